"""Backwards, scalers, masks and users: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from private_steps import X, Y, backward, over, parts, steps
from remedies import Right, data, equals, plain, refused, right, stepped
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from dpcompile import DPOptimizer, PoissonLoader, dp_compile, set_mask


def begun(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@refused("call dp_compile again after changing the model, and make the optimizer from the result")
def test_a_parameter_replaced_after_a_call(told: int) -> Right:
    ordinary = plain()
    model, optimizer = parts(ordinary)
    steps(model, optimizer)
    ordinary.bias = nn.Parameter(torch.zeros(3))
    if told:
        model = dp_compile(ordinary, backend="eager")
        optimizer = over(model)
    return steps(model, optimizer)


# --- C --------------------------------------------------------------------------------------------------------------


@refused("compile the model with a C of about the size that it will have")
def test_a_bound_far_from_the_first(told: int) -> Right:
    model: Any = dp_compile(plain(), max_grad_norm=1e12 if told else 1.0, backend="eager")
    optimizer = over(model)
    optimizer.max_grad_norm = 2e13
    return steps(model, optimizer)


@refused("change it after optimizer.step(), before the next forward")
def test_a_bound_moved_before_the_backward(told: int) -> Right:
    model, optimizer = parts()
    before = begun(model)
    loss = F.cross_entropy(model(X), Y)
    if not told:
        optimizer.max_grad_norm = 0.5
    loss.backward()
    optimizer.step()
    optimizer.max_grad_norm = 0.5
    return stepped(model, optimizer, before, 1)


# --- backwards ------------------------------------------------------------------------------------------------------


@refused(
    "Right if you add noise of your own to p.grad; else DPOptimizer(sgd, model, noise_multiplier=.., "
    "expected_batch_size=..)",
    warns=True,
)
def test_a_plain_optimizer(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    sgd: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if told:
        sgd = DPOptimizer(sgd, model, noise_multiplier=1.0, expected_batch_size=8)
    before = begun(model)
    backward(model)
    sgd.step()
    return stepped(model, sgd, before, 1)


@refused("call loss.backward() and read p.grad; torch.autograd.grad is for gradients of inputs", ways=2)
def test_gradients_asked_of_autograd(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    x = X.clone().requires_grad_(told == 2)
    loss = F.cross_entropy(model(x), Y)
    if told == 0:
        torch.autograd.grad(loss, list(model.parameters()))
    elif told == 2:
        (g,) = torch.autograd.grad(loss, x)
        wanted = torch.autograd.grad(F.cross_entropy(F.linear(x, model.weight, model.bias), Y), x)[0]
        return equals(torch.allclose(g, wanted), True)
    return right(model, X)


@refused(
    "call zero_grad() after optimizer.step() or before the forward, and call loss.backward(): what torch.autograd.grad "
    "returns is not clipped and cannot stand in; to leave a parameter out, freeze it with requires_grad_(False) before "
    "the forward",
    ways=2,
)
def test_a_sum_that_was_taken_out(told: int) -> Right:
    model, optimizer = parts()
    if told == 2:
        model.bias.requires_grad_(False)
    before = begun(model)
    backward(model)
    if not told:
        model.bias.grad = None
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("run the last micro-batch before optimizer.step() outside no_sync()")
def test_no_sync_and_a_step(told: int, one_rank: None) -> Right:
    model: Any = DistributedDataParallel(dp_compile(plain(), backend="eager"))
    optimizer = over(model)
    before = begun(model)
    optimizer.accumulating = True
    with model.no_sync():
        backward(model)
        if not told:
            optimizer.accumulating = False
            backward(model, -X)
    if told:
        optimizer.accumulating = False
        backward(model, -X)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


# --- scalers --------------------------------------------------------------------------------------------------------


def scaler(scale: float = 1024.0) -> GradScaler:
    return GradScaler("cpu", init_scale=scale)


def scaled_step(model: Any, optimizer: Any, own: GradScaler, loss: Tensor, before: list[Tensor]) -> Right:
    own.scale(loss).backward()
    own.step(optimizer)
    own.update()
    return stepped(model, optimizer, before, 1)


@refused("their weight is 0; give the gradient scaler a smaller init_scale, and a large growth_interval", warns=True)
def test_a_scale_that_is_too_large(told: int) -> Right:
    model, optimizer = parts()
    before = begun(model)
    own = GradScaler("cpu", init_scale=1e4, growth_interval=10**6) if told else scaler(3e38)
    return scaled_step(model, optimizer, own, 1e3 * F.cross_entropy(model(X), Y), before)


@refused("scale the sum of the losses with one gradient scaler")
def test_losses_scaled_differently(told: int) -> Right:
    model, optimizer = parts()
    before, one, other = begun(model), scaler(), scaler(16.0)
    output = model(X)
    losses = F.cross_entropy(output, Y), output.square().mean()
    if told:
        return scaled_step(model, optimizer, one, losses[0] + losses[1], before)
    (one.scale(losses[0]) + other.scale(losses[1])).backward()
    return stepped(model, optimizer, before, 1)


@refused(
    "call torch.amp.GradScaler's own scale() on the loss, outside compiled functions, of the same scaler, and update() "
    "after step(); or step the optimizer without a scaler",
    ways=2,
)
def test_a_step_of_another_scaler(told: int) -> Right:
    model, optimizer = parts()
    before = begun(model)
    loss = F.cross_entropy(model(X), Y)
    if told == 1:
        return scaled_step(model, optimizer, scaler(), loss, before)
    loss.backward()
    if told:
        optimizer.step()
    else:
        own = scaler()
        own.scale(torch.zeros(()))
        own.step(optimizer)
    return stepped(model, optimizer, before, 1)


@refused("hold trained parameters in float32 or bfloat16, and let autocast narrow them", ways=2)
def test_sums_that_a_scaler_finds_infinite(told: int) -> Right:
    dtype = (torch.float16, torch.float32, torch.bfloat16)[told]
    model: Any = dp_compile(plain().to(dtype), max_grad_norm=1e6, backend="eager")
    optimizer = over(model)
    before = begun(model)
    x = torch.full((8, 5), 1e4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=told > 0):
        output = model(x).float()
        loss = F.cross_entropy(output, output.argmin(1))  # each gradient is 1e4 large, and their sum 8e4
    return scaled_step(model, optimizer, scaler(1.0), loss, before)


# --- masks and users ------------------------------------------------------------------------------------------------


@refused("give dp_compile and PoissonLoader the same examples_per_user (1 without groups)", ways=2)
def test_a_mask_of_a_loader_of_users(told: int) -> Right:
    of_model, of_loader = ((1, 2), (2, 2), (1, 1))[told]
    model: Any = dp_compile(plain(), backend="eager", examples_per_user=of_model)
    groups: Any = {"groups": torch.arange(24) // 3, "examples_per_user": 2} if of_loader > 1 else {}
    loader = PoissonLoader(data().dataset, expected_batch_size=4, **groups)
    optimizer = over(model, expected_batch_size=4)
    before = begun(model)
    batch = next(iter(loader.batches()))
    set_mask(model, batch.mask)
    backward(model, *batch.data)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "call the model once per batch with gradients (others under torch.no_grad()); to train without masks, "
    "set_mask(model, None) first",
    ways=2,
)
def test_a_mask_used_twice(told: int) -> Right:
    model, optimizer = parts()
    set_mask(model, torch.ones(8, dtype=torch.bool))
    before = begun(model)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    if told == 1:
        with torch.no_grad():
            model(X)
        return stepped(model, optimizer, before, 1)
    if told == 2:
        set_mask(model, None)
    return steps(model, optimizer)


ROWS = (
    "give each user of a batch examples_per_user rows, one after the other, and fill up with rows whose mask is False, "
    "as PoissonLoader(groups=...) does; evaluate under torch.no_grad()"
)


def one_user_each(model: Any, x: Tensor, y: Tensor, mask: Tensor | None) -> Right:
    """The clipped sum of users' gradients of the sum over rows that are theirs, by one backward per user."""
    if mask is not None:
        set_mask(model, mask)
    losses = F.cross_entropy(model(x), y, reduction="none")
    losses.mean().backward()
    found, keep = [model.weight.grad.clone(), model.bias.grad.clone()], torch.ones(8) if mask is None else mask
    wanted = [torch.zeros(3, 5), torch.zeros(3)]
    for i in range(0, len(x), 2):
        w, b = model.weight.detach().requires_grad_(), model.bias.detach().requires_grad_()
        own = F.cross_entropy(F.linear(x[i : i + 2], w, b), y[i : i + 2], reduction="none")
        grads = torch.autograd.grad((own * keep[i : i + 2]).sum(), (w, b))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        wanted = [t + g * min(1.0, 1.0 / float(norm)) for t, g in zip(wanted, grads, strict=True)]
    return equals([torch.allclose(f, t, atol=1e-5) for f, t in zip(found, wanted, strict=True)], [True, True])


