"""Ghost norms of embeddings: sums by an index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile.kernels import by_index
from dpcompile.kernels.by_index import LEFT_OUT, clipped_sums_by_index, norms_by_index, sums_and_sizes

dp_compile: Any = dpcompile.dp_compile
WORDS = 11


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(by_index, "_library", lambda: None)
    return request.param


def dense(index: Tensor, cotangents: Tensor) -> Tensor:
    """By every example's whole gradient."""
    table = torch.zeros(len(index), WORDS, cotangents.shape[2], dtype=torch.float64)
    for b, t in torch.cartesian_prod(torch.arange(index.shape[0]), torch.arange(index.shape[1])).tolist():
        table[b, int(index[b, t])] += cotangents[b, t].double()
    return table.square().sum((1, 2))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "spread": lambda x: x[:, :1].expand(x.shape),
    "one number": lambda x: x.new_full((1, 1, 1), 0.3).expand(x.shape),
    "positions last": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],
    "examples last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 17, 6), (1, 40, 33), (3, 1, 4)])
def test_norms(shape: tuple[int, int, int], dtype: torch.dtype, layout: str, compiled: bool) -> None:
    index = torch.randint(0, WORDS, shape[:2])
    cotangents = LAYOUTS[layout](torch.randn(shape, dtype=dtype))
    assert by_index.has_sums_by_index(cotangents.device, dtype) == (compiled and dtype == torch.float32)
    wanted = dense(index, cotangents)
    torch.testing.assert_close(norms_by_index(index, cotangents), wanted)
    torch.testing.assert_close(norms_by_index(index.int() - 5, cotangents), wanted)
    torch.testing.assert_close(norms_by_index(index.T.contiguous().T, cotangents), wanted)
    torch.testing.assert_close(sums_and_sizes(index, cotangents)[0], wanted)
    torch.library.opcheck(norms_by_index, (index, cotangents))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
@pytest.mark.usefixtures("compiled")
def test_norms_of_nothing(shape: tuple[int, int, int]) -> None:
    assert norms_by_index(torch.zeros(shape[:2], dtype=torch.int64), torch.ones(shape)).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("compiled")
def test_what_is_not_finite_stays_in_its_example(bad: float) -> None:
    index, cotangents = torch.randint(0, WORDS, (4, 9)), torch.randn(4, 9, 5)
    cotangents[2, 4, 1] = bad
    found = norms_by_index(index, cotangents)
    assert found.isfinite().tolist() == [True, True, False, True]
    torch.testing.assert_close(found[:2], dense(index, cotangents)[:2])


@pytest.mark.usefixtures("compiled")
def test_sums_that_cancel() -> None:
    """Positions of one index whose cotangents differ in sign only: nothing is left, and nothing is invented."""
    cotangents = torch.randn(2, 1, 64).repeat(1, 8, 1)
    cotangents[0, ::2] *= -1
    found = norms_by_index(torch.full((2, 8), 3), cotangents)
    torch.testing.assert_close(found, torch.stack([torch.tensor(0.0), 64 * cotangents[1, 0].square().sum()]).double())


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums(layout: str, dtype: torch.dtype, threads: int, compiled: bool) -> None:
    """By any number of threads; an example of weight 0 is not read."""
    index, weights = torch.randint(0, WORDS, (5, 17)), torch.tensor([0.5, 0.0, 1.0, 0.0, 2.0], dtype=dtype)
    values = torch.randn(5, 17, 6, dtype=dtype)
    cotangents = LAYOUTS[layout](values)
    wanted = torch.zeros(WORDS, 6, dtype=dtype)
    for b in (0, 2, 4):
        wanted.index_add_(0, index[b], weights[b] * cotangents[b])
    if layout != "one number":
        values[[1, 3]] = torch.nan
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = clipped_sums_by_index(weights, index, LAYOUTS[layout](values), WORDS)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, wanted)
    torch.library.opcheck(clipped_sums_by_index, (weights, index, cotangents, WORDS))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
@pytest.mark.usefixtures("compiled")
def test_sums_of_nothing(shape: tuple[int, int, int]) -> None:
    index, cotangents = torch.zeros(shape[:2], dtype=torch.int64), torch.ones(shape)
    found = clipped_sums_by_index(torch.ones(shape[0]), index, cotangents, WORDS)
    assert torch.equal(found, torch.zeros(WORDS, shape[2]))


@pytest.mark.parametrize("wrong", [-1, WORDS])
def test_an_index_that_is_no_row_is_an_error(wrong: int) -> None:
    index = torch.tensor([[1, wrong], [2, 3]])
    with pytest.raises(IndexError, match="not that of one of the table's 11 rows"):
        clipped_sums_by_index(torch.ones(2), index, torch.ones(2, 2, 4), WORDS)


