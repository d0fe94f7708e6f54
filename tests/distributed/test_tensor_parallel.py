"""Tensor parallelism: launches of tests/workers/tensor_worker.py, and the index maps of what is cut twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch, passed
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

from dpcompile._torch.tensors import real_tensors
from dpcompile.distributed import shards
from dpcompile.distributed.tensor_parallel import fingerprint
from dpcompile.noise.mechanism import privatize_

pytestmark = pytest.mark.full  # launches of several ranks

CHECKS = {
    "gradients of MLP", "gradients of attention", "gradients of GPT", "clipping by layer", "inductor",
    "gradients of a block twice", "a block twice, by layer",
    "frozen parameters", "one example", "training with noise", "C by a quantile", "secure noise",
    "C of each layer by a quantile", "loading",
    "checkpoints", "communication", "refusals", "other rates", "users",
}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_layers_come_to_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    """Two ranks: tensor parallelism alone. Four: with FSDP2, two by two."""
    found = passed(launch(ranks, "tensor_worker.py", str(tmp_path)))
    assert found == CHECKS | ({"regions", "cut embedding"} if ranks == 2 else set())


def test_what_layers_that_are_cut_twice_do_otherwise(tmp_path: Path) -> None:
    """Two by two, with FSDP2; the rest of their checks is slow."""
    few = {
        "gradients of GPT",
        "clipping by layer",
        "training with noise",
        "C by a quantile",
        "C of each layer by a quantile",
        "communication",
        "refusals",
    }
    assert passed(launch(4, "tensor_worker.py", str(tmp_path), *few)) == few


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_noise_that_is_correlated_over_steps(ranks: int, tmp_path: Path) -> None:
    """Weights are those of one process, so that its variance is there once; on four ranks with FSDP2."""
    found = passed(launch(ranks, "tensor_worker.py", str(tmp_path), "correlated"))
    assert found == {"correlated by bands", "correlated by buffers"}


BOXES = [
    ((6, 4), (0, 0), (6, 4)), ((6, 4), (2, 0), (3, 4)), ((6, 4), (0, 2), (6, 2)), ((6, 4), (3, 2), (2, 2)),
    ((4, 3, 6), (1, 0, 2), (2, 3, 2)), ((4, 3, 6), (1, 1, 0), (2, 1, 6)), ((5,), (2,), (3,)), ((), (), ()),
    ((6, 4), (6, 0), (0, 4)), ((4, 1, 6), (0, 0, 3), (4, 1, 3)),
]  # fmt: skip


def box_of(value: Tensor, offset: tuple[int, ...], here: tuple[int, ...]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, here, strict=True)):
        value = value.narrow(dim, start, length)
    return value


@pytest.mark.parametrize(("whole", "offset", "here"), BOXES)
def test_runs_are_the_elements_of_a_part_in_its_own_order(
    whole: tuple[int, ...], offset: tuple[int, ...], here: tuple[int, ...]
) -> None:
    """Against the indices themselves."""
    index = torch.arange(torch.Size(whole).numel()).reshape(whole)
    runs = shards._runs(whole, offset, here)
    found = [i for start, length in runs for i in range(start, start + length)]
    assert found == box_of(index, offset, here).reshape(-1).tolist()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("whole", "offset", "here"), BOXES)
def test_noise_of_a_part_is_the_part_of_the_noise(
    whole: tuple[int, ...], offset: tuple[int, ...], here: tuple[int, ...], secure: bool
) -> None:
    """Whatever the part."""
    full, own = torch.zeros(whole), torch.zeros(here)
    options = {"parameters": [3], "std": 2.0, "expected_batch_size": 4.0, "seed": 11, "step": 5, "secure": secure}
    privatize_([full], **options)  # type: ignore[arg-type]
    privatize_([own], **options, runs=[shards._runs(whole, offset, here)])  # type: ignore[arg-type]
    assert torch.equal(own, box_of(full, offset, here))


class _Placement:
    def __init__(self, dim: int | None, factor: int = 0) -> None:
        self.dim, self.split_factor = dim, factor


class Shard(_Placement):
    """Stands in for torch's, by name."""


class _StridedShard(_Placement):
    pass


