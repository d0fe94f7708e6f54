"""The search: the rules, one per parameter, that take the least time and fit the memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dpcompile.planning.replay import Holding, Replay

__all__ = ["Candidate", "Limit", "Outcome", "choose", "fastest", "seconds_of"]

_MAPPED = 2**25  # bytes from which the C library takes memory straight from the operating system
_TRIES = 64  # how many single changes of rule are tried to win time back within a budget
_NEAR = 1.05  # over the budget anyway, less memory than this is not worth more parts
_SPARE = 1.01  # what the compiler may need besides what the replay shows, for it orders the operations anew
_DEAR = 1e6  # seconds per byte with which only memory counts


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rule that one parameter may have.

    Attributes:
        rule: its name.
        seconds: what it adds to the plain step, without the Gram matrices.
        mapping: seconds that mapping fresh memory for its results takes, if they are so large that they come straight
            from the operating system.
        grams: the Gram matrices that it needs: what they are of -> seconds. Equal ones are made once.
        holding: what it keeps until the clip.
    """

    rule: str
    seconds: float
    mapping: float = 0.0
    grams: Mapping[Hashable, float] = field(default_factory=dict)
    holding: Holding = Holding({}, (), 0.0, 0.0, 0.0)

    def time(self, parts: int) -> float:
        """Seconds for the batch in so many parts."""
        made = (self.holding.kept + self.holding.scratch) / parts
        return self.seconds + (self.mapping if made >= _MAPPED else 0.0)


@dataclass(frozen=True, slots=True)
class Limit:
    """A memory budget.

    Attributes:
        replay: of the plain step.
        bytes: what the private step may need at its peak.
        parts: in how many parts the batch may run.
        overhead: seconds that every further part takes.
        seen: of how many parts ``replay`` shows one.
    """

    replay: Replay
    bytes: float
    parts: Sequence[int]
    overhead: float
    seen: int = 1

    def peak(self, holdings: Iterable[Holding], parts: int) -> float:
        """Bytes at the private step's peak."""
        return self.replay.peak(holdings, parts, self.seen)

    def allows(self, peak: float) -> bool:
        """Whether a step with this peak keeps to the budget, with something to spare."""
        return peak * _SPARE <= self.bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was chosen: an index into every parameter's candidates, the parts of the batch, and whether it fits."""

    picks: list[int]
    parts: int = 1
    fits: bool = True


def choose(options: Sequence[Sequence[Candidate]], limit: Limit | None) -> Outcome:
    """Choose for all parameters together.

    Without a limit this is the quickest choice found by improving one parameter at a time, from two starts. Under a
    limit, memory gets a price, the lowest at which the choice fits, and then what time can be won back is; so for every
    number of parts, of which the quickest is taken. If nothing fits, the smallest is taken, in the fewest parts that
    come near to it.
    """
    if limit is None:
        return Outcome(fastest(options))
    found: list[tuple[float, Outcome]] = []
    over: list[tuple[float, Outcome]] = []
    dear = _smallest(options)
    for parts in limit.parts:
        peak, least = min((limit.peak(_holdings(options, p), parts), p) for p in (dear, _later(options, dear)))
        if not limit.allows(peak):
            over.append((peak, Outcome(least, parts, fits=False)))
            continue
        picks = _within(options, limit, parts, least)
        found.append((seconds_of(options, picks, parts) + (parts - 1) * limit.overhead, Outcome(picks, parts)))
    if found:
        return min(found, key=lambda f: f[0])[1]
    smallest = min(peak for peak, _ in over)
    return next(outcome for peak, outcome in over if peak <= _NEAR * smallest)


def fastest(options: Sequence[Sequence[Candidate]], price: float = 0.0, parts: int = 1) -> list[int]:
    """The quickest choice, where a byte that is held costs ``price`` seconds."""
    alone = [min(range(len(o)), key=lambda i, o=o: _cost(o[i], price, parts)) for o in options]
    shared = [min(range(len(o)), key=lambda i, o=o: _own(o[i], price, parts)) for o in options]
    found = [_improved(options, start, price, parts) for start in (alone, shared)]
    return min(found, key=lambda picks: _total(options, picks, price, parts))


