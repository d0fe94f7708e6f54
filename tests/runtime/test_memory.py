"""What a forward without gradients leaves of its examples, and what a forward with gradients may read."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import DPOptimizer, compile_step
from dpcompile.errors import ExampleMixingError, UnsupportedGraphError

dp_compile: Any = dpcompile.dp_compile
B, D = 6, 4
KEPT: dict[str, Any] = {}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.zeros(D)


class Net(nn.Module):
    """Leaves something in ``collect`` and reads it in training, by one of the pairs below."""

    running: Tensor
    rows: Tensor
    count: Tensor
    wide: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, 3)
        self.inner, self.centre, self.items, self.named = Inner(), torch.zeros(D), [torch.zeros(D)], {"a": 0.0}
        self.array, self.number = numpy.zeros(D, dtype=numpy.float32), 0.0
        self.frozen = nn.Parameter(torch.zeros(D), requires_grad=False)
        self.register_buffer("running", torch.zeros(D))
        self.register_buffer("rows", torch.zeros(3, D))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("wide", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, mode: str = "train") -> Any:
        h = self.layer(x)
        write, read = WAYS[self.way]
        if mode == "collect":
            write(self, h.detach())
        elif mode == "train":
            h = h + read(self)
        return self.head(h)


def attribute(net: Net, h: Tensor) -> None:
    net.centre = h.mean(0)


def attribute_of_a_part(net: Net, h: Tensor) -> None:
    net.inner.centre = h.mean(0)


def in_a_list(net: Net, h: Tensor) -> None:
    net.items.append(h)


def in_a_global(net: Net, h: Tensor) -> None:
    KEPT["h"] = h


def buffer_in_place(net: Net, h: Tensor) -> None:
    net.running.mul_(0.9).add_(h.mean(0))


def view_of_a_buffer(net: Net, h: Tensor) -> None:
    net.rows.view(-1)[:D].copy_(h[0])


def buffer_replaced(net: Net, h: Tensor) -> None:
    net.running = h.mean(0)


def numpy_array(net: Net, h: Tensor) -> None:
    net.array = h.mean(0).numpy()


def frozen_parameter(net: Net, h: Tensor) -> None:
    net.frozen.copy_(h.mean(0))


def trained_parameter(net: Net, h: Tensor) -> None:
    net.layer.bias.data.copy_(h.mean(0))


def number(net: Net, h: Tensor) -> None:
    net.number = 0.9 * net.number + h.mean().item()


def number_in_a_dict(net: Net, h: Tensor) -> None:
    net.named["a"] = float(h.mean())


def counted(net: Net, h: Tensor) -> None:
    net.count.add_((h > 0).sum())


def total(net: Net, h: Tensor) -> None:
    net.wide.add_(h.sum())


def times_counted(net: Net) -> Tensor:
    """The graph has the count as a constant, and not as an input."""
    value = torch.zeros(D)
    for _ in range(int(net.count) % 5):
        value = value + 1
    return value


WAYS: dict[str, tuple[Any, Any]] = {
    "centre": (attribute, lambda net: net.centre),
    "inner.centre": (attribute_of_a_part, lambda net: net.inner.centre),
    "items.1": (in_a_list, lambda net: net.items[-1].mean(0)),
    "KEPT['h']": (in_a_global, lambda net: KEPT["h"].mean(0)),
    "running": (buffer_in_place, lambda net: net.running),
    "rows": (view_of_a_buffer, lambda net: net.rows[0]),
    "running'": (buffer_replaced, lambda net: net.running),
    "array": (numpy_array, lambda net: torch.from_numpy(net.array)),
    "frozen": (frozen_parameter, lambda net: net.frozen),
    "layer.bias": (trained_parameter, lambda net: 0.0),
    "number": (number, lambda net: net.number),
    "named.a": (number_in_a_dict, lambda net: net.named["a"]),
    "count": (counted, times_counted),
    "wide": (total, lambda net: net.wide.item()),
}


def made(way: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return dp_compile(Net(way), max_grad_norm=0.1, **{"backend": "eager", **options})


def collect(model: Any) -> None:
    with torch.no_grad():
        model(torch.randn(B, D), mode="collect")


def train(model: Any) -> None:
    model(torch.randn(B, D)).square().sum(1).mean().backward()


def check_refused(model: Any, way: str) -> None:
    with pytest.raises(ExampleMixingError) as refused:
        train(model)
    assert way in str(refused.value) and "earlier call" in str(refused.value)
    assert "what to do: " in str(refused.value)


@pytest.mark.parametrize("way", WAYS)
def test_left_without_gradients_and_read_in_training(way: str) -> None:
    """Row 0 of what was collected is in no batch that is trained on: nothing would clip its influence."""
    model = made(way)
    collect(model)
    check_refused(model, way)


@pytest.mark.parametrize(
    ("way", "options"),
    [("running", {"backend": "inductor"}), ("running", {"regions": "blocks"}), ("centre", {"regions": "breaks"})],
)
def test_left_without_gradients_however_it_is_compiled(way: str, options: Any) -> None:
    model = made(way, **options)
    collect(model)
    check_refused(model, way)


def test_left_in_inference_mode() -> None:
    model = made("running")
    with torch.inference_mode():
        model(torch.randn(B, D), mode="collect")
    check_refused(model, "running")


def test_left_while_all_weights_were_frozen() -> None:
    model = made("centre")
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    model(torch.randn(B, D), mode="collect")
    for p in trained:
        p.requires_grad_(True)
    check_refused(model, "centre")


def test_left_between_two_steps() -> None:
    """What was compiled when the attribute held nothing is not run on what it holds now."""
    model = made("centre")
    train(model)
    collect(model)
    check_refused(model, "centre")


class Eager(Net):
    """Computes behind a graph break what it keeps."""

    def forward(self, x: Tensor, mode: str = "train") -> Any:
        h = self.layer(x)
        if mode == "collect":
            torch._dynamo.graph_break()
            keep(self, h)  # type: ignore[call-arg]
            return self.head(h)
        return self.head(h + self.centre) * (1 + self.number)


@torch._dynamo.disable
def keep(net: Net, h: Tensor) -> None:
    if net.way == "centre":
        net.centre = h.detach().mean(0)
    else:
        net.number = sum(h.mean(0).tolist())


@pytest.mark.parametrize("way", ["centre", "number"])
def test_left_by_python_between_graphs(way: str) -> None:
    torch.manual_seed(0)
    model = dp_compile(Eager(way), backend="eager", regions="breaks")
    collect(model)
    with pytest.raises(ExampleMixingError, match=f"'?{way}'?, (and|which) an earlier call"):
        train(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("way", ["running", "number"])
def test_a_copy_of_the_model_holds_what_the_model_held(way: str, copied: Any) -> None:
    model = made(way)
    collect(model)
    check_refused(copied(model), way)


Decorated = dp_compile(max_grad_norm=0.1, backend="eager")(Net)
Decorated.__qualname__ = Decorated.__name__ = "Decorated"


def test_a_copy_of_an_instance_of_a_decorated_class() -> None:
    model = Decorated("running")
    collect(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_refused(copied, "running")
    train(Decorated("running"))


def test_compile_step_reads_what_was_left() -> None:
    model = made("running")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=B
    )
    step = compile_step(model, F.cross_entropy, optimizer)
    step(torch.randn(B, D), torch.randint(0, 3, (B,)))
    collect(model)
    with pytest.raises(ExampleMixingError, match="the model reads 'running'"):
        step(torch.randn(B, D), torch.randint(0, 3, (B,)))


# --- what users rightly do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["running", "number"])
def test_kept_and_not_read_again(way: str) -> None:
    """Caches of generation, statistics for an evaluation after training."""
    model = made(way)
    for _ in range(2):
        collect(model)
        model(torch.randn(B, D), mode="skip").square().sum(1).mean().backward()
        model.zero_grad()
    with torch.no_grad():
        model(torch.randn(B, D))


def test_the_remedy_works() -> None:
    model = made("centre")
    collect(model)
    check_refused(model, "centre")
    model.centre = torch.zeros(D)
    train(model)
    collect(copy.deepcopy(model))
    model.zero_grad()
    train(model)
    model = made("number")
    collect(model)
    check_refused(model, "number")
    model.number = 0.0
    train(model)


class Shared(nn.Module):
    """Keeps a counter, an average of its weights, and returns a number."""

    count: Tensor
    average: Tensor
    heat: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 3)
        self.steps = 0
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(3, D))
        self.register_buffer("heat", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        self.steps += 1
        self.heat.mul_(0.5)
        self.average.lerp_(self.layer.weight.detach(), 0.1)
        out = self.layer(x) + x @ self.average.T + self.count
        return out if torch.is_grad_enabled() else (out, out.mean().item())


def test_what_depends_on_no_example_is_kept_and_read() -> None:
    torch.manual_seed(0)
    plain = Shared()
    model = dp_compile(copy.deepcopy(plain), max_grad_norm=0.5, backend="eager")
    for _ in range(2):
        x = torch.randn(B, D)
        with torch.no_grad():
            _, mean = model(x)
            assert mean == pytest.approx(plain(x)[1], rel=1e-5)
        model.zero_grad()
        torch.testing.assert_close(train_step(model, (x,), {}, PseudoLoss(B)), plain(x))
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


# --- a buffer of one number -------------------------------------------------------------------------------------------


class Scalar(nn.Module):
    value: Tensor

    def __init__(self, write: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.write = nn.Linear(D, 3), write
        self.register_buffer("value", torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.write == "schedule":
            self.value.mul_(0.5).add_(0.125)
        elif self.write == "read":
            self.value.copy_(self.value * 0.5)
            return h * self.value.item()
        elif self.write == "chain":
            self.value.mul_(0.9).add_(h.detach().mean())
        elif self.write == "lerp":
            self.value.lerp_(h.detach().mean().to(self.value.dtype), 0.1)
        elif self.write == "copy":
            self.value[...] = h.detach().mean()
        else:
            self.value.data.view(-1).add_(h.detach().mean())
        return h * self.value


@pytest.mark.parametrize("write", ["schedule", "read"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_written_number_is_the_plain_models(write: str, dtype: torch.dtype) -> None:
    """Torch before 2.14 leaves out writes to a float64 buffer of one number, and reads what it was before."""
    torch.manual_seed(0)
    plain = Scalar(write, dtype)
    model = dp_compile(copy.deepcopy(plain), backend="eager")
    for _ in range(3):
        x = torch.randn(B, D)
        torch.testing.assert_close(model(x), plain(x))
        assert model.value == plain.value


@pytest.mark.parametrize("write", ["chain", "lerp", "copy", "data"])
def test_a_number_of_examples_in_a_buffer(write: str) -> None:
    model = dp_compile(Scalar(write, torch.float64), backend="eager")
    with pytest.raises(ExampleMixingError, match="buffer 'value' is written with values that depend on the examples"):
        model(torch.randn(B, D))


def test_numpy_argument() -> None:
    """An array is no tensor of the call, so nobody said whether it holds examples."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, 3)

        def forward(self, x: Tensor, y: Any) -> Tensor:
            return self.layer(x - torch.from_numpy(y).mean(0))

    with pytest.raises(UnsupportedGraphError, match="an array of NumPy"):
        dp_compile(Two(), backend="eager")(torch.randn(B, D), numpy.ones((B, D), dtype=numpy.float32))


