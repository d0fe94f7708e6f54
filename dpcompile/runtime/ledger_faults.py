"""What is wrong with a gradient that is not the clipped sum: named for the user."""

from __future__ import annotations

from typing import Literal

from dpcompile.errors import PrivacyError, running_line

__all__ = ["Change", "foreign", "second_step", "taken", "without_backward", "zeroed"]

Change = Literal["elsewhere", "replaced", "in place"]

_WHAT: dict[Change, str] = {
    "elsewhere": "no clipped backward reached it, and something else set p.grad",
    "replaced": "p.grad is another tensor than that backward left",
    "in place": "what that backward left in p.grad was changed in place",
}
_CAUSE: dict[Change, str] = {
    "elsewhere": "train through the compiled model only: no backward of the undecorated model, no regulariser on "
    "parameters in the loss (use weight_decay), no assignment to p.grad",
    "replaced": "assign nothing to p.grad (no copy, no mean over ranks, no other library's gradient)",
    "in place": "leave out what changed it: clip_grad_norm_ or clip_grad_value_ (every example's gradient is clipped "
    "already: max_grad_norm), a backward of the undecorated model, a regulariser on parameters in the loss (use "
    "weight_decay), an all_reduce or scaling of p.grad",
}


def foreign(name: str, change: Change, *, scaled: bool) -> PrivacyError:
    """The gradient of a parameter is not what the clipped backward left there.

    Args:
        name: of the parameter.
        change: how it differs.
        scaled: a gradient scaler scaled the loss.
    """
    scaling = (
        "; leave unscale_() of the gradient scaler out: the sums are those of the unscaled loss already"
        if scaled
        else "; to scale the loss use torch.amp.GradScaler"
    )
    return PrivacyError(
        f"the gradient of parameter '{name}' did not come out of the clipped backward alone: {_WHAT[change]}",
        where=running_line(),
        remedy=f"{_CAUSE[change]}{scaling}; then call zero_grad()",
    )


def zeroed(name: str) -> PrivacyError:
    """Sums that were to be kept are gone."""
    return PrivacyError(
        f"zero_grad() within a logical step: the sums of its earlier physical batches are gone (seen at parameter "
        f"'{name}')",
        remedy="call zero_grad() of the DPOptimizer, which waits for the end of the step, and not that of the "
        "model or of the wrapped optimizer; optimizer.discard() gives the step up",
    )


def taken(name: str) -> PrivacyError:
    """A sum is not there any more."""
    return PrivacyError(
        f"the clipped sum of parameter '{name}' was taken out of p.grad (it is None or zero) between backward and step",
        remedy="call zero_grad() after optimizer.step() or before the forward, and call loss.backward(): what "
        "torch.autograd.grad returns is not clipped and cannot stand in; to leave a parameter out, freeze it with "
        "requires_grad_(False) before the forward",
    )


def second_step(name: str) -> PrivacyError:
    """A sum was stepped on before."""
    return PrivacyError(
        f"a second optimizer step on the same gradients (seen at parameter '{name}')",
        where=running_line(),
        remedy="run forward, loss.backward() and optimizer.zero_grad() between two steps",
    )


def without_backward() -> PrivacyError:
    """There is no sum at all."""
    return PrivacyError(
        "optimizer.step() without a clipped backward since the last step",
        where=running_line(),
        remedy="call loss.backward() on an output of the compiled model first; for an empty draw run the "
        "padded batch that PoissonLoader gives",
    )