@refused(ROWS, ways=2)
def test_half_a_user(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager", examples_per_user=2)
    if told == 0:
        backward(model, X[:7], Y[:7])
    if told == 2:
        with torch.no_grad():
            return equals(model(X[:7]).shape, (7, 3))
    mask = torch.tensor([True] * 7 + [False])
    return one_user_each(model, X, Y, mask)


class Pooling(nn.Linear):
    def __init__(self, pooled: bool) -> None:
        super().__init__(5, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 2, 5).mean(1) if self.pooled else x)


@refused(
    "return what belongs to a row in a row of its own, or let an example of the dataset hold all of a user's, and "
    "leave examples_per_user out",
    ways=2,
)
def test_an_output_for_each_user(told: int) -> Right:
    torch.manual_seed(1)
    if told == 2:

        class Whole(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.mean(1))

        return right(dp_compile(Whole(5, 3), backend="eager"), X.view(4, 2, 5))
    model: Any = dp_compile(Pooling(pooled=not told), backend="eager", examples_per_user=2)
    return one_user_each(model, X, Y, None)


@refused(
    "return a row for each row of the input, from two users or more, or give every user of a batch as many rows as "
    "examples_per_user says",
    ways=2,
)
def test_a_summed_loss_of_users_with_fewer_rows(told: int) -> Right:
    class Loss(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h if told == 1 else h.square().sum(1).mean()

    torch.manual_seed(1)
    model: Any = dp_compile(Loss(5, 3), backend="eager", examples_per_user=2)
    mask = torch.tensor([True] * 7 + [told == 2])
    if told == 1:
        return one_user_each(model, X, Y, mask)
    set_mask(model, mask)
    model(X).backward()
    return equals(model.grad_norms.shape, (4,))