# --- numbers ----------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["low", "high"])


class Holder:
    mean = 0.0


class Numbers(nn.Module):
    """Keeps numbers of the examples of a call without gradients; reads them in training."""

    buf: Tensor
    count: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.head = way, nn.Linear(D, D), nn.Linear(D, 3)
        self.k, self.l, self.flag, self.text, self.z, self.steps = 1.0, [1.0, 2.0], False, "1", 1j, 0
        self.pair, self.keyed, self.queue = Pair(1.0, 2.0), {0: 1.0, (1, 2): 1.0, 3: 2.0}, collections.deque([1.0])
        self.holder, self.rows, self.drop, self.array = Holder(), torch.zeros(2), nn.Dropout(0.0), numpy.ones(2)
        self.drop.train(False)
        self.register_buffer("buf", torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, mode: str = "train") -> Tensor:
        write, read = NUMBERS[self.way][:2]
        self.steps += 1
        if mode == "collect":
            write(self, x)
        elif mode == "move":
            MOVES[self.way](self)
        elif mode == "train":
            return self.head(self.layer(x) * read(self))
        elif mode == "public":
            return self.head(self.layer(x) * (self.l[1] + self.keyed[3] + self.steps + self.count))
        return self.head(self.layer(x))


def put(name: str, value: Any = lambda x: x.mean().item()) -> Any:
    return lambda net, x: setattr(net, name, value(x))


