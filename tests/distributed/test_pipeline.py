"""Pipelines: launches of tests/workers/pipeline_worker.py, and what a stage refuses, on one rank with two stages."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import launch, passed
from pipeline_worker import BLOCKS, MESHES, B, D, Model, Pipeline, T, batch, dp_compile, loss_of, optimizer_of
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.utils.data import TensorDataset

from dpcompile import (
    AdaptiveClip,
    DPCompileError,
    ExampleMixingError,
    PoissonLoader,
    PrivacyError,
    UnsupportedGraphError,
    compile_step,
)
from dpcompile.module import engine_of, set_mask
from dpcompile.regions.backward import RegionBackward

FEW = {
    "gradients", "schedule 1F1B", "schedule ZBVZeroBubble", "padding", "not finite", "loading", "own checkpoints",
    "communication", "differing",
}  # fmt: skip
REST = {
    "regions", "inductor", "schedule Interleaved1F1B", "schedule InterleavedZeroBubble", "schedule LoopedBFS",
    "schedule DualPipeV", "users", "noise once", "masks by hand", "evaluation", "dropped", "other draws",
    "messages of another batch", "copies", "in turn", "automatic",
}  # fmt: skip
ON_FOUR = {"gradients", "loading", "own checkpoints"}
WITH = {"{} and stages", "users, {} and stages", "automatic, {} and stages", "checkpoints of {} and stages"}
SEVERAL = {"{} and two stages each", "zero bubble, {} and stages"}


@pytest.mark.full
def test_stages_on_two_ranks_come_to_what_one_process_does(tmp_path: Path) -> None:
    assert passed(launch(2, "pipeline_worker.py", str(tmp_path), *FEW)) == FEW


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "checks"),
    [
        (2, REST),
        (4, ON_FOUR),
        *((4, {n.format(m) for n in WITH | SEVERAL}) for m in MESHES.values()),
    ],
)
def test_other_schedules_and_more_ranks(ranks: int, checks: set[str], tmp_path: Path) -> None:
    assert passed(launch(ranks, "pipeline_worker.py", str(tmp_path), *checks)) == checks


@pytest.mark.full
def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    done = launch(2, "pipeline_worker.py", str(tmp_path), "accident")
    assert done.returncode != 0 and "OSError: an accident" in done.stderr and "passed" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("check", "told"), [("late accident", "OSError: an accident"), ("killed", "SIGKILL")])
def test_a_rank_that_fails_in_the_midst_of_a_schedule(check: str, told: str, tmp_path: Path) -> None:
    """While norms of earlier micro-batches are on their way."""
    done = launch(2, "pipeline_worker.py", str(tmp_path), check, timeout=240)
    assert done.returncode != 0 and told in done.stderr and "passed" not in done.stdout


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """One rank, in this process."""
    if request.node.get_closest_marker("full") or request.node.get_closest_marker("slow"):
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    torch.manual_seed(0)
    yield
    dist.destroy_process_group()


def refusal(kind: type[DPCompileError], call: Callable[[], Any]) -> str:
    """What our error says; torch's stages raise another one from it."""
    with pytest.raises(Exception) as caught:  # noqa: B017
        call()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, DPCompileError):
        error = error.__cause__
    assert isinstance(error, kind), caught.value
    return str(error)


def one(**options: Any) -> Pipeline:
    """Two stages on one rank."""
    return Pipeline("Interleaved1F1B", **options)


class Mixing(Model):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out - out.mean(0)


class Turned(Model):
    """Hands on positions first."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.transpose(0, 1) if x.is_floating_point() else x)
        return out if hasattr(self, "head") else out.transpose(0, 1)


class Telling(Model):
    """Hands on what no example has, and takes it."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        out = super().forward(x)
        return out if hasattr(self, "head") else (out, (x > 0).sum(1))


