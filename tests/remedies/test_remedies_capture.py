"""What a call is given: what the messages about arguments say to do, tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss
from private_steps import X
from remedies import Right, plain, refused, right
from torch import Tensor, nn
from torch.nn.utils import rnn

from dpcompile import dp_compile

Y = X.flip(1) + 1
SCALE = torch.linspace(0.5, 1.5, 5)


class Net(nn.Module):
    """A linear layer, and whatever the test does with it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.function = nn.Linear(5, 5), function

    def forward(self, x: Any, more: Any = None) -> Any:
        return self.function(self.layer, x) if more is None else self.function(self.layer, x, more)


def compared(function: Callable[..., Any], *args: Any, in_dims: Any = 0, say: Any = None, loss: Any = None) -> Right:
    model = dp_compile(Net(function), in_dims=in_dims if say is None else say, backend="eager")
    return right(model, *args, in_dims=in_dims, loss=loss)


def scaled(layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    return layer(x) * scale


# --- in_dims --------------------------------------------------------------------------------------------------------


@refused("pass a clone where the other dimension is meant")
def test_one_tensor_for_two_axes(told: int) -> Right:
    square = X[:5]
    other = square.clone() if told else square
    return compared(lambda layer, x, y: layer(x) * y.t(), square, other, in_dims=(0, 1))


@refused("give the number of the dimension that holds the examples, or None", ways=2)
def test_an_axis_that_is_no_number(told: int) -> Right:
    scale: Any = SCALE.expand(8, 5).contiguous() if told == 1 else SCALE
    entry: Any = ("shared", 0, None)[told]
    return compared(scaled, X, scale, in_dims=(0, entry if told else None), say={"more": entry})


@refused("say so with in_dims, e.g. in_dims={'more': None} if it is the same for all examples")
def test_a_number_without_an_axis(told: int) -> Right:
    return compared(scaled, X, torch.tensor(0.5), in_dims=(0, None), say={"more": None} if told else 0)


@refused("pass batches of one size; name inputs that have no example axis in in_dims with None", ways=2)
def test_inputs_of_several_sizes(told: int) -> Right:
    if told == 2:
        return compared(scaled, X, SCALE, in_dims=(0, None), say={"more": None})
    return compared(scaled, X, X[: 8 if told else 7] + 1, loss=PseudoLoss(8))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bags = nn.EmbeddingBag(10, 3, padding_idx=0)

    def forward(self, ids: Tensor, starts: Tensor | None = None) -> Tensor:
        return self.bags(ids, starts)


@refused(
    "pass batches of one size; name inputs that have no example axis in in_dims with None; if 'starts' says where bags "
    "begin (EmbeddingBag), leave it out and pass ids as [B, T], filled up with padding_idx",
)
def test_bags_and_where_they_begin(told: int) -> Right:
    model = dp_compile(Bags(), backend="eager")
    if told:
        return right(model, torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]))
    return right(model, torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 3, 5]), loss=PseudoLoss(3))


@refused("give one entry per positional argument, or a dict by argument name", ways=2)
def test_axes_for_fewer_arguments(told: int) -> Right:
    say: Any = ((0,), (0, None), {"more": None})[told]
    return compared(scaled, X, SCALE, in_dims=(0, None), say=say)


@refused("its arguments are ['x', 'more']")
def test_an_axis_of_no_argument(told: int) -> Right:
    return compared(scaled, X, SCALE, in_dims=(0, None), say={"more" if told else "scale": None})


@refused("nest it like the argument")
def test_axes_of_another_structure(told: int) -> Right:
    both: Any = [0, None] if told else [0, None, 0]
    return compared(lambda layer, pair: layer(pair[0]) * pair[1], [X, SCALE], in_dims=([0, None],), say={"x": both})


@refused("pass the batch as a tensor argument of the call; in_dims says which dimension holds the examples")
def test_no_input_with_examples(told: int) -> Right:
    return compared(lambda layer, x: layer(x.t()), X.t().contiguous(), in_dims=1, say=1 if told else {"x": None})


# --- kinds of tensors -----------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, returned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cell, self.returned = nn.GRU(3, 4, batch_first=True), returned

    def forward(self, x: Any, lengths: Any = None) -> Any:
        if lengths is None:
            return self.cell(x)[1][0]
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        found, last = self.cell(packed)
        if self.returned:
            return found
        return rnn.pad_packed_sequence(found, batch_first=True, total_length=4)[0], last[0]


def masked(output: Any, rows: slice) -> Tensor:
    inside = torch.arange(4) < torch.tensor([4, 2, 3])[rows, None]
    return (output[0].square().sum(2) * inside).sum(1)


@refused("pass the padded tensor and the lengths, and mask what is behind the end of each sequence")
def test_a_packed_sequence(told: int) -> Right:
    x, lengths = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(5)), torch.tensor([4, 2, 3])
    model = dp_compile(Recurrent(), backend="eager")
    if told:
        return right(model, x, lengths, loss=masked)
    return right(model, rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), loss=masked)


