"""The models of the suite, a file for each family; every one is compared with one backward per example."""

import importlib.util

from models import habits as habits
from models import modules as modules
from models.case import ALL, B, Case, D, T, V
from models.modules import Block, LanguageModel

if importlib.util.find_spec("transformers") is not None:
    from models import language as language
    from models import speech as speech
    from models import vision as vision

__all__ = ["ALL", "B", "Block", "CASES", "Case", "D", "LanguageModel", "T", "V", "ZOO"]

CASES = {case.name: case for case in ALL}
assert len(CASES) == len(ALL), "two models of one name"
ZOO = [case for case in ALL if case.family == "modules"]