class Frozen(Model):
    """Of two stages the first has nothing to train."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        self.requires_grad_(first > 0)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (Mixing, ExampleMixingError, "mixes examples"),
        (Turned, UnsupportedGraphError, "the next stage takes what it is given for one row an example"),
        (Telling, UnsupportedGraphError, "a stage of a pipeline returns torch.int64"),
        (Frozen, UnsupportedGraphError, "stage 0 has no trainable parameters, so nothing is proved of it"),
    ],
)
def test_stages_that_are_no_functions_of_rows(make: Any, kind: type[DPCompileError], text: str) -> None:
    assert text in refusal(kind, lambda: one(make=make).run(*batch()))


def test_a_stage_that_was_compiled_as_if_it_were_the_model() -> None:
    """Its norms would be too small."""
    model = one(wrap=lambda m: dp_compile(m, backend="eager"))
    assert "was compiled without pipeline=" in refusal(PrivacyError, lambda: model.run(*batch()))

    class Around(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    inside = one(wrap=lambda m: Around(dp_compile(m, backend="eager")))
    assert "was compiled without pipeline=" in refusal(PrivacyError, lambda: inside.run(*batch()))
    around = one(wrap=lambda m: Around(dp_compile(m, backend="eager", pipeline=True)))
    assert "a Around, is not private itself" in refusal(PrivacyError, lambda: around.run(*batch()))


def test_a_rank_of_which_one_stage_is_not_private() -> None:
    halves = iter((lambda m: dp_compile(m, backend="eager", pipeline=True), lambda m: m))
    model = one(wrap=lambda m: next(halves)(m))
    assert "the module of stage 1, a Model, is not private" in refusal(PrivacyError, lambda: model.run(*batch()))


def test_a_parameter_in_two_stages() -> None:
    parts: list[Any] = [Model(0, 2), Model(2, 4)]
    parts[1].blocks["3"].norm = parts[0].blocks["0"].norm
    model = one(make=lambda first, _: parts[first > 0])
    told = refusal(UnsupportedGraphError, lambda: model.run(*batch()))
    assert "parameter 'blocks.3.norm.weight' is in stages 0 and 1" in told


class TiedCopies(Model):
    """The head is a copy of the embedding."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        if end == BLOCKS:
            self.head.weight.data.copy_(Model().tokens.weight)


class OneSeed(Model):
    """Blocks of every stage from one seed."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        for block in self.blocks.values():
            torch.manual_seed(4)
            linear: Any = block.linear
            nn.init.normal_(linear.weight)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (TiedCopies, "parameter 'head.weight' of stage 1 and 'tokens.weight' of stage 0 are equal bit by bit"),
        (OneSeed, "parameter 'blocks.2.linear.weight' of stage 1 and 'blocks.0.linear.weight' of stage 0 are equal"),
    ],
)
def test_copies_of_a_parameter_in_two_stages(make: Any, text: str) -> None:
    """Their gradients may be meant to add. Ones and zeros of norm layers and biases are no copies."""
    model = one(make=make).optimize()
    model.run(*batch())
    for _ in range(2):  # a second step does not get by
        assert text in refusal(PrivacyError, model.optimizers[0].step)
    assert all(p.grad is None for p in model.named().values())
    told_apart = one(make=make).optimize()
    with torch.no_grad():
        told_apart.parts[1].head.weight[0, 0] += 1e-3
        for block in told_apart.parts[1].blocks.values():
            block.linear.weight[0, 0] += 1e-3
    told_apart.step(*batch())


def test_gradients_that_a_loop_adds_up_between_stages() -> None:
    """As is done for tied embeddings: before the step there is nothing to add, and what is put there is refused."""
    model = one().optimize()
    model.run(*batch())
    tied = [model.parts[0].tokens.weight, model.parts[1].head.weight]
    assert all(p.grad is None for p in tied)
    tied[1].grad = torch.randn_like(tied[1])
    told = refusal(PrivacyError, model.optimizers[1].step)
    assert "parameter 'head.weight' did not come out of the clipped backward alone" in told


def test_micro_batches_are_freed() -> None:
    """Torch keeps each micro-batch's loss, and with it our backward, which holds neither activations nor sums."""
    seen: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        ours = [o for o in gc.get_objects() if type(o) is RegionBackward]
        seen.append(len(ours))
        assert not any(run.rest is not None for o in ours for run in o.received)
        assert not any(any(vars(o.sums).values()) for o in ours)
        return loss_of(logits, targets)

    gc.collect()
    model = one(loss=loss, chunks=B).optimize()
    model.step(*batch())
    model.check_held()
    assert max(seen) >= B


def test_calls_outside_a_schedule() -> None:
    model = one()
    with torch.no_grad():
        assert model.parts[1](torch.randn(B, T, D)).shape[0] == B
    told = refusal(PrivacyError, lambda: model.parts[1](torch.randn(B, T, D)))
    assert "called with gradients outside of a schedule" in told


def test_a_second_batch_before_the_step() -> None:
    model = one().optimize()
    model.run(*batch())
    told = refusal(PrivacyError, lambda: model.run(*batch()))
    assert "a second batch of the pipeline's schedule before the optimizer's step" in told
    model.clear()
    model.step(*batch())


def test_a_step_in_the_middle_of_a_schedule() -> None:
    model = one().optimize()
    calls: list[Any] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled() and calls.append(0) is None and len(calls) == 3:
            model.optimizers[0].step()
        return loss_of(logits, targets)

    model.schedule._loss_fn = loss
    told = refusal(PrivacyError, lambda: model.run(*batch()))
    assert "in the middle of the pipeline's schedule" in told


def test_a_scaled_loss() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    model = one(loss=lambda logits, targets: scaler.scale(loss_of(logits, targets))).optimize()
    assert "scaled by a gradient scaler" in refusal(PrivacyError, lambda: model.step(*batch()))


