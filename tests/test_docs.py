"""The pages run: every Python block of README and docs is executed, and prints what the page says it prints.

The blocks of a page are run in order in one namespace. A ``text`` block that follows a ``python`` block is its output;
a refusal counts as output. After a change that is meant, ``python tests/test_docs.py`` writes the new output into the
pages.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import linecache
import os
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

os.environ["DPCOMPILE_RATES"] = "typical"  # the pages' plans must not depend on the machine

import pytest
import torch
from models.supported import supported
from order import ORDER
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import DPCompileError

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/how_it_works.md",
    "docs/sharp_edges.md",
    "docs/index.md",
    "docs/choosing.md",
    "docs/faq.md",
    "docs/auditing.md",
    "docs/extending.md",
    "docs/frameworks.md",
    "docs/plan.md",
    "docs/design.md",
)
_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_ON_THE_PINNED_RELEASE = torch.__version__.startswith("2.13")
# What a reader need not wait for in a test.
_SHORTER = {"for epoch in range(20):": "for epoch in range(1):"}


def run_page(page: str) -> Iterator[tuple[re.Match[str], str]]:
    """Run the Python blocks of a page; gives each with what it printed."""
    # Dynamo looks functions up by the name of their module, and remembers it.
    module = types.ModuleType(re.sub(r"\W", "_", page))
    namespace: dict[str, Any] = module.__dict__
    namespace.update(_given(page))
    with _uncompiled(), pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(sys.modules, module.__name__, module)
        patch.chdir(folder)  # where runs are saved
        for block in _BLOCK.finditer((ROOT / page).read_text()):
            yield block, _run(block["code"], namespace)


def _run(code: str, namespace: dict[str, Any]) -> str:
    for long, short in _SHORTER.items():
        code = code.replace(long, short)
    name = "train.py"  # the file that messages point to
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, name, "exec"), namespace)
        except DPCompileError as refusal:
            print(f"{type(refusal).__name__}: {refusal}")
    return printed.getvalue()


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Run rewritten graphs as they are: the pages do not show what Inductor makes of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dp_compile", "make_private"):
            function: Callable[..., Any] = getattr(dpcompile, name)
            patch.setattr(dpcompile, name, functools.partial(function, backend="eager"))
        with contextlib.suppress(ImportError):
            from dpcompile.integrations import transformers

            uncompiled = functools.partial(transformers.PrivacyArguments, backend="eager")
            patch.setattr(transformers, "PrivacyArguments", uncompiled)
        yield


def _given(page: str) -> dict[str, Any]:
    """What a page takes for granted: in the README, the reader's own model, optimizer and data."""
    if page != "README.md":
        return {}
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from train_digits import Network, digits  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    images, labels, _ = digits()[0].tensors
    model = Network()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=2.0),
        "dataset": TensorDataset(images, labels),
    }


def _of_any_release(output: str) -> str:
    """Without the expected time and peak of a step: another release's backward has other operations."""
    return re.sub(r"^expected: .*", "expected: -", output, flags=re.MULTILINE)


def _as_on_the_page() -> bool:
    packages = ("transformers", "peft")
    return _ON_THE_PINNED_RELEASE and all(importlib.util.find_spec(p) is not None for p in packages)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_prints_what_it_says(page: str) -> None:
    count = 0
    for block, printed in run_page(page):
        count += 1
        if block["output"] is not None:
            read = str if _ON_THE_PINNED_RELEASE else _of_any_release
            assert read(printed) == read(block["output"]), f"run `python tests/test_docs.py` if the new {page} is right"
        else:
            assert "Error: " not in printed
    assert count or page == "docs/design.md"


def test_links_lead_to_files() -> None:
    for page in PAGES:
        path = ROOT / page
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_set_up_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[examples]" -c constraints.txt && python examples/train_digits.py\n' in readme
    assert 'pip install -e ".[test]" -c constraints.txt && pytest\n' in readme
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


_ROOMS = re.compile(r"(<!-- the rooms, .*? -->\n)(.*?)(<!-- end of the rooms -->)", re.DOTALL)


def rooms() -> str:
    """Every file's one job, in its docstring's words: folders from top to bottom."""
    text = []
    for floor in reversed(ORDER.split("\n")[1:-1]):
        for name in floor.split():
            path = ROOT / "dpcompile" / name
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
            if path.is_dir():
                text.append(
                    f"\n**{name}/** {_first_words(path / '__init__.py')}\n\n| file | its one job |\n|---|---|\n"
                )
                files = [f for f in files if f.name != "__init__.py"]
            elif not text or not text[-1].startswith("| `"):
                text.append("\n| file | its one job |\n|---|---|\n")
            text += [f"| `{f.relative_to(ROOT / 'dpcompile')}` | {_first_words(f)} |\n" for f in files]
    return "".join(text) + "\n"


def _first_words(path: pathlib.Path) -> str:
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(words.split("\n\n")[0].split()).replace("|", "\\|")


def test_the_rooms_are_as_they_are() -> None:
    page = (ROOT / "docs/design.md").read_text()
    found = _ROOMS.search(page)
    assert found is not None and found[2] == rooms(), "run `python tests/test_docs.py`"
    for pages in ("docs", "."):
        for path in (ROOT / pages).glob("*.md"):
            for name in re.findall(r"`(?:dpcompile/)?([\w/]+\.py)`", path.read_text()):
                held = any((ROOT / room / name).exists() for room in ("", "dpcompile", "benchmarks", "examples"))
                assert held or name == "train.py", f"{path.name} mentions {name}, which is not there"


@pytest.mark.skipif(not _as_on_the_page(), reason="the page is that of torch 2.13 and of all models")
def test_the_page_of_what_is_supported() -> None:
    assert (ROOT / "docs/supported.md").read_text() == supported(), "run `python tests/test_docs.py`"


def rewrite_outputs() -> None:
    """Put what the blocks print now into the pages, and write what is supported."""
    (ROOT / "docs/supported.md").write_text(supported())
    design = ROOT / "docs/design.md"
    design.write_text(_ROOMS.sub(lambda m: m[1] + rooms() + m[3], design.read_text()))
    for page in PAGES:
        path = ROOT / page
        text, moved = path.read_text(), 0
        for block, printed in run_page(page):
            if block["output"] is not None:
                start, end = (position + moved for position in block.span("output"))
                text = text[:start] + printed + text[end:]
                moved += len(printed) - (end - start)
        path.write_text(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    rewrite_outputs()
