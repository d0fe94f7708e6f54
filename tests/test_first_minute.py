"""What a newcomer's mistakes say, and that doing what they say works."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from dpcompile import (
    DPCompileError,
    DPOptimizer,
    PoissonLoader,
    PrivacyAccountant,
    PrivacyError,
    UnsupportedGraphError,
    calibrate_noise,
    dp_compile,
    make_private,
)
from dpcompile.losses import per_example_causal_lm

NO_COMPILER = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from dpcompile import UnsupportedGraphError, dp_compile, make_private

def loop(**options):
    plain = nn.Linear(5, 3)
    data = DataLoader(TensorDataset(torch.randn(16, 5), torch.randint(0, 3, (16,))), batch_size=8)
    model, optimizer, loader = make_private(
        plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, noise_multiplier=1.0, **options
    )
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

def evaluation(**options):
    with torch.no_grad():
        dp_compile(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), **options)(torch.randn(8, 5))

def blocks(**options):
    dp_compile(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), regions="blocks", **options)(
        torch.randn(8, 5)
    ).sum().backward()

for use in (loop, evaluation, blocks):
    try:
        use()
    except UnsupportedGraphError as error:
        print(use.__name__, error.what)
        assert "install a C++ compiler" in error.remedy and "backend='eager'" in error.remedy
    use(backend="eager")
"""


@pytest.mark.skipif(os.name != "posix", reason="where compilers are found goes by the system")
def test_no_compiler(tmp_path: Any) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": str(tmp_path / "none")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True, env=environment)
    said = "Inductor needs a C++ compiler, and finds none\n"
    assert (done.returncode, done.stdout) == (0, f"loop {said}evaluation {said}blocks {said}"), done.stderr


FIRST = """
import torch
from torch import nn
from dpcompile import dp_compile

model = dp_compile(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten()), backend="eager")
model(torch.randn(3, 1, 6, 6)).square().sum(1).mean().backward()
print(*model.grad_norms.shape)
"""


