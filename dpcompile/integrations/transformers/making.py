"""From a Trainer's model, data and arguments to what ``make_private`` makes of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, RandomSampler

from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.integrations.transformers.arguments import PrivacyArguments
from dpcompile.integrations.transformers.draws import MarkedCollate, loader_of_steps
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.private import make_private

__all__ = ["Private", "made_private", "refuse_stream", "sampled"]


class Private(NamedTuple):
    """A Trainer's private training.

    Attributes:
        model: the view that is trained.
        optimizer: that steps on the loader's draws.
        loader: of the draws.
        steps: the loader as the Trainer's loop knows it, an item for each draw.
        planned: how many steps the noise was calibrated for.
    """

    model: Any
    optimizer: DPOptimizer
    loader: PoissonLoader
    steps: DataLoader[Any]
    planned: int


def refuse_stream(dataset: Any) -> None:
    """Raise PrivacyError for data without length or index."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise PrivacyError(
            f"train_dataset is {type(dataset).__name__}, without length or index: examples cannot be drawn "
            "independently",
            remedy="give a map-style dataset (of a stream a list, or datasets.Dataset.from_generator)",
        )


def sampled(theirs: Any, args: Any, padding_example: Any) -> DataLoader[Any]:
    """The Trainer's dataset, collation and workers, with the expected batch size.

    Args:
        theirs: what the Trainer itself would train with.
        args: ``TrainingArguments`` as they were given.
        padding_example: see :class:`PrivacyArguments`.

    Raises:
        PrivacyError: it samples in another way than at random.
    """
    sampler = getattr(theirs.batch_sampler, "sampler", None)
    if not isinstance(sampler, RandomSampler):
        raise PrivacyError(
            f"the Trainer samples with {type(sampler).__name__}: epsilon is that of independent draws",
            remedy="leave _get_train_sampler as transformers.Trainer has it",
        )
    options: dict[str, Any] = {
        name: getattr(theirs, name)
        for name in ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context", "persistent_workers")
    }
    if theirs.num_workers:
        options["prefetch_factor"] = theirs.prefetch_factor
    return DataLoader(
        theirs.dataset,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps,
        shuffle=True,
        collate_fn=MarkedCollate(theirs.collate_fn, padding_example),
        **options,
    )


def made_private(model: Any, inner: Any, data: DataLoader[Any], args: Any, privacy: PrivacyArguments) -> Private:
    """What ``make_private`` makes of a Trainer's model, optimizer and data.

    Args:
        model: the ordinary one.
        inner: its optimizer.
        data: with the expected batch size (:func:`sampled`).
        args: ``TrainingArguments`` as they were given.
        privacy: of the user.

    Raises:
        PrivacyError: what ``make_private`` refuses.
    """
    assert data.batch_size is not None
    a_pass = math.ceil(len(data.dataset) / data.batch_size)  # type: ignore[arg-type]
    planned = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_pass)
    physical = privacy.physical_batch_size
    if physical is None and args.gradient_accumulation_steps > 1:
        physical = args.train_batch_size
    model, optimizer, loader = make_private(
        model,
        inner,
        data,
        noise_multiplier=privacy.noise_multiplier,
        target_epsilon=privacy.target_epsilon,
        target_delta=privacy.target_delta if privacy.noise_multiplier is None else None,
        steps=planned,
        max_grad_norm=float(args.max_grad_norm),
        accountant=privacy.accountant,  # type: ignore[arg-type]
        physical_batch_size=physical,
        max_batch_size=privacy.max_batch_size,
        padding_example=privacy.padding_example,
        seed=privacy.noise_seed,
        secure=privacy.secure,
        clipping=privacy.clipping,
        backend=privacy.backend,
        **privacy.options,
    )
    return Private(model, optimizer, loader, loader_of_steps(loader, optimizer), planned)
