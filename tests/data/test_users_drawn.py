"""PoissonLoader with groups: users are drawn, their rows stay together, and what the loop may not do to them."""

from __future__ import annotations

import math
import re
from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpcompile
from dpcompile import AdaptiveClip, DPOptimizer, PoissonLoader, PrivacyError
from dpcompile.data.padding import Request
from dpcompile.data.users import Users
from dpcompile.module import engine_of

make_private: Any = dpcompile.make_private
N, K = 60, 3
OWNER = [f"user {i % 13}" if i < 40 else "large" for i in range(N)]  # 12 of three, one of four, one of twenty
COUNT = Counter(OWNER)


def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.arange(N), torch.randn(N, 6), torch.randint(0, 3, (N,)))


def loader_of(dataset: Any = None, **options: Any) -> PoissonLoader:
    own = {"expected_batch_size": 4, "groups": OWNER, "examples_per_user": K, "seed": 3, **options}
    return PoissonLoader(data() if dataset is None else dataset, **own)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def private(
    dataset: Any = None, max_grad_norm: Any = 0.3, model: Any = None, **options: Any
) -> tuple[Any, DPOptimizer, PoissonLoader]:
    model = net() if model is None else model
    own = {"noise_multiplier": 0.0, "groups": OWNER, "examples_per_user": K, "seed": 3, "backend": "eager", **options}
    loader = DataLoader(data() if dataset is None else dataset, batch_size=4)
    return make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), loader, max_grad_norm=max_grad_norm, **own)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_user_stand_together() -> None:
    loader = loader_of(physical_batch_size=4, steps=40)
    drawn: list[Counter[str]] = [Counter()]
    for batch in loader.batches():
        index, mask = batch.data[0], batch.mask
        assert len(index) == len(mask) == 4 * K
        for rows, given in zip(index.view(-1, K).tolist(), mask.view(-1, K).tolist(), strict=True):
            own = [i for i, m in zip(rows, given, strict=True) if m]
            if not own:
                continue
            (name,) = {OWNER[i] for i in rows}  # also of rows that repeat others
            assert len(set(own)) == len(own) == min(K, COUNT[name])
            drawn[-1][name] += 1
        if batch.ends_step:
            assert all(n == 1 for n in drawn[-1].values()), "a user twice in a step"
            drawn.append(Counter())
    assert loader.dataset_size == 14 and loader.sample_rate == 4 / 14
    assert 2 < sum(len(step) for step in drawn) / 40 < 6


def test_the_law_of_what_is_chosen() -> None:
    """Each user with the same chance; of a large one each set of k examples with the same."""
    owner = [0] * 5 + [1] * 2 + [2]
    loader = PoissonLoader(
        TensorDataset(torch.arange(8)), expected_batch_size=1.5, groups=owner, examples_per_user=2, seed=5, steps=4000
    )
    taken, sets = Counter(), Counter()
    for batch in loader.batches():
        (index,), mask = batch.data, batch.mask
        for rows, given in zip(index.view(-1, 2).tolist(), mask.view(-1, 2).tolist(), strict=True):
            if any(given):
                taken[owner[rows[0]]] += 1
            if all(given) and owner[rows[0]] == 0:
                sets[frozenset(rows)] += 1
    assert all(abs(n / 4000 - 0.5) < 4 * (0.25 / 4000) ** 0.5 for n in taken.values()), taken
    assert len(sets) == 10 and stats.chisquare(list(sets.values())).pvalue > 1e-3


def test_what_is_chosen_goes_by_step_and_seed() -> None:
    users = Users([0] * 50, 50, 5)
    asked = [users.request(Request([0], 1, step), seed).indices for step in (0, 1) for seed in (7, 8)]
    assert len({tuple(x) for x in asked}) == 4
    assert asked[0] == Users(torch.zeros(50), 50, 5).request(Request([0], 1, 0), 7).indices
    assert asked[0] != users.request(Request([0], 1, 0), 7, secure=True).indices


