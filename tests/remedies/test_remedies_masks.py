"""Masks and parts of a draw: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
from private_steps import X, backward, parts
from remedies import Right, data, plain, private, refused, right, stepped, trains

from dpcompile import PoissonLoader, dp_compile, set_mask


@refused("True marks an example, False a padding row")
def test_a_mask_of_numbers(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    mask = torch.ones(8, dtype=torch.bool if told else torch.float32)
    set_mask(model, mask)
    return right(model, X, mask=mask)


@refused("call the model on the batch that the loader gave, whole", slow=True)
def test_a_mask_of_other_rows(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    mask = torch.ones(8 if told else 7, dtype=torch.bool)
    set_mask(model, mask)
    return right(model, X, mask=mask)


@refused(
    "iterate over the loader and leave the mask to it, or do not attach one and use loader.batches()",
    ways=2,
)
def test_a_mask_beside_a_loader(told: int) -> Right:
    if told == 2:
        model, optimizer = parts()
        before = [p.detach().clone() for p in model.parameters()]
        loader = PoissonLoader(data().dataset, expected_batch_size=8)
        for batch in loader.batches():
            set_mask(model, batch.mask)
            optimizer.accumulating = not batch.ends_step
            backward(model, *batch.data)
            optimizer.step()
            optimizer.zero_grad()
        return stepped(model, optimizer, before, 3)
    model, optimizer, loader = private()
    if not told:
        set_mask(model, torch.ones(8, dtype=torch.bool))
    return trains(model, optimizer, loader)


@refused("leave it to the loader, or iterate over loader.batches() without attaching it", ways=2)
def test_accumulating_beside_a_loader(told: int) -> Right:
    if told == 2:
        return loop_of_ones_own()
    model, optimizer, loader = private()
    if not told:
        optimizer.accumulating = True
    return trains(model, optimizer, loader)


def loop_of_ones_own() -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    for batch in PoissonLoader(data().dataset, expected_batch_size=8, physical_batch_size=4).batches():
        set_mask(model, batch.mask)
        optimizer.accumulating = not batch.ends_step
        backward(model, *batch.data)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)
