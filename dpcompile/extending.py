"""``register_axis_rule`` and ``register_site``: what dpcompile cannot know of operators that are not torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dpcompile._torch import OpOverload, OpOverloadPacket
from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.graph.operations import operation_name
from dpcompile.graph.sizes import is_one, product, same
from dpcompile.proof.rules import AxisRule, Call, Labels, add_rule, find_rule
from dpcompile.proof.rules.pointwise import pointwise
from dpcompile.proof.site_kinds import SiteKind, add_site_kind

__all__ = ["register_axis_rule", "register_site"]

Result: TypeAlias = 'int | Literal["sum"] | None'
_registered: set[Any] = set()


def register_axis_rule(
    operator: Any,
    rule: AxisRule | Literal["pointwise"] | None = None,
    *,
    examples: Mapping[str, int] | None = None,
    results: Result | Sequence[Result] = 0,
) -> Any:
    """Tell the proof what an operator does to the example axis.

    **The guarantee then rests on it.** An operator is a black box: if it lets one example reach another where the rule
    says that it does not, nobody will notice.

    Args:
        operator: ``"mylib::op"``, ``torch.ops.mylib.op``, or what ``torch.library.custom_op`` returned. Forward and
            backward operators each need a rule.
        rule: ``"pointwise"``: element by element, with broadcasting. Or a function from
            :class:`dpcompile.proof.rules.Call` to the label of the result, or a tuple of labels
            (:mod:`dpcompile.graph.labels`), for what cannot be said otherwise; it can be given by decoration.
        examples: operand -> the dimension that may hold the examples. The rule says: slices of these operands at one
            position make the slice of the result at that position, and no other. All other operands are shared.
        results: for each result, where the examples lie in it: a dimension, ``"sum"`` for a sum over examples of terms
            that depend on one example each, None for what depends on no example.

    Raises:
        ValueError: no such operator or operand, a wrong number of results, or an operator that has a rule already.
    """
    packet = _packet(operator)
    if find_rule(packet) is not None and packet not in _registered:
        raise ValueError(f"`{operation_name(packet)}` has a rule of dpcompile's own; it cannot be replaced")
    if rule is None and examples is None:

        def decorate(function: AxisRule) -> AxisRule:
            register_axis_rule(operator, function)
            return function

        return decorate
    if (rule is None) == (examples is None):
        raise ValueError("say what the operator does either by a rule or by examples= and results=, not both")
    if examples is not None:
        listed = tuple(results) if isinstance(results, Sequence) and not isinstance(results, str) else (results,)
        _check_operands(packet, examples)
        _check_results(packet, listed)
        rule = _declared(dict(examples), listed)
    elif rule == "pointwise":
        rule = pointwise
    elif not callable(rule):
        raise ValueError(f"a rule is a function or 'pointwise', not {rule!r}")
    _registered.add(packet)
    add_rule(packet, rule)  # type: ignore[arg-type]
    return rule


def register_site(
    operator: Any,
    *,
    linear_in: str,
    examples: Mapping[str, int],
    result: int = 0,
    per_example: Callable[..., Tensor] | None = None,
) -> None:
    """Tell how a result that the operator sums over the examples is clipped.

    A parameter's gradient that such an operator makes (the backward of a custom layer) has to be had for each example,
    and with the examples weighted. Weighting is done by scaling ``linear_in``; the norms come from ``per_example``.

    Args:
        operator: as in :func:`register_axis_rule`, whose rule says ``"sum"`` for this result.
        linear_in: the operand, most often the cotangent, in which the result is linear, example by example.
        examples: operand -> the dimension that holds the examples.
        result: which result, if there are several.
        per_example: called like the operator, with an operand in ``examples`` of shape ``[.., n·B, ..]`` given as
            ``[B, .., n, ..]`` (``n`` is 1 unless positions are folded into the example axis); returns
            ``[B, *shape of the result]``, in float32 for narrower operands. The default is ``torch.vmap`` of the
            operator, which needs ``torch.library.register_vmap``.

    Raises:
        ValueError: no such operator, operand or result.
    """
    packet = _packet(operator)
    _check_operands(packet, {linear_in: 0, **examples})
    if linear_in not in examples:
        raise ValueError(f"linear_in={linear_in!r} must be one of the operands with examples: {sorted(examples)}")
    if not 0 <= result < len(_schema(packet).returns):
        raise ValueError(f"`{operation_name(packet)}` has {len(_schema(packet).returns)} results, no result {result}")
    if operation_name(packet).find("::") < 0:
        raise ValueError(f"`{operation_name(packet)}` is torch's own; only operators of other libraries are registered")
    add_site_kind(operation_name(packet), result, SiteKind((linear_in,), dict(examples), per_example))


def _packet(operator: Any) -> Any:
    """The operator, however it is named."""
    found = getattr(operator, "_opoverload", operator)  # torch.library.CustomOpDef
    if isinstance(found, str):
        namespace, _, name = found.replace("::", ".").partition(".")
        found = getattr(getattr(torch.ops, namespace), name.partition(".")[0], None)
    if isinstance(found, OpOverload):
        found = found.overloadpacket
    if not isinstance(found, OpOverloadPacket):
        raise ValueError(f"there is no operator {operator!r}; register it with torch.library first")
    return found


def _schema(packet: Any) -> Any:
    return getattr(packet, packet.overloads()[0])._schema


def _check_operands(packet: Any, operands: Mapping[str, Any]) -> None:
    names = [a.name for a in _schema(packet).arguments]
    unknown = [n for n in operands if n not in names]
    if unknown:
        raise ValueError(f"`{operation_name(packet)}` has no operand {unknown[0]!r}; it has {', '.join(names)}")


def _check_results(packet: Any, results: Sequence[Result]) -> None:
    count = len(_schema(packet).returns)
    if len(results) != count:
        raise ValueError(f"`{operation_name(packet)}` has {count} results, and results= says {len(results)}")
    if not all(r is None or r == "sum" or isinstance(r, int) for r in results):
        raise ValueError(f"a result is a dimension, 'sum' or None, not {results!r}")


def _declared(examples: Mapping[str, int], results: Sequence[Result]) -> AxisRule:
    """The rule of an operator that treats every position of the example axis by itself."""

    def rule(call: Call) -> Labels:
        axis: Examples | None = None
        for name, operand in _tensors(call):
            label = call.label(operand)
            if isinstance(label, Summed):
                return _all(call.mixes("it was not registered as linear in a sum over the examples"), results)
            if not isinstance(label, Examples):
                continue
            if name not in examples:
                return _all(call.mixes(f"operand `{name}` holds examples; it was registered as shared"), results)
            dim = call.dim(examples[name], len(call.shape(operand)))
            if label.dim != dim:
                where = f"operand `{name}` holds the examples on dim {label.dim}; it was registered with dim {dim}"
                return _all(call.unsupported(where), results)
            if axis is not None and not axis.same_layout(label):
                return _all(call.mixes("its operands enumerate the examples in different orders"), results)
            axis = label
        assert axis is not None
        for name, operand in _tensors(call):
            if name in examples and not isinstance(call.label(operand), Examples):
                size = call.shape(operand)[examples[name]]
                if not is_one(size) and not same(size, product([axis.outer, call.batch, axis.inner])):
                    return _all(call.unsupported(f"operand `{name}` does not run along the examples"), results)
                dim = call.dim(examples[name], len(call.shape(operand)))
                if (refusal := call.by_row(operand, axis.at(dim))) is not None:
                    return _all(refusal, results)
        labels = tuple(_of_result(call, axis, i, r) for i, r in enumerate(results))
        return labels if isinstance(call.node.meta["val"], (tuple, list)) else labels[0]

    return rule


def _tensors(call: Call) -> list[tuple[str, Any]]:
    """Tensor operands by name, those in lists too."""
    found = []
    for name, value in call.arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [(name, v) for v in values if v in call.operands]
    return found


def _of_result(call: Call, axis: Examples, position: int, result: Result) -> Label:
    if result is None:
        return Shared()
    if result == "sum":
        return Summed()
    value = call.node.meta["val"]
    value = value[position] if isinstance(value, (tuple, list)) else value
    return axis.at(call.dim(int(result), getattr(value, "ndim", 0)))


def _all(label: Label, results: Sequence[Result]) -> Labels:
    return tuple(label for _ in results) if len(results) > 1 else label
