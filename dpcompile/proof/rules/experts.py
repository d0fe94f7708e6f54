"""Rows with one matrix each, chosen by an index: :mod:`dpcompile.graph.expert_products`, and those of other ranks."""

from __future__ import annotations

from dpcompile.graph.expert_products import each_expert_sum  # and registers the operations
from dpcompile.graph.labels import Examples, Label, Summed
from dpcompile.graph.sent_products import no_gradient_of_one_example  # and registers the operations
from dpcompile.proof.rules.growth import Product
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, row_wise
from dpcompile.proof.site_kinds import SiteKind

__all__ = ["along_rows"]


@axis_rule("dpcompile.expert_products", "dpcompile.sent_products", growth=Product(("rows", "matrices")))
def expert_products(call: Call) -> Label:
    """Every row's product with the matrix that its index chooses."""
    if call.summed() or isinstance(call.label(call["matrices"]), Examples):
        return call.mixes("it multiplies every example's rows with matrices that depend on all of them")
    return along_rows(call, "rows", "expert")


@axis_rule(
    "dpcompile.expert_sums",
    growth=Product(("left", "right")),
    site=SiteKind(("left", "right"), {"left": 0, "right": 0, "expert": 0}, per_example=each_expert_sum, form="experts"),
)
def expert_sums(call: Call) -> Label:
    """Outer products of rows, added up by an index."""
    return _sums(call)


@axis_rule(
    "dpcompile.sent_sums",
    growth=Product(("left", "right")),
    site=SiteKind(
        ("left", "right"),
        {"left": 0, "right": 0, "expert": 0},
        per_example=no_gradient_of_one_example,
        form="experts of ranks",
    ),
)
def sent_sums(call: Call) -> Label:
    """The same, and what other ranks' examples add: each is clipped where it lies, as this rank's are."""
    return _sums(call)


def _sums(call: Call) -> Label:
    if call.summed():
        return call.mixes("it multiplies a sum over all examples with other values")
    found = along_rows(call, "left", "right", "expert")
    return Summed() if isinstance(found, Examples) else found


@axis_rule("aten.histc", "aten.bincount")
def count(call: Call) -> Label:
    """How often each value is there, among all elements."""
    return call.mixes(
        "it counts values of all examples",
        "losses of load balancing over the batch belong to no example: leave them out (Transformers: "
        "output_router_logits=False), or return the router's logits in their place, and take one for every example, "
        "outside the model: dpcompile.losses.per_example_load_balancing",
    )


@axis_rule("aten.nonzero")
def chosen_rows(call: Call) -> Label:
    """Which elements are not zero, among all."""
    return call.mixes(
        "it picks rows out of all examples, and how many there are depends on all of them",
        "in a loop over experts, give every expert all rows, and weights that are zero where it was not chosen: "
        "`out = out + expert(x) * (weights * (chosen == e)).sum(-1, keepdim=True)`; or sort the rows by expert and "
        "multiply each stretch with its matrix (torch.nn.functional.grouped_mm)",
    )


def along_rows(call: Call, *names: str) -> Label:
    """The example axis of operands that lie along each other with dimension 0."""
    axes = [x for n in names if isinstance(x := call.label(call[n]), Examples)]
    if any(x.dim != 0 or not x.same_layout(axes[0]) for x in axes):
        return call.mixes("its rows enumerate the examples in different orders")
    refusals = (call.by_row(call[n], axes[0]) for n in names)
    return next((r for r in refusals if r is not None), axes[0])


@row_wise(expert_products)
def _slices_of_products(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim == 0:
        return [(call["rows"], stripes), (call["expert"], stripes)]
    return [(call["matrices"], stripes.at(2))]
