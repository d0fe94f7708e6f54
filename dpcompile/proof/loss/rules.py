"""Rules of what computes: elementwise, along dimensions, products, losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpcompile._torch.loss_graph import constants, saved
from dpcompile.graph.labels import Shared, Summed
from dpcompile.proof.loss.labels import NOT_LINEAR, Mixes, Of, OneExample, Outer, Unknown, Value, combined
from dpcompile.proof.loss.registry import depending, dims_of, rule

# --- elementwise -----------------------------------------------------------------------------------------------------


@rule("Add Sub Rsub Neg ToCopy Clone Alias MaskedFill Where Triu Tril Real Imag Conj NativeDropout Detach")
def _linear(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    return combined(values, len(shape), linear=True)


@rule(
    "Exp Exp2 Log Log2 Log10 Log1P Expm1 Sqrt Rsqrt Sigmoid Tanh Relu Gelu Silu Mish Softplus LogSigmoid Abs Pow Sgn "
    "Sin Cos Tan Atan Asin Acos Sinh Cosh Atanh Asinh Acosh Erf Erfc Erfinv Lgamma Digamma Reciprocal Clamp ClampMin "
    "ClampMax Minimum Maximum Fmin Fmax Elu LeakyRelu Hardtanh Hardsigmoid Hardswish Softshrink Hardshrink Threshold "
    "Atan2 Xlogy Logaddexp Logaddexp2 Logit NanToNum Fmod Remainder Sinc Frac"
)
def _pointwise(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    return combined(values, len(shape), linear=False)


@rule("Mul")
def _product(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    return combined(values, len(shape), linear=len(depending(values)) == 1)


@rule("Div")
def _quotient(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    below = values[1:] and not isinstance(values[1].label, Shared)
    return combined(values, len(shape), linear=not below)


# --- along dimensions ------------------------------------------------------------------------------------------------


@rule("Sum Mean Nansum")
def _sum(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    (value,) = depending(values)
    if not isinstance(value.label, Of):
        return value.label
    dims, dim = dims_of(node, len(value.shape)), value.label.axis.dim
    if dim in dims:
        return Summed()
    kept = len(shape) == len(value.shape)
    return Of(value.label.axis.at(dim if kept else dim - sum(d < dim for d in dims)), value.label.picked)


@rule(
    "Softmax LogSoftmax Logsumexp Amax Amin Aminmax Max Min Prod Norm LinalgVectorNorm Var VarMean Std StdMean Median "
    "Nanmedian Mode Kthvalue Topk Sort Cummax Cummin Cumprod Logcumsumexp Renorm"
)
def _along(node: Any, values: Sequence[Value], shape: tuple[int, ...], output: int) -> Outer:
    if len(depending(values)) > 1 or len(values) > 1:  # max and min of two tensors
        return combined(values, len(shape), linear=False)
    (value,) = values
    if isinstance(value.label, Summed):
        raise Mixes(NOT_LINEAR)
    if isinstance(value.label, Of) and value.label.axis.dim in dims_of(node, len(value.shape)):
        raise Mixes("it runs over the examples")
    return _sum(node, values, shape, output)


@rule("Cumsum")
def _running_sum(node: Any, values: Sequence[Value], _: tuple[int, ...], __: int) -> Outer:
    (value,) = values
    along = isinstance(value.label, Of) and value.label.axis.dim in dims_of(node, len(value.shape))
    return Summed() if along else value.label


@rule("NativeLayerNorm")
def _layer_norm(node: Any, values: Sequence[Value], _: tuple[int, ...], output: int) -> Outer:
    value = values[0]
    if output or len(depending(values)) > 1 or isinstance(value.label, Shared):
        return Unknown()
    last = len(value.shape) - len(saved(node, "normalized_shape"))
    if isinstance(value.label, Summed):
        raise Mixes(NOT_LINEAR)
    if isinstance(value.label, Of) and value.label.axis.dim >= last:
        raise Mixes("it runs over the examples")
    return value.label


@rule("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm")
def _batch_norm(node: Any, values: Sequence[Value], _: tuple[int, ...], output: int) -> Outer:
    if output or not isinstance(values[0].label, Of):
        return Unknown()
    if saved(node, "training") and values[0].label.axis.dim != 1:
        raise Mixes("its mean and variance are those of all examples")
    return values[0].label


# --- products --------------------------------------------------------------------------------------------------------


@rule("Mm")
def _mm(_: Any, values: Sequence[Value], __: tuple[int, ...], ___: int) -> Outer:
    return _matrix_product(values[0].label, values[1].label, 0, 1, 1, 0)


@rule("Addmm")
def _addmm(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    bias, *factors = values
    label = _matrix_product(factors[0].label, factors[1].label, 0, 1, 1, 0)
    return combined([bias, Value(label, shape)], 2, linear=True)


@rule("Bmm")
def _bmm(_: Any, values: Sequence[Value], __: tuple[int, ...], ___: int) -> Outer:
    left, right = (v.label for v in values)
    batched = [x for x in (left, right) if isinstance(x, Of) and x.axis.dim == 0]
    if len(batched) == len(depending(values)):
        return combined([Value(x, (0, 0, 0)) for x in batched], 3, linear=len(batched) == 1)
    return _matrix_product(left, right, 1, 2, 2, 1)


@rule("Mv")
def _mv(_: Any, values: Sequence[Value], __: tuple[int, ...], ___: int) -> Outer:
    return _matrix_product(values[0].label, values[1].label, 0, 1, -1, 0)


@rule("Dot Vdot")
def _dot(_: Any, values: Sequence[Value], __: tuple[int, ...], ___: int) -> Outer:
    return _matrix_product(values[0].label, values[1].label, -1, 0, -1, 0)


def _matrix_product(left: Outer, right: Outer, row: int, inner: int, column: int, other: int) -> Outer:
    """Of a product that sums over ``inner`` of the left factor and ``other`` of the right one.

    Args:
        left: the left factor.
        right: the right factor.
        row: the dimension of the left factor that stays.
        inner: the dimension of the left factor that is summed over.
        column: the dimension of the right factor that stays.
        other: the dimension of the right factor that is summed over.
    """
    if isinstance(left, Shared) or isinstance(right, Shared):
        given, stays, contracted = (left, row, inner) if isinstance(right, Shared) else (right, column, other)
        if not isinstance(given, Of) or given.axis.dim == stays:
            return given
        return Summed() if given.axis.dim == contracted else Unknown()
    if isinstance(left, Of) and isinstance(right, Of):
        if (left.axis.dim, right.axis.dim) == (inner, other) and left.picked == right.picked:
            return Summed()
        if left.plain and right.plain:
            raise Mixes("it multiplies every example with every other one")
        return Unknown()
    if left == right and isinstance(left, OneExample):
        return left
    return combined([Value(left, ()), Value(right, ())], 0, linear=False)


@rule("Cdist")
def _cdist(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    labels = [v.label for v in depending(values)]
    if all(isinstance(x, Of) and x.axis.dim < len(shape) - 2 for x in labels):
        return combined(values, len(shape), linear=False)
    if len(labels) == 2 and all(isinstance(x, Of) and x.plain and x.axis.dim == len(shape) - 2 for x in labels):
        raise Mixes("it takes the distance of every example to every other one")
    return Unknown()


@rule("Pdist")
def _pdist(_: Any, values: Sequence[Value], __: tuple[int, ...], ___: int) -> Outer:
    if isinstance(values[0].label, Of) and values[0].label.axis.dim == 0:
        raise Mixes("it takes the distance of every example to every other one")
    return Unknown()


# --- losses ----------------------------------------------------------------------------------------------------------


@rule("NllLoss NllLoss2D")
def _nll_loss(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    value = values[0]
    if isinstance(value.label, Of) and saved(node, "reduction") == 1 and constants(node, "weight"):
        raise Mixes(
            "with weights of classes its mean divides by the sum of the weights of the whole batch",
            "call the loss with reduction='none' and take the mean of what it returns: the weights stay in it",
        )
    label = _loss(node, values, shape, 0)
    return Unknown() if isinstance(label, Of) and label.axis.dim > 0 else label


@rule(
    "MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits SoftMarginLoss MultiMarginLoss "
    "MultilabelMarginLoss"
)
def _loss(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    label = combined(values, max(len(v.shape) for v in values), linear=False)
    return Summed() if isinstance(label, Of) and saved(node, "reduction") else label


@rule("CtcLoss")
def _ctc_loss(_: Any, values: Sequence[Value], __: tuple[int, ...], output: int) -> Outer:
    label = values[0].label
    second = isinstance(label, Of) and label.axis.dim == 1 and not output
    return Of(label.axis.at(0), label.picked) if isinstance(label, Of) and second else Unknown()
