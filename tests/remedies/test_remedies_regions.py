"""Models in regions: what their messages say to do, tried."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from block_models import Around, D, rows
from remedies import Right, refused, right
from shared_models import Peeking
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dpcompile import UnsupportedGraphError, dp_compile


def compiled(model: nn.Module, **options: Any) -> Any:
    everything: Any = {"backend": "eager", "regions": "blocks", **options}
    return dp_compile(model, **everything)


def around(function: Callable[[Any, Any, Tensor], Any], **options: Any) -> Right:
    torch.manual_seed(1)
    return right(compiled(Around(function), **options), rows())


@refused(
    "call the model again: it is compiled anew, with one norm over both uses; or clipping='flat'", ways=2, slow=True
)
def test_a_weight_of_two_blocks_that_is_seen_late(told: int) -> Right:
    torch.manual_seed(1)
    shared = nn.Linear(D, D)
    model = nn.Sequential(shared, nn.Tanh(), Peeking([shared]), Peeking([shared]))
    private, x = compiled(model, clipping="flat" if told == 2 else "per_layer"), rows()
    try:
        private(x)
    except UnsupportedGraphError:
        if not told:
            raise
    layers = {n: n.rpartition(".")[0] for n, _ in private.named_parameters()}
    return right(private, x, groups=None if told == 2 else layers)


class Hyper(nn.Module):
    """A block makes a weight of a parameter; or its own layer does, where the weight is used."""

    def __init__(self, *, within: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Makes() for _ in range(2))
        self.given, self.within = nn.Parameter(torch.randn(D, D)), within

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return second(first(x), self.given) if self.within else second(x) @ first(self.given)


class Makes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        return self.linear(x).tanh() if given is None else x @ self.linear(given)


@refused(
    "compute these values where they meet the examples, in the block that uses them; or leave regions out, where the "
    "model is not under FSDP2",
    ways=2,
)
def test_a_block_that_makes_a_weight_of_parameters(told: int) -> Right:
    torch.manual_seed(1)
    return right(compiled(Hyper(within=told == 1), regions=None if told == 2 else "blocks"), rows())


@refused("run the forward again, or add the losses before one backward", ways=2, slow=True)
def test_two_backwards_through_regions(told: int) -> Right:
    torch.manual_seed(1)
    private, x = compiled(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))), rows()
    first = private(x)
    if told == 2:
        (first.sum() + first.square().sum()).backward()
    else:
        first.sum().backward(retain_graph=True)
        private.zero_grad() if told else None
        (private(x) if told else first).square().sum().backward()
    return right(private, x)


class Both(nn.Module):
    """Two uses of a weight in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).tanh())


@refused(
    "use one backward (norm='auto'), compile the model without regions, or put both uses into one block",
    ways=3,
    slow=True,
)
def test_a_weight_of_two_blocks_and_two_passes(told: int) -> Right:
    torch.manual_seed(1)
    options = [{}, {"norm": "auto"}, {"regions": None}, {}][told]
    if told == 3:
        return right(compiled(nn.Sequential(Both(), Both()), norm="two_pass"), rows())
    model = Around(lambda m, blocks, x: blocks[1](blocks[0](blocks[0](x).tanh())))
    return right(compiled(model, **{"norm": "two_pass", **options}), rows())


class Selective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=False, context_fn=_contexts())


def _contexts() -> Any:
    return partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])


@refused("put the checkpoint into the block, or leave context_fn out", ways=2)
def test_a_checkpoint_that_chooses(told: int) -> Right:
    torch.manual_seed(1)
    if told == 1:
        return right(compiled(nn.Sequential(Selective(), Selective())), rows())
    options: Any = {} if told else {"context_fn": _contexts()}
    return around(lambda m, blocks, x: checkpoint(blocks[1], blocks[0](x), use_reentrant=False, **options))


@refused("check the model on one process before fully_shard")
def test_a_check_of_a_sharded_model(told: int) -> Right:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(1)
        model: Any = nn.Linear(D, D)
        return right(compiled(model if told else fully_shard(model), check=True, regions=None), rows())
    finally:
        torch.distributed.destroy_process_group()


@refused("change parameters and inputs only after loss.backward()", slow=True)
def test_an_input_that_changes_before_it_runs_again(told: int) -> Right:
    torch.manual_seed(1)
    model = nn.Sequential(*(checkpoint_wrapper(nn.Linear(D, D)) for _ in range(2)))
    private, x = compiled(model, norm="two_pass"), rows()
    loss = private(x).sum()
    if told:
        loss.backward()
    with torch.no_grad():
        x += 1
    if not told:
        loss.backward()
    return right(private, x)


