"""What cannot be proved, followed or clipped is refused, and the message says what, where and what to do."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from wrapped import Wrapper

import dpcompile
from dpcompile import DPCompileError, ExampleMixingError, PrivacyError, UnsupportedGraphError

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, T, D = 4, 3, 6


class Net(nn.Module):
    """A linear layer, then whatever the test does with its output."""

    extra: Any

    def __init__(self, function: Callable[..., Any], extra: Any = None) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(D, D), function
        if isinstance(extra, Tensor) and not isinstance(extra, nn.Parameter):
            self.register_buffer("extra", extra)
        else:
            self.extra = extra

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.function(self, x, *more)


def refused(
    kind: type[DPCompileError], match: str, model: nn.Module, *args: Any, calls: int = 1, **options: Any
) -> str:
    """Train for some calls; the message of the refusal."""
    private = dp_compile(model, backend="eager", **options)
    with pytest.raises(kind, match=match) as caught:
        for _ in range(calls):
            batch = args if calls == 1 else [torch.randn_like(a) for a in args]
            train_step(private, batch, {}, PseudoLoss(B))
            private.zero_grad()
    assert "what to do: " in str(caught.value)
    return str(caught.value)


def names_line_of(message: str, source: object) -> None:
    """The message names a line inside ``source``."""
    lines, first = inspect.getsourcelines(source)  # type: ignore[arg-type]
    found = re.search(r"test_refusals\.py:(\d+)", message)
    assert found and first <= int(found[1]) < first + len(lines), message


# --- what a graph returns, and what it writes -------------------------------------------------------------------------


def view_of_parameter(net: Net, x: Tensor) -> Any:
    return net.layer(x), net.extra[0]


def transposed_parameter(net: Net, x: Tensor) -> Any:
    return net.layer(x), net.extra.t().t()[:B]


@pytest.mark.parametrize("function", [view_of_parameter, transposed_parameter], ids=lambda f: f.__name__)
def test_view_of_a_parameter_returned(function: Any) -> None:
    """AOTAutograd makes the view behind the graph: its gradient would have reached the parameter unclipped."""
    private = dp_compile(Net(function, nn.Parameter(torch.randn(B, 2))), backend="eager")
    refused = "(parameter 'extra'|output 1 of the model, which) does not come from the examples"
    with pytest.raises(DPCompileError, match=refused) as caught:
        h, view = private(torch.randn(B, D))
        (h.square().mean() + view.sum()).backward()
    names_line_of(str(caught.value), function)
    assert private.extra.grad is None


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_view_of_a_parameter_returned_on_the_side(backend: str) -> None:
    """It may be looked at; the parameter's gradient is that of the examples, none."""
    private = dp_compile(Net(view_of_parameter, nn.Parameter(torch.randn(B, 2))), backend=backend)
    h, view = private(torch.randn(B, D))
    h.square().mean().backward()
    assert torch.equal(view, private.extra[0]) and not private.extra.grad.any()
    _, view = private(torch.randn(B, D))
    with pytest.raises(DPCompileError, match="output 1 of the model, which does not come from the examples"):
        (0 * view.sum()).backward()


def written_parameter(net: Net, x: Tensor) -> Any:
    with torch.no_grad():
        net.extra.div_(net.extra.norm())
    return net.layer(x) * net.extra


def written_by_data(net: Net, x: Tensor) -> Any:
    net.extra.data.mul_(0.9).add_(x.mean())
    return net.layer(x)


@pytest.mark.parametrize("function", [written_parameter, written_by_data], ids=lambda f: f.__name__)
def test_write_to_a_trained_parameter(function: Any) -> None:
    names_line_of(
        refused(DPCompileError, "writes to .*'extra'", Net(function, nn.Parameter(torch.ones(D))), torch.randn(B, D)),
        function,
    )


def frozen_written(net: Net, x: Tensor) -> Any:
    net.extra.data.add_(x.mean(0))
    return net.layer(x)


def replaced_data(net: Net, x: Tensor) -> Any:
    net.extra.data = x.detach().mean(0)
    return net.layer(x)


def written_slice(net: Net, x: Tensor) -> Any:
    net.extra[0] = x.detach().mean()
    return net.layer(x)


@pytest.mark.parametrize("batch", [B, 1])
@pytest.mark.parametrize("function", [frozen_written, replaced_data, written_slice], ids=lambda f: f.__name__)
def test_examples_written_into_the_model(function: Any, batch: int) -> None:
    """Whatever operation writes them."""
    model, x = Net(function, torch.zeros(D)), torch.randn(batch, D)
    message = refused(ExampleMixingError, "buffer 'extra' is written", model, x)
    names_line_of(message, function)