def put_in(name: str, key: Any) -> Any:
    return lambda net, x: getattr(net, name).__setitem__(key, x.mean().item())


def positive(x: Tensor) -> bool:
    return bool(abs(x.mean()) >= 0)


def size_in_a_buffer(net: Numbers, x: Tensor) -> None:
    size = len(x.nonzero())
    net.buf.add_(size)


def read_k(net: Numbers) -> float:
    return net.k


NUMBERS: dict[str, tuple[Any, Any, str]] = {
    "tuple": (put("pair", lambda x: (x.mean().item(), 1.0)), lambda net: net.pair[0], "pair.0"),
    "namedtuple": (put("pair", lambda x: Pair(1.0, x.mean().item())), lambda net: net.pair.high, "pair.1"),
    "tuple in a dict": (
        lambda net, x: net.keyed.update(k=(x.mean().item(),)), lambda net: net.keyed["k"][0], "keyed.k.0"
    ),
    "key 0": (put_in("keyed", 0), lambda net: net.keyed[0], "keyed.0"),
    "key (1, 2)": (put_in("keyed", (1, 2)), lambda net: net.keyed[1, 2], "keyed.(1, 2)"),
    "key a.b": (put_in("keyed", "a.b"), lambda net: net.keyed["a.b"], "keyed.a.b"),
    "key a'b": (put_in("keyed", "a'b"), lambda net: net.keyed["a'b"], "keyed.a'b"),
    "deque": (lambda net, x: net.queue.append(x.mean().item()), lambda net: net.queue[-1], "queue.1"),
    "object": (lambda net, x: setattr(net.holder, "mean", x.mean().item()), lambda net: net.holder.mean, "holder.mean"),
    "sum of a list": (put_in("l", 0), lambda net: sum(net.l), "l.0"),
    "size": (put("k", lambda x: x[x > 0].shape[0]), read_k, "k"),
    "nonzero": (put("k", lambda x: len(x.nonzero())), read_k, "k"),
    "unique": (put("k", lambda x: x.round().unique().numel()), read_k, "k"),
    "size in a buffer": (size_in_a_buffer, lambda net: net.buf, "buf"),
    "ones": (put("buf", lambda x: torch.ones(x[x > 0].shape[0]).sum()), lambda net: net.buf, "buf"),
    "rows": (put("rows", lambda x: x[x > 0]), lambda net: len(net.rows), "rows"),
    "array": (lambda net, x: net.array.fill(x.mean().numpy()), lambda net: torch.from_numpy(net.array)[0], "array"),
    "number": (put("k"), read_k, "k"),
}  # fmt: skip
EXACT = tuple(NUMBERS)
NUMBERS |= {
    "item in a buffer": (lambda net, x: net.buf.fill_(x.mean().item()), lambda net: net.buf, "buf"),
    "item added": (lambda net, x: net.buf.add_(x.mean().item()), lambda net: net.buf, "buf"),
    "tensor of an item": (put("buf", lambda x: torch.tensor(x.mean().item())), lambda net: net.buf, "buf"),
    "bool": (put("flag", positive), lambda net: 5.0 if net.flag else 7.0, "flag"),
    "bool for a number": (put("k", positive), lambda net: 5.0 if net.k else 7.0, "k"),
    "str": (put("text", lambda x: str(x.mean().item())), lambda net: float(net.text), "text"),
    "complex": (put("z", lambda x: complex(x.mean().item(), 1)), lambda net: net.z.real, "z"),
    "mode of a part": (
        lambda net, x: net.drop.train(positive(x)), lambda net: 5.0 if net.drop.training else 7.0, "drop.training"
    ),
    "numpy": (put("k", lambda x: float(numpy.mean(x.numpy()))), read_k, "k"),
}  # fmt: skip
MOVES: dict[str, Any] = {
    "number": lambda net: net.buf.fill_(net.k),
    "tuple": lambda net: net.l.__setitem__(0, net.pair[0] * 2),
}