def test_max_pooling_first_of_all() -> None:
    """Before anything has imported the parts of Inductor that its decomposition takes for granted."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def private(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Linear(5, 3)
    data = DataLoader(TensorDataset(torch.randn(64, 5), torch.randint(0, 3, (64,))), batch_size=8)
    options = {"noise_multiplier": 1.0, "backend": "eager", **options}
    return make_private(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, **options)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("noise_multipler", "noise_multiplier"),
        ("max_grad_nrom", "max_grad_norm"),
        ("delta", "target_delta"),
        ("epsilon", "target_epsilon"),
        ("clipp", "clipping"),
        ("bogus", None),
        ("memory_buget", "memory_budget"),
    ],
)
def test_an_unknown_keyword(wrong: str, right: str | None) -> None:
    with pytest.raises(TypeError) as caught:
        private(**{wrong: 1.0})
    ending = "" if right is None else f"; did you mean {right!r}?"
    assert str(caught.value) == f"make_private() got an unexpected keyword argument {wrong!r}{ending}"


@pytest.mark.parametrize("loader", [None, [1, 2], torch.optim.SGD([nn.Parameter(torch.ones(1))])])
def test_what_is_no_loader(loader: Any) -> None:
    plain = nn.Linear(5, 3)
    with pytest.raises(PrivacyError, match=f"the loader is a {type(loader).__name__}\n.*torch.utils.data.DataLoader"):
        make_private(plain, torch.optim.SGD(plain.parameters()), loader, noise_multiplier=1.0)


def test_epsilon_of_an_optimizer_without_an_accountant() -> None:
    model = dp_compile(nn.Linear(5, 3), backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers: Any = {"noise_multiplier": 1.0, "expected_batch_size": 8}
    with pytest.raises(PrivacyError, match="has no accountant: nobody counted its steps"):
        DPOptimizer(inner, model, **numbers).epsilon(1e-5)
    counted = DPOptimizer(
        inner, model, **numbers, accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, method="rdp")
    )
    assert counted.epsilon(1e-5) == 0.0
    model(torch.randn(8, 5)).mean().backward()
    counted.step()
    assert counted.accountant is not None and counted.epsilon(1e-5) == counted.accountant.epsilon(1e-5) > 0


@pytest.mark.parametrize("of", ["all", "the last", "all, or None"])
def test_autograd_grad_of_parameters(of: str) -> None:
    model: Any = dp_compile(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), backend="eager")
    x = torch.randn(8, 5, requires_grad=True)
    wanted = list(model.parameters()) if of != "the last" else [model[1].bias]
    with pytest.raises(PrivacyError, match="autograd.grad was asked for gradients of the private model's") as caught:
        torch.autograd.grad(model(x).mean(), wanted, allow_unused=of == "all, or None")
    assert __file__ in str(caught.value)
    assert all(p.grad is None for p in model.parameters())
    model(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert torch.autograd.grad(model(x).mean(), x)[0].shape == x.shape


@pytest.mark.parametrize("where", ["calls", "layers"])
def test_inputs_of_another_size(where: str, caplog: Any) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.linear.weight)  # here

    model = dp_compile(Calls() if where == "calls" else nn.Linear(5, 3), backend="eager")
    with caplog.at_level(logging.ERROR), pytest.raises(UnsupportedGraphError, match="the model fails on these") as e:
        model(torch.randn(8, 7))
    assert "[8, 7]" in e.value.what and "\n" not in e.value.what and not caplog.records
    line = "# here" if where == "calls" else "model(torch.randn(8, 7))"
    assert e.value.where is not None and __file__ in e.value.where and e.value.where.endswith(line)
    assert model(torch.randn(8, 5)).shape == (8, 3)


def test_what_torch_logs_of_others_is_logged(caplog: Any) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(Exception, match="8, 7"):
        torch.compile(nn.Linear(5, 3), backend="eager")(torch.randn(8, 7))
    assert any("failed while attempting to run meta for" in record.message for record in caplog.records)


class OfPacked(nn.Module):
    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(5, 3), read

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.linear(self.read((x, lengths)))


def of_rows(given: Any) -> Tensor:
    return pack_padded_sequence(*given, batch_first=True).data.sum(0, keepdim=True)


def of_padded(given: Any) -> Tensor:
    x, lengths = given
    return (x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]).sum(1)


def test_rows_of_packed_sequences() -> None:
    call = (torch.randn(4, 6, 5), torch.tensor([6, 5, 3, 2]))
    with pytest.raises(DPCompileError, match="compute it on the padded tensor, masked by the lengths") as caught:
        dp_compile(OfPacked(of_rows), backend="eager")(*call)
    assert "issue" not in str(caught.value)
    model = dp_compile(OfPacked(of_padded), backend="eager")
    model(*call).mean().backward()
    assert model.grad_norms.shape == (4,)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_given_by_offsets(mode: str) -> None:
    bags = [[1, 2, 3], [4], [5, 6]]
    flat, offsets = torch.tensor(sum(bags, [])), torch.tensor([0, 3, 4])
    model: Any = dp_compile(nn.EmbeddingBag(10, 3, mode=mode, padding_idx=0), backend="eager", loss_reduction="sum")
    with pytest.raises(
        DPCompileError, match="'offsets' says where bags begin .EmbeddingBag., leave it out and pass ids"
    ):
        model(flat, offsets)
    with pytest.raises(UnsupportedGraphError, match="bags given by offsets.*(\n.*)*pass ids as .B, T."):
        dp_compile(nn.EmbeddingBag(10, 3, mode=mode), backend="eager", in_dims=(None, 0))(flat, offsets)
    ids = torch.tensor([bag + [0] * (3 - len(bag)) for bag in bags])
    out = model(ids)
    expected = F.embedding_bag(flat, model.weight, offsets, mode=mode, padding_idx=0)
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    for i, bag in enumerate(bags):
        one = torch.func.grad(lambda w, bag=bag: F.embedding_bag(torch.tensor([bag]), w, mode=mode).sum())(
            model.weight.detach()
        )
        assert torch.allclose(model.grad_norms[i], one.norm(), rtol=1e-5)


def scaled(model: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def limited(model: Any) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def copied(model: Any) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = 2 * p.grad


def decayed(model: Any) -> None:
    sum((p**2).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        (scaled, "changed in place", "leave out what changed it: clip_grad_norm_ or clip_grad_value_"),
        (limited, "changed in place", "every example's gradient is clipped already: max_grad_norm"),
        (decayed, "changed in place", "a regulariser on parameters in the loss (use weight_decay)"),
        (copied, "p.grad is another tensor than that backward left", "assign nothing to p.grad"),
    ],
)
def test_a_gradient_that_was_changed(change: Callable[[Any], None], what: str, remedy: str) -> None:
    model, optimizer, loader = private()
    (x, y), *_ = (batch for batch, _ in zip(loader, range(1), strict=False))
    F.cross_entropy(model(x), y).backward()
    change(model)
    with pytest.raises(PrivacyError, match=what) as caught:
        optimizer.step()
    assert remedy in str(caught.value.remedy) and str(caught.value.where).endswith("optimizer.step()")
    optimizer.zero_grad()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


# --- what messages say to do, done ---------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """A dataset without a length, until it has one."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((5,), float(i)), i % 3


