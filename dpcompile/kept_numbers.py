"""Python numbers that were read out of examples, and that the model keeps in attributes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpcompile._torch import guarded_names, pytree
from dpcompile.errors import ExampleMixingError

__all__ = ["KeptNumbers", "Reads", "path_of", "reads_of"]

_TOKENS = re.compile(r"\[(?:'([^']*)'|(\d+))\]|\.(\w+)")
_MODULE = "L['module']"  # in a frame of our own
_ROOTS = (_MODULE, "L['losses']._modules['module']", "L['self']")  # a whole step; a module's, behind a graph break
_HOLDERS = ("_modules", "_buffers", "_parameters", "__dict__")


class KeptNumbers:
    """Follows numbers that leave graphs without gradients: the caller may have them, a training graph may not.

    To a graph such a number is a constant; which constants it was compiled with, its guards tell.

    Args:
        module: whose attributes may keep them.
        exact: whether Python computes nothing with them. Otherwise whatever number of the module changes in a call in
            which one was read may have come of it.

    Attributes:
        left: the attributes that keep such numbers, by path.
    """

    def __init__(self, module: nn.Module, *, exact: bool) -> None:
        self._module, self._exact = module, exact
        self._before: dict[str, Any] | None = None  # attributes, as they were when the first number was read
        self._read: list[tuple[Any, str | None]] = []
        self.left: dict[str, Any] = {}

    def note(self, value: Any, place: str | None) -> None:
        """A number was read out of examples; what the model does with it, it does later in this call."""
        if self._before is None:
            self._before = dict(_numbers_in(self._module))
        self._read.append((value.item() if isinstance(value, Tensor) else value, place))

    def settle(self, result: Any) -> None:
        """The call is over, and returned this.

        Raises:
            ExampleMixingError: a number is neither there nor in an attribute of the model: something else keeps it.
        """
        if self._before is None:
            return
        before, read, self._before, self._read = self._before, self._read, None, []
        changed = {path: x for path, x in _numbers_in(self._module) if not _same(before.get(path), x)}
        if not self._exact:
            self.left.update(changed)
            return
        returned = [x for x in pytree.tree_leaves(result) if isinstance(x, (int, float))]
        for value, place in read:
            found = {path: x for path, x in changed.items() if _same(x, value)}
            self.left.update(found)
            if not found and not any(_same(x, value) for x in returned):
                raise ExampleMixingError(
                    "the model reads a Python number out of the values of examples, and keeps it outside of itself: "
                    "the next batch could meet it as a constant",
                    where=place,
                    remedy="leave it a tensor (no .item(), float() or int()), or return it",
                )

    def check(self, reads: Reads) -> None:
        """Raise ExampleMixingError if a graph with gradients that was compiled for this meets one as a constant."""
        for path, number in self.left.items():
            if _ends_like(path, reads.paths) and _same(_at(self._module, path), number):
                raise ExampleMixingError(
                    f"the model reads the number in '{path}', which an earlier call without gradients read out of its "
                    "examples: it would reach the gradients of this batch, unclipped",
                    remedy="set it to a number that depends on no example before training goes on, or make such calls "
                    "on a copy, copy.deepcopy(model)",
                )


@dataclass(frozen=True, slots=True)
class Reads:
    """What of a module Dynamo looked at when it compiled a graph: paths from that module, or from one inside it.

    Attributes:
        paths: of attributes: ``layers.0.scale``, ``sizes.k``.
        scalars: those that may be tensors of one value, which the graph may have as a Python number.
    """

    paths: frozenset[str] = frozenset()
    scalars: tuple[str, ...] = ()

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the scalars are now."""
        for prefix, part in model.named_modules() if self.scalars else ():
            for path in self.scalars:
                value = _at(part, path)
                if isinstance(value, Tensor):
                    yield (f"{prefix}.{path}" if prefix else path), value


def reads_of(module: nn.Module) -> Reads:
    """What the graph that is being compiled reads of this module, or of those inside it."""
    names = guarded_names()
    paths = {name: p for name in names if (p := path_of(name)) is not None}
    scalars = {p for name, p in paths.items() for m in _roots(name, module) if _is_scalar(_at(m, p))}
    return Reads(frozenset(paths.values()), tuple(scalars))


def path_of(name: str) -> str | None:
    """``sizes.k`` for ``L['module'].sizes['k']``, as Dynamo calls it; None for what does not hang on a module."""
    root = next((r for r in _ROOTS if name.startswith(r)), None)
    if root is None:
        return None
    return ".".join(t for t in map("".join, _TOKENS.findall(name.removeprefix(root))) if t not in _HOLDERS)


def _roots(name: str, module: nn.Module) -> Iterator[nn.Module]:
    yield from (module,) if name.startswith(_MODULE) else module.modules()


def _ends_like(path: str, paths: frozenset[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[i:]) in paths for i in range(len(parts)))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _at(module: nn.Module, path: str) -> Any:
    """What stands there now; None if nothing does."""
    value: Any = module
    for token in path.split("."):
        if isinstance(value, (list, tuple)):
            value = value[int(token)] if token.isdigit() and int(token) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(token)
        else:
            value = getattr(value, token, None)
    return value


def _numbers_in(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for prefix, part in module.named_modules():
        values = {k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters", "_buffers")}
        for path, leaf in pytree.tree_flatten_with_path(values)[0]:
            if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
                tokens = ["".join(t) for t in _TOKENS.findall(pytree.keystr(path))]
                yield ".".join([*([prefix] if prefix else []), *tokens]), leaf


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, (int, float)) and isinstance(other, (int, float))):
        return False
    return one == other or (math.isnan(one) and math.isnan(other))