def with_numbers(way: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return dp_compile(Numbers(way), backend="eager", **options)


def check_number_refused(model: Any, path: str) -> None:
    with pytest.raises(ExampleMixingError) as refused:
        train(model)
    assert f"'{path}'" in str(refused.value) and "earlier call without gradients" in str(refused.value)
    assert "what to do: " in str(refused.value)


@pytest.mark.parametrize("way", EXACT)
def test_a_number_however_it_is_kept(way: str) -> None:
    model = with_numbers(way)
    collect(model)
    check_number_refused(model, NUMBERS[way][2])


@pytest.mark.parametrize("way", [w for w in NUMBERS if w != "array"])
def test_a_number_behind_a_graph_break(way: str) -> None:
    model = with_numbers(way, regions="breaks")
    collect(model)
    check_number_refused(model, NUMBERS[way][2])


@pytest.mark.parametrize(("way", "read"), [("number", "buf"), ("tuple", "l")])
@pytest.mark.parametrize("regions", [None, "breaks"])
def test_a_kept_number_written_on_without_gradients(way: str, read: str, regions: Any) -> None:
    model = with_numbers(way, regions=regions)
    collect(model)
    with torch.no_grad():
        model(torch.randn(B, D), mode="move")
    model.k, model.pair, model.steps = 1.0, Pair(1.0, 2.0), 0
    model.way = "item in a buffer" if read == "buf" else "sum of a list"
    check_number_refused(model, "buf" if read == "buf" else "l.0")


def test_compile_step_reads_a_number() -> None:
    model = with_numbers("number")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=B
    )
    step = compile_step(model, F.cross_entropy, optimizer)
    collect(model)
    with pytest.raises(ExampleMixingError, match="reads the number in 'k'"):
        step(torch.randn(B, D), torch.randint(0, 3, (B,)))


