"""Operations of torch that are there once its module of them was imported."""

from contextlib import suppress

import torch._inductor.inductor_prims  # noqa: F401

with suppress(ImportError):  # torch before 2.13
    import torch.nn.modules.linear_cross_entropy  # type: ignore[import-not-found]  # noqa: F401
