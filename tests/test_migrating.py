"""The tables of docs/migrating.md: every call in them is one that the library has, with arguments that it takes."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpcompile

PAGE = (pathlib.Path(__file__).parent.parent / "docs/migrating.md").read_text("utf-8")
OPACUS, JAX = PAGE.split("## From JAX-Privacy")
ANY = object()  # what a reader has: a model, a delta, a loss


def snippets(table: str, column: int) -> Iterator[str]:
    """What stands in backticks in a column."""
    for line in table.splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([^`]+)`", line.strip("|").split(" | ")[column])


def check(snippet: str, names: dict[str, Any]) -> None:
    """Every name exists, and every call has such arguments."""
    text = re.sub(r"=(?=[,)])", "=ANY", snippet)
    if re.fullmatch(r"\w+=.+", text):
        text = f"dp_compile({text})"
    _value(ast.parse(text, mode="eval").body, names)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return ANY
    if isinstance(node, ast.Name):
        assert node.id in names or node.id == "ANY", f"what is {node.id}?"
        return names.get(node.id, ANY)
    if isinstance(node, ast.Starred):
        return _value(node.value, names)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, names)
        assert owner is ANY or hasattr(owner, node.attr), f"{owner} has no {node.attr}"
        return ANY if owner is ANY else getattr(owner, node.attr)
    assert isinstance(node, ast.Call), ast.dump(node)
    function = _value(node.func, names)
    for argument in [*node.args, *(k.value for k in node.keywords)]:
        _value(argument, names)
    if function is not ANY:
        known = set(inspect.signature(function).parameters)
        if function is dpcompile.make_private:
            known |= set(inspect.signature(dpcompile.dp_compile).parameters)
        unknown = {k.arg for k in node.keywords} - known
        assert not unknown, f"{function} takes no {unknown}"
    return function if inspect.isclass(function) else ANY


def ours() -> dict[str, Any]:
    model = nn.Linear(4, 3)
    loader: Any = DataLoader(TensorDataset(torch.zeros(16, 4)), batch_size=4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = dpcompile.make_private(model, sgd, loader, noise_multiplier=1.0, backend="eager")
    private: Any = parts[0]
    own = {name: getattr(dpcompile, name) for name in dpcompile.__all__}
    given = dict.fromkeys(("delta", "epochs", "inputs", "losses", "loss_fn", "p"), ANY)
    return {**own, **given, "model": type(private), "optimizer": parts[1], "loader": parts[2], "torch": torch, "nn": nn}


@pytest.mark.parametrize("table", [OPACUS, JAX], ids=["opacus", "jax"])
def test_ours(table: str) -> None:
    names = ours()
    found = list(snippets(table, 1))
    assert len(found) > 10
    for snippet in found:
        if not snippet.startswith('"') and snippet not in ("state_dict()", "load_state_dict()", "p.grad"):
            check(snippet, names)


@pytest.mark.filterwarnings("ignore")
def test_opacus() -> None:
    opacus = pytest.importorskip("opacus")
    for name in ("layers", "distributed", "schedulers", "accountants.utils", "data_loader", "grad_sample",
        "validators", "utils.batch_memory_manager"):  # fmt: skip
        importlib.import_module(f"opacus.{name}")
    engine = opacus.PrivacyEngine
    names = {
        "opacus": opacus, "PrivacyEngine": engine, "make_private": engine.make_private,
        "load_checkpoint": engine.load_checkpoint, "GradSampleModule": opacus.GradSampleModule,
        "BatchMemoryManager": opacus.utils.batch_memory_manager.BatchMemoryManager,
        "ModuleValidator": opacus.validators.ModuleValidator, "DPDataLoader": opacus.data_loader.DPDataLoader,
        "DPMultiheadAttention": opacus.layers.DPMultiheadAttention,
        "register_grad_sampler": opacus.grad_sample.register_grad_sampler,
        "get_noise_multiplier": opacus.accountants.utils.get_noise_multiplier,
        **dict.fromkeys(("model", "loader", "delta", "p"), ANY),
    }  # fmt: skip
    assert opacus.__version__.startswith("1.6") and "Opacus 1.6" in PAGE
    found = [s for s in snippets(OPACUS, 0) if not s.startswith('"')]
    assert len(found) > 20
    for snippet in found:
        check(snippet, names)


@pytest.mark.filterwarnings("ignore")
def test_jax_privacy() -> None:
    library = pytest.importorskip("jax_privacy", reason="pip install dpcompile[audit]")
    names = {name: getattr(library, name) for name in ("batch_selection", "noise_addition", "accounting", "auditing")}
    names |= {"jax_privacy": library, "clipped_grad": library.clipped_grad}
    names["CyclicPoissonSampling"] = library.batch_selection.CyclicPoissonSampling
    names |= dict.fromkeys(("loss", "noising_matrix", "noise_multiplier", "iterations"), ANY)
    for snippet in snippets(JAX, 0):
        check(snippet, names)
