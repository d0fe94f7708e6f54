"""The values of ``norm=``: rules of our own, and the algorithms of the literature as choices among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["MODES", "NORM_MODES", "Mode", "without_keeping"]


@dataclass(frozen=True, slots=True)
class Mode:
    """What a mode allows.

    Attributes:
        rules: the rules that a parameter of factored sites may have, preferred first; where it has none of them, and
            for every other parameter, per-example gradients.
        mixed: between "ghost" and the others by 2T^2 < pd, instead of by time.
        drop: per-example gradients are dropped after their norm is taken, and the product is done again.
        second_backward: the clipped sums come from a second backward on reweighted cotangents.
        source: whose algorithm it is.
    """

    rules: tuple[str, ...]
    mixed: bool = False
    drop: bool = False
    second_backward: bool = False
    source: str = ""

    def wanted(self, t: float, p: float, d: float) -> Callable[[str], bool]:
        """Which rules may stand at sites of these sizes."""
        if not self.mixed:
            return lambda rule: rule in self.rules
        ghost = 2 * t * t < p * d
        return lambda rule: rule in self.rules and (rule in ("ghost", "outer")) == ghost


MODES: Mapping[str, Mode] = {
    "auto": Mode(("outer", "ghost", "keep", "redo", "direct")),
    "ghost": Mode(("outer", "ghost")),
    "instantiate": Mode(("keep",)),
    "redo": Mode(("redo",), drop=True),
    "direct": Mode(("direct",), drop=True),
    "per_example": Mode(("keep",), source="Abadi et al. 2016; Opacus, Yousefpour et al. 2021"),
    "ghost_clipping": Mode(
        ("outer", "ghost"), drop=True, second_backward=True, source="Li et al. 2022, arXiv:2110.05679"
    ),
    "mixed_ghost_clipping": Mode(
        ("outer", "ghost", "redo"), mixed=True, drop=True, second_backward=True,
        source="Bu, Mao and Xu 2022, arXiv:2205.10683",
    ),
    "book_keeping": Mode(("outer", "ghost"), drop=True, source="Bu et al. 2023, arXiv:2210.00038, BK"),
    "bk_mixed_ghost": Mode(
        ("outer", "ghost", "redo"), mixed=True, drop=True, source="Bu et al. 2023, arXiv:2210.00038, BK-MixGhostClip"
    ),
    "bk_mix_opt": Mode(
        ("outer", "ghost", "keep"), mixed=True, source="Bu et al. 2023, arXiv:2210.00038, BK-MixOpt"
    ),
    "two_pass": Mode(("outer", "ghost", "redo", "direct"), drop=True, second_backward=True),
}  # fmt: skip
NORM_MODES = tuple(MODES)
_NOTHING_KEPT = {"auto": "two_pass", "instantiate": "redo", "per_example": "redo", "bk_mix_opt": "bk_mixed_ghost"}


def without_keeping(mode: str) -> str:
    """The mode that a region in two passes has in place of this one: per-example gradients would not be kept."""
    return _NOTHING_KEPT.get(mode, mode)