def test_other_dimensions_and_groups() -> None:
    turned = one(in_dims=1)
    assert "in_dims gives 1 for 'x' of stage" in refusal(UnsupportedGraphError, lambda: turned.run(*batch()))
    other: Any = dist.new_group([0])
    model = one()
    for stage in model.stages:
        stage.group = other
    assert "another process group than dp_compile" in refusal(PrivacyError, lambda: model.run(*batch()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clipping": "per_layer"}, "clipping='per_layer' for a stage of a pipeline"),
        ({"memory_budget": 2.0}, "memory_budget for a stage of a pipeline"),
        ({"norm": "two_pass"}, "norm='two_pass' for a stage of a pipeline"),
        ({"check": True}, "check=True for a stage of a pipeline"),
        ({"regions": "breaks"}, "regions='breaks' for a stage of a pipeline"),
        ({"pipeline": "pp"}, "pipeline is 'pp'"),
    ],
)
def test_options_that_a_stage_cannot_have(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DPCompileError, match="pipeline") as caught:
        dp_compile(Model(), **{"pipeline": True, **options})
    assert text in str(caught.value)


def test_mechanisms_and_steps_that_a_stage_cannot_have() -> None:
    model = dp_compile(Model(), backend="eager", pipeline=True)
    cases: list[dict[str, Any]] = [{"exact": True}, {"adaptive_clip": AdaptiveClip()}]
    for options in cases:
        with pytest.raises(PrivacyError, match="another mechanism than independent Gaussian noise"):
            optimizer_of(model, 1.0, adam=False, **options)
    optimizer = optimizer_of(model, 1.0, adam=False)
    with pytest.raises(UnsupportedGraphError, match="compile_step makes one graph"):
        compile_step(model, lambda out, y: loss_of(out, y), optimizer)


def test_without_torch_distributed(tmp_path: Path) -> None:
    dist.destroy_process_group()
    with pytest.raises(DPCompileError, match="pipeline= without torch.distributed"):
        dp_compile(Model(), pipeline=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'again'}", rank=0, world_size=1)


def single(rows: int) -> tuple[Any, Any, Any, PoissonLoader]:
    """One stage that is the whole model, fed by a loader."""
    part = dp_compile(Model(), max_grad_norm=0.3, backend="eager", pipeline=True)
    stage = pipelining.PipelineStage(part, 0, 1, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, 2, loss_fn=loss_of)
    optimizer = optimizer_of(part, 0.0, adam=False)
    loader = PoissonLoader(TensorDataset(*batch(40)), expected_batch_size=8, physical_batch_size=rows, steps=3, seed=3)
    return part, schedule, optimizer, loader.attach(part, optimizer)


def test_batches_of_a_loader() -> None:
    _, schedule, optimizer, loader = single(20)
    x, y = next(iter(loader))
    told = refusal(PrivacyError, lambda: schedule.step(x.flip(0), target=y, losses=[]))
    assert "other rows than the loader's batch" in told
    optimizer.discard()
    told = refusal(PrivacyError, lambda: schedule.step(x, target=y, losses=[]))
    assert "a backward on what is no batch of the loader" in told


def test_batches_of_a_loader_in_turns_or_taken_ahead() -> None:
    _, schedule, _, loader = single(2)
    x, y = next(iter(loader))
    assert "iterate over loader.parts()" in refusal(PrivacyError, lambda: schedule.step(x, target=y, losses=[]))
    _, schedule, _, loader = single(20)
    drawn = iter(loader.parts())
    (x, y), _ = next(drawn), next(drawn)
    assert "2 batches of the loader wait" in refusal(PrivacyError, lambda: schedule.step(x, target=y, losses=[]))


def test_masks() -> None:
    model = one().optimize()
    for part in model.parts:
        set_mask(part, torch.ones(B + 1, dtype=torch.bool))
    told = refusal(PrivacyError, lambda: model.run(*batch()))
    assert "micro-batch 0 of 4 has [2] rows, and of the batch of 9 it would have 3" in told
    model = one().optimize()
    for part in model.parts:
        set_mask(part, torch.ones(B, dtype=torch.bool))
    model.step(*batch())
    model.clear()
    assert "a second backward on one batch" in refusal(PrivacyError, lambda: model.step(*batch()))


def test_what_torch_finds_shapes_out_by() -> None:
    """Shapes are found out by the plain model on zeros; that leaves nothing behind."""
    seen: list[Tensor] = []

    class Looking(Model):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                seen.append(x.detach().clone())
            return super().forward(x)

    model = one(make=Looking).optimize()
    x, y = batch()
    model.step(x.clamp_min(1), y)
    assert seen and not any(s.any() for s in seen)
    assert all(engine_of(p).ledger.deliveries == 0 for p in model.parts)
    firsts = [stage.first_parameter for p in model.parts if (stage := engine_of(p).stage) is not None]
    assert firsts == [0, len(list(model.parts[0].parameters()))]
