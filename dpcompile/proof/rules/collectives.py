"""Collectives over ranks that see the same examples, in the same order (tensor parallelism).

What one rank holds of an example meets what the others hold of the same one, so examples are kept apart. Whether a
collective is one over these ranks is not asked here: see :mod:`dpcompile.proof.replication`.
"""

from __future__ import annotations

from dpcompile.graph.labels import Examples, Label, Summed
from dpcompile.graph.sizes import divide, product, value_of
from dpcompile.proof.rules.growth import Linear
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, row_wise

_AFTER_THE_SUM = (
    "it exchanges, over the ranks of tensor parallelism, what was summed over the examples already, and does not add "
    "it up: the norm of a rank's share says nothing of the norm of the whole"
)
_REMEDY = (
    "let parameters that every rank holds see whole activations, or use SequenceParallel, which adds up; "
    "a parameter that is cut should be used as it is cut"
)


@axis_rule("_c10d_functional.wait_tensor", growth=Linear())
def wait(call: Call) -> Label:
    """The same values."""
    return call.label(call.operands[0])


@axis_rule("_c10d_functional.all_reduce", growth=Linear())
def all_reduce(call: Call) -> Label:
    """Element by element over the ranks. Behind the sum over the examples it is part of the gradient's linear tail."""
    if call.summed() and call["reduce_op"] not in ("sum", "avg"):
        return call.unsupported(_AFTER_THE_SUM, _REMEDY)
    return call.label(call.operands[0])


@row_wise(wait, all_reduce, "inductor_force_stride_order")
def _slices_of_same_places(call: Call, stripes: Stripes, result: int) -> Behind:
    return [(call.operands[0], stripes)]


@axis_rule("_c10d_functional.all_gather_into_tensor", growth=Linear())
def all_gather(call: Call) -> Label:
    """The ranks' values one behind the other along dimension 0."""
    if call.summed():
        return call.unsupported(_AFTER_THE_SUM, _REMEDY)
    label = call.label(call.operands[0])
    if isinstance(label, Examples) and label.dim == 0:
        return Examples(0, product([call["group_size"], label.outer]), label.inner)
    return label


@axis_rule("_c10d_functional.reduce_scatter_tensor", growth=Linear())
def reduce_scatter(call: Call) -> Label:
    """The sum over the ranks, cut into one piece for each along dimension 0: whole batches, or no examples there."""
    if call.summed():
        return call.unsupported(_AFTER_THE_SUM, _REMEDY)
    label = call.label(call.operands[0])
    if not isinstance(label, Examples) or label.dim != 0:
        assert not isinstance(label, Summed)
        return label
    outer = divide(label.outer, call["group_size"])
    if outer is None:
        return call.mixes("it hands every rank some of the examples only")
    return Examples(0, outer, label.inner)


@axis_rule("_c10d_functional.all_to_all_single", growth=Linear())
def all_to_all(call: Call) -> Label:
    """Every rank hands each one a run of dimension 0, and gets one of each: whole batches, or no examples there.

    **Guarantee.** Ranks see the same examples in the same order, and each asks this of what it sends and of what it
    gets. So a run of whole batches meets a place for whole batches, whatever lengths the ranks agree on.
    """
    if call.summed():
        return call.unsupported(_AFTER_THE_SUM, _REMEDY)
    label = call.label(call.operands[0])
    if not isinstance(label, Examples) or label.dim != 0:
        return label
    once = product([call.batch, label.inner])
    handed = [call["output_split_sizes"], call["input_split_sizes"]]
    outer = divide(call.out_shape[0], once)
    if outer is None or not all(handed) or any(divide(value_of(n), once) is None for ns in handed for n in ns):
        return call.mixes(
            "it hands every rank some of the examples only",
            "exchange heads or positions: move their dimension to the front, or flatten it there before the examples; "
            "let experts that are cut over ranks work on one batch, and all-reduce their results, or send rows to them "
            "by dpcompile.experts.products_of_experts (docs/distributed.md)",
        )
    return Examples(0, outer, label.inner)


@axis_rule("_dtensor.shard_dim_alltoall", growth=Linear())
def shard_dim_all_to_all(call: Call) -> Label:
    """The ranks' values one behind the other along ``gather_dim``, of which each gets a piece of ``shard_dim``."""
    if call.summed():
        return call.unsupported(_AFTER_THE_SUM, _REMEDY)
    label = call.label(call.operands[0])
    ndim = len(call.out_shape)
    if not isinstance(label, Examples) or label.dim not in (call["gather_dim"] % ndim, call["shard_dim"] % ndim):
        return label
    return call.mixes("it hands every rank some of the examples only")
