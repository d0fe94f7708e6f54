"""What private training needs to know beyond ``TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpcompile.errors import PrivacyError

__all__ = ["PrivacyArguments"]

# Of make_private and dp_compile, beside the fields: what the Trainer's loop is known to be right with.
_OPTIONS = ("check", "dynamic", "exact", "memory_budget", "noise_schedule", "norm", "regions", "verify")


@dataclass
class PrivacyArguments:
    """Privacy of a run: what ``TrainingArguments`` has no word for.

    C is ``TrainingArguments.max_grad_norm``; the expected batch size is ``per_device_train_batch_size *
    gradient_accumulation_steps``; how many steps there are say ``max_steps`` or ``num_train_epochs``. A dataclass by
    itself, so that ``HfArgumentParser((TrainingArguments, PrivacyArguments))`` reads it from a command line, and
    ``training_args.bin``, which is saved beside the weights, does not hold the seed.

    Attributes:
        target_epsilon: what all steps together may cost; the noise is calibrated to it.
        noise_multiplier: sigma, in place of a target.
        target_delta: of epsilon, of the target and in the logs; well below 1 / size of the dataset.
        accountant: "pld" or "rdp".
        clipping: as in :func:`dpcompile.dp_compile`.
        backend: likewise.
        physical_batch_size: examples per forward. None: ``per_device_train_batch_size`` where gradients are
            accumulated, else as in :class:`dpcompile.PoissonLoader`.
        max_batch_size: the cap on draws, see there.
        secure: ChaCha20 for noise and draws.
        noise_seed: of noise and draws, a secret: not ``TrainingArguments.seed``, which has a default that everybody
            knows. None draws one.
        padding_example: an item of the dataset's kind that is no example, see :class:`dpcompile.PoissonLoader`.
        options: more keyword arguments of :func:`dpcompile.make_private`: check, dynamic, exact, memory_budget,
            noise_schedule, norm, regions, verify.

    Raises:
        PrivacyError: no delta, or an option that is set elsewhere or that the Trainer's loop does not have.
    """

    target_epsilon: float | None = field(default=None, metadata={"help": "Epsilon that all steps together may cost."})
    noise_multiplier: float | None = field(default=None, metadata={"help": "Sigma, in place of a target."})
    target_delta: float | None = field(
        default=None, metadata={"help": "Delta of epsilon, well below 1 / size of the dataset."}
    )
    accountant: str = field(default="pld", metadata={"help": "'pld' or 'rdp'."})
    clipping: str = field(default="flat", metadata={"help": "'flat', 'automatic', 'per_layer' or 'per_block'."})
    backend: str = field(default="inductor", metadata={"help": "'inductor' or 'eager'."})
    physical_batch_size: int | None = field(
        default=None, metadata={"help": "Examples per forward; by default the per-device batch size."}
    )
    max_batch_size: int | None = field(default=None, metadata={"help": "A cap on draws."})
    secure: bool = field(default=False, metadata={"help": "Cryptographic noise and draws."})
    noise_seed: int | None = field(default=None, metadata={"help": "Secret seed of noise and draws; by default drawn."})
    padding_example: Any = field(default=None, repr=False, metadata={"help": "An item that is no example."})
    options: dict = field(default_factory=dict, metadata={"help": "More arguments of make_private."})

    def __post_init__(self) -> None:
        if self.target_delta is None:
            raise PrivacyError(
                "PrivacyArguments without target_delta: there is no epsilon without a delta",
                remedy="give target_delta, well below 1 / size of the dataset",
            )
        other = sorted(set(self.options) - set(_OPTIONS))
        if other:
            raise PrivacyError(
                f"options of make_private that the Trainer's loop sets itself or does not have: {', '.join(other)}",
                remedy=f"C is TrainingArguments.max_grad_norm; options may hold {', '.join(_OPTIONS)}; for the rest "
                "write the loop with make_private",
            )

    def __repr__(self) -> str:
        """Without the seed."""
        seed = "None" if self.noise_seed is None else "given"
        return (
            f"PrivacyArguments(target_epsilon={self.target_epsilon}, noise_multiplier={self.noise_multiplier}, "
            f"target_delta={self.target_delta}, accountant={self.accountant!r}, clipping={self.clipping!r}, "
            f"secure={self.secure}, noise_seed={seed})"
        )
