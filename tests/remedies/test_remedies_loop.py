"""The loop: what its messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from private_steps import X, Y, backward, over, parts, steps
from remedies import Right, data, equals, plain, private, refused, stepped, trains
from torch import Tensor, nn

from dpcompile import PrivacyAccountant, dp_compile


@refused(
    "call loss.backward() on an output of the compiled model first; for an empty draw run the padded batch "
    "that PoissonLoader gives",
)
def test_a_step_without_a_backward(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    if told:
        backward(model)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("run forward, loss.backward() and optimizer.zero_grad() between two steps")
def test_a_second_step_on_the_same_gradients(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    optimizer.step()
    if told:
        optimizer.zero_grad()
        backward(model)
    optimizer.step()
    return stepped(model, optimizer, before, 2)


@refused("call optimizer.zero_grad() after optimizer.step()")
def test_no_zero_grad(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        backward(model)
        optimizer.step()
        if told:
            optimizer.zero_grad()
    return stepped(model, optimizer, before, 2)


@refused(
    "call the model once per backward (put both passes in one forward: return self.net(real), "
    "self.net(fake)), or run one backward per micro-batch",
    ways=2,
)
def test_two_calls_and_one_backward(told: int) -> Right:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(real), self.net(fake)

    model, optimizer = parts(Both() if told == 1 else None)
    before = [p.detach().clone() for p in model.parameters()]
    if told == 1:
        real, fake = model(X, -X)
        (F.cross_entropy(real, Y) + F.cross_entropy(fake, Y)).backward()
    elif told == 2:
        optimizer.accumulating = True
        backward(model)
        optimizer.accumulating = False
        backward(model, -X)
    else:
        (F.cross_entropy(model(X), Y) + F.cross_entropy(model(-X), Y)).backward()
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("run the forward again, or add the losses before one backward", ways=2)
def test_two_backwards_through_one_forward(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.accumulating = told == 1
    output = model(X)
    if told == 2:
        (F.cross_entropy(output, Y) + output.square().mean()).backward()
    else:
        F.cross_entropy(output, Y).backward(retain_graph=True)
        optimizer.accumulating = False
        (model(X) if told else output).square().mean().backward()
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "leave out what changed it: clip_grad_norm_ or clip_grad_value_ (every example's gradient is clipped "
    "already: max_grad_norm), a backward of the undecorated model, a regulariser on parameters in the loss "
    "(use weight_decay), an all_reduce or scaling of p.grad; to scale the loss use torch.amp.GradScaler; "
    "then call zero_grad()",
)
def test_gradients_that_are_changed(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if not told:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "call loss.backward() on an output of the compiled model first; for an empty draw run the padded batch "
    "that PoissonLoader gives",
)
def test_a_gradient_that_was_taken_out(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    if told:
        optimizer.zero_grad()
    backward(model)
    if not told:
        optimizer.zero_grad()
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "call zero_grad() of the DPOptimizer, which waits for the end of the step, and not that of the model or "
    "of the wrapped optimizer; optimizer.discard() gives the step up",
    ways=2,
)
def test_zeroed_within_a_step(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.accumulating = True
    backward(model)
    optimizer.step()
    if told == 2:
        optimizer.discard()
    elif told == 1:
        optimizer.zero_grad()
    else:
        model.zero_grad(set_to_none=False)
    optimizer.accumulating = False
    backward(model, -X)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("step the DPOptimizer, and no other optimizer over the parameters of the private model")
def test_the_inner_optimizer_is_stepped(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    (optimizer if told else optimizer.optimizer).step()
    return stepped(model, optimizer, before, 1)


@refused("step the DPOptimizer, and no other optimizer over the parameters of the private model")
def test_another_optimizer_is_stepped(told: int) -> Right:
    model, optimizer = parts()
    other: Any = optimizer if told else torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    other.step()
    return stepped(model, optimizer, before, 1)


@refused("remove the hook; change clipped sums in p.grad only through DPOptimizer")
def test_a_hook_on_a_gradient(told: int) -> Right:
    model, optimizer = parts()
    hook = next(model.parameters()).register_hook(lambda g: 2 * g)
    if told:
        hook.remove()
    return steps(model, optimizer)


@refused(
    "call dp_compile again after changing the model, and make the optimizer from the result; hold modules in "
    "nn.ModuleList or nn.ModuleDict",
)
def test_a_parameter_that_was_replaced(told: int) -> Right:
    ordinary = plain()
    model, optimizer = parts(ordinary)
    ordinary.bias = nn.Parameter(torch.zeros(3))
    if told:
        model = dp_compile(ordinary, backend="eager")
        optimizer = over(model)
    return steps(model, optimizer)


@refused(
    "call dp_compile again after changing the model, and make the optimizer from the result; hold modules in "
    "nn.ModuleList or nn.ModuleDict",
)
def test_modules_in_a_list(told: int) -> Right:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.rest: Any = nn.ModuleList([plain()]) if told else [plain()]

        def forward(self, x: Tensor) -> Tensor:
            return self.rest[0](self.first(x))

    return steps(*parts(Listed()))


@refused(
    "call the model once per batch with gradients (other calls under torch.no_grad()), and iterate over the "
    "loader anew for every epoch",
    slow=True,
)
def test_a_batch_used_twice(told: int) -> Right:
    model, optimizer, loader = private()
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in loader:
        backward(model, x, y)
        if told:
            with torch.no_grad():
                model(x)
        else:
            backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)


@refused(
    "iterate over the loader that make_private returned, and call the model with gradients once per batch "
    "(other calls under torch.no_grad()); for batches of your own use dp_compile and DPOptimizer without "
    "attaching a loader",
)
def test_the_old_loader_in_the_loop(told: int) -> Right:
    old = data()
    model, optimizer, loader = private(old)
    return trains(model, optimizer, loader if told else old)


@refused(
    "call optimizer.step() after every batch of the loader (it waits by itself where a draw goes on), or "
    "optimizer.discard() to skip one",
    ways=2,
)
def test_a_draw_without_a_step(told: int) -> Right:
    model, optimizer, loader = private()
    before, taken = [p.detach().clone() for p in model.parameters()], 0
    for i, (x, y) in enumerate(loader):
        backward(model, x, y)
        if i == 0 and told != 1:
            if told == 2:
                optimizer.discard()
            continue
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
    return stepped(model, optimizer, before, taken)


@refused(
    "call the model on the batch that the loader gave, whole (other calls under torch.no_grad()); every view "
    "of an example is part of the example: give it a dimension of its own",
)
def test_half_of_the_batch(told: int) -> Right:
    model, optimizer, loader = private(physical_batch_size=8)
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in loader.parts():
        backward(model, x if told else x[:4], y if told else y[:4])
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)


@refused(
    "where batches are taken ahead, call the model on the batch's own tensors or copies of them; compute new "
    "ones (normalise, augment) in the dataset, in collate_fn or in the model",
)
def test_tensors_computed_from_batches_taken_ahead(told: int) -> Right:
    model, optimizer, loader = private()
    before = [p.detach().clone() for p in model.parameters()]
    batches = iter(loader)
    ahead = [next(batches), next(batches)]
    for x, y in ahead:
        backward(model, x if told else 2 * x, y)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 2)


@refused("call loss.backward() first")
def test_norms_before_a_backward(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    if told:
        backward(model)
    return equals(model.grad_norms.shape, (8,))


@refused("call the model once, or model.trace(*example_inputs), then look", ways=2)
def test_a_plan_before_a_call(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    if told == 1:
        model(X)
    elif told == 2:
        model.trace(X)
    return equals("weight" in model.plan.rules(), True)


@refused("call optimizer.report(delta) of the DPOptimizer", slow=True)
def test_a_report_of_the_model_alone(told: int) -> Right:
    model, optimizer = parts(accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp"))
    steps(model, optimizer)
    return equals("epsilon" in str((optimizer if told else model).report(1e-3)).lower(), True)
