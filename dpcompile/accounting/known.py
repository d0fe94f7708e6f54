"""For which methods and relations dp-accounting knows a bound of an event."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from dpcompile.accounting.arguments import Method, Relation
from dpcompile.accounting.releases import leaves
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent, NeighboringRelation

__all__ = ["neighbours", "refuse_unbounded"]


def neighbours(relation: Relation) -> NeighboringRelation:
    """The relation as dp-accounting has it."""
    from dp_accounting import NeighboringRelation as Known

    known = {"zero_out": Known.REPLACE_SPECIAL, "add_remove": Known.ADD_OR_REMOVE_ONE}
    return known.get(relation, Known.REPLACE_ONE)


def refuse_unbounded(event: DpEvent, method: Method, relation: Relation) -> None:
    """Raise PrivacyError where dp-accounting knows no bound for an event, with this method and this relation."""
    if _bounded(event, method, relation):
        return
    other: Method = "rdp" if method == "pld" else "pld"
    relations = [r for r in get_args(Relation) if _bounded(event, method, r)]
    remedy = "leave it out here, and add its own epsilon and delta to those of the accountant (basic composition)"
    if relations:
        remedy = f"{remedy}; one is known for relation {' and '.join(map(repr, relations))}"
    if _bounded(event, other, relation):
        remedy = f"make the accountant with method={other!r}"
    raise PrivacyError(f"no bound of {event!r} is known for method {method!r} and relation {relation!r}", remedy=remedy)


def _bounded(event: DpEvent, method: Method, relation: Relation) -> bool:
    if (method, relation) == ("rdp", "replace_one"):
        return False
    from dp_accounting import TruncatedSubsampledGaussianDpEvent, pld, rdp

    if relation == "add_remove" and any(
        isinstance(part, TruncatedSubsampledGaussianDpEvent) for part, _ in leaves(event, 1)
    ):
        return False  # its size of the dataset is what this relation protects
    kinds = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}
    return kinds[method](neighboring_relation=neighbours(relation)).supports(event)