@refused("return pad_packed_sequence(..) of it, and mask the loss by the lengths")
def test_a_packed_sequence_returned(told: int) -> Right:
    x, lengths = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(5)), torch.tensor([4, 2, 3])
    return right(dp_compile(Recurrent(returned=not told), backend="eager"), x, lengths, loss=masked)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@refused("pass a padded tensor and the lengths, one per example; the loss of an example is then a masked sum")
def test_ragged_sequences(told: int) -> Right:
    rows = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 3)]
    if not told:
        return compared(lambda layer, x: layer(x), torch.nested.nested_tensor(rows), loss=masked)
    padded, lengths = rnn.pad_sequence(rows, batch_first=True), torch.tensor([4, 2, 3])
    model = dp_compile(Net(lambda layer, x, n: (layer(x), n)), backend="eager")
    return right(model, padded, lengths, loss=masked)


@refused("pass it dense (x.to_dense()), or its indices and values", ways=2)
def test_a_sparse_input(told: int) -> Right:
    dense = torch.eye(8, 5)
    if told == 2:
        indices, values = torch.arange(8) % 5, dense.sum(1, keepdim=True)
        return compared(lambda layer, i, v: F.embedding(i, layer.weight.t()) * v + layer.bias, indices, values)
    return compared(lambda layer, x: layer(x), dense if told else dense.to_sparse())


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantize:DeprecationWarning")
@refused("dequantize() it, or keep int8 values and scales in plain buffers", ways=2)
def test_a_quantised_input(told: int) -> Right:
    small = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    if told == 2:
        return compared(lambda layer, q, s: layer(q.float() * s), small.int_repr(), torch.full((8, 1), 0.1))
    return compared(lambda layer, x: layer(x), small.dequantize() if told else small)


class Named(Tensor):
    """A subclass that adds nothing."""


@refused("pass the plain tensor inside it (x.as_subclass(torch.Tensor), x.full_tensor(), x.get_data(), ..)")
def test_a_subclass_of_tensors(told: int) -> Right:
    named: Tensor = X.as_subclass(Named)
    return compared(lambda layer, x: layer(x), named.as_subclass(Tensor) if told else named)


@dataclasses.dataclass
class Box:
    x: Tensor


@refused("pass tensors themselves (torch.from_numpy), or in lists, tuples and dicts", ways=4)
def test_a_tensor_in_an_object(told: int) -> Right:
    values: Any = (Box(Y), torch.from_numpy(Y.numpy()), [Y], (Y,), {"x": Y})[told]
    find: Any = (lambda v: v.x, lambda v: v, lambda v: v[0], lambda v: v[0], lambda v: v["x"])[told]
    return compared(lambda layer, x, more: layer(x) * find(more), X, values)


# --- parameters that are none ---------------------------------------------------------------------------------------


class Outside(nn.Module):
    def __init__(self, tensor: Tensor, registered: bool) -> None:
        super().__init__()
        self.layer, self.tensors = plain(), [tensor]
        if registered:
            self.extra = nn.Parameter(tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * getattr(self, "extra", self.tensors[0]))


@refused("register it as an nn.Parameter of the model, or detach it", ways=2)
def test_a_tensor_with_a_gradient(told: int) -> Right:
    tensor = SCALE.clone().requires_grad_()
    model = Outside(tensor.detach() if told == 2 else tensor, told == 1)
    return right(dp_compile(model, backend="eager"), X)


# --- what is written to, and what comes out -------------------------------------------------------------------------


@refused("clone the input before the in-place operation")
def test_an_input_and_a_view_of_it(told: int) -> Right:
    def function(layer: Any, x: Tensor, view: Tensor) -> Tensor:
        x = x.clone() if told else x
        return layer(x.mul_(2.0)) + view

    x = X.clone()
    return compared(function, x, x.view(8, 5))


@refused(
    "clone it before the in-place operation; write to parameters only between two steps (an embedding with max_norm "
    "does so in every forward)",
    ways=2,
)
def test_a_parameter_that_is_written_to(told: int) -> Right:
    def shrunk(layer: Any, x: Tensor) -> Tensor:
        weight = layer.weight.clone() if told == 1 else layer.weight
        if told < 2:
            weight.data.mul_(0.5) if not told else weight.mul_(0.5)
        return F.linear(x, weight, layer.bias)

    model = Net(shrunk)
    if told == 2:
        model.layer.weight.data.mul_(0.5)
    return right(dp_compile(model, backend="eager"), X)


@refused(
    "look for detach(), no_grad() and rounding on the way to the outputs; where no training is meant, call the model "
    "under torch.no_grad()",
    ways=2,
)
def test_an_output_without_a_gradient(told: int) -> Right:
    model: Any = dp_compile(Net(lambda layer, x: layer(x) if told == 1 else layer(x).detach()), backend="eager")
    if told == 2:
        with torch.no_grad():
            model(X)
        return right(dp_compile(plain(), backend="eager"), X)
    return right(model, X)