@pytest.mark.parametrize("layout", ["rows", "spread", "positions last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("compiled")
def test_positions_that_are_left_out(dtype: torch.dtype, layout: str) -> None:
    """Whatever their cotangents are, in an example of nothing else too."""
    index, values = torch.randint(0, WORDS, (5, 9)), torch.randn(5, 9, 6, dtype=dtype)
    index[1] = LEFT_OUT
    if layout != "spread":
        index[2, ::2], values[2, ::2] = LEFT_OUT, torch.nan
    values[1] = torch.inf
    cotangents, there = LAYOUTS[layout](values), index != LEFT_OUT
    known = torch.where(there.unsqueeze(2), cotangents, 0.0)
    places, weights = torch.where(there, index, 0), torch.rand(5, dtype=dtype)
    for found in (norms_by_index(index, cotangents), sums_and_sizes(index, cotangents)[0]):
        torch.testing.assert_close(found, dense(places, known))
    sums = clipped_sums_by_index(weights, index, cotangents, WORDS)
    torch.testing.assert_close(sums, clipped_sums_by_index(weights, places, known, WORDS))


class Words(nn.Module):
    """A table that is looked up, twice if told, and summed over positions."""

    def __init__(self, twice: bool = False, **options: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 6, **options), nn.Linear(6, 3)
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        vectors = torch.tanh(self.table(ids)).mean(1)
        if self.twice:
            vectors = vectors + self.table(ids[:, :3]).square().sum(1)
        return self.head(vectors)


class Transposed(nn.Module):
    """The parameter holds the table's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(6, WORDS))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.sin(F.embedding(ids, self.columns.t())).mean(1)


class Negative(nn.Module):
    """The same row by a positive and by a negative index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WORDS, 6))

    def forward(self, ids: Tensor) -> Tensor:
        signed = torch.where(torch.arange(ids.shape[1]) % 2 == 0, ids, ids - WORDS)
        return torch.sin(self.table[signed]).sum(1)


class Averaged(nn.Module):
    """Cotangents that are one row for each example, but for the padding."""

    def __init__(self, words: int = WORDS, width: int = 6) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(words, width, padding_idx=2), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(-self.table(ids).mean(1) / 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "once": Words,
    "averaged": Averaged,
    "twice": lambda: Words(twice=True),
    "padding": lambda: Words(padding_idx=2),
    "transposed": Transposed,
    "negative": Negative,
}


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models(model: str, dtype: torch.dtype, compiled: bool) -> None:
    """Against one backward per example, with few words, so that most are looked up several times."""
    net, ids, loss = MODELS[model]().to(dtype), torch.randint(0, WORDS, (4, 12)), PseudoLoss(4)
    truth = clip(per_example_gradients(net, (ids,), {}, loss), 0.5)
    private = dp_compile(net, max_grad_norm=0.5, norm="ghost", backend="eager")
    train_step(private, (ids,), {}, loss)
    assert "norms_by_index" in private.graph.code
    assert ("clipped_sums_by_index" in private.graph.code) == (compiled and dtype != torch.float64)
    assert_right(private, truth, 5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.usefixtures("compiled")
def test_a_table_in_a_model_of_wider_parameters() -> None:
    """Clip weights are float64 then, where the table's cotangents are float32."""

    class Wider(Words):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(ids)).double().mean(1))

    net, ids, loss = Wider(), torch.randint(0, WORDS, (4, 12)), PseudoLoss(4)
    net.head.double()
    truth = clip(per_example_gradients(net, (ids,), {}, loss), 0.5)
    private = dp_compile(net, max_grad_norm=0.5, norm="ghost", backend="eager")
    train_step(private, (ids,), {}, loss)
    assert_right(private, truth, 1e-5)


@pytest.mark.usefixtures("compiled")
def test_sums_with_wider_weights() -> None:
    index, cotangents = torch.randint(0, WORDS, (3, 7)), torch.randn(3, 7, 4)
    weights = torch.tensor([0.5, 2.0, 0.25])
    found = clipped_sums_by_index(weights.double(), index, cotangents, WORDS)
    torch.testing.assert_close(found, clipped_sums_by_index(weights, index, cotangents, WORDS))


def test_a_tied_head_has_gram_matrices() -> None:
    """Products and look-ups have terms in common."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(WORDS, 6))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.sin(F.embedding(ids, self.table)) @ self.table.T

    net, ids, loss = Tied(), torch.randint(0, WORDS, (4, 12)), PseudoLoss(4)
    truth = clip(per_example_gradients(net, (ids,), {}, loss), 0.5)
    private = dp_compile(net, max_grad_norm=0.5, norm="ghost", backend="eager")
    train_step(private, (ids,), {}, loss)
    assert "gram" in private.graph.code
    assert_right(private, truth, 1e-5)


def test_ghost_norms_of_long_texts_need_little() -> None:
    """No matrix of positions by positions: neither time nor memory of the rule grows with their square."""
    plans = []
    for length in (64, 512):
        private = dp_compile(Words(), norm="ghost", backend="eager")
        private.trace(torch.randint(0, WORDS, (4, length)))
        plans.append(next(c.cost.at(private.plan.hints) for c in private.plan.choices if c.rule == "ghost"))
    short, long = plans
    assert long.flops == short.flops == 0
    assert long.memory == short.memory == 0
    assert long.traffic == 8 * short.traffic


def test_cotangents_that_are_alike_for_all_positions_are_one_row() -> None:
    """Neither the graph nor the plan has a value for every position: the budget is kept in one part."""
    private = dp_compile(Averaged(500, 32), memory_budget=1.25, backend="eager")
    private.trace(torch.randint(0, 500, (16, 64)))
    assert private.plan.parts == 1
    assert private.plan.prediction.peak < 1.25 * private.plan.prediction.plain_peak
    (norms,) = (n for n in private.graph.graph.nodes if n.target is torch.ops.dpcompile.norms_by_index.default)
    assert norms.args[1].meta["val"].stride()[1] == 0


@pytest.mark.full
@pytest.mark.parametrize("model", ["once", "twice", "averaged"])
def test_inductor(model: str) -> None:
    net, ids, loss = MODELS[model](), torch.randint(0, WORDS, (4, 12)), PseudoLoss(4)
    truth = clip(per_example_gradients(net, (ids,), {}, loss), 0.5)
    private = dp_compile(net, max_grad_norm=0.5, norm="ghost")
    train_step(private, (ids,), {}, loss)
    assert_right(private, truth, 1e-5)