class Replicate(_Placement):
    def __init__(self) -> None:
        super().__init__(None)


class Partial(_Placement):
    def __init__(self) -> None:
        super().__init__(None)


@pytest.mark.parametrize(
    ("placements", "understood"),
    [
        ((Shard(0),), True),
        ((Shard(1),), True),
        ((Replicate(),), True),
        ((Replicate(), Shard(0)), True),
        ((Shard(0), Replicate()), True),
        ((Shard(0), Shard(1)), True),
        ((_StridedShard(0, 2), Shard(0)), True),
        ((_StridedShard(0, 3), Shard(0)), False),
        ((Shard(0), Shard(0)), False),
        ((_StridedShard(0, 2), Shard(1)), False),
        ((Shard(1), Shard(0)), False),
        ((_StridedShard(0, 2),), False),
        ((Partial(),), False),
        ((Shard(0), Partial()), False),
        ((Replicate(), Replicate()), False),
        ((Replicate(), Shard(0), Shard(1)), True),
        ((Replicate(), Shard(0), Replicate()), True),
        ((Replicate(), _StridedShard(0, 2), Shard(0)), True),
        ((Replicate(), _StridedShard(0, 3), Shard(0)), False),
        ((Replicate(), Shard(1), Shard(0)), False),
        ((Replicate(), Replicate(), Shard(0)), False),
        ((Shard(0), Replicate(), Shard(1)), True),
        ((Shard(0), Replicate(), Replicate()), True),
        ((_StridedShard(0, 2), Replicate(), Shard(0)), True),
        ((_StridedShard(0, 2), Shard(0), Shard(1)), True),
        ((_StridedShard(0, 4), Shard(0), Shard(1)), False),
        ((_StridedShard(0, 4), Shard(0), Shard(0)), False),
        ((Shard(0), Shard(1), Shard(1)), False),
        ((Shard(0), Replicate(), Replicate(), Shard(1)), False),
        ((Replicate(), Shard(0), Replicate(), Shard(1)), True),
        ((Replicate(), Replicate(), Shard(0), Shard(1)), False),
    ],
)
def test_only_placements_that_are_understood_pass(placements: tuple[_Placement, ...], understood: bool) -> None:
    """Under FSDP2; any other could lie elsewhere in the parameter than its noise."""
    assert shards._is_understood(placements, [2] * len(placements), fsdp=True) is understood


@pytest.mark.parametrize(
    ("placements", "understood"),
    [
        ((Replicate(), Replicate()), True),
        ((Replicate(), Shard(1)), True),
        ((Shard(1), Shard(0)), True),
        ((Shard(0), Shard(0)), False),
        ((_StridedShard(0, 2), Shard(0)), False),
        ((Replicate(), Partial()), False),
        ((Replicate(), Replicate(), Shard(0)), False),
    ],
)
def test_placements_without_fsdp(placements: tuple[_Placement, ...], understood: bool) -> None:
    assert shards._is_understood(placements, [2] * len(placements), fsdp=False) is understood


def test_fingerprints_tell_batches_apart() -> None:
    """One bit, the order, the dtype's size: all count."""
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    changed, swapped = x.clone(), x.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    swapped[[0, 1]] = x[[1, 0]]
    seen = {int(fingerprint([v])) for v in (x, changed, swapped, x.double(), x[:32], torch.zeros(4), torch.zeros(5))}
    assert len(seen) == 7
    assert int(fingerprint([x, changed])) != int(fingerprint([changed, x]))
    assert int(fingerprint([x.T.contiguous().T])) == int(fingerprint([x]))
    for value in (
        torch.ones(3, dtype=torch.bool),
        torch.randn(3, dtype=torch.complex64),
        torch.ones((), dtype=torch.int32),
    ):
        assert int(fingerprint([value])) == int(fingerprint([value.clone()]))


def test_collectives_while_tracing_leave_the_interpreter_free() -> None:
    """Else gloo hangs now and then: its thread waits for the interpreter, and holds what the collective needs."""
    included = torch._C._dispatch_tls_is_dispatch_key_included
    with enable_python_dispatcher():
        assert included("PythonDispatcher")
        with real_tensors():
            assert not included("PythonDispatcher")
        assert included("PythonDispatcher")