class Sized(Rows):
    def __len__(self) -> int:
        return 32


def loader_of(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(Sized() if dataset is None else dataset, **{"batch_size": 8, **options})


def eager() -> Any:
    return dp_compile(nn.Linear(5, 3), backend="eager")


def with_loader(loader: Any, **options: Any) -> Any:
    plain = nn.Linear(5, 3)
    options = {"noise_multiplier": 1.0, "backend": "eager", **options}
    made = make_private(plain, torch.optim.SGD(plain.parameters()), loader, **options)
    for x, y in made[2]:
        F.cross_entropy(made[0](x), y).backward()
        made[1].step()
        made[1].zero_grad()
    return made


def backward_of(plain: nn.Module, *call: Tensor, **options: Any) -> None:
    out = dp_compile(plain, backend="eager", **options)(*call)
    (out if isinstance(out, Tensor) else out[0]).mean().backward()


class Shared(nn.Module):
    """Takes a table that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.linear(x + table.sum(0))


class Mean(nn.Module):
    """Subtracts the mean of an axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.dim = nn.Linear(5, 3), dim

    def forward(self, x: Tensor) -> Tensor:
        features = self.linear(x)
        return features - features.mean(self.dim, keepdim=True)


class Branches(nn.Module):
    """Branches on what it computes, or chooses by it."""

    def __init__(self, *, where: bool) -> None:
        super().__init__()
        self.linear, self.where = nn.Linear(5, 3), where

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.where:
            return torch.where(y > 0, y, 2 * y)
        return y if y.sum() > 0 else 2 * y


def frozen(norm: nn.Module) -> nn.Module:
    norm[1].eval()  # type: ignore[index]
    return norm


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))


def resumed(state: Callable[[Any], Any]) -> None:
    model, optimizer, loader = with_loader(loader_of(), seed=1)
    plain = nn.Linear(5, 3)
    again = make_private(
        plain, torch.optim.SGD(plain.parameters()), loader_of(), noise_multiplier=1.0, backend="eager", seed=1
    )
    again[1].load_state_dict(state(optimizer))


def second_backward(*, anew: bool) -> None:
    model, x = dp_compile(nn.Linear(5, 3), backend="eager"), torch.randn(8, 5)
    out = model(x)
    out.mean().backward(retain_graph=True)
    (model(x) if anew else out).mean().backward()


def called_twice(*, at_once: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)

        def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(real), self.net(fake)

    x = torch.randn(8, 5)
    if at_once:
        real, fake = dp_compile(Both(), backend="eager")(x, -x)
    else:
        model = dp_compile(nn.Linear(5, 3), backend="eager")
        real, fake = model(x), model(-x)
    (real.mean() + fake.mean()).backward()


def iterated(*, attach: bool) -> None:
    loader = PoissonLoader(Sized(), expected_batch_size=8)
    if attach:
        with_loader(loader)
    next(iter(loader))


def causal(*, outside: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, bos_token_id=0, eos_token_id=0)
    model, ids = dp_compile(transformers.GPT2LMHeadModel(config), backend="eager"), torch.randint(0, 11, (4, 6))
    if outside:
        per_example_causal_lm(model(ids).logits, ids).mean().backward()
    else:
        model(ids, labels=ids).loss.backward()


