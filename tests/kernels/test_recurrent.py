"""Recurrent layers as one operation, against torch's layers, by both ways of running it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpcompile.kernels import recurrent, recurrent_cpp
from dpcompile.kernels.recurrent import recurrence, recurrence_backward

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
SIZES = [(1, 1, 1), (3, 5, 7), (4, 37, 20), (2, 9, 64)]  # steps, batch, hidden


@pytest.fixture(params=["kernel", "steps"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "steps":
        monkeypatch.setattr(recurrent, "forward_by_kernel", lambda *_, **__: None)
        monkeypatch.setattr(recurrent, "backward_by_kernel", lambda *_, **__: None)
    elif recurrent_cpp._library() is None:
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(kind: str, steps: int, batch: int, hidden: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(steps + batch + hidden)
    gates = {"lstm": 4, "gru": 3}.get(kind, 1) * hidden
    shapes = {
        "inputs": (steps, batch, gates),
        "state": (2 if kind == "lstm" else 1, batch, hidden),
        "weight": (gates, hidden),
        "bias": (gates,),
    }
    scale = {"weight": hidden**-0.5}
    made = {name: torch.randn(shape) * scale.get(name, 1) for name, shape in shapes.items()}
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def by_torch(kind: str, o: dict[str, Tensor], reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same in float64, by torch's cells: an identity gives the inputs to the gates."""
    gates, hidden = o["weight"].shape
    w = {k: v.double() for k, v in o.items()}
    eye, zeros = torch.eye(gates, dtype=torch.float64), torch.zeros(gates, dtype=torch.float64)
    cell = getattr(torch, f"{kind}_cell")
    state, outputs = w["state"], []
    for x in w["inputs"].flip(0) if reverse else w["inputs"]:
        hx = list(state) if kind == "lstm" else state[0]
        new = cell(x, hx, eye, w["weight"], zeros, w["bias"])
        state = torch.stack(new) if kind == "lstm" else new.unsqueeze(0)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def gradients(results: tuple[Tensor, ...], o: dict[str, Tensor]) -> list[Tensor]:
    total = results[0].double().sin().sum() + results[1].double().square().sum()
    return list(torch.autograd.grad(total, list(o.values())))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torchs_cells(kind: str, size: tuple[int, int, int], reverse: bool, way: str) -> None:
    o = operands(kind, *size)
    found = recurrence(kind, o["inputs"], o["state"], o["weight"], o["bias"], None, reverse)
    wanted = by_torch(kind, o, reverse)
    for f, w in zip(found, wanted, strict=False):
        torch.testing.assert_close(f.double(), w, rtol=2e-5, atol=2e-5)
    for f, w in zip(gradients(found, o), gradients(wanted, o), strict=True):
        torch.testing.assert_close(f, w, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_shorter_sequences(kind: str, reverse: bool, way: str) -> None:
    o, lengths = operands(kind, 4, 5, 3), [4, 0, 2, 1, 3]
    inside = torch.arange(4).unsqueeze(1) < torch.tensor(lengths)
    outputs, last, _ = recurrence(kind, o["inputs"], o["state"], o["weight"], o["bias"], inside, reverse)
    found = gradients((outputs, last), o)
    parts, total = [], torch.zeros((), dtype=torch.float64)
    for i, n in enumerate(lengths):
        own = {**o, "inputs": o["inputs"][:n, i : i + 1], "state": o["state"][:, i : i + 1]}
        y, state = by_torch(kind, own, reverse) if n else (own["inputs"][..., :3].double(), own["state"].double())
        torch.testing.assert_close(outputs[:n, i : i + 1].double(), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last[:, i : i + 1].double(), state, rtol=1e-5, atol=1e-5)
        assert not outputs[n:, i].any()
        total = total + y.sin().sum() + state.square().sum()
        parts.append(n)
    wanted = torch.autograd.grad(total, list(o.values()))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_the_same_to_the_bit_among_others(kind: str, way: str) -> None:
    o = {k: v.detach() for k, v in operands(kind, 3, 41, 24).items()}
    results = recurrence(kind, o["inputs"], o["state"], o["weight"], o["bias"], None, False)
    cotangent = torch.randn_like(results[0])
    back = recurrence_backward(kind, cotangent, o["state"], results[0], results[2], o["weight"], None, False)
    order = torch.randperm(41)[:11]
    few = [x[:, order] for x in (o["inputs"], o["state"])]
    again = recurrence(kind, *few, o["weight"], o["bias"], None, False)
    mine = [x[:, order] for x in (cotangent, o["state"], results[0], results[2])]
    back_again = recurrence_backward(kind, *mine, o["weight"], None, False)
    if way == "kernel":  # torch's products of other sizes round otherwise
        assert all(torch.equal(a, r[:, order]) for a, r in zip((*again, *back_again), (*results, *back), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_with_its_example(kind: str, value: float, way: str) -> None:
    o = operands(kind, 3, 10, 17)
    clean = [x.detach() for x in recurrence(kind, o["inputs"], o["state"], o["weight"], o["bias"], None, False)]
    with torch.no_grad():
        o["inputs"][1, 4, 2] = value
    found = recurrence(kind, o["inputs"], o["state"], o["weight"], o["bias"], None, False)
    others = [i for i in range(10) if i != 4]
    assert all(torch.equal(f[:, others], c[:, others]) for f, c in zip(found, clean, strict=True))
    of_inputs, of_state = gradients(found, o)[:2]
    assert of_inputs[:, others].isfinite().all() and of_state[:, others].isfinite().all()
    if value != value:
        assert found[0][1:, 4].isnan().any() and of_inputs[:, 4].isnan().any()


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 20.0, 1e4])
def test_functions_over_the_whole_range(kind: str, scale: float, way: str) -> None:
    o = operands(kind, 1, 16, 33)
    with torch.no_grad():
        o["inputs"] *= scale
        o["weight"].zero_()
        o["bias"].zero_()
    found, wanted = (f(o) for f in (lambda o: _outputs(kind, o), lambda o: by_torch(kind, o)[0]))
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-36 if scale < 1 else 2e-7)


