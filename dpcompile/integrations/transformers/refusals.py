"""What of ``TrainingArguments`` cannot be had with private training, and what to set in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dpcompile.errors import PrivacyError

__all__ = ["REFUSED", "Refused", "refuse_arguments", "refuse_mixed", "refuse_overridden"]


class Refused(NamedTuple):
    """A setting that is refused.

    Attributes:
        name: of the argument.
        found: whether it is set so.
        because: what it would do.
        remedy: what to set.
    """

    name: str
    found: Callable[[Any], bool]
    because: str
    remedy: str


def _value(args: Any, name: str) -> str:
    value = getattr(args, name, None)
    return str(getattr(value, "value", value) or "")


def _sampling(args: Any) -> bool:
    return _value(args, "train_sampling_strategy") not in ("", "random") or bool(getattr(args, "group_by_length", 0))


def _optim(args: Any) -> bool:
    return any(kind in _value(args, "optim") for kind in ("lomo", "layerwise", "schedule_free"))


def _of_fsdp(args: Any, name: str) -> Any:
    return (getattr(args, "fsdp_config", None) or {}).get(name) if getattr(args, "fsdp", None) else None


def _is_set(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, None))


REFUSED = (
    Refused(
        "max_grad_norm",
        lambda args: not (args.max_grad_norm or 0) > 0,
        "it is C, the largest norm of one example's gradient, and there is no privacy without one",
        "set max_grad_norm above 0, 1.0 for a start",
    ),
    Refused(
        "train_sampling_strategy",
        _sampling,
        "draws are independent of what examples hold and of their order: epsilon is not that of another sampling",
        "leave it at 'random' (group_by_length=False); draws are padded to their longest example",
    ),
    Refused(
        "auto_find_batch_size",
        _is_set("auto_find_batch_size"),
        "it begins the run again with another batch size, on draws and noise that were used",
        "set physical_batch_size in PrivacyArguments: examples per forward, which changes nothing else",
    ),
    Refused(
        "dataloader_drop_last",
        _is_set("dataloader_drop_last"),
        "no draw is a last part of the data",
        "leave it at False",
    ),
    Refused(
        "data_seed",
        lambda args: getattr(args, "data_seed", None) is not None,
        "draws are a secret",
        "leave it out; PrivacyArguments(noise_seed=) repeats an experiment",
    ),
    Refused(
        "ignore_data_skip",
        _is_set("ignore_data_skip"),
        "a run that is resumed goes on with the draws that are left, which are not read again",
        "leave it at False: nothing is loaded to be skipped",
    ),
    Refused(
        "include_num_input_tokens_seen",
        lambda args: _value(args, "include_num_input_tokens_seen") not in ("", "no"),
        "it counts the tokens of the examples that were drawn, which tells of them",
        "leave it at 'no'",
    ),
    Refused(
        "fp16",
        _is_set("fp16"),
        "the Trainer's loss scaling is not supported",
        "set bf16=True, or write the loop with make_private and torch.amp.GradScaler",
    ),
    Refused(
        "torch_compile",
        _is_set("torch_compile"),
        "the private model compiles itself, and a graph around it could not be rewritten",
        "leave it at False; PrivacyArguments(backend=) says what compiles",
    ),
    Refused(
        "use_liger_kernel",
        _is_set("use_liger_kernel"),
        "its fused loss is a number for the batch, and its kernels have no rule",
        "leave it at False",
    ),
    Refused(
        "optim",
        _optim,
        "it updates while the backward runs, before there is noise, or is told apart training from evaluation",
        "take an optimizer that updates in step(), adamw_torch for instance",
    ),
    Refused(
        "deepspeed",
        _is_set("deepspeed"),
        "its engine sums gradients itself",
        "train on one device, or write the loop with make_private under torchrun (docs/distributed.md)",
    ),
    Refused(
        "fsdp_config",
        lambda args: bool(_of_fsdp(args, "xla")),
        "the shards of XLA are not those of torch",
        "leave xla out",
    ),
    Refused(
        "fsdp_config",
        lambda args: str(_of_fsdp(args, "version") or 2) == "1",
        "FSDP1's flattened parameters have no gradient for each example",
        "set version to 2",
    ),
    Refused(
        "fsdp_config",
        lambda args: str(_of_fsdp(args, "cpu_ram_efficient_loading") or False).lower() == "true",
        "the weights of all ranks but the first are not there when the model is sharded",
        "set cpu_ram_efficient_loading to False",
    ),
    Refused(
        "parallelism_config",
        _is_set("parallelism_config"),
        "the Trainer would split the model or its inputs before it is made private",
        "train on one device, or write the loop with make_private under torchrun (docs/distributed.md)",
    ),
    Refused(
        "n_gpu",
        lambda args: args.n_gpu > 1,
        "one process with several devices copies the model to each (nn.DataParallel), and copies are not clipped",
        "start a process for each device (torchrun --nproc-per-node), or show one (CUDA_VISIBLE_DEVICES)",
    ),
    Refused(
        "hub_strategy",
        lambda args: bool(args.push_to_hub) and "checkpoint" in _value(args, "hub_strategy"),
        "it uploads checkpoints, and they hold the seed of noise and draws",
        "set hub_strategy='end' or 'every_save': the weights alone",
    ),
)


def refuse_arguments(args: Any) -> None:
    """Raise PrivacyError at the first of ``TrainingArguments`` that cannot be had.

    Args:
        args: of the user.
    """
    for refused in REFUSED:
        if refused.found(args):
            value = getattr(args, refused.name, None)
            raise PrivacyError(
                f"{refused.name}={getattr(value, 'value', value)!r} in TrainingArguments: {refused.because}",
                remedy=refused.remedy,
            )


def refuse_overridden(trainer: Any, own: type, remedies: dict[str, str]) -> None:
    """Raise PrivacyError where a subclass takes the place of what makes training private.

    Args:
        trainer: an instance of the subclass.
        own: the class whose methods must be found first.
        remedies: by the method's name, what to do.
    """
    for name, remedy in remedies.items():
        if getattr(type(trainer), name) is not getattr(own, name):
            raise PrivacyError(
                f"{type(trainer).__name__}.{name} takes the place of the one that trains privately", remedy=remedy
            )


def refuse_mixed(trainer: Any) -> None:
    """Raise PrivacyError where the mixin stands before a trainer of TRL, whose batches and losses are others.

    Args:
        trainer: an instance.
    """
    kinds = type(trainer).__mro__
    theirs = next((k for k in kinds if k.__module__.partition(".")[0] == "trl"), None)
    ours = [k for k in kinds if k.__module__.startswith("dpcompile.integrations.trl.")]
    if theirs is not None and not ours:
        raise PrivacyError(
            f"{type(trainer).__name__} is made of trl's {theirs.__name__}: what it does with a batch is not the "
            "Trainer's",
            remedy="take DPSFTTrainer or DPDPOTrainer of dpcompile.integrations.trl; for TRL's other trainers write "
            "the loop with make_private",
        )
