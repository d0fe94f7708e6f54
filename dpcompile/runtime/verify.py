"""``verify=True``: what a graph was compiled to, on its first batch, against the same graph run uncompiled.

A compiler's fault is silent: a gradient that is zero where it should not be, an example left out of a norm. The proof
is of the rewritten graph, so this is what the compiled code is compared with: run operation by operation, on the same
inputs, mask and cotangents, with the same random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.aot import ForwardTokenAOTOutput, is_gradient_of_input
from dpcompile._torch.compile import Boxed
from dpcompile._torch.inductor_random import drawing_as_inductor
from dpcompile._torch.tensors import WeakMemory, is_fake, memory_of, weak_memory
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.graph.locate import where
from dpcompile.lowering.backward import Cut
from dpcompile.lowering.pending import Late, LoweredBackward
from dpcompile.options import TWO_PASS
from dpcompile.pipeline import Transformed
from dpcompile.runtime.agreement import described, distance, largest, norms_scale, scale_of, suspects, tolerances
from dpcompile.runtime.random_state import RandomState
from dpcompile.runtime.reference import Noise, Reference

__all__ = ["Verifier"]

_HELD = 2  # forwards that wait for their backward
_TRIES = 3  # batches that a graph is compared on while gradients are still zero
_NOISE = 4.0  # a difference may be this many times the one that moving every value by an epsilon makes


@dataclass(frozen=True, slots=True)
class _Forward:
    """A compiled forward that ran.

    Attributes:
        values: of its inputs by name; copies of those that it writes to.
        versions: of the others.
        outputs: what the user got, and their versions then.
        saved: memory that its backward will be given.
        random: where its random numbers start.
    """

    values: dict[str, Any]
    versions: dict[str, int]
    outputs: list[tuple[Any, int]]
    saved: dict[int, WeakMemory]
    random: RandomState | None

    def on(self, inputs: Mapping[str, Any], same: Callable[[Tensor, Tensor], bool]) -> bool:
        """Whether it ran on these inputs, as far as they are told and the graph does not write to them."""
        return all(same(inputs[n], self.values[n]) for n in self.versions.keys() & inputs.keys())

    def unchanged(self) -> bool:
        """Whether the inputs are what they were."""
        return all(_version(self.values[n]) == v for n, v in self.versions.items())


class Verifier:
    """Compares one compiled joint graph with its original, once.

    **Guarantee.** Before a backward of the graph hands anything on, its outputs, the gradients of its inputs, the norms
    and the clipped sums were compared with those of the rewritten graph, on the first batch on which they can be: where
    they differ by more than rounding can explain, PrivacyError is raised in their place.

    ===========================================================  =================================================
    edge case                                                    outcome
    ===========================================================  =================================================
    a forward without a backward                                 nothing is compared; the next backward is
    two forwards, then their backwards                           the backward's own forward is found by what it saved
    inputs changed in place in between                           compared on the next batch
    outputs changed in place                                     all but the outputs is compared
    gradients that are all zero (padding, layers that begin      compared, and again on the next batches, three in all
    at zero)
    an example that is not finite                                must not be finite in both
    clip weights that are not known yet                          the sums for weights of the verifier's own
    two passes                                                   each at its own time
    no memory left for the eager run                             a warning
    a graph that cannot be run uncompiled                        refused
    ===========================================================  =================================================

    Args:
        place: what to call the graph.
        lowered: the backward of a region; None for a model that is one graph.
    """

    def __init__(self, place: str, lowered: LoweredBackward | None = None) -> None:
        self._place, self._lowered = place, lowered
        self._cut: Cut | None = None
        self._norms: set[int] = set()
        self._mask = ""
        self._sums: dict[int, str] = {}
        self._reference: Reference | None = None
        self._forwards: list[_Forward] = []
        self._left: set[int] = set()
        self._tries = self._first = self._tokens = 0

    def take(self, joint: fx.GraphModule) -> None:
        """See :class:`dpcompile._torch.Watcher`."""
        self._reference = Reference(joint)
        descriptors = self._reference.graph.output_node().meta["desc"]
        forward = [i for i, d in enumerate(descriptors) if d is not None and is_gradient_of_input(d) is None]
        self._first = max(forward, default=-1) + 1  # an input without a gradient has a place, and no descriptor
        self._tokens = sum(isinstance(d, ForwardTokenAOTOutput) for d in descriptors)  # forwards do not return them
        self._left = {i for i, n in enumerate(self._reference.outputs) if i >= self._first and n is not None}

    def describe(self, transformed: Transformed) -> None:
        """What stands where in the joint graph; before :meth:`take`."""
        self._mask, self._cut = transformed.mask, transformed.cut
        self._norms = {slot for slot in (transformed.norm_slot, transformed.group_slot) if slot is not None}
        self._sums = {slot: name for name, slot in transformed.sum_slots.items()}

    def forward(self, gm: fx.GraphModule) -> Callable[[Boxed], Boxed]:
        """See :class:`dpcompile._torch.Watcher`."""
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]

        def watched(compiled: Boxed) -> Boxed:
            def run(arguments: list[Any]) -> Sequence[Any]:
                reference = self._reference
                if reference is None or any(isinstance(x, Tensor) and is_fake(x) for x in arguments):
                    return compiled(arguments)
                ran = self._before(reference, dict(zip(names, arguments, strict=True)))
                outputs = compiled(arguments)
                self._after(ran, [*[None] * self._tokens, *outputs])
                return outputs

            return run

        return watched

    def backward(self, gm: fx.GraphModule) -> Callable[[Boxed], Boxed]:
        """See :class:`dpcompile._torch.Watcher`."""
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]

        def watched(compiled: Boxed) -> Boxed:
            def run(arguments: list[Any]) -> Sequence[Any]:
                if self._reference is None:
                    return compiled(arguments)
                of_joint = {n.name for n in self._reference.graph.find_nodes(op="placeholder")}
                given = dict(zip(names, arguments, strict=True))
                own = {n: v for n, v in given.items() if n in of_joint}
                ran = self._forward_of([v for n, v in given.items() if n not in of_joint], own)
                del given
                results = compiled(arguments)
                if ran is not None and ran.unchanged():
                    self._compare(ran, {**own, **ran.values}, results)
                return results

            return run

        return watched

    def whole(self, run: Callable[..., Sequence[Any]], graph: fx.GraphModule) -> Callable[..., Sequence[Any]]:
        """In place of ``run``, what a whole joint graph was compiled to: forward, cotangents and backward in one.

        Args:
            run: takes the graph's inputs and returns its outputs.
            graph: rewritten; with flat inputs and outputs (:func:`dpcompile._torch.aot.flat_graph`).
        """
        self.take(drawing_as_inductor(graph))
        names = [n.name for n in graph.graph.find_nodes(op="placeholder")]

        def watched(*arguments: Any) -> Sequence[Any]:
            reference = self._reference
            if reference is None:
                return run(*arguments)
            given = dict(zip(names, arguments, strict=True))
            ran = self._before(reference, given)
            outputs = run(*arguments)
            self._after(ran, outputs)
            self._forwards = []
            try:
                self._compare(ran, ran.values, outputs[self._first :])
            except PrivacyError:
                for name in reference.written & given.keys():  # buffers, as if the call had not been
                    given[name].copy_(ran.values[name])
                raise
            return outputs

        return watched

    # --- a run ---------------------------------------------------------------------------------------------------

    def _before(self, reference: Reference, given: dict[str, Any]) -> _Forward:
        values = {n: v.detach() if isinstance(v, Tensor) else v for n, v in given.items()}
        values |= {n: values[n].clone() for n in reference.written if n in values}
        versions = {n: _version(v) for n, v in values.items() if isinstance(v, Tensor) and n not in reference.written}
        random = RandomState.now(given.values()) if reference.draws else None
        return _Forward(values, versions, [], {}, random)

    def _after(self, ran: _Forward, results: Sequence[Any]) -> None:
        outputs = [x.detach() if isinstance(x, Tensor) else x for x in results[: self._first]]
        ran.outputs.extend((x, _version(x)) for x in outputs)
        tensors = [x for x in results[self._first :] if isinstance(x, Tensor)]
        ran.saved.update((memory_of(x), weak_memory(x)) for x in tensors)
        self._forwards = [f for f in self._forwards if not any(m.expired() for m in f.saved.values())]
        self._forwards = [*self._forwards, ran][-_HELD:]

    def _forward_of(self, saved: Sequence[Any], inputs: Mapping[str, Any]) -> _Forward | None:
        """The forward that saved these values and ran on these inputs; None if it is not known."""
        memory = {memory_of(x) for x in saved if isinstance(x, Tensor)}
        for ran in reversed(self._forwards):
            if memory <= ran.saved.keys() and ran.on(inputs, lambda a, b: memory_of(a) == memory_of(b)):
                return ran
        if len(self._forwards) == 1 and self._forwards[0].on(inputs, torch.equal):  # hooks may put copies in place
            return self._forwards[0]
        return None

    # --- the comparison --------------------------------------------------------------------------------------------

    def _compare(self, ran: _Forward, values: dict[str, Any], results: Sequence[Any]) -> None:
        reference, late = self._reference, self._late(values, results)
        assert reference is not None
        if late is not None and late.weights is not None and self._cut is not None:
            values = {**values, self._cut.weights: late.weights}
        found = self._found(ran, results, late)
        if not any(i in self._left for i in found):
            return  # the norms of equal regions, while their second pass is still to come
        try:
            wanted = reference.run(values, ran.random)
            scales = self._scales(wanted[0])
            errors = self._errors(found, late, wanted, scales)
            allowed = tolerances(reference.graph, [self._mask])
            wrong = {slot: error for slot, error in errors.items() if error > allowed[slot]}
            for decisions in (False, True) if wrong else ():
                moved = self._moved(ran, values, wanted, scales, decisions)
                wrong = {s: error for s, error in wrong.items() if error > allowed[s] + _NOISE * moved.get(s, 0.0)}
        except torch.OutOfMemoryError:
            self._stop()
            warnings.warn(
                f"verify=True: no memory left to run {self._place} uncompiled once, so its compiled code was not "
                "compared with it; verify=False does not try",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        except Exception as error:
            raise UnsupportedGraphError(
                f"verify=True: the graph of {self._place} cannot be run uncompiled, to compare its compiled code with: "
                f"{type(error).__name__}: {error}",
                remedy="pass verify=False, and report it",
            ) from error
        if wrong:
            raise self._fault(wrong, errors)
        self._tries += 1
        self._left -= {i for i in errors if i in self._left and bool(wanted[0][i].any())}
        if not self._left or self._tries >= (2 * _TRIES if self._in_two_passes else _TRIES):
            self._stop()

    @property
    def _in_two_passes(self) -> bool:
        return self._lowered is not None and self._lowered.lowering.kind == TWO_PASS

    def _stop(self) -> None:
        self._reference, self._forwards = None, []

    def _late(self, values: Mapping[str, Any], results: Sequence[Any]) -> Late | None:
        if self._cut is None:
            return None
        assert self._lowered is not None
        return self._lowered.late(results[self._cut.norms - self._first], values[self._mask])

    def _found(self, ran: _Forward, results: Sequence[Any], late: Late | None) -> dict[int, Any]:
        """Slot of the joint graph's outputs -> what the compiled code gives for it, where it can be compared."""
        found: dict[int, Any] = {}
        if self._tries == 0:
            kept = {i: x for i, (x, version) in enumerate(ran.outputs) if _version(x) == version}
            found |= {i: x for i, x in kept.items() if isinstance(x, Tensor) and _has_rounding(x)}
        found |= {i: x for i, x in enumerate(results, start=self._first)}
        if self._cut is not None:
            for slot in self._cut.sums:
                found.pop(slot, None)  # type: ignore[arg-type]
            if late is not None:
                found |= {s: x for s, x in zip(self._cut.sums, late.sums, strict=True) if s is not None}
                if late.again:
                    found.pop(self._cut.norms)
        return found

    def _scales(self, wanted: Sequence[Any]) -> dict[int, Tensor]:
        """What a difference in each output is divided by."""
        sums = {i: wanted[i] for i in self._sums if isinstance(wanted[i], Tensor)}
        top = largest(sums)
        scales = {}
        for i, value in enumerate(wanted):
            if isinstance(value, Tensor):
                scales[i] = norms_scale(value) if i in self._norms else scale_of(value, top if i in sums else 0.0)
        return scales

    def _errors(
        self,
        found: Mapping[int, Any],
        late: Late | None,
        wanted: tuple[list[Any], dict[str, list[Tensor]]],
        scales: Mapping[int, Tensor],
    ) -> dict[int, float]:
        """How far each output is off."""
        errors = {}
        for i, value in found.items():
            target = wanted[0][i]
            if isinstance(target, Tensor):
                errors[i] = distance(value, target, scales[i]) if isinstance(value, Tensor) else float("inf")
        if late is not None and self._cut is not None and self._reference is not None:
            for row, values in late.handed.items():
                slot = self._cut.sums[row]
                assert slot is not None
                targets = wanted[1][self._reference.outputs[slot].name]
                own = [distance(a, b, scale_of(b)) for a, b in zip(values, targets, strict=True)]
                errors[slot] = max([errors.get(slot, 0.0), *own])
        return errors

    def _moved(
        self,
        ran: _Forward,
        values: Mapping[str, Any],
        wanted: tuple[list[Any], dict[str, list[Tensor]]],
        scales: Mapping[int, Tensor],
        decisions: bool,
    ) -> dict[int, float]:
        """How far rounding alone moves each output: the farthest of four runs with noise of that size."""
        assert self._reference is not None
        moved: dict[int, float] = {}
        for noise in (Noise(seed, sign, decisions) for seed in (1, 2) for sign in (1.0, -1.0)):
            outputs, _ = self._reference.run(values, ran.random, noise)
            for i, error in self._errors(dict(enumerate(outputs)), None, wanted, scales).items():
                moved[i] = max(moved.get(i, 0.0), error)
        return moved

    def _fault(self, wrong: Mapping[int, float], errors: Mapping[int, float]) -> PrivacyError:
        assert self._reference is not None
        outputs = self._reference.outputs
        told = {i for i in wrong if i not in self._norms} or set(wrong)
        right = [outputs[i] for i in errors if i not in wrong and i not in self._norms]
        nodes = suspects([outputs[i] for i in told], right)
        listed = ", ".join(f"{self._called(i)} by {error:.1g}" for i, error in list(wrong.items())[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        likely = f"; the operations behind these and behind nothing that is right: {described(nodes)}" if nodes else ""
        return PrivacyError(
            f"verify=True: the compiled code of {self._place} does not compute what its graph says, on this batch: "
            f"{listed}{more} (relative to the largest; rounding explains less){likely}",
            where=next((place for n in nodes if (place := where(n)) is not None), None),
            remedy="do not train with this compiled model: pass backend='eager', or take another release of torch than "
            f"{torch.__version__}, and report it; nothing was written to p.grad",
        )

    def _called(self, slot: int) -> str:
        if slot in self._norms:
            return "the norms"
        if slot in self._sums:
            return f"the clipped sum of '{self._sums[slot]}'"
        return f"output {slot}" if slot < self._first else "the gradient of an input"


def _version(value: Any) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _has_rounding(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
