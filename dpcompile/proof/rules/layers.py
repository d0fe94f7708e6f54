"""Operations that stay whole in the graph: convolution, pooling, attention, bags of embeddings."""

from __future__ import annotations

from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.proof.rules.growth import Degrees, Homogeneous, Linear, ProductAndSum
from dpcompile.proof.rules.pointwise import combine
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise
from dpcompile.proof.site_kinds import SiteKind


@axis_rule("aten.convolution", growth=ProductAndSum(("input", "weight"), "bias"))
@axis_rule("aten.mkldnn_convolution", "aten.conv2d")
def convolution(call: Call) -> Label:
    """Slide shared filters over every example."""
    source, weight, bias = (call.label(call[k]) for k in ("input", "weight", "bias"))
    if isinstance(weight, Examples) or isinstance(bias, (Examples, Summed)):
        return call.mixes("filters made from one example slide over the others")
    if isinstance(weight, Summed) or isinstance(source, Summed):
        alone = isinstance(weight, Summed) != isinstance(source, Summed) and not isinstance(source, Examples)
        if alone and call["bias"] is None:
            return Summed()
        return call.mixes("it is not linear in a sum over the examples")
    assert isinstance(source, Examples)
    if source.dim != 0:
        return call.unsupported(f"its input has the examples on dim {source.dim}, not on dim 0")
    return source


@row_wise(convolution)
def _slices_of_convolution(call: Call, stripes: Stripes, result: int) -> Behind:
    return [(call["input"], stripes)] if stripes.dim == 0 else None


def _growth_of_convolution_backward(d: Degrees) -> tuple[float, float, float]:
    cotangent, source, weight = (d.of(d.arguments[k]) for k in ("grad_output", "input", "weight"))
    return (cotangent + weight, cotangent + source, cotangent)


@axis_rule(
    "aten.convolution_backward",
    growth=Homogeneous(_growth_of_convolution_backward),
    site=SiteKind(("grad_output", "input"), {"grad_output": 0, "input": 0}, form="filters"),
)
def convolution_backward(call: Call) -> Labels:
    """Gradients of a convolution: the input's keeps examples apart, the filters' and the bias's sum over them."""
    cotangent, source, weight = (call.label(call[k]) for k in ("grad_output", "input", "weight"))
    axes = [x for x in (cotangent, source) if isinstance(x, Examples)]
    if not isinstance(weight, Shared) or call.summed() or not axes:
        refusal = call.mixes("filters made from examples, or a sum over them, slide over other examples")
        return (refusal, refusal, refusal)
    if any(x.dim != 0 or not x.same_layout(axes[0]) for x in axes):
        refusal = call.mixes("its operands carry their examples in different places")
        return (refusal, refusal, refusal)
    differing = call.any_by_row([call["grad_output"], call["input"]], axes[0], len(call.shape(call["input"])))
    if differing is not None:
        return (differing, differing, differing)
    bias: Label = Summed() if isinstance(cotangent, Examples) else Shared()
    return (cotangent, Summed(), bias)


@axis_rule(
    "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d", "aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d",
    "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_nearest3d", "aten.upsample_linear1d",
    "aten.upsample_bilinear2d", "aten.upsample_bicubic2d", "aten.upsample_trilinear3d",
    "aten._upsample_bilinear2d_aa", growth=Linear(),
)  # fmt: skip
@axis_rule(
    "aten.max_pool2d_with_indices", "aten.max_pool2d_with_indices_backward", "aten.max_pool3d_with_indices",
    "aten.max_pool3d_with_indices_backward", "aten._low_memory_max_pool_with_offsets",
    "prims._low_memory_max_pool_with_offsets", "prims._low_memory_max_pool_offsets_to_indices",
    "aten.avg_pool2d_backward", "aten.avg_pool3d_backward", "aten._adaptive_avg_pool2d_backward",
    "aten._adaptive_avg_pool3d_backward", "aten.adaptive_max_pool2d", "aten.adaptive_max_pool2d_backward",
    "aten.adaptive_max_pool3d", "aten.adaptive_max_pool3d_backward", "aten.upsample_nearest1d_backward",
    "aten.upsample_nearest2d_backward", "aten.upsample_nearest3d_backward", "aten.upsample_bilinear2d_backward",
    "aten.upsample_bicubic2d_backward", "aten._upsample_bilinear2d_aa_backward", "aten.upsample_linear1d_backward",
    "aten.upsample_trilinear3d_backward", "aten.reflection_pad1d_backward", "aten.reflection_pad2d_backward",
    "aten.reflection_pad3d_backward", "aten.replication_pad1d_backward", "aten.replication_pad2d_backward",
    "aten.replication_pad3d_backward",
)  # fmt: skip
def spatial(call: Call) -> Labels:
    """Work on the last dimensions of each image; batch and channel dimensions come first."""
    value = call.node.meta["val"]
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    label = combine(call, call.operands, call.out_shape)
    if call.summed():
        label = call.mixes("it is not used on sums over the examples")
    elif isinstance(label, Examples) and label.dim >= len(call.out_shape) - spatial_dims(call):
        label = call.mixes("it pools over the examples")
    return tuple(label for _ in values) if isinstance(value, (tuple, list)) else label


def spatial_dims(call: Call) -> int:
    """How many of the last dimensions are those of an image."""
    name = call.name
    if "low_memory" in name:
        return len(call["kernel_size"])
    return next((n for n in (1, 3) if f"{n}d" in name), 2)


@row_wise(spatial)
def _slices_of_spatial(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim >= len(call.out_shape) - spatial_dims(call):
        return None
    return broadcast(call, call.operands, stripes)


@axis_rule("aten.native_layer_norm", "aten.native_layer_norm_backward", "aten._fused_rms_norm",
           "aten._fused_rms_norm_backward", "aten.native_group_norm", "aten.native_group_norm_backward")  # fmt: skip
def undecomposed_norm(call: Call) -> Labels:
    """Normalisation layers are decomposed before the proof; reaching this rule means one was not."""
    refusal = call.unsupported("this normalisation was not decomposed")
    return tuple(refusal for _ in call.node.meta["val"])
