"""Every message that says what to do has a program here that was mended by it, or a reason why none has.

``listed.txt`` says which. Each program sees for itself that it came to the messages that are listed for it. After a new
message or a new program, ``DPCOMPILE_LIST_REMEDIES=1 pytest tests/remedies -n 0`` writes it anew; of a message that has
no program the reason is to be written by hand. ``python tests/support/remedy_sites.py`` prints all of it.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import remedies
from remedies import Right, equals, refused
from remedy_sites import listed, noted, sites

from dpcompile import DPCompileError, dp_compile

HERE = Path(__file__).parent


def names() -> list[str]:
    """Of all programs, slow ones too."""
    trees = [ast.parse(path.read_text()) for path in sorted(HERE.glob("test_remedies_*.py"))]
    return [f.name for tree in trees for f in tree.body if isinstance(f, ast.FunctionDef) and f.name[:5] == "test_"]


WRITING = pytest.mark.skipif("DPCOMPILE_LIST_REMEDIES" in os.environ, reason="the list is written now")


@WRITING
def test_every_message_is_tried_or_has_a_reason() -> None:
    known, there = listed(), [site.key for site in sites()]
    assert sorted(known) == sorted(there), f"listed and gone, or new: {sorted(set(known) ^ set(there))}"
    assert [key for key, tests in known.items() if tests == ("- ",)] == [], "neither tried nor a reason why not"
    tried = {name for tests in known.values() for name in tests if not name.startswith("- ")}
    assert tried == set(names()), f"listed and no program, or not listed: {sorted(tried ^ set(names()))}"
    assert len(names()) == len(set(names())), "two programs of one name"
    assert [key for key, tests in known.items() if tests == ("- not yet",)] == []


def test_sites_are_found() -> None:
    assert len(sites()) > 500 and len({site.key for site in sites()}) == len(sites())
    assert {s.said for s in sites() if s.key.startswith("proof/rules/rows.py")} == {"_REMEDY"}  # made by a rule
    assert [s for s in sites() if s.key.startswith("proof/rules/registry.py")] == []  # hands on what rules say


def with_norm(norm: Any) -> Right:
    return equals(dp_compile(remedies.plain(), norm=norm, backend="eager").training, True)


@WRITING
@pytest.mark.parametrize(
    ("program", "remedy", "fault"),
    [
        (lambda told: with_norm("auto"), "", "DID NOT RAISE"),
        (lambda told: with_norm("auto" if told else "fast"), "use another", "unknown norm 'fast'"),
        (lambda told: with_norm("auto" if told else "fast"), None, "came to"),  # listed for no test of this name
    ],
)
def test_a_program_that_is_no_proof(program: Any, remedy: str | None, fault: str) -> None:
    with pytest.raises(DPCompileError) as caught:
        with_norm("fast")
    test = refused(str(caught.value.remedy) if remedy is None else remedy)(program)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=fault):
        test()


@pytest.mark.parametrize(
    ("mended", "fault"),
    [(lambda: with_norm("faster"), "unknown norm 'faster'"), (lambda: None, "nothing was compared")],
)
def test_a_remedy_that_does_not_work(mended: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(told: int) -> Any:
        return mended() if told else with_norm("fast")

    with noted() as made, pytest.raises(DPCompileError) as caught:
        with_norm("fast")
    assert [site.key for _, site in made] == ["api.py _one_of 1"]
    monkeypatch.setattr(remedies, "listed", lambda: {"api.py _one_of 1": ("program",)})
    with pytest.raises((AssertionError, DPCompileError), match=fault):
        refused(str(caught.value.remedy))(program)()
    remedies.HITS.pop("program")