class NA:
    """As pandas has it."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "groups",
    [torch.tensor([3, 3, 1, 9]), np.array([3, 3, 1, 9]), ["a", "a", "b", "c"], (1, 1.0, 2, None), [0.5, 0.5, 1.5, 2.5]],
    ids=str,
)
def test_names_of_users(groups: Any) -> None:
    if None in list(groups):
        with pytest.raises(PrivacyError, match=re.escape("example 3 has no user: groups[3] is None")):
            Users(groups, 4, 2)
        return
    users = Users(groups, 4, 2)
    assert users.count == 3
    assert [users.request(Request([u], 1, 0), 1).indices for u in range(3)] == [[0, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": OWNER[:-1]}, "names the users of 59 examples, and the dataset has 60"),
        ({"groups": "abc"}, "groups is str"),
        ({"groups": 7}, "groups is int"),
        ({"groups": np.zeros((N, 2))}, "groups is an array [60, 2]"),
        ({"groups": [[1]] * N}, "groups[0] is a list, which cannot be told from others"),
        ({"groups": [float("nan")] * N}, "example 0 has no user"),
        ({"groups": [Decimal("NaN")] * N}, "example 0 has no user"),
        ({"groups": [1, *[NA()] * (N - 1)]}, "example 1 has no user"),
        ({"groups": [np.zeros(2)] * N}, "groups[0] is a ndarray, which cannot be told from others"),
        ({"groups": [*"1" * 30, *[1] * 30]}, "groups holds 1 and '1': if that is one user, it would count as two"),
        ({"groups": None}, "examples_per_user without groups"),
        ({"examples_per_user": None}, "groups without examples_per_user"),
        ({"examples_per_user": 0}, "examples_per_user is 0"),
        ({"examples_per_user": 2.0}, "examples_per_user is 2.0"),
        ({"expected_batch_size": 20}, "expected_batch_size is 20, not in (0, 14]"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=re.escape(message)):
        loader_of(**options)


# --- the loop --------------------------------------------------------------------------------------------------------


def reference(steps: list[tuple[Tensor, Tensor, Tensor]], bound: float) -> nn.Module:
    """By one backward for each user: batches of index, rows and labels, rows of a user once each."""
    model, dataset = net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for index, _, _ in steps:
        optimizer.zero_grad()
        users: dict[str, set[int]] = {}
        for i in index.tolist():
            users.setdefault(OWNER[i], set()).add(i)
        for rows in users.values():
            _, x, y = dataset[sorted(rows)]
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))
            norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = (0 if p.grad is None else p.grad) + g * min(1, bound / norm) / 4
        optimizer.step()
    return model


def trained(physical: int | None = None, parts: bool = False, **options: Any) -> tuple[Any, list[Any]]:
    model, optimizer, loader = private(physical_batch_size=physical, **options)
    seen: list[Any] = []
    for index, x, y in loader.parts() if parts else loader:
        batch = engine_of(model).draws._waiting[-1]  # type: ignore[union-attr]
        real = batch.mask.view(-1, K).any(1).repeat_interleave(K)
        seen.append((batch.step, index[real]))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    steps = [
        (torch.cat([i for s, i in seen if s == step]), torch.empty(0), torch.empty(0)) for step in {s for s, _ in seen}
    ]
    return model, steps


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 0.3), ({"physical": 2}, 0.3), ({"physical": 2, "parts": True}, 0.3), ({"secure": True}, 0.3),
        ({"bands": 2, "seed": 4}, 0.3),
    ],
)  # fmt: skip
def test_the_ordinary_loop(options: dict[str, Any], bound: float) -> None:
    model, steps = trained(**options)
    for found, wanted in zip(model.parameters(), reference(steps, bound).parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_the_ordinary_loop_through_inductor() -> None:
    model, steps = trained(2, backend="inductor")
    for found, wanted in zip(model.parameters(), reference(steps, 0.3).parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("clip", [0.3, AdaptiveClip(initial=0.3)], ids=["fixed", "adaptive"])
def test_compile_step(physical: int | None, clip: Any) -> None:
    weights, losses = [], []
    for compiled in (False, True):
        model, optimizer, loader = private(max_grad_norm=clip, noise_multiplier=0.5, physical_batch_size=physical)
        step = dpcompile.compile_step(model, F.cross_entropy, optimizer)
        own = []
        for _, x, y in loader:
            if compiled:
                own.append(step(x, y).item())
                continue
            each, mask = F.cross_entropy(model(x), y, reduction="none"), engine_of(model).draws._used[-1].mask  # type: ignore[union-attr]
            own.append((each * mask).sum().item() / max(int(mask.sum()), 1))
            each.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(own)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def changed(change: Any, **options: Any) -> None:
    model, optimizer, loader = private(**options)
    for index, x, y in loader:
        x, y = change(x, y)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        del index
        break


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.flip(0), y), lambda x, y: (2 * x, y), lambda x, y: (x.half().float(), y),
        lambda x, y: (x.copy_(x.flip(0)), y), lambda x, y: (x.mul_(2), y), lambda x, y: (torch.cat([x[K:], x[:K]]), y),
    ],
)  # fmt: skip
def test_rows_that_may_be_another_users(change: Any) -> None:
    with pytest.raises(PrivacyError, match="it cannot be told that rows are still there"):
        changed(change)


def patch_of_others(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[:, 1:5] = x[:, 1:5].flip(0)
    return x, y


def labels_left_out(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y[:K] = -100
    return x, y


@pytest.mark.parametrize("change", [patch_of_others, labels_left_out])
def test_a_change_in_part_of_wide_rows(change: Any) -> None:
    """Of rows of 400 elements 64 are looked at elsewhere. What the model is not given may change."""
    torch.manual_seed(0)
    wide = TensorDataset(torch.randn(N, 400), torch.randint(0, 3, (N,)))
    model, optimizer, loader = private(wide, model=nn.Linear(400, 3))
    x, y = change(*next(iter(loader)))
    if change is patch_of_others:
        with pytest.raises(PrivacyError, match="it cannot be told that rows are still there"):
            F.cross_entropy(model(x), y).backward()
        return
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change", [lambda x, y: (x, y), lambda x, y: (x.clone(), y), lambda x, y: (x.view(len(x), 2, 3).flatten(1), y)]
)
def test_rows_that_are_where_they_were(change: Any) -> None:
    changed(change)


def stack(items: list[Any]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*items, strict=True)]


def halves_swapped(items: list[Any]) -> list[Tensor]:
    return stack([*items[len(items) // 2 :], *items[: len(items) // 2]])


@pytest.mark.parametrize(
    "collate", [lambda items: stack(sorted(items, key=lambda item: float(item[1].sum()))), halves_swapped]
)
def test_collations_that_move_rows(collate: Any) -> None:
    with pytest.raises(PrivacyError, match="is not example 0: with groups it must be known whose each row is"):
        next(iter(loader_of(collate_fn=collate, sample_rate=1.0).batches()))


class Texts(Dataset[Any]):
    """Of several lengths."""

    def __getitem__(self, i: int) -> Tensor:
        return torch.arange(1 + i % 4) + 10 * i

    def __len__(self) -> int:
        return N


@pytest.mark.parametrize("side", ["right", "left"])
def test_collations_that_fill_up(side: str) -> None:
    def collate(items: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1, padding_side=side)

    for batch in loader_of(Texts(), collate_fn=collate).batches():
        for row, real in zip(batch.data, batch.mask, strict=True):
            own = row[row >= 0]
            assert not real or (len(own) == 1 + int(own[0]) // 10 % 4)


def packed(items: list[Tensor]) -> Tensor:
    """Rows are filled up with the next row."""
    longest = max(map(len, items))
    return torch.stack(
        [torch.cat([a, b, *items])[:longest] for a, b in zip(items, [*items[1:], items[0]], strict=True)]
    )


def positions(items: list[Tensor]) -> Tensor:
    return torch.arange(max(map(len, items))).expand(len(items), -1)


@pytest.mark.parametrize("collate", [packed, positions])
def test_collations_that_fill_up_with_other_than_a_number(collate: Any) -> None:
    with pytest.raises(PrivacyError, match=r"is not example \d+: with groups it must be known whose.*\n.*one number"):
        next(iter(loader_of(Texts(), collate_fn=collate, sample_rate=1.0).batches()))


@pytest.mark.parametrize("as_number", [float, lambda mean: mean, lambda mean: mean.numpy()])
def test_a_collation_that_tells_of_all_examples(as_number: Any) -> None:
    def collate(items: list[Any]) -> Any:
        index, x, y = stack(items)
        return index, x, y, as_number(x.mean())

    message = r"what collate_fn returns at \[3\] has no row for each example, and is another for one example alone"
    with pytest.raises(PrivacyError, match=message):
        next(iter(loader_of(collate_fn=collate, sample_rate=1.0).batches()))


def test_a_collation_that_tells_how_long_sequences_are() -> None:
    def collate(items: list[Tensor]) -> Any:
        filled = nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)
        length = filled.shape[1]
        return filled, length, torch.ones(length, length).tril(), 0.5, math.nan

    assert len(list(loader_of(Texts(), collate_fn=collate, steps=3).batches())) >= 3


class Together(Dataset[Any]):
    """Examples are read in the order in which they lie."""

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(i)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(i) for i in sorted(indices)]

    def __len__(self) -> int:
        return N


def test_items_that_come_in_another_order() -> None:
    for batch in loader_of(Together(), sample_rate=1.0, steps=3).batches():
        for rows, given in zip(batch.data.view(-1, K), batch.mask.view(-1, K), strict=True):
            own = rows[given].tolist()
            assert len(set(own)) == len(own) and len({OWNER[i] for i in own}) == bool(own)


# --- what must agree -------------------------------------------------------------------------------------------------


def test_a_model_of_single_examples_is_refused() -> None:
    message = re.escape("the loader gives 3 row(s) of each that it draws, and the model clips the gradient of 1 row(s)")
    model = dpcompile.dp_compile(net(), backend="eager")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=4, seed=1
    )
    loader = loader_of()
    with pytest.raises(PrivacyError, match=message):
        loader.attach(model, optimizer)
    with pytest.raises(PrivacyError, match="the mask is of a loader that gives 3 row"):
        dpcompile.set_mask(model, next(iter(loader.batches())).mask)
    users = dpcompile.dp_compile(net(), backend="eager", examples_per_user=K)
    other = DPOptimizer(
        torch.optim.SGD(users.parameters(), lr=0.1), users, noise_multiplier=1.0, expected_batch_size=4, seed=2
    )
    with pytest.raises(PrivacyError, match="gives 1 row.* clips the gradient of 3 row"):
        PoissonLoader(data(), expected_batch_size=4, seed=3).attach(users, other)
    loader.attach(users, other)


def test_a_loader_that_is_made_already() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"noise_multiplier": 1.0, "backend": "eager", "seed": 3}
    with pytest.raises(PrivacyError, match="groups, and a PoissonLoader that is made already"):
        make_private(model, optimizer, loader_of(), groups=OWNER, **options)
    with pytest.raises(PrivacyError, match="examples_per_user is 2, and the PoissonLoader has 3"):
        make_private(model, optimizer, loader_of(), examples_per_user=2, **options)
    found, _, loader = make_private(model, optimizer, loader_of(), **options)
    assert engine_of(found).options.examples_per_user == loader.examples_per_user == K


def test_states() -> None:
    first = loader_of(steps=4)
    batches = first.batches()
    next(batches)
    state = first.state_dict()
    rest = [b.data[0].tolist() for b in batches]
    again = loader_of(steps=4, seed=9)
    again.load_state_dict(state)
    assert [b.data[0].tolist() for b in again.batches()] == rest
    with pytest.raises(PrivacyError, match="groups say of other examples that they are one user's"):
        loader_of(groups=[*OWNER[1:], OWNER[0]]).load_state_dict(state)
    with pytest.raises(PrivacyError, match="examples_per_user was 3 in the saved run and is 2 here"):
        loader_of(examples_per_user=2).load_state_dict(state)
    with pytest.raises(PrivacyError, match="groups say of other examples"):
        PoissonLoader(data(), expected_batch_size=4).load_state_dict(state)
    del state["groups"], state["examples_per_user"]  # of a loader before there were users
    with pytest.raises(PrivacyError, match="groups say of other examples"):
        loader_of().load_state_dict(state)


def test_the_report_is_of_users() -> None:
    model, optimizer, loader = private(noise_multiplier=1.0, seed=11)
    for _, x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    text = str(optimizer.report(1e-3))
    assert "differentially private for one user" in text
    assert "up to 3 of them in a step" in text and "Poisson, each user with probability 0.285714" in text
    assert "one example" not in text
