"""What of TRL's configs and trainers cannot be had with private training, and what to set in its place."""

from __future__ import annotations

from typing import Any

from dpcompile.errors import PrivacyError
from dpcompile.integrations.transformers.refusals import Refused

__all__ = ["REFUSED", "refuse_config", "refuse_made"]

_SORTS = ("aot", "aot_unpaired")


def _types(args: Any) -> list[str]:
    types = getattr(args, "loss_type", None) or []
    return [types] if isinstance(types, str) else list(types)


REFUSED = (
    Refused(
        "packing",
        lambda args: bool(getattr(args, "packing", None)),
        "a row would hold several examples, and what is clipped is a row",
        "set packing=False: draws are padded to their longest example",
    ),
    Refused(
        "padding_free",
        lambda args: bool(getattr(args, "padding_free", None)),
        "all examples would lie in one row, and what is clipped is a row",
        "set padding_free=False: draws are padded to their longest example",
    ),
    Refused(
        "activation_offloading",
        lambda args: bool(getattr(args, "activation_offloading", None)),
        "it moves what a backward keeps by hooks that the compiled graph does not call",
        "set activation_offloading=False; gradient_checkpointing=True, or a smaller physical_batch_size in "
        "PrivacyArguments, saves memory",
    ),
    Refused(
        "loss_type",
        lambda args: bool(set(_types(args)) & set(_SORTS)),
        "it sorts the pairs of a batch, and the loss of one depends on the others",
        "take another loss_type, 'sigmoid' for instance",
    ),
    Refused(
        "sync_ref_model",
        lambda args: bool(getattr(args, "sync_ref_model", None)),
        "the reference model is in no checkpoint, and a run that is resumed would go on with another",
        "set sync_ref_model=False",
    ),
)


def refuse_config(args: Any) -> None:
    """Raise PrivacyError at the first setting of an ``SFTConfig`` or ``DPOConfig`` that cannot be had.

    Args:
        args: of the user.
    """
    for refused in REFUSED:
        if refused.found(args):
            raise PrivacyError(
                f"{refused.name}={getattr(args, refused.name)!r} in {type(args).__name__}: {refused.because}",
                remedy=refused.remedy,
            )


def refuse_made(trainer: Any) -> None:
    """Raise PrivacyError for what a trainer of TRL turned out to be when it was made.

    Args:
        trainer: whose ``__init__`` has run.
    """
    if trainer.aux_loss_enabled:
        raise PrivacyError(
            "the model's load-balancing loss is on, and it is one of all tokens of a batch",
            remedy=f"set router_aux_loss_coef=0.0 in {type(trainer.args).__name__}",
        )
    columns = getattr(trainer.train_dataset, "column_names", None) or []
    if {"image", "images"} & set(columns):
        raise PrivacyError(
            "a dataset with images: how many rows they take in a batch depends on its examples",
            remedy="train on the text columns (dataset.remove_columns), or write the loop with make_private, with a "
            "model whose inputs all have a row for each example",
        )
    if "seq_lengths" in columns:
        raise PrivacyError(
            "the dataset was packed (it has a column seq_lengths): a row holds several examples",
            remedy="give it unpacked",
        )