def seconds_of(options: Sequence[Sequence[Candidate]], picks: Sequence[int], parts: int = 1) -> float:
    """What a choice adds to the plain step."""
    return _total(options, picks, 0.0, parts)


def _total(options: Sequence[Sequence[Candidate]], picks: Sequence[int], price: float, parts: int) -> float:
    together: dict[Hashable, float] = {}
    total = 0.0
    for candidate in _picked(options, picks):
        total += _own(candidate, price, parts)
        together.update(_shared(candidate, price))
    return total + sum(together.values())


def _improved(options: Sequence[Sequence[Candidate]], picks: list[int], price: float, parts: int) -> list[int]:
    picks = list(picks)
    users: dict[Hashable, int] = {}
    for candidate in _picked(options, picks):
        for key in _shared(candidate, price):
            users[key] = users.get(key, 0) + 1
    for _ in range(4):
        before = list(picks)
        for i, candidates in enumerate(options):
            for key in _shared(candidates[picks[i]], price):
                users[key] -= 1

            def cost(n: int, candidates: Sequence[Candidate] = candidates) -> float:
                new = sum(s for key, s in _shared(candidates[n], price).items() if not users.get(key))
                return _own(candidates[n], price, parts) + new

            picks[i] = min(range(len(candidates)), key=cost)
            for key in _shared(candidates[picks[i]], price):
                users[key] = users.get(key, 0) + 1
        if picks == before:
            break
    return picks


def _own(candidate: Candidate, price: float, parts: int) -> float:
    """What one parameter's rule costs by itself."""
    return candidate.time(parts) + price * (candidate.holding.kept + candidate.holding.scratch)


def _shared(candidate: Candidate, price: float) -> Mapping[Hashable, float]:
    """What several parameters' rules may need, and pay for once: Gram matrices, and operands held until the clip."""
    if not price:
        return candidate.grams
    return {**candidate.grams, **{("held", n): price * size for n, size in candidate.holding.operands.items()}}


def _cost(candidate: Candidate, price: float, parts: int) -> float:
    return _own(candidate, price, parts) + sum(_shared(candidate, price).values())


def _within(options: Sequence[Sequence[Candidate]], limit: Limit, parts: int, best: list[int]) -> list[int]:
    """The quickest choice that is found to fit; ``best`` is one that fits."""

    def fits(picks: list[int]) -> bool:
        return limit.allows(limit.peak(_holdings(options, picks), parts))

    def fitting(picks: list[int]) -> list[int] | None:
        return next((p for p in (picks, _later(options, picks)) if fits(p)), None)

    quickest = fitting(fastest(options, parts=parts))
    if quickest is not None:
        return quickest
    low, high = 1e-15, 1e-6  # seconds per byte: less than any memory moves, more than any needs
    for _ in range(16):
        price = (low * high) ** 0.5
        picks = fitting(fastest(options, price, parts))
        if picks is not None:
            best, high = picks, price
        else:
            low = price
    gains = []
    for i, candidates in enumerate(options):
        times = [c.time(parts) + sum(c.grams.values()) for c in candidates]
        gains += [(times[best[i]] - time, i, n) for n, time in enumerate(times) if time < times[best[i]]]
    changed: set[int] = set()
    for _, i, n in sorted(gains, key=lambda g: -g[0])[:_TRIES]:
        tried = [*best]
        tried[i] = n
        if i not in changed and fits(tried):
            best = tried
            changed.add(i)
    return best


def _later(options: Sequence[Sequence[Candidate]], picks: Sequence[int]) -> list[int]:
    """The same rules, each at the last of the moments at which it can make what it keeps."""
    return [max(n for n, c in enumerate(o) if c.rule == o[i].rule) for o, i in zip(options, picks, strict=True)]


def _smallest(options: Sequence[Sequence[Candidate]]) -> list[int]:
    return fastest(options, price=_DEAR)


def _picked(options: Sequence[Sequence[Candidate]], picks: Sequence[int]) -> Iterable[Candidate]:
    return (o[i] for o, i in zip(options, picks, strict=True))


def _holdings(options: Sequence[Sequence[Candidate]], picks: Sequence[int]) -> list[Holding]:
    return [c.holding for c in _picked(options, picks)]