def test_input_overwritten_by_a_mixture() -> None:
    def function(net: Net, x: Tensor) -> Any:
        y = net.layer(x.clone())
        x.sub_(x.mean(0))
        return y

    names_line_of(refused(ExampleMixingError, "input 'x' is overwritten", Net(function), torch.randn(B, D)), function)


def test_input_overwritten_in_place_is_right() -> None:
    """Where every example keeps its place."""
    model = Net(lambda net, x: net.layer(x.mul_(2)))
    x = torch.randn(B, D)
    truth = clip(per_example_gradients(model, (x.clone(),), {}, PseudoLoss(B)), 0.5)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    given = x.clone()
    train_step(private, (given,), {}, PseudoLoss(B))
    assert_right(private, truth, 1e-4)
    assert torch.equal(given, 2 * x)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_buffer_read_before_it_is_written(backend: str) -> None:
    """The backward uses the value that the forward used, not the new one."""

    def function(net: Net, x: Tensor) -> Any:
        before = net.extra.clone()
        net.extra.add_(1)
        return net.layer(x) * before * net.extra.exp()

    torch.manual_seed(0)
    model, x = Net(function, torch.ones(D)), torch.randn(B, D)
    fresh = [torch.ones(D) for _ in range(B)]

    class Fresh(Net):
        def forward(self, x: Tensor, *more: Any) -> Any:
            self.extra = fresh.pop()
            return super().forward(x, *more)

    plain = Fresh(function, torch.ones(D))
    plain.load_state_dict(model.state_dict())
    truth = clip(per_example_gradients(plain, (x,), {}, PseudoLoss(B)), 0.5)
    private = dp_compile(model, max_grad_norm=0.5, backend=backend)
    train_step(private, (x,), {}, PseudoLoss(B))
    assert_right(private, truth, 1e-4)


def test_no_differentiable_output() -> None:
    model = Net(lambda net, x: net.layer(x).detach())
    refused(UnsupportedGraphError, "no output of the model depends", model, torch.randn(B, D))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hook_on_a_parameter(register: str) -> None:
    """It would silently not run."""
    model = Net(lambda net, x: net.layer(x))
    getattr(model.layer.weight, register)(lambda value: None)
    refused(PrivacyError, "'layer.weight' has a hook on its gradient", model, torch.randn(B, D))


# --- what a model keeps -----------------------------------------------------------------------------------------------


