"""Where the package says what to do: every error and warning in its source, and which of them a caught one came from.

``python tests/support/remedy_sites.py`` lists them with the tests that try them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import dpcompile
from dpcompile.errors import DPCompileError
from dpcompile.graph.labels import Mixed

__all__ = ["LISTED", "Site", "came_from", "listed", "noted", "sites"]

PACKAGE = Path(dpcompile.__file__).parent
LISTED = Path(__file__).parents[1] / "remedies" / "listed.txt"


@dataclasses.dataclass(frozen=True)
class Site:
    """A call in the source that makes an error with a remedy, or warns.

    Attributes:
        key: file, function and which one of the function it is: it stays when words or other functions change.
        lines: first and last line.
        said: what it says to do, as the source has it.
    """

    key: str
    file: str
    lines: tuple[int, int]
    said: str


@functools.cache
def sites() -> tuple[Site, ...]:
    """All of them, in the order of the source."""
    found: list[Site] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        count: Counter[str] = Counter()
        for function, call in _calls(ast.parse(path.read_text()), "", frozenset()):
            count[function] += 1
            said = next((ast.unparse(k.value) for k in call.keywords if k.arg == "remedy"), ast.unparse(call))
            key = f"{file} {function} {count[function]}"
            found.append(Site(key, file, (call.lineno, call.end_lineno or call.lineno), said))
    return tuple(found)


def _calls(node: ast.AST, function: str, arguments: frozenset[str]) -> Iterator[tuple[str, ast.Call]]:
    """Calls with ``remedy=`` that is not the function's own argument, which who calls it has said; and warnings."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = frozenset(a.arg for a in [*node.args.args, *node.args.kwonlyargs])
    if isinstance(node, ast.Call):
        remedy = next((k.value for k in node.keywords if k.arg == "remedy"), None)
        handed_on = isinstance(remedy, ast.Name) and remedy.id in arguments
        if (remedy is not None and not handed_on) or ast.unparse(node.func) == "warnings.warn":
            yield function, node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, function, arguments)


def _site_at(file: str, line: int) -> Site | None:
    if not file.startswith(str(PACKAGE)):
        return None
    name = Path(file).relative_to(PACKAGE).as_posix()
    inside = [s for s in sites() if s.file == name and s.lines[0] <= line <= s.lines[1]]
    return max(inside, key=lambda s: s.lines[0], default=None)


@contextmanager
def noted() -> Iterator[list[tuple[Any, Site]]]:
    """Every error, and every finding of the proof, that is made inside, with the site that made it."""
    made: list[tuple[Any, Site]] = []

    def noting(kind: type) -> Any:
        before = kind.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            before(self, *args, **kwargs)
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                site = _site_at(frame.f_code.co_filename, frame.f_lineno)
                if site is not None:
                    made.append((self, site))
                    break
                frame = frame.f_back

        kind.__init__ = init
        return before

    kinds = (DPCompileError, Mixed)
    before = [noting(kind) for kind in kinds]
    try:
        yield made
    finally:
        for kind, init in zip(kinds, before, strict=True):
            kind.__init__ = init


def came_from(error: BaseException, made: list[tuple[Any, Site]]) -> set[str]:
    """Keys of the sites of ``error``: where it was made; the rule that knew what to do; or where it warned."""
    found = set()
    for what, site in made:
        own = what is error or (isinstance(what, DPCompileError) and str(what) == str(error))
        rule = isinstance(what, Mixed) and what.remedy is not None and what.remedy == getattr(error, "remedy", None)
        if own or rule:
            found.add(site.key)
    if isinstance(error, Warning):
        warned = [_site_at(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
        found |= {s.key for s in warned if s is not None and "warnings.warn" in s.said}
    return found


def listed() -> dict[str, tuple[str, ...]]:
    """By key: names of the tests that try it, or ``-`` and why none does."""
    lines = LISTED.read_text().splitlines() if LISTED.exists() else []
    split = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
    return {key: (why,) if why.startswith("- ") else tuple(why.split(", ")) for key, why in split}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    by_key = listed()
    for site in sites():
        print(f"{site.key}: {', '.join(by_key.get(site.key, ('not listed',)))}\n    {site.said}")
    tried = sum(not by_key.get(s.key, ("- ",))[0].startswith("- ") for s in sites())
    print(f"{tried} of {len(sites())} tried")
