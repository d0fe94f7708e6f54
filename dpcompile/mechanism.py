"""The Gaussian mechanism on the clipped sums of one logical step.

Source: Dwork and Roth 2014, appendix A; Abadi et al. 2016, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpcompile.noise import add_gaussian_

__all__ = ["privatize_"]


def privatize_(
    totals: Sequence[Tensor],
    *,
    parameters: Sequence[int],
    starts: Sequence[int] | None = None,
    std: float,
    expected_batch_size: float,
    seed: int,
    step: int,
    secure: bool = False,
) -> None:
    """Turn clipped sums into private mean gradients, in place: ``(total + std * noise) / expected_batch_size``.

    Args:
        totals: clipped sums, float32 or wider, each of its parameter's shape, or a run of its elements.
        parameters: their indices in the model, no two equal.
        starts: where each total begins in its parameter, flattened; 0 for whole ones, the default.
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
    starts = [0] * len(totals) if starts is None else starts
    if not std > 0:
        for total in totals:
            total.div_(expected_batch_size)
        return
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, total in enumerate(totals):
        groups.setdefault((total.device, total.dtype), []).append(i)
    for members in groups.values():
        add_gaussian_(
            [totals[i] for i in members],
            parameters=[parameters[i] for i in members],
            starts=[starts[i] for i in members],
            std=std,
            seed=seed,
            step=step,
            secure=secure,
            divisor=expected_batch_size,
        )