def _outputs(kind: str, o: dict[str, Tensor]) -> Tensor:
    return recurrence(kind, o["inputs"], o["state"], o["weight"], o["bias"], None, False)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, way: str) -> None:
    o = operands("gru", 3, 5, 8, dtype)
    found = recurrence("gru", o["inputs"], o["state"], o["weight"], o["bias"], None, False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [f.dtype for f in found] == [dtype, dtype, wide]
    wanted = by_torch("gru", o)
    close = 1e-10 if dtype == torch.float64 else 1e-2
    for f, w in zip(gradients(found, o), gradients(wanted, o), strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), w.double(), rtol=close * 4, atol=close * 4)


def test_operators_are_sound() -> None:
    o = operands("gru", 2, 3, 4)
    inside = torch.tensor([[True, True, False], [True, False, False]])
    given = ("gru", o["inputs"], o["state"], o["weight"], o["bias"], inside, True)
    torch.library.opcheck(recurrence, given)
    results = [x.detach() for x in recurrence(*given)]
    back = ("gru", results[0], results[1], results[0], results[2], o["weight"].detach(), inside, True)
    torch.library.opcheck(recurrence_backward, back)


def test_layers_take_and_give_what_torchs_do() -> None:
    """The stand-in of torch's functions, with options that the suite of models does not combine."""
    from dpcompile.capture.recurrent import layers

    torch.manual_seed(0)
    for cls, kind in ((nn.LSTM, "lstm"), (nn.GRU, "gru")):
        for first in (False, True):
            model = cls(3, 4, num_layers=3, bidirectional=True, batch_first=first, dtype=torch.float64)
            x = torch.randn(5, 2, 3, dtype=torch.float64)
            zeros = torch.zeros(6, 5 if first else 2, 4, dtype=torch.float64)
            hx = (zeros, zeros) if kind == "lstm" else zeros
            weights = [w for group in model.all_weights for w in group]
            ours = layers(kind, getattr(torch._VF, kind))(x, hx, weights, True, 3, 0.0, True, True, first)
            y, state = model(x)
            wanted = (y, *state) if kind == "lstm" else (y, state)
            for f, w in zip(ours, wanted, strict=True):
                torch.testing.assert_close(f, w)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    o = {k: v.detach() for k, v in operands("lstm", 3, 4, 5).items()}
    for name, wrong in (("state", o["state"][:1]), ("weight", o["weight"][:, :4]), ("bias", o["bias"][:7])):
        given = {**o, name: wrong}
        with pytest.raises(ValueError, match="inputs, state and weight of lstm do not belong together"):
            recurrence("lstm", given["inputs"], given["state"], given["weight"], given["bias"], None, False)
    with pytest.raises(ValueError, match=r"inside is torch.bool \[4, 3\], not bool \[3, 4\]"):
        recurrence("lstm", o["inputs"], o["state"], o["weight"], o["bias"], torch.ones(4, 3, dtype=torch.bool), False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch 2.14 for forward mode itself
def test_forward_mode_is_refused_and_not_dropped() -> None:
    o = {k: v.detach() for k, v in operands("gru", 3, 4, 5).items()}
    with pytest.raises(NotImplementedError, match="a recurrent layer as one operation has no forward-mode derivative"):
        torch.func.jvp(lambda x: _outputs("gru", {**o, "inputs": x}), (o["inputs"],), (o["inputs"],))
