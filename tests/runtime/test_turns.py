"""A drawn batch larger than the physical one, behind one call: the same sums, norms, outputs and memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import clip, per_example_gradients
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpcompile import DPOptimizer, PoissonLoader, dp_compile
from dpcompile.errors import UnsupportedGraphError
from dpcompile.runtime.autocast import Autocast

N, C = 40, 0.3


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.drop(self.first(x).tanh()))


def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(N, 6) + 0.1, torch.randint(0, 3, (N,)))


def private(net: nn.Module, physical: int, **options: Any) -> tuple[Any, DPOptimizer, PoissonLoader]:
    options.setdefault("backend", "eager")
    model = dp_compile(net, max_grad_norm=C, **options)
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=8)
    loader = PoissonLoader(data(), expected_batch_size=8, physical_batch_size=physical, seed=1)
    return model, optimizer, loader.attach(model, optimizer)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_reduction": "sum"}, {"regions": "blocks"}, {"clipping": "per_layer"}, {"check": True},
     {"regions": "blocks", "norm": "two_pass"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("physical", [1, 3])
def test_every_draw_gives_what_one_backward_per_example_gives(physical: int, options: dict[str, Any]) -> None:
    net = Net()
    plain = copy.deepcopy(net)
    model, optimizer, loader = private(net, physical, **options)
    reduction = options.get("loss_reduction", "mean")
    for x, y in loader:
        real = (x != 0).any(1)
        plain.load_state_dict(net.state_dict())
        output = model(x)
        torch.testing.assert_close(output, plain(x))
        loss = F.cross_entropy(output, y, reduction="none")
        (loss.mean() if reduction == "mean" else loss.sum()).backward()
        each = lambda out, rows, y=y: F.cross_entropy(out, y[rows], reduction="none")  # noqa: E731
        truth = clip(per_example_gradients(plain, (x,), {}, each), C, mask=real)
        if "clipping" not in options:
            torch.testing.assert_close(model.grad_norms.double(), truth.norms[real], rtol=1e-4, atol=1e-7)
            for n, p in net.named_parameters():
                assert p.grad is not None
                torch.testing.assert_close(p.grad.double(), truth.sums[n], rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.logical_step == len(loader)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}, {"backend": "inductor"}], ids=str)
def test_autocast_is_the_same_when_a_part_runs_again(options: dict[str, Any], inside: bool) -> None:
    """Wherever the loop calls backward: what is returned, and the weights, are those of physical batches one by one."""
    ends = []
    for parts in (False, True):
        net = Net()
        torch.manual_seed(3)
        for p in net.parameters():
            p.data.normal_()
        model, optimizer, loader = private(net, 4, **options)
        for x, y in loader.parts() if parts else loader:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
                loss = F.cross_entropy(output.float(), y)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            assert output.dtype == torch.bfloat16
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=2e-2, atol=2e-2)  # means over other numbers round otherwise


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_again(enabled: bool) -> None:
    """Of another dtype, in and out of other states; what is outside comes back."""
    with torch.autocast("cpu", torch.float16, enabled=enabled, cache_enabled=False):
        state = Autocast.now([torch.ones(1), torch.ones(1, device="meta"), None])
    for outside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            with state.again():
                assert Autocast.now([]) == state and torch.is_autocast_enabled("cpu") is enabled
            assert torch.is_autocast_enabled("cpu") is outside and torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert torch.is_autocast_cache_enabled()


class Widens(Net):
    widens = False

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        return result.double() if self.widens else result


def test_another_dtype_the_second_time_is_refused() -> None:
    net = Widens()
    model, _, loader = private(net, 3)
    x, y = next(iter(loader))
    loss = F.cross_entropy(model(x), y)
    net.widens = True
    with pytest.raises(UnsupportedGraphError, match=r"returned something else.*\n.*loader.parts\(\)"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_dropout_is_the_same_when_a_part_runs_again(backend: str) -> None:
    ends = []
    for parts in (False, True):
        net = copy.deepcopy(Net(0.5))
        torch.manual_seed(3)
        for p in net.parameters():
            p.data.normal_()
        model, optimizer, loader = private(net, 4, backend=backend)
        for x, y in loader.parts() if parts else loader:
            F.cross_entropy(model(x), y).backward()  # a second result of a part would be refused
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.isfinite(ends[0]).all() and torch.isfinite(ends[1]).all()


class LossInside(Net):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:  # type: ignore[override]
        logits = super().forward(x)
        loss = F.cross_entropy(logits, y, reduction="none").mean()
        return {"loss": loss, "logits": logits, "nothing": None, "one": 1}


def test_a_loss_inside_is_the_mean_of_the_parts() -> None:
    found = []
    for physical in (3, 40):
        torch.manual_seed(4)
        net = LossInside()
        model, optimizer, loader = private(net, physical)
        x, y = next(iter(loader))
        real = int((x != 0).any(1).sum())
        out = model(x, y)
        assert out["nothing"] is None and out["one"] == 1 and out["logits"].shape == (len(x), 3)
        torch.testing.assert_close(out["loss"], F.cross_entropy(out["logits"], y))
        out["loss"].backward()
        found.append((model.grad_norms, *(p.grad for p in net.parameters())))
        assert len(model.grad_norms) == real
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Counting(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.9**self.calls)


def test_a_result_that_changes_from_call_to_call_is_refused() -> None:
    model, _, loader = private(Counting(), 3)
    x, y = next(iter(loader))
    with pytest.raises(UnsupportedGraphError, match=r"returned something else.*\n.*loader.parts\(\)"):
        F.cross_entropy(model(x), y).backward()


class Writing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


def test_a_forward_that_writes_to_a_buffer_is_refused_and_the_remedies_work() -> None:
    model, _, loader = private(Writing(), 3)
    x, _ = next(iter(loader))
    with pytest.raises(UnsupportedGraphError, match=r"writes to its buffer 'count'.*\n.*loader.parts\(\)"):
        model(x)
    for physical, parts in ((40, False), (3, True)):
        model, optimizer, loader = private(Writing(), physical)
        for x, y in loader.parts() if parts else loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.logical_step == len(loader)


def test_what_cannot_be_put_together_is_refused() -> None:
    class Wide(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return torch.cat([out, out])

    model, _, loader = private(Wide(), 3)
    x, _ = next(iter(loader))
    with pytest.raises(UnsupportedGraphError, match=r"cannot be put together.*\n.*example axis"):
        model(x)


def test_parts_that_return_other_containers_are_refused() -> None:
    class Moody(Net):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {"odd" if self.calls % 2 else "even": out}

    model, _, loader = private(Moody(), 3)
    x, _ = next(iter(loader))
    with pytest.raises(UnsupportedGraphError, match=r"in other containers: .*'odd'.*'even'.*\n.*loader.parts\(\)"):
        model(x)


def test_numbers_beside_the_outputs_stay_numbers() -> None:
    class Reporting(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), 2, float("nan"), None, "name"

    model, _, loader = private(Reporting(), 3)
    x, y = next(iter(loader))
    out, *rest = model(x)
    assert rest[0] == 2 and rest[1] != rest[1] and rest[2:] == [None, "name"]
    F.cross_entropy(out, y).backward()
