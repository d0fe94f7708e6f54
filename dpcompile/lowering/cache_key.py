"""A name for everything that the rewritten graph depends on, for compile caches on disk."""

from __future__ import annotations

import hashlib
import pathlib
import uuid
from functools import lru_cache

from dpcompile.capture.roles import Roles
from dpcompile.options import Options

__all__ = ["cache_key"]

_PACKAGE = pathlib.Path(__file__).parent.parent


def cache_key(options: Options, roles: Roles, parts: int = 1) -> str:
    """Equal only for equal rules, clipping, C, inputs, parts of the batch and source code of this package.

    A stale hit would be an unclipped gradient. A clipping function of the user has no name that outlives the process:
    it gets a key that never repeats.
    """
    clipping = options.clipping if isinstance(options.clipping, str) else uuid.uuid4().hex
    described = [
        _source_digest(), repr(float(options.max_grad_norm)), clipping, options.norm, options.loss_reduction,
        repr(options.memory_budget), repr(parts), repr(options.examples_per_user),
        repr(sorted(roles.parameters.items())), repr(roles.groups),
        repr(sorted(roles.examples.items())),
        repr(roles.lowering), repr(sorted(roles.shared)),
        repr(sorted((p, str(x)) for p, x in roles.layouts.items())), repr(sorted(roles.alike.items())),
    ]  # fmt: skip
    return hashlib.sha256("\0".join(described).encode()).hexdigest()


@lru_cache(maxsize=1)
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
