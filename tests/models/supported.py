"""``docs/supported.md``, read off the table of rules, the kinds of sites, the errors, and the models of the suite."""

from __future__ import annotations

import ast
import inspect
import pathlib
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import dpcompile
from dpcompile import errors
from dpcompile.graph.operations import operation_name
from dpcompile.proof.rules.pointwise import pointwise
from dpcompile.proof.rules.registry import rules
from dpcompile.proof.site_kinds import site_kinds
from models.case import ALL

__all__ = ["supported"]

_FACTORED = ("mm", "bmm", "index_put", "_unsafe_index_put", "convolution_backward")
_HEAD = """# What is supported

Written by `python tests/test_docs.py` from the table of rules, the kinds of sites, the errors in the code, and the
models of the test suite (torch 2.13); not by hand.

Three questions are asked of a model. Can `torch.compile` capture it as one graph? Is there a rule for each operation on
values of examples, and does it keep the examples apart? Do the operations that sum a parameter's gradient over the
examples have a norm rule? A model that passes is right; one that does not is refused, with the line of its code.
"""


def supported() -> str:
    """The page."""
    parts = [_HEAD, "## Operations\n", *_operations(), "\n## Sums over the examples\n", *_sites()]
    parts += ["\n## Refusals\n", *_refusals(), "\n## Models of the test suite\n", *_models()]
    return "\n".join(parts) + "\n"


# --- operations -------------------------------------------------------------------------------------------------------


def _operations() -> Iterator[str]:
    yield "All operations that torch tags as pointwise, and those listed here. An operation that is not listed is"
    yield "refused by name when it meets a value of an example ([register one](extending.md)).\n"
    grouped: dict[Callable[..., Any], list[str]] = {}
    for packet, rule in rules().items():
        name = operation_name(packet).removeprefix("python::")
        if "::" not in name:
            grouped.setdefault(rule, []).append(name)
    for rule, names in sorted(grouped.items(), key=lambda x: (x[0].__module__, x[0].__name__)):
        yield f"**{_first_line(rule)}**\n"
        yield textwrap.fill(", ".join(f"`{n}`" for n in sorted(set(names))), 125, break_long_words=False) + "\n"
        if rule is pointwise:
            yield "and every operation with the tag `pointwise`.\n"
        reasons = list(dict.fromkeys(_reasons(rule, set())))
        if reasons:
            yield "Refused where\n"
            yield from (f"- {reason}" for reason in reasons)
            yield ""


def _first_line(rule: Callable[..., Any]) -> str:
    return (inspect.getdoc(rule) or "").splitlines()[0]


def _reasons(function: Any, seen: set[Any]) -> Iterator[str]:
    """What a rule says when it refuses, and the functions that it calls."""
    if function in seen or not isinstance(function, types.FunctionType):
        return
    seen.add(function)
    if not function.__module__.startswith("dpcompile.proof.rules"):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("mixes", "unsupported") and node.args:
            text = _text(node.args[0])
            if text:
                yield text
        elif isinstance(node.func, ast.Name):
            yield from _reasons(function.__globals__.get(node.func.id), seen)


def _text(node: ast.expr) -> str:
    """A message with its blanks."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""


# --- sites ------------------------------------------------------------------------------------------------------------


def _sites() -> Iterator[str]:
    yield "| the gradient is summed by | weighted through | norms without the per-example gradients |"
    yield "|---|---|---|"
    for name, kind in site_kinds().items():
        factored = ("outer, ghost" if "index" in name else "outer, ghost, direct") if name in _FACTORED else "-"
        yield f"| `{name}` | {' or '.join(kind.linear)} | {factored} |"
    yield "\nPer-example gradients (kept, or made again) exist for all of them, through any tail that vmap can run."


# --- refusals ---------------------------------------------------------------------------------------------------------

_KINDS = ("ExampleMixingError", "UnsupportedGraphError", "PrivacyError", "NotReadyError", "DPCompileError")


def _refusals() -> Iterator[str]:
    """Every error that the package raises, with blanks for what it fills in."""
    yield "Besides those of the rules. `…` is filled in; each message goes on with the place and with what to do.\n"
    root = pathlib.Path(dpcompile.__file__).parent
    for kind in _KINDS:
        yield f"**{kind}**: {(inspect.getdoc(getattr(errors, kind)) or '').splitlines()[0]}\n"
        found = {text for path in sorted(root.rglob("*.py")) for text in _raised(path, kind)}
        yield from (f"- {text}" for text in sorted(found))
        yield ""


def _raised(path: pathlib.Path, kind: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kind and node.args:
            text = _text(node.args[0])
            if text and text != "…":
                yield text


# --- models -----------------------------------------------------------------------------------------------------------


def _models() -> Iterator[str]:
    yield "Each is compared with one backward per example; `pytest tests/models` prints the errors.\n"
    families: dict[str, list[Any]] = {}
    for case in ALL:
        families.setdefault(case.family, []).append(case)
    for family, cases in sorted(families.items()):
        right = [c.name for c in cases if c.refused is None]
        if right:
            yield f"**{family}**, right: " + ", ".join(right) + "\n"
        refused = [c for c in cases if c.refused is not None]
        if refused:
            yield f"**{family}**, refused:\n"
            yield from (f"- {c.name}: {c.reason}" for c in refused)
            yield ""
