"""Matrix products: one rule, written as an einsum, for all of them."""

from __future__ import annotations

from typing import Any

from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.proof.rules.growth import Product, ProductAndSum
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise
from dpcompile.proof.site_kinds import SiteKind

__all__ = ["contraction"]


def contraction(call: Call, spec: str, operands: list[Any]) -> Label:
    """The example axis through ``spec``, an einsum such as ``"pn,nd->pd"``.

    An index that survives keeps the examples apart; an index that is contracted sums over them; an example axis on two
    different indices pairs every example with every other.
    """
    inputs, _, output = spec.partition("->")
    labels = [call.label(x) for x in operands]
    summed = [x for x in labels if isinstance(x, Summed)]
    axes = [(i, x) for i, x in zip(inputs.split(","), labels, strict=True) if isinstance(x, Examples)]
    if summed:
        if len(summed) == 1 and not axes:
            return Summed()
        return call.mixes("it multiplies a sum over all examples with values that depend on examples")
    if not axes:
        return Shared()
    letters = {indices[label.dim] for indices, label in axes}
    if len(letters) > 1:
        return call.mixes("it multiplies every example with every other one")
    letter, label = letters.pop(), axes[0][1]
    if any(not x.same_layout(label) for _, x in axes):
        return call.mixes("its operands enumerate the examples in different orders")
    for operand, indices in zip(operands, inputs.split(","), strict=True):
        if letter in indices and (refusal := call.by_row(operand, label.at(indices.index(letter)))) is not None:
            return refusal
    return label.at(output.index(letter)) if letter in output else Summed()


@axis_rule(
    "aten.mm",
    growth=Product(("self", "mat2")),
    site=SiteKind(("self", "mat2"), {"self": 1, "mat2": 0}, form="product"),
)
def mm(call: Call) -> Label:
    """Matrix times matrix."""
    return contraction(call, "pn,nd->pd", [call["self"], call["mat2"]])


@axis_rule(
    "aten.bmm",
    growth=Product(("self", "mat2")),
    site=SiteKind(("self", "mat2"), {"self": 2, "mat2": 1}, form="product"),
)
def bmm(call: Call) -> Label:
    """Batched matrix times matrix."""
    return contraction(call, "kpn,knd->kpd", [call["self"], call["mat2"]])


@axis_rule("aten.mv", growth=Product(("self", "vec")), site=SiteKind(("self", "vec"), {"self": 1, "vec": 0}))
def mv(call: Call) -> Label:
    """Matrix times vector."""
    return contraction(call, "pn,n->p", [call["self"], call["vec"]])


@axis_rule("aten.dot", growth=Product(("self", "tensor")), site=SiteKind(("self", "tensor"), {"self": 0, "tensor": 0}))
@axis_rule("aten.vdot", growth=Product(("self", "other")))
def dot(call: Call) -> Label:
    """Vector times vector."""
    operands = [call["self"], call["tensor"] if call["tensor"] is not None else call["other"]]
    return contraction(call, "n,n->", operands)


@axis_rule("aten.addmm", growth=ProductAndSum(("mat1", "mat2"), "self"))
@axis_rule("aten.baddbmm", growth=ProductAndSum(("batch1", "batch2"), "self"))
@axis_rule("aten.addmv", growth=ProductAndSum(("mat", "vec"), "self"))
def add_product(call: Call) -> Label:
    """A product plus a value broadcast to its shape."""
    if call["batch1"] is not None:
        spec, factors = "kpn,knd->kpd", [call["batch1"], call["batch2"]]
    elif call["vec"] is not None:
        spec, factors = "pn,n->p", [call["mat"], call["vec"]]
    else:
        spec, factors = "pn,nd->pd", [call["mat1"], call["mat2"]]
    product = contraction(call, spec, factors)
    added = call["self"]
    label, shift = call.label(added), len(call.out_shape) - len(call.shape(added))
    if isinstance(label, Examples):
        label = label.at(label.dim + shift)
    if isinstance(product, Summed) or isinstance(label, Summed):
        parts = [product, label]
        if all(isinstance(x, Summed) or (isinstance(x, Shared) and x.zero) for x in parts):
            return Summed()
        return call.mixes("it adds a sum over all examples to other values")
    if isinstance(product, Examples) and isinstance(label, Examples):
        if product.dim != label.dim or not product.same_layout(label):
            return call.mixes("it adds values whose examples lie in different places")
        return product
    if isinstance(product, Examples):
        return call.any_by_row([added], product, len(call.out_shape)) or product
    return _shared_product(call, spec, factors, label) if isinstance(label, Examples) else product


def _shared_product(call: Call, spec: str, factors: list[Any], axis: Examples) -> Label:
    """A product of shared values is added to values of examples."""
    inputs, _, output = spec.partition("->")
    letter = output[axis.dim]
    refusals = (call.by_row(x, axis.at(i.find(letter))) for x, i in zip(factors, inputs.split(","), strict=True))
    return next((r for r in refusals if r is not None), axis)


@row_wise(mm, bmm, mv, add_product)
def _slices_of_product(call: Call, stripes: Stripes, result: int) -> Behind:
    spec, operands = _PRODUCTS[call.name]
    inputs, _, output = spec.partition("->")
    letter = output[stripes.dim]
    places = [(call[k], i.find(letter)) for k, i in zip(operands, inputs.split(","), strict=True)]
    found = [(x, stripes.at(d)) for x, d in places if d >= 0]
    return found + (broadcast(call, [call["self"]], stripes) if "self" not in operands else [])


_PRODUCTS = {
    "mm": ("pn,nd->pd", ("self", "mat2")),
    "bmm": ("kpn,knd->kpd", ("self", "mat2")),
    "mv": ("pn,n->p", ("self", "vec")),
    "addmm": ("pn,nd->pd", ("mat1", "mat2")),
    "baddbmm": ("kpn,knd->kpd", ("batch1", "batch2")),
    "addmv": ("pn,n->p", ("mat", "vec")),
}
