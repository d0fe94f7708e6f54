"""The models of the suite, a file for each family; every one is compared with one backward per example."""

import importlib.util

from models import adapters as adapters
from models import architectures as architectures
from models import attention as attention
from models import autograd as autograd
from models import calls as calls
from models import habits as habits
from models import layers as layers
from models import look_alikes as look_alikes
from models import mixing as mixing
from models import modules as modules
from models import operations as operations
from models import recurrent as recurrent
from models import spatial as spatial
from models import structures as structures
from models import uses as uses
from models.case import ALL, B, Case, D, T, V
from models.modules import Block, LanguageModel

if importlib.util.find_spec("transformers") is not None:
    from models import experts as experts
    from models import language as language
    from models import speech as speech
    from models import vision as vision

__all__ = ["ALL", "B", "Block", "CASES", "Case", "D", "LanguageModel", "T", "V", "ZOO"]

ZOO = [case for case in ALL if case.family == "modules"]
CASES = {case.name: case for case in ZOO}
assert len({case.id for case in ALL}) == len(ALL), "two models of one name"
