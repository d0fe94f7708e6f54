"""Python numbers that were read out of examples, and that the model keeps in attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile._torch.dynamo import Key, guarded_places
from dpcompile.errors import ExampleMixingError
from dpcompile.runtime.places import LENGTH, Path, Place, follow, places_in, same

__all__ = ["KeptNumbers", "Reads", "reads_of"]


class KeptNumbers:
    """Follows numbers that leave graphs without gradients: the caller may have them, a training graph may not.

    To a graph such a number is a constant; which constants it was compiled with, its guards tell.

    **Guarantee.** A number that stands in the model because of a call without gradients, and depends on its examples,
    is refused in a graph with gradients that was made for it; so is what a later such call makes of it.

    ==================================================  ==============================================================
    edge case                                           outcome
    ==================================================  ==============================================================
    in a list, a tuple, a dict with any keys, a deque,  found, by the object that holds it
    an object with attributes
    a size that goes by values (``len(x.nonzero())``)   a number that was read
    a call without gradients reads a kept number        all that this call changes in the model, or writes, holds
                                                        examples
    Python runs between graphs, and a number was read   so does all that the call changes or writes from then on,
                                                        flags, texts and lengths too
    the same, with gradients                            refused while there is any kept number, read or not
    it is set to a value of no example                  allowed again
    kept outside of the model's attributes              refused at once; where Python runs between graphs, not
                                                        seen, nor a flag that is set to what it was
    ==================================================  ==============================================================

    Args:
        module: whose attributes may keep them.
        exact: whether Python computes nothing with them. Otherwise whatever the model changes in a call in which one
            was read may have come of it.
        left: what is kept already, by path; it is added to.
    """

    def __init__(self, module: nn.Module, *, exact: bool, left: dict[Path, Any] | None = None) -> None:
        self._module, self._exact = module, exact
        self._start: dict[Path, Any] | None = None  # what stands in the model, when the call began
        self._before: dict[Path, Any] | None = None  # when the first number was read
        self._read: list[tuple[Any, str | None]] = []
        self._live: list[Place] = []  # of `left`, what stood there still when the call began
        self._derived = False  # the call read one of them
        self.left: dict[Path, Any] = {} if left is None else left

    def begin(self) -> None:
        """A call begins."""
        self.end()
        if self.left:
            now = list(places_in(self._module))
            self._live = [p for p in now if p.path in self.left and same(p.value, self.left[p.path])]
            self._start = {p.path: p.value for p in now} if self._live else None

    @property
    def spread(self) -> bool:
        """Whether what is computed or written from here to the end of the call may have come of a number."""
        return self._derived or (self._before is not None and not self._exact)

    def note(self, value: Any, place: str | None) -> None:
        """A number was read out of examples (None: any); what the model does with it, it does later in this call.

        One that a graph returns as a tensor may be meant as that.
        """
        if self._before is None:
            self._before = {p.path: p.value for p in places_in(self._module)}
        self._read.append((value, place))

    def settle(self, result: Any, *, ran: bool = True) -> None:
        """The call is over, and returned this; ``ran`` if a graph did.

        Raises:
            ExampleMixingError: a number is neither there nor in an attribute of the model: something else keeps it.
        """
        start, before, read, live = self._start, self._before, self._read, self._live
        derived, exact = self._derived or (bool(live) and not ran), self._exact
        self.end()
        if start is not None and derived:
            self.left.update((p.path, p.value) for p in self._changed(start))
            return
        if before is None:
            return
        changed = list(self._changed(before))
        if not exact:
            self.left.update((p.path, p.value) for p in changed)
            return
        returned = [x for x in pytree.tree_leaves(result) if isinstance(x, (int, float))]
        tensors = {id(x) for x in pytree.tree_leaves(result)} | {id(x) for x in self._module.buffers()}
        tensors |= {id(p.value) for p in places_in(self._module, tensors=True)}
        for value, place in read:
            if isinstance(value, Tensor):
                if id(value) in tensors:
                    continue
                value = value.item()
            found = [p for p in changed if _same_number(p, value)]
            self.left.update((p.path, p.value) for p in found)
            if not found and not any(same(x, value) for x in returned):
                raise ExampleMixingError(
                    "the model reads a Python number out of the values of examples, and keeps it outside of itself: "
                    "the next batch could meet it as a constant",
                    where=place,
                    remedy="leave it a tensor (no .item(), float() or int(), and no size that goes by values), or "
                    "return it",
                )

    def end(self) -> None:
        """No call is under way."""
        self._start, self._before, self._read, self._live, self._derived = None, None, [], [], False

    def _changed(self, before: dict[Path, Any]) -> Iterator[Place]:
        return (p for p in places_in(self._module) if p.path not in before or not same(before[p.path], p.value))

    def read(self, reads: Reads, root: nn.Module, *, whole: bool = True) -> None:
        """A graph without gradients runs that was made for this; ``whole`` if no Python of the model runs beside."""
        self._derived |= bool(self._live) and (not whole or self._met(reads, root) is not None)

    def check(self, reads: Reads, root: nn.Module, *, whole: bool = True) -> None:
        """Raise ExampleMixingError if a graph with gradients that was made for this may meet one."""
        if not self._live:
            return
        met = self._met(reads, root)
        if met is None and whole:
            return
        reading = "reads the number in" if met else "may read, in Python between its graphs, what stands in"
        raise ExampleMixingError(
            f"the model {reading} '{met or self._live[0]}', which an earlier call without gradients read out of its "
            "examples: it would reach the gradients of this batch, unclipped",
            remedy="set it to a number that depends on no example before training goes on, or make such calls on a "
            "copy, copy.deepcopy(model)",
        )

    def _met(self, reads: Reads, root: nn.Module) -> Place | None:
        """One that a graph was made for, of a module that is this now."""
        if not self._live:
            return None
        entries, within = set(reads.entries), set(reads.within)
        for way, by_value in reads.ways:
            _add(entries, within, follow(root, way), by_value=by_value)
        for place in self._live:
            if (place.owners[-1], place.path[-1]) in entries or not within.isdisjoint(place.owners):
                return place
        return None


@dataclass(frozen=True, slots=True)
class Reads:
    """What of a module Dynamo looked at when it compiled a graph.

    Attributes:
        ways: from that module, or one that takes its place; with whether the value was looked at.
        entries: elsewhere: holder, by identity, and key.
        within: elsewhere: containers that were looked at as a whole.
        scalars: ways to what may be tensors of one value, which the graph may have as a Python number; from the module,
            or from any inside it.
    """

    ways: frozenset[tuple[tuple[Key, ...], bool]] = frozenset()
    entries: frozenset[tuple[int, Any]] = frozenset()
    within: frozenset[int] = frozenset()
    scalars: frozenset[tuple[Key, ...]] = frozenset()

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the scalars are now."""
        for prefix, part in model.named_modules() if self.scalars else ():
            for way in self.scalars:
                value = follow(part, way)[2]
                if isinstance(value, Tensor):
                    yield ".".join([*([prefix] if prefix else []), *_names(way)]), value


