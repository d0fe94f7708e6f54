"""Operations on batches of images, matrices and signals: grid sampling, linear algebra, Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.graph.matrix_exp import matrix_exp_adjoint as matrix_exp_adjoint  # registers the operation
from dpcompile.graph.sizes import same_shape
from dpcompile.proof.rules.growth import Linear
from dpcompile.proof.rules.pointwise import degree_in_sums
from dpcompile.proof.rules.registry import Call, Labels, axis_rule

# How many trailing dimensions of an operand one matrix or vector takes; 2 where nothing is said.
_CORE = {"linalg_householder_product": {"tau": 1}, "linalg_lu_solve": {"pivots": 1}, "lu_unpack": {"LU_pivots": 1}}


@axis_rule(
    "aten.grid_sampler_2d", "aten.grid_sampler_2d_backward", "aten.grid_sampler_3d", "aten.grid_sampler_3d_backward",
    "aten.fractional_max_pool2d", "aten.fractional_max_pool2d_backward", "aten.fractional_max_pool3d",
    "aten.fractional_max_pool3d_backward",
)  # fmt: skip
def by_rows(call: Call) -> Labels:
    """Row n of every result is made from row n of every operand; the examples must lie along these rows."""
    axes = [x for n in call.operands if isinstance(x := call.label(n), Examples)]
    label: Label
    if call.summed():
        label = call.mixes("it is not used on sums over the examples")
    elif any(x.dim != 0 or not x.same_layout(axes[0]) for x in axes):
        label = call.unsupported("its operands do not all have their examples on dim 0, in one order")
    else:
        refusals = (call.by_row(n, axes[0]) for n in call.operands)
        label = next((r for r in refusals if r is not None), axes[0])
    return _each(call, label)


@axis_rule("aten.linalg_solve_triangular", "aten.linalg_lu_solve", growth=Linear("B"))
@axis_rule("aten._linalg_solve_ex", growth=Linear("B", first_result=True))
@axis_rule("aten.cholesky_solve", growth=Linear("self"))
@axis_rule("dpcompile.matrix_exp_adjoint", growth=Linear("g"))
@axis_rule(
    "aten.linalg_inv_ex", "aten.linalg_cholesky_ex", "aten.linalg_lu_factor_ex", "aten.linalg_lu", "aten.linalg_qr",
    "aten._linalg_svd", "aten._linalg_eigh", "aten._linalg_det", "aten._linalg_slogdet", "aten.linalg_matrix_exp",
    "aten.linalg_householder_product", "aten.cholesky_inverse", "aten.lu_unpack", "aten.linalg_pinv",
)  # fmt: skip
def matrices(call: Call) -> Labels:
    """Linear algebra on the last two dimensions; the dimensions before are a batch, broadcast together."""
    name = call.name
    leading = {n: len(call.shape(n)) - _core(call, name, n) for n in call.operands}
    if call.summed():
        return _results(call, name, _linear(call))
    batch_ndim = max(leading.values())
    found: Examples | None = None
    for node in call.operands:
        label = call.label(node)
        if not isinstance(label, Examples):
            continue
        if label.dim >= leading[node]:
            return _each(call, call.mixes("it takes the examples for rows or columns of one matrix"))
        here = label.at(label.dim + batch_ndim - leading[node])
        if found is not None and (found.dim != here.dim or not found.same_layout(here)):
            return _each(call, call.mixes("its operands carry their examples in different places"))
        found = here
    if found is not None:
        places = ((n, found.at(found.dim - batch_ndim + leading[n])) for n in call.operands)
        refusal = next((r for n, here in places if (r := call.by_row(n, here)) is not None), None)
        if refusal is not None:
            return _each(call, refusal)
    return _results(call, name, found or Shared())


def _results(call: Call, name: str, label: Label) -> Labels:
    """The label of every result; what a solver keeps of its matrix belongs to the matrix alone."""
    if name != "_linalg_solve_ex":
        return _each(call, label)
    factors = call.label(call["A"])
    if isinstance(factors, Summed):
        factors = call.mixes("a factorisation is not linear in a sum over the examples")
    return (label, factors, factors, factors)


def _core(call: Call, name: str, operand: fx.Node) -> int:
    for argument, ndim in _CORE.get(name, {}).items():
        if call[argument] is operand:
            return ndim
    if name == "_linalg_solve_ex" and operand is call["B"] and operand is not call["A"]:
        matrix, right = call.shape(call["A"]), call.shape(operand)
        if len(right) == 1 or same_shape(right, matrix[:-1]):  # a vector, or a batch of vectors
            return 1
    return 2


def _linear(call: Call) -> Label:
    if degree_in_sums(call) != 1:
        return call.mixes("it is not linear in a sum over the examples")
    if any(isinstance(call.label(n), Examples) for n in call.operands):
        return call.mixes("it combines a sum over all examples with other values of examples")
    return Summed()


@axis_rule("aten._fft_c2c", "aten._fft_r2c", "aten._fft_c2r", growth=Linear())
def fourier(call: Call) -> Label:
    """Transform some dimensions; linear over the real numbers, as clip weights are."""
    label = call.label(call["self"])
    if isinstance(label, Examples) and label.dim in {d % len(call.out_shape) for d in call["dim"]}:
        return call.mixes("it transforms along the examples")
    return label


@axis_rule(
    "aten.view_as_real",
    "aten.view_as_complex",
    "aten.view_as_real_copy",
    "aten.view_as_complex_copy",
    growth=Linear(),
)
def parts_of_complex(call: Call) -> Label:
    """A last dimension of real and imaginary parts, to and fro."""
    source = call["self"]
    label, ndim = call.label(source), len(call.shape(source))
    shrinks = len(call.out_shape) < ndim
    if isinstance(label, Examples) and shrinks and label.dim == ndim - 1:
        return call.mixes("it makes one complex number of two examples")
    return label


def _each(call: Call, label: Label) -> Labels:
    """One label for every result; results that are not computed, or have no such dimension, are no example's."""
    value: Any = call.node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return label
    return tuple(label if isinstance(v, torch.Tensor) else Shared() for v in value)