class Hidden:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@refused(
    "return tensors, in tuples, lists and dicts, or compile without memory_budget and with one backward",
    ways=2,
    slow=True,
)
def test_an_object_out_of_two_passes(told: int) -> Right:
    torch.manual_seed(1)

    def function(m: Any, blocks: Any, x: Tensor) -> Any:
        out = blocks[1](blocks[0](x))
        return {"out": out} if told == 1 else Hidden(out)

    private, x = compiled(Around(function), norm="auto" if told == 2 else "two_pass"), rows()

    def loss(output: Any, part: slice) -> Tensor:
        value = output["out"] if told == 1 else output.value
        return value.square().flatten(1).sum(1)

    return right(private, x, loss=loss)


class Counted(nn.Module):
    """Every second time a hook makes another dtype of what a block returns."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.blocks, self.calls = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), 0
        if hooked:
            self.blocks[0].register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output.double() if self.calls % 2 == 0 else output

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x).float())


@refused("remove hooks that change what the block returns, or compile the model without regions", ways=2, slow=True)
def test_a_hook_that_changes_its_mind(told: int) -> Right:
    torch.manual_seed(1)
    return right(compiled(Counted(told != 1), regions=None if told == 2 else "blocks"), rows())


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:  # type: ignore[override]
        return function(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g, None


@refused(
    "write loops and branches in Python; call the block outside the torch.autograd.Function, or compile the model "
    "without regions"
)
def test_a_block_in_a_branch(told: int) -> Right:
    def function(m: Any, blocks: Any, x: Tensor) -> Tensor:
        h = blocks[0](x)
        if told:
            return blocks[1](h) if m.deep > 0 else h
        return torch.cond(m.deep > 0, lambda h: blocks[1](h), lambda h: h + 1, (h,))

    torch.manual_seed(1)
    model = Around(function)
    model.deep = 1 if told else torch.ones(())  # type: ignore[assignment]
    return right(compiled(model), rows())


@refused(
    "write loops and branches in Python; call the block outside the torch.autograd.Function, or compile the model "
    "without regions",
    ways=2,
)
def test_a_block_in_a_function_of_autograd(told: int) -> Right:
    def function(m: Any, blocks: Any, x: Tensor) -> Tensor:
        h = blocks[0](x)
        return blocks[1](blocks[0](h) if told == 1 else Through.apply(h, blocks[0]))  # type: ignore[arg-type]

    return around(function, regions=None if told == 2 else "blocks")


@refused(
    "enter it around the call of the whole model or inside the block, freeze parameters with requires_grad_(False), or "
    "compile the model without regions",
    ways=4,
    slow=True,
)
def test_blocks_under_autocast_in_forward(told: int) -> Right:
    def function(m: Any, blocks: Any, x: Tensor) -> Tensor:
        if told in (1, 3):
            return blocks[1](blocks[0](x))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=told != 3):
            return blocks[1](blocks[0](x))

    class Inside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.linear(x, self.weight, self.bias)

    torch.manual_seed(1)
    if told == 2:
        return right(compiled(nn.Sequential(Inside(D, D), Inside(D, D))), rows(), tolerance=2e-2)
    model = Around(function)
    if told == 3:
        model.blocks[0].requires_grad_(False)
    private = compiled(model, regions=None if told == 4 else "blocks")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=told == 1):
        return right(private, rows(), tolerance=2e-2)


@refused("switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)", slow=True)
def test_blocks_that_are_not_compiled(told: int) -> Right:
    with torch.compiler.set_stance("default" if told else "force_eager"):
        return around(lambda m, blocks, x: blocks[1](blocks[0](x)))


@refused("return a tuple, or compile the model without regions", ways=2)
def test_blocks_that_return_a_dict(told: int) -> Right:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Any:
            out = self.linear(x)
            return (out,) if told == 1 else {"out": out}

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)[0 if told == 1 else "out"]
            return x

    torch.manual_seed(1)
    return right(compiled(Blocks(), regions=None if told == 2 else "blocks"), rows())


@refused("call it on the whole batch, or compile the model without regions", ways=2)
def test_a_block_under_vmap(told: int) -> Right:
    def function(m: Any, blocks: Any, x: Tensor) -> Tensor:
        h = blocks[0](x)
        return blocks[1](h) if told == 1 else torch.func.vmap(lambda row: blocks[1](row))(h)

    return around(function, regions=None if told == 2 else "blocks")