def reads_of(module: nn.Module) -> Reads:
    """What the graph that is being compiled reads of this module, or of what else it reaches."""
    ways: set[tuple[tuple[Key, ...], bool]] = set()
    entries: set[tuple[int, Any]] = set()
    within: set[int] = set()
    scalars: set[tuple[Key, ...]] = set()
    for name, root, way, by_value in guarded_places():
        start = next((i for i in range(len(way) + 1) if follow(root, way[:i])[2] is module), None)
        if name in ("module", "losses") and start is not None:
            way, root = way[start:], module
            ways.add((way, by_value))
        else:
            _add(entries, within, follow(root, way), by_value=by_value)
        value = follow(root, way)[2]
        if way and isinstance(value, Tensor) and value.ndim == 0:
            scalars.add(way)
    return Reads(frozenset(ways), frozenset(entries), frozenset(within), frozenset(scalars))


def _add(entries: set[tuple[int, Any]], within: set[int], found: tuple[Any, Any, Any], *, by_value: bool) -> None:
    owner, key, value = found
    if owner is not None and _is_hashable(key):
        entries.add((id(owner), key))
    entries.add((id(value), LENGTH))
    if isinstance(value, (set, frozenset)) or (by_value and isinstance(value, tuple)):
        within.add(id(value))


def _names(way: Iterable[Key]) -> list[str]:
    return [str(k.key) for k in way if k.key not in ("_modules", "_buffers", "_parameters", "__dict__")]


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _same_number(place: Place, value: Any) -> bool:
    return place.path[-1] != LENGTH and not isinstance(place.value, bool) and same(place.value, value)
