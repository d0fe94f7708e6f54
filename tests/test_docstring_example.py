"""The example that fine-tunes on documents: its text, its tokenizer, and the whole command, small."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
TINY = [
    "--backend", "eager", "--documents", "40", "--epochs", "1", "--batch-size", "12", "--width", "32", "--layers", "1",
    "--vocabulary", "160", "--public-steps", "2", "--canaries", "20", "--audit-steps", "1", "--seed", "0",
]  # fmt: skip


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("finetune_docstrings")


def test_the_tokenizer_gives_text_back(example: Any) -> None:
    text = "for x in range(3):\n    print(x)  # the words, the words\n\n" * 20
    tokenizer = example.Tokenizer(text, 150)
    assert len(tokenizer.tokens) == 150 and len(set(tokenizer.tokens)) == 150
    other = "   Returns\n   ------- \n\n  the\tx_1 = {'a': ~b}\n".expandtabs(4)
    for one in (text, other):
        assert tokenizer.decode(tokenizer.encode(one)) == one
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_pairs_are_counted_as_from_scratch(example: Any) -> None:
    """The quick counts of pairs are those of the words as they are after each merge."""
    words = {"lower": 5, " lowest": 3, " newer": 6, " wide": 2, "aaaa": 4}
    text = "".join(word * count for word, count in words.items())
    tokens = example.Tokenizer(text, 136).tokens[128:]
    docstrings = importlib.import_module("docstrings")
    found = docstrings.Counter(docstrings._WORDS.findall(text))
    parts, slow = {word: list(word) for word in found}, []
    for _ in tokens:
        pairs = docstrings.Counter(
            p for word, n in found.items() for p in docstrings.itertools.pairwise(parts[word]) for _ in range(n)
        )
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        slow.append("".join(best))
        parts = {word: docstrings._merged(p, best) for word, p in parts.items()}
    assert tokens == slow


def test_no_window_has_two_owners(example: Any) -> None:
    tokenizer = example.Tokenizer("", 128)
    ids, owners = example.windows(["a" * 10, "b" * 3, "c" * 4], tokenizer, 4)
    assert owners == [0, 0, 2] and [tokenizer.decode(row) for row in ids.tolist()] == ["aaaa", "aaaa", "cccc"]


def test_held_out_loss_is_in_bits_per_character(example: Any) -> None:
    """A model that knows nothing of 128 characters needs 7 bits for each."""

    def uniform(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 128)

    held_out = example.HeldOut(["xy" * 200, "z" * 64], example.Tokenizer("", 128))
    assert held_out.ids.shape == (3, example.CONTEXT)  # two of the first document, which has six
    assert held_out.bits(uniform) == pytest.approx(7.0)


def test_an_adapter_begins_as_nothing(example: Any) -> None:
    network = example.GPT(32, 8, 32, 1)
    ids = torch.randint(32, (2, 8))
    before = network(ids)
    example.adapted(network, 4)
    assert torch.equal(network(ids), before)
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    layers = [f"blocks.0.{name}.base.weight" for name in ("qkv", "out", "rise", "fall")]
    assert frozen == {"tokens.weight", "positions.weight", *layers}


@pytest.mark.full  # a process of its own
def test_the_command(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / "finetune_docstrings.py"), *TINY, "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, "--baseline"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    printed = done.stdout
    assert re.search(
        r"^epsilon (7\.9\d\d|8\.000) at delta 0\.0001 for a whole document, after \d+ steps", printed, re.M
    )
    assert "audit of 1 steps by 20 canaries (spread)" in printed and "not contradicted" in printed
    for name in ("private, ε = 8", "not private"):
        assert f"--- a sample, {name}\nParameters\n" in printed
        assert re.search(rf"^held out, {name}: \d\.\d+ bits per character before, \d\.\d+ after", printed, re.M)
    assert "audit" in (tmp_path / "report.html").read_text().lower()
    for name in ("training", "plan", "norms"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    weights = torch.load(tmp_path / "adapters.pt")
    assert "blocks.0.qkv.up" in weights and "bias" in weights and "tokens.weight" not in weights
    assert not any(w.requires_grad for w in weights.values())


@pytest.mark.slow
def test_private_fine_tuning_helps_and_costs(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(EXAMPLES / "finetune_docstrings.py"), "--seed", "0", "--baseline"]
    done = subprocess.run([*command, "--output-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^held out, .*: ([\d.]+) bits per character before, ([\d.]+) after", done.stdout, re.M)
    (before, private), (_, public) = (tuple(map(float, pair)) for pair in found)
    assert public < private < before - 0.05
