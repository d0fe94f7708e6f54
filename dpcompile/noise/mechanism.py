"""The Gaussian mechanism on the clipped sums of one logical step.

Source: Dwork and Roth 2014, appendix A; Abadi et al. 2016, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpcompile.noise.normal import add_gaussian_

__all__ = ["privatize_"]


def privatize_(
    totals: Sequence[Tensor],
    *,
    parameters: Sequence[int],
    runs: Sequence[Sequence[tuple[int, int]]] | None = None,
    std: float,
    expected_batch_size: float,
    seed: int,
    step: int,
    secure: bool = False,
) -> None:
    """Turn clipped sums into private mean gradients, in place: ``(total + std * noise) / expected_batch_size``.

    Args:
        totals: clipped sums, float32 or wider, each of its parameter's shape, or a part of it.
        parameters: their indices in the model, no two equal.
        runs: for parts of parameters: where each total's elements, row by row, lie in its parameter, flattened, as
            ``(first, how many)``. A total of several runs is contiguous. By default totals are whole.
        std: standard deviation of the noise, sigma * C; 0 draws none.
        expected_batch_size: a constant, never the drawn size.
        seed: of the noise.
        step: the logical step.
        secure: ChaCha20 instead of Philox.

    **Guarantee.** If all ``totals`` together change by at most C in L2 norm when one example is added or removed, the
    result is the Gaussian mechanism of noise multiplier ``std / C``, provided that (seed, step) was used for no other
    release. That is a statement about real numbers: floating-point sums are rounded (Mironov 2012).

    =======================================  ==============================================
    edge case                                outcome
    =======================================  ==============================================
    a total of zeros                         noise alone
    ``std`` 0                                the exact mean: no privacy
    a total of float16 or bfloat16           PrivacyError: the noise would be rounded away
    not finite total                         stays so: clipping gives such examples weight 0
    =======================================  ==============================================
    """
    if not std > 0:
        for total in totals:
            total.div_(expected_batch_size)
        return
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, total in enumerate(totals):
        groups.setdefault((total.device, total.dtype), []).append(i)
    for members in groups.values():
        pieces = [
            (piece, parameters[i], start)
            for i in members
            for piece, start in _pieces(totals[i], None if runs is None else runs[i])
        ]
        add_gaussian_(
            [piece for piece, _, _ in pieces],
            parameters=[parameter for _, parameter, _ in pieces],
            starts=[start for _, _, start in pieces],
            std=std,
            seed=seed,
            step=step,
            secure=secure,
            divisor=expected_batch_size,
        )


def _pieces(total: Tensor, runs: Sequence[tuple[int, int]] | None) -> list[tuple[Tensor, int]]:
    """Views of a total, one for each run, and the index of their first element."""
    if runs is None:
        return [(total, 0)]
    lengths = [length for _, length in runs]
    assert sum(lengths) == total.numel(), "every element has a place in its parameter"
    parts = [total] if len(runs) == 1 else total.view(-1).split(lengths) if runs else []
    return [(part, start) for part, (start, _) in zip(parts, runs, strict=True)]