def helper(model: Any, h: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    if not torch.is_grad_enabled():
        model.k = float(h.sum())
        return h
    return h * model.k


@torch._dynamo.disable
def unseen(model: Any) -> Any:
    return 2 * model.k


class Helped(nn.Module):
    """Reads its number in a function, as a local variable, or where torch does not look."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.k = way, nn.Linear(D, 3), 1.0

    def forward(this: Any, x: Tensor, mode: str = "train") -> Tensor:  # type: ignore[reportSelfClsParameterName]  # noqa: N805
        h = this.layer(x)
        if mode == "collect" or this.way == "helper":
            return helper(this, h)
        if this.way == "local":
            k = 2 * this.k
            torch._dynamo.graph_break()
            return h * k
        return h * unseen(this)


@pytest.mark.parametrize("way", ["helper", "local", "unseen"])
def test_a_number_that_python_reads_between_graphs(way: str) -> None:
    model = dp_compile(Helped(way), backend="eager", regions="breaks")
    train(model)
    collect(model)
    check_number_refused(model, "k")
    model.k = 1.0
    train(model)


@pytest.mark.parametrize("way", ["centre", "running", "number"])
@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, nn.Sequential], ids=["itself", "copied", "wrapped"])
def test_compiled_anew(way: str, again: Any) -> None:
    """What was left stays with the model, whoever compiles it next."""
    torch.manual_seed(0)
    net = Net(way)
    collect(dp_compile(net, backend="eager"))
    model = dp_compile(again(net), backend="eager")
    check_refused(model, way)


def test_two_private_views_of_one_model() -> None:
    net = Net("running")
    one, other = (dp_compile(net, backend="eager") for _ in range(2))
    train(other)
    collect(one)
    check_refused(other, "running")


@pytest.mark.parametrize("regions", [None, "blocks", "breaks"])
@pytest.mark.parametrize("way", ["number", "sum of a list", "key 0"])
def test_other_numbers_are_read_while_one_is_kept(way: str, regions: Any) -> None:
    """Another entry, a counter of calls, one in a buffer."""
    model = with_numbers(way, regions=regions)
    collect(model)
    model(torch.randn(B, D), mode="public").square().sum(1).mean().backward()
    model.k, model.l, model.keyed = 1.0, [1.0, 2.0], {0: 1.0, 3: 2.0}
    train(model)


@pytest.mark.parametrize("regions", [None, "blocks"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("new", [True, False])
def test_an_output_made_a_parameter(regions: str | None, grad: bool, name: str, new: bool) -> None:
    """Of a forward with gradients, or without; frozen, or trained."""
    layer = nn.Linear(D, D)
    layer.weight.requires_grad_(False)
    model: Any = dp_compile(nn.Sequential(layer, nn.Linear(D, D)), backend="eager", regions=regions)
    x = torch.randn(D, D)
    model(x).sum().backward()
    with torch.set_grad_enabled(grad):
        value = model(x).detach()
    value = value if name == "weight" else value[0]
    if new:
        setattr(layer, name, nn.Parameter(value, requires_grad=name == "bias"))
    else:
        getattr(layer, name).data = value
    with pytest.raises(ExampleMixingError, match=f"parameter '0.{name}' was written with values of examples"):
        model(x).sum().backward()
