"""Where in the user's code a node comes from."""

from __future__ import annotations

import os
import re

import torch
from torch import fx

__all__ = ["module_of", "where"]

_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_ROOT = re.compile(r"^[LG]\['[^']*'\]")  # how Dynamo calls the module that was compiled
_TORCH, _HERE = os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__))


def where(node: fx.Node) -> str | None:
    """``file:line, in function: source`` of the innermost frame that is the user's own, or None.

    Nodes of the backward carry the trace of the forward operation that they belong to. Where a node has none, those of
    its operands speak for it that have one, and among them the last in the graph.
    """
    own = _user_frame(node.meta.get("stack_trace") or "")
    if own is not None:
        return own
    found: dict[fx.Node, str] = {}
    seen, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand in seen:
                continue
            seen.add(operand)
            frame = _user_frame(operand.meta.get("stack_trace") or "")
            if frame is None:
                stack.append(operand)
            else:
                found[operand] = frame
    return next((found[n] for n in reversed(node.graph.nodes) if n in found), None)


def module_of(node: fx.Node) -> tuple[str, type] | None:
    """``(path, class)`` of the innermost module whose forward holds the node, or None."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return None
    path, kind = list(stack.values())[-1]
    path = _ROOT.sub("", path).replace("._modules['", ".").replace("']", "").lstrip(".") or "the model itself"
    if isinstance(kind, str):  # some torch versions keep the qualified name
        kind = getattr(torch.nn, kind.rsplit(".", 1)[-1], None) or type(kind.rsplit(".", 1)[-1], (), {})
    return path, kind


def _user_frame(trace: str) -> str | None:
    lines = trace.splitlines()
    fallback = None
    for i in reversed(range(len(lines))):
        match = _FRAME.match(lines[i])
        if not match:
            continue
        source = lines[i + 1].strip() if i + 1 < len(lines) else ""
        text = f"{match['file']}:{match['line']}, in {match['function']}: {source}"
        if not match["file"].startswith((_TORCH, _HERE)):
            return text
        if match["file"].startswith(_TORCH):
            fallback = fallback or text
    return fallback
