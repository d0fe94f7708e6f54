"""From a Trainer's model, data and arguments to what ``make_private`` makes of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.integrations.replicated import private_replicas
from dpcompile.integrations.transformers.arguments import PrivacyArguments
from dpcompile.integrations.transformers.draws import MarkedCollate, loader_of_steps
from dpcompile.module import engine_of
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.private import make_private

__all__ = ["Private", "made_of", "made_private", "refuse_stream", "sampled"]


class Private(NamedTuple):
    """A Trainer's private training.

    Attributes:
        model: the view that is trained.
        optimizer: that steps on the loader's draws.
        loader: of the draws.
        steps: the loader as the Trainer's loop knows it, an item for each draw.
        planned: how many steps the noise was calibrated for.
        made_of: by name, what of the Trainer all this was made of.
    """

    model: Any
    optimizer: DPOptimizer
    loader: PoissonLoader
    steps: DataLoader[Any]
    planned: int
    made_of: dict[str, Any]

    def refuse_changed(self, made_of: dict[str, Any]) -> None:
        """Raise PrivacyError if the Trainer's model, data or numbers are others by now."""
        for name, value in made_of.items():
            before = self.made_of[name]
            if before is not value and not (isinstance(value, (int, float, dict)) and before == value):
                raise PrivacyError(
                    f"{name} was changed after training began: what is trained, and what epsilon counts, is as it was",
                    remedy="make a new DPTrainer with it; on the same data epsilon is that of both runs together",
                )


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
    batches = getattr(theirs.batch_sampler, "batch_sampler", theirs.batch_sampler)  # of one rank, if there are more
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, RandomSampler):
        raise PrivacyError(
            f"the Trainer samples with {type(sampler).__name__}: epsilon is that of independent draws",
            remedy="leave _get_train_sampler as transformers.Trainer has it",
        )
    options: dict[str, Any] = {
        name: getattr(theirs, name)
        for name in ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context", "persistent_workers")
    }
    options["pin_memory"] = theirs.pin_memory and torch.cuda.is_available()
    if theirs.num_workers:
        options["prefetch_factor"] = theirs.prefetch_factor
    return DataLoader(
        theirs.dataset,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        shuffle=True,
        collate_fn=MarkedCollate(theirs.collate_fn, padding_example),
        **options,
    )


def made_of(trainer: Any, args: Any) -> dict[str, Any]:
    """What of a Trainer its private training is made of.

    Args:
        trainer: it.
        args: its ``TrainingArguments`` as they were given.
    """
    objects = {
        name: getattr(trainer, name) for name in ("model", "train_dataset", "data_collator", "compute_loss_func")
    }
    numbers = ("max_grad_norm", "train_batch_size", "gradient_accumulation_steps")
    return {**objects, **{name: getattr(args, name) for name in numbers}, "privacy": dict(vars(trainer.privacy))}


def made_private(trainer: Any, module: nn.Module, inner: Any, data: DataLoader[Any], args: Any) -> Private:
    """What ``make_private`` makes of a Trainer's model, optimizer and data.

    Args:
        trainer: it.
        module: what is trained: its model, or what holds that.
        inner: its optimizer.
        data: with the expected batch size (:func:`sampled`).
        args: ``TrainingArguments`` as they were given.

    Raises:
        PrivacyError: what ``make_private`` refuses.
    """
    privacy: PrivacyArguments = trainer.privacy
    assert data.batch_size is not None
    a_pass = math.ceil(len(data.dataset) / data.batch_size)  # type: ignore[arg-type]
    planned = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_pass)
    physical = privacy.physical_batch_size
    if physical is None and args.gradient_accumulation_steps > 1:
        physical = args.train_batch_size
    make: Any = make_private if trainer.replicated is None else partial(private_replicas, trainer.replicated)
    model, optimizer, loader = make(
        module,
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
    if args.world_size > 1 and not engine_of(model).distributed:
        raise PrivacyError(
            f"{args.world_size} ranks, and the model is neither replicated nor sharded: each would train its own",
            remedy="let the Trainer make its accelerator; give fsdp=True to shard",
        )
    return Private(model, optimizer, loader, loader_of_steps(loader, optimizer), planned, made_of(trainer, args))
