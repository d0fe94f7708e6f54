"""The site: every page is in it, every public name is on the page of the API, and it builds without a warning."""

from __future__ import annotations

import html.parser
import os
import pathlib
import re
import subprocess
import sys

import pytest

import dpcompile

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text("utf-8")


def test_every_page_is_in_the_site() -> None:
    assert set(re.findall(r"(\w+\.md)", SITE.partition("nav:")[2])) == {path.name for path in DOCS.glob("*.md")}


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    named = re.findall(r"^::: dpcompile\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted([*dpcompile.__all__, "experts", "viz"])


class Ids(html.parser.HTMLParser):
    """Ids of a page, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag in ("script", "img"):
            self.loaded.append(given.get("src") or "")
        if tag == "link" and given.get("rel") == "stylesheet":
            self.loaded.append(given.get("href") or "")


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: pathlib.Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stderr[-3000:]
    found = Ids((tmp_path / "api/index.html").read_text("utf-8"))
    assert {f"dpcompile.{name}" for name in dpcompile.__all__} <= found.ids
    text = (tmp_path / "api/index.html").read_text("utf-8")
    assert ":func:" not in text and ":class:" not in text
    for page in tmp_path.rglob("*.html"):
        loaded = Ids(page.read_text("utf-8")).loaded
        assert not [one for one in loaded if one.startswith(("http:", "https:", "//"))], page
