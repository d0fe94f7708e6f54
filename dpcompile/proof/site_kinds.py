"""What is known of the operations in which gradients are summed over the examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

__all__ = ["Form", "SiteKind", "add_site_kind", "find_site_kind", "own_site_kind", "site_kinds"]


Form: TypeAlias = Literal["product", "filters", "table", "experts", "experts of ranks", "head"]


@dataclass(frozen=True, slots=True)
class SiteKind:
    """An operation that sums over the examples.

    Attributes:
        linear: the operands in which it is linear, of which one is scaled to weight the examples; preferred first.
        lies_along: operand -> the dimension that runs along the examples, where its place in the operation tells.
        form: how the summed outer products are found: "product", "filters", "table", "experts", "experts of ranks" or
            "head"; None: by no general way.
        widens: it takes bfloat16 and float16 as they are, and adds up in float32 or wider; what others are given is
            widened first.
        per_example: the same for each example by itself: operands with the examples in front to ``[B, *shape]``; None
            leaves it to ``torch.vmap``.
    """

    linear: tuple[str, ...]
    lies_along: Mapping[str, int] = field(default_factory=dict)
    per_example: Callable[..., Tensor] | None = None
    form: Form | None = None
    widens: bool = False


_OWN: dict[str, SiteKind] = {}
_REGISTERED: dict[tuple[str, int], SiteKind] = {}


def find_site_kind(operation: str, result: int) -> SiteKind | None:
    """What is known of a result of an operation (by :func:`dpcompile.graph.operations.operation_name`), or None."""
    return _OWN.get(operation) or _REGISTERED.get((operation, result))


def own_site_kind(operation: str, kind: SiteKind) -> None:
    """Register a kind for all results of an operation of torch's own, as its rule does."""
    assert _OWN.setdefault(operation, kind) == kind, f"two kinds of {operation}"


def add_site_kind(operation: str, result: int, kind: SiteKind) -> None:
    """Register a kind for an operation of another library."""
    assert operation not in _OWN, operation
    _REGISTERED[operation, result] = kind


def site_kinds() -> dict[str, SiteKind]:
    """Torch's own, by operation, for documentation."""
    return dict(_OWN)
