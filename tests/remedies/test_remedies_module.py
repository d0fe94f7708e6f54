"""The private module, and the compiled step: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from private_steps import X, Y, over, parts, steps
from remedies import Right, data, equals, plain, refused, sgd, stepped, trains
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpcompile import compile_step, dp_compile, make_private

REBUILD = (
    "do it with an ordinary model: build it again and load_state_dict(private.state_dict()); a private model is for "
    "training"
)


def blocks(**options: Any) -> Any:
    torch.manual_seed(1)
    return dp_compile(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)), backend="eager", **options)


@refused("leave regions, fully_shard and parallelize_module out, or plan for a block by itself", ways=2, slow=True)
def test_a_plan_of_regions_for_another_machine(told: int) -> Right:
    model: Any = blocks(regions=None if told == 1 else "blocks")
    if told == 2:
        model = dp_compile(nn.Linear(5, 5), backend="eager")
    return equals(model.trace(X, rates="h100") is not None, True)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@refused(REBUILD)
def test_a_script(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    wanted = model(X)
    if told:
        ordinary = plain()
        ordinary.load_state_dict(model.state_dict())
        model = ordinary
    return equals(torch.equal(torch.jit.script(model)(X), wanted), True)


@refused("use DistributedDataParallel(dp_compile(model)), one process per device")
def test_data_parallel(told: int, one_rank: None) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    if not told:
        model._replicate_for_data_parallel()  # as nn.DataParallel calls it for every device
    model = DistributedDataParallel(model)
    return steps(model, over(model))


@refused("use the ordinary loop: model(inputs), loss.backward(), optimizer.step()")
def test_a_compiled_step_of_replicas(told: int, one_rank: None) -> Right:
    model = DistributedDataParallel(dp_compile(plain(), backend="eager"))
    optimizer = over(model)
    if not told:
        compile_step(model, F.cross_entropy, optimizer)
    return steps(model, optimizer)


@refused("switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)")
def test_a_compiled_step_that_is_not_compiled(told: int) -> Right:
    model, optimizer = parts()
    step = compile_step(model, F.cross_entropy, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.compiler.set_stance("default" if told else "force_eager"):
        step(X, Y)
    return stepped(model, optimizer, before, 1)


@refused(
    "make the loop private first, and prepare what comes of it; or, with Accelerate, call "
    "dpcompile.integrations.accelerate.make_private(accelerator, model, optimizer, loader, ...)",
    ways=2,
    slow=True,
)
def test_an_optimizer_that_accelerate_prepared(told: int) -> Right:
    accelerate = pytest.importorskip("accelerate")
    from dpcompile.integrations.accelerate import make_private as of_accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = plain()
    three: Any = model, sgd(model), data()
    options: Any = {"noise_multiplier": 1.0, "backend": "eager", "accountant": "rdp"}
    if told == 0:
        make_private(*accelerator.prepare(*three), **options)
    private_model, optimizer, loader = of_accelerate(accelerator, *three, **options) if told == 2 else \
        accelerator.prepare(*make_private(*three, **options))  # fmt: skip
    return trains(private_model, optimizer.optimizer if not hasattr(optimizer, "logical_step") else optimizer, loader)