def keeps_argument(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    h = h if net.extra is None else h + net.extra.mean(0)
    net.extra = x
    return h


def keeps_view(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    h = h if net.extra is None else h + net.extra[0]
    net.extra = (x.detach()[:2] * 1)[:, :3].expand(2, 3).repeat(1, 2)
    return h


def keeps_array(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    h = h if net.extra is None else h + torch.from_numpy(net.extra)
    net.extra = h.detach().mean(0).numpy()
    return h


def keeps_in_queue(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    h = h + torch.stack(list(net.extra)).mean(0) if len(net.extra) else h
    net.extra.append(h.detach().mean(0))
    return h


@pytest.mark.parametrize(
    ("function", "extra"),
    [(keeps_argument, None), (keeps_view, None), (keeps_array, None), (keeps_in_queue, collections.deque(maxlen=2))],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_values_of_a_batch_kept_for_the_next(function: Any, extra: Any) -> None:
    refused(ExampleMixingError, "left there with examples in it", Net(function, extra), torch.randn(B, D), calls=3)


def test_number_kept_for_the_next_batch() -> None:
    def function(net: Net, x: Tensor) -> Any:
        h = net.layer(x) * net.extra
        net.extra = net.extra + x.sum().item()
        return h

    match = "reads a Python number out of the values of examples"
    refused(ExampleMixingError, match, Net(function, 1.0), torch.randn(B, D))


def test_attribute_that_shares_memory_with_an_argument() -> None:
    x = torch.randn(B, D)
    model = Net(lambda net, x: net.layer(x) - net.extra[0].mean(0), [x.view(-1, D)])
    refused(ExampleMixingError, "shares the memory of an argument", model, x)


def test_freed_memory_is_forgotten() -> None:
    """A new tensor at the address of an old output is not taken for it."""
    model = Net(lambda net, x: net.layer(x) * net.extra[0], [torch.ones(D)])
    private = dp_compile(model, backend="eager")
    for _ in range(100):
        train_step(private, (torch.randn(B, D),), {}, PseudoLoss(B))
        private.zero_grad()
        model.extra[0] = torch.ones(D)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dpcompile_tests::pretends", mutates_args=(), tags=(torch.Tag.pointwise,))
def pretends(x: Tensor) -> Tensor:
    return x - x.mean(0)


@pretends.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


pretends.register_autograd(lambda ctx, g: g)


def test_foreign_operator_tagged_pointwise() -> None:
    """A tag is a hint to a compiler; the proof takes nobody's word but a registered rule's."""

    def function(net: Net, x: Tensor) -> Any:
        return pretends(net.layer(x))

    match = "no rule for `dpcompile_tests::pretends`"
    message = refused(UnsupportedGraphError, match, Net(function), torch.randn(B, D))
    assert "register_axis_rule" in message
    names_line_of(message, function)


@torch.library.custom_op("dpcompile_tests::record", mutates_args=("into",))
def record(into: Tensor, x: Tensor) -> None:
    into.copy_(x.mean(0))


@record.register_fake
def _(into: Tensor, x: Tensor) -> None:
    return None


def test_foreign_operator_that_writes_to_a_buffer() -> None:
    def function(net: Net, x: Tensor) -> Any:
        record(net.extra, x)
        return net.layer(x)

    refused(ExampleMixingError, "buffer 'extra' is written", Net(function, torch.zeros(D)), torch.randn(B, D))


def masked_look_up(net: Net, x: Tensor) -> Any:
    mask = x[:, 0] > 0
    return net.layer(x) * torch.ops.aten._unsafe_masked_index(net.extra, mask.flip(0), [torch.arange(B)], 0.0)[:, None]


def mask_from_another(net: Net, x: Tensor) -> Any:
    h = net.layer(x).clone()
    h[(x > 0).flip(0)] = 0
    return h


def value_of_one(net: Net, x: Tensor) -> Any:
    h = net.layer(x).clone()
    h[x > 0] = h[0, 0]
    return h


@pytest.mark.parametrize("function", [masked_look_up, mask_from_another, value_of_one], ids=lambda f: f.__name__)
def test_masks_carry_examples_too(function: Any) -> None:
    names_line_of(refused(DPCompileError, "mixes examples", Net(function, torch.randn(B)), torch.randn(B, D)), function)


def test_fresh_random_numbers_in_place() -> None:
    """``uniform_`` and its like overwrite whatever was there."""
    model = Net(lambda net, x: F.rrelu(net.layer(x), training=True).sum(1))
    private = dp_compile(model, backend="eager")
    train_step(private, (torch.randn(B, D),), {}, PseudoLoss(B))
    assert torch.isfinite(private.grad_norms).all()


def test_one_draw_for_each_example() -> None:
    model = Net(lambda net, x: net.layer(x).gather(1, torch.multinomial(x.softmax(1), 2)))
    private = dp_compile(model, backend="eager")
    train_step(private, (torch.randn(B, D),), {}, PseudoLoss(B))
    assert torch.isfinite(private.grad_norms).all()


# --- kinds of tensors -------------------------------------------------------------------------------------------------


class Named(Tensor):
    """A subclass that adds nothing."""


def linear(net: Net, x: Tensor) -> Any:
    return net.layer(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantize:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.nested.nested_tensor([torch.randn(2, D), torch.randn(3, D)]), "nested"),
        (lambda: torch.nested.nested_tensor([torch.randn(2, D), torch.randn(3, D)], layout=torch.jagged), "nested"),
        (lambda: torch.eye(B, D).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.eye(B, D).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.randn(B, D), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.randn(B, D).as_subclass(Named), "Named, a subclass of torch.Tensor"),
        (lambda: Wrapper(torch.randn(B, D)), "Wrapper, a subclass of torch.Tensor"),
    ],
    ids=["nested", "jagged", "coo", "csr", "quantised", "subclass", "wrapper"],
)
def test_inputs_that_are_no_plain_tensors(make: Callable[[], Tensor], match: str) -> None:
    private = dp_compile(Net(linear), backend="eager")
    with pytest.raises(UnsupportedGraphError, match=f"input 'x' is .*{match}") as caught:
        private(make())
    assert "what to do: " in str(caught.value)


def test_parameters_and_buffers_that_are_no_plain_tensors() -> None:
    x = torch.randn(B, D)
    for trainable in (True, False):
        model = Net(linear)
        model.layer.weight = nn.Parameter(Wrapper(torch.randn(D, D)), requires_grad=trainable)
        refused(UnsupportedGraphError, "parameter 'layer.weight' is a .*Wrapper", model, x)
    reads_sparse = Net(lambda net, x: net.layer(x) @ net.extra, torch.eye(D).to_sparse())
    refused(UnsupportedGraphError, "buffer 'extra' is .*sparse", reads_sparse, x)
    refused(UnsupportedGraphError, "no plain tensor", Net(lambda net, x: Wrapper(net.layer(x))), x)


def test_renamed_parameters_are_right() -> None:
    class Own(nn.Parameter):
        pass

    model, x = Net(linear), torch.randn(B, D)
    truth = clip(per_example_gradients(model, (x,), {}, PseudoLoss(B)), 0.5)
    model.layer.weight = Own(model.layer.weight.detach())
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, PseudoLoss(B))
    assert_right(private, truth, 1e-4)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(D, D, batch_first=True)

    def forward(self, x: Any, lengths: Any = None) -> Any:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.cell(x)[1][0]


@pytest.mark.parametrize("in_dims", [0, None])
def test_packed_sequence_given(in_dims: Any) -> None:
    packed = pack_sequence([torch.randn(3, D), torch.randn(2, D)])
    refused(UnsupportedGraphError, "input 'x' is a PackedSequence", Packs(), packed, in_dims=in_dims)


# --- graph breaks -----------------------------------------------------------------------------------------------------


def sparse_inside(net: Net, x: Tensor) -> Any:
    return torch.sparse.mm(net.layer(x).to_sparse(), net.layer.weight)


def branches(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    return h * 2 if h.sum() > 0 else h


def differentiates(net: Net, x: Tensor) -> Any:
    x = x.requires_grad_()
    return net.layer(x) + torch.autograd.grad(net.layer(x).tanh().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(
    ("function", "remedy"),
    [(sparse_inside, "dense tensors"), (branches, "torch.where"), (differentiates, "torch.func.grad")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_to_do_about_graph_breaks(function: Any, remedy: str) -> None:
    """The line, the reason, and a remedy that fits it."""
    message = refused(UnsupportedGraphError, "one graph|branches on the values", Net(function), torch.randn(B, D))
    assert remedy in message.split("what to do: ")[1]
    names_line_of(message, function)


def test_what_to_do_about_backward_hooks() -> None:
    model = Net(linear)
    model.layer.register_full_backward_hook(lambda module, before, after: None)
    message = refused(UnsupportedGraphError, "one graph", model, torch.randn(B, D))
    assert "hooks" in message.split("what to do: ")[1]


# --- experts, and parts left out by chance ----------------------------------------------------------------------------


def sorted_by_expert(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    order = x.argmax(1).argsort()
    return torch.empty_like(h).index_copy(0, order, h)


def experts_that_are_asked_for(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    for expert in range(2):
        chosen = x.argmax(1) == expert
        if chosen.any():
            h = h + chosen[:, None] * expert
    return h


def rows_of_an_expert(net: Net, x: Tensor) -> Any:
    h = net.layer(x)
    rows = torch.where(x.argmax(1) == 0)[0]
    return h.index_add(0, rows, h[rows])


def drops_a_layer(net: Net, x: Tensor) -> Any:
    return net.layer(x) if torch.rand([]) > 0.5 else x * net.layer.bias


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (sorted_by_expert, "`sort` mixes examples"),
        (experts_that_are_asked_for, "branches on the values of tensors"),
        (rows_of_an_expert, "it picks rows out of all examples"),
        (drops_a_layer, "branches on the values of tensors"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_experts_and_random_depth(function: Any, match: str) -> None:
    names_line_of(refused(DPCompileError, match, Net(function), torch.randn(B, D)), function)


# --- arguments that hold tensors --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Box:
    x: Any


@pytest.mark.parametrize(
    ("hide", "find"),
    [
        (Box, lambda box: box.x),
        (lambda x: types.SimpleNamespace(x=x), lambda box: box.x),
        (lambda x: collections.UserDict(x=x), lambda box: box["x"]),
        (lambda x: [Box([x])], lambda box: box[0].x[0]),
        (lambda x: functools.partial(torch.neg, x), lambda box: box()),
        (lambda x: lambda: x, lambda box: box()),
        (lambda x: lambda y=x: y, lambda box: box()),
        (lambda x: weakref.ref(x), lambda box: box()),
        (lambda x: x.numpy(), torch.from_numpy),
        (lambda x: Box(x.numpy()), lambda box: torch.from_numpy(box.x)),
        (lambda x: Net(linear, x), lambda box: box.extra),
    ],
    ids=["dataclass", "namespace", "UserDict", "list", "partial", "closure", "default", "weakref", "NumPy",
         "NumPy in an object", "module"],
)  # fmt: skip
def test_tensors_hidden_in_arguments(hide: Any, find: Any) -> None:
    hidden = torch.randn(B, D)
    model = Net(lambda net, x, box: net.layer(x) - find(box).mean(0))
    match = "which is inside an object or an array of NumPy: it is not known whether it has an example axis"
    refused(UnsupportedGraphError, match, model, torch.randn(B, D), hide(hidden))