REMEDIES: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = [
    ("sampler is WeightedRandomSampler", "torch's default sampler",
     lambda: with_loader(loader_of(sampler=WeightedRandomSampler([1.0] * 32, 32))),
     lambda: with_loader(loader_of(shuffle=True))),
    ("Rows has no __len__", "with __getitem__ and __len__",
     lambda: PoissonLoader(Rows(), expected_batch_size=8), lambda: PoissonLoader(Sized(), expected_batch_size=8)),
    ("is no private model|is not a private model", "wrap it first: model = dp_compile",
     lambda: DPOptimizer(torch.optim.SGD(nn.Linear(5, 3).parameters()), nn.Linear(5, 3), noise_multiplier=1.0),
     lambda: DPOptimizer(torch.optim.SGD((m := dp_compile(nn.Linear(5, 3))).parameters()), m, noise_multiplier=1.0,
                         expected_batch_size=8)),
    ("BatchNorm1d in training mode", r"or call .eval\(\) on BatchNorm lay",
     lambda: backward_of(with_batch_norm(), torch.randn(8, 5)),
     lambda: backward_of(frozen(with_batch_norm()), torch.randn(8, 5))),
    ("BatchNorm1d in training mode", r"use GroupNorm \(dpcompile.replace_batchnorm\) or LayerNorm",
     lambda: backward_of(with_batch_norm(), torch.randn(8, 5)),
     lambda: backward_of(nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(2, 4)), torch.randn(8, 5))),
    ("`sub` mixes examples", "compute it for every example by itself",
     lambda: backward_of(Mean(0), torch.randn(8, 5)), lambda: backward_of(Mean(1), torch.randn(8, 5))),
    ("the inputs disagree about the number", "in in_dims with None",
     lambda: backward_of(Shared(), torch.randn(8, 5), torch.randn(3, 5)),
     lambda: backward_of(Shared(), torch.randn(8, 5), torch.randn(3, 5), in_dims={"table": None})),
    ("branches on the values of tensors", "use torch.where",
     lambda: backward_of(Branches(where=False), torch.randn(8, 5)),
     lambda: backward_of(Branches(where=True), torch.randn(8, 5))),
    ("a second backward through the same forward", "run the forward again",
     lambda: second_backward(anew=False), lambda: second_backward(anew=True)),
    ("called twice before one backward", r"put both passes in one forward: return self.net\(real\)",
     lambda: called_twice(at_once=False), lambda: called_twice(at_once=True)),
    ("the loader is not attached", "as make_private does",
     lambda: iterated(attach=False), lambda: iterated(attach=True)),
    ("has no 'dpcompile' entry", r"load what DPOptimizer.state_dict\(\)",
     lambda: resumed(lambda o: o.optimizer.state_dict()), lambda: resumed(lambda o: o.state_dict())),
    ("the optimizer is a DPOptimizer already", "pass the plain torch optimizer",
     lambda: make_private(nn.Linear(5, 3), private()[1], loader_of(), noise_multiplier=1.0),
     lambda: private()),
    ("target_epsilon without target_delta", "give target_delta",
     lambda: private(noise_multiplier=None, target_epsilon=3.0, epochs=1),
     lambda: private(noise_multiplier=None, target_epsilon=3.0, epochs=1, target_delta=1e-3, accountant="rdp")),
    ("the private model's parameters|the model does not hold", r"build it over model.parameters\(\)",
     lambda: make_private(nn.Linear(5, 3), torch.optim.SGD(nn.Linear(5, 3).parameters()), loader_of(),
                          noise_multiplier=1.0),
     lambda: private()),
    ("there are no gradient norms yet", r"call loss.backward\(\) first",
     lambda: dp_compile(nn.Linear(5, 3)).grad_norms,
     lambda: (m := eager())(torch.randn(8, 5)).mean().backward() or m.grad_norms),
    ("nothing is compiled yet", r"or model.trace\(",
     lambda: dp_compile(nn.Linear(5, 3)).plan,
     lambda: (m := eager()).trace(torch.randn(8, 5)) or m.plan),
    ("cannot be exported", "build it again and load_state_dict",
     lambda: torch.export.export(dp_compile(nn.Linear(5, 3), backend="eager"), (torch.randn(8, 5),)),
     lambda: torch.export.export(_built_again(dp_compile(nn.Linear(5, 3), backend="eager")), (torch.randn(8, 5),))),
    ("target_epsilon is 0.0", "number above 0|positive",
     lambda: calibrate_noise(target_epsilon=0.0, target_delta=1e-5, sample_rate=0.1, steps=1, method="rdp"),
     lambda: calibrate_noise(target_epsilon=1.0, target_delta=1e-5, sample_rate=0.1, steps=1, method="rdp")),
    ("mean over|mixes examples|labels", "per example|per_example",
     lambda: causal(outside=False), lambda: causal(outside=True)),
]  # fmt: skip


def _built_again(private_model: Any) -> nn.Module:
    plain = nn.Linear(5, 3)
    plain.load_state_dict(private_model.state_dict())
    return plain


@pytest.mark.parametrize(("what", "remedy", "wrong", "right"), REMEDIES, ids=[str(i) for i in range(len(REMEDIES))])
def test_what_a_message_says_to_do_works(
    what: str, remedy: str, wrong: Callable[[], Any], right: Callable[[], Any]
) -> None:
    with pytest.raises(DPCompileError, match=what) as caught:
        wrong()
    assert caught.match(remedy) and caught.value.remedy
    right()
