"""Text that lies on every machine with this package: the docstrings of Python and of the packages that torch needs.

Public is what Python itself brings: its reference (``pydoc_data.topics``) and the docstrings of its standard library.
Private, for the sake of the example, are the docstrings of NumPy, SymPy, NetworkX and PyTorch; a *document* is all
docstrings of one source file, and it belongs to one user.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import re
import textwrap
from collections import Counter, defaultdict
from pydoc_data.topics import topics

import torch
from torch import Tensor

__all__ = ["PACKAGES", "Tokenizer", "private_documents", "public_text", "windows"]

PACKAGES = ("numpy", "sympy", "networkx", "torch")
_SHORTEST = 200  # letters of a document
_STRINGS = re.compile(r'"""(.*?)"""', re.DOTALL)
_WORDS = re.compile(r" ?[A-Za-z]+|\d|\n *| +|[^A-Za-z\d\s]+")  # every character of ASCII but tabs is in one


def public_text() -> str:
    """The reference of Python, and docstrings of the modules of its standard library."""
    texts = [topics[name] for name in sorted(topics)]
    texts += (_docstrings(path) for path in sorted(pathlib.Path(os.__file__).parent.glob("*.py")))
    return "\n\n".join(_plain(text) for text in texts if text)


def private_documents(at_most: int | None = None) -> list[str]:
    """Text of every source file that has enough of it, package by package, in the order of names."""
    found: list[str] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} comes with dpcompile"
        for path in sorted(pathlib.Path(spec.origin).parent.rglob("*.py")):
            if "tests" not in path.parts and len(text := _plain(_docstrings(path))) >= _SHORTEST:
                found.append(text)
    return found if at_most is None else found[:: max(len(found) // at_most, 1)][:at_most]


def _docstrings(path: pathlib.Path) -> str:
    """What stands between triple quotes."""
    found = _STRINGS.findall(path.read_text("utf-8", errors="ignore"))
    return "\n\n".join(textwrap.dedent(f"{'':4}{text}").strip() for text in found)


def _plain(text: str) -> str:
    return "".join(c for c in text.expandtabs(4) if c.isascii() and (c.isprintable() or c == "\n"))


class Tokenizer:
    """Byte pairs (Sennrich et al. 2016, arXiv:1508.07909), learned from public text alone.

    Args:
        text: public.
        size: of the vocabulary; the first 128 tokens are the characters of ASCII.
    """

    def __init__(self, text: str, size: int) -> None:
        words = [(list(word), count) for word, count in Counter(_WORDS.findall(text)).most_common(4000)]
        self.tokens = [chr(i) for i in range(128)]
        self.rank: dict[tuple[str, str], int] = {}
        pairs: Counter[tuple[str, str]] = Counter()
        where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # the words that have a pair
        changed = range(len(words))
        while True:
            for i in changed:
                for pair in itertools.pairwise(words[i][0]):
                    pairs[pair] += words[i][1]
                    where[pair].add(i)
            best = max(pairs, key=lambda pair: (pairs[pair], pair), default=("", ""))
            if len(self.tokens) >= size or pairs[best] < 2:
                break
            self.rank[best] = len(self.rank)
            self.tokens.append("".join(best))
            changed = sorted(where[best])
            for i in changed:
                parts, count = words[i]
                for pair in itertools.pairwise(parts):
                    pairs[pair] -= count
                    where[pair].discard(i)
                words[i] = (_merged(parts, best), count)
        self.numbers = {token: i for i, token in reversed(list(enumerate(self.tokens)))}
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Numbers of the tokens."""
        return [number for word in _WORDS.findall(text) for number in self._word(word)]

    def decode(self, numbers: list[int]) -> str:
        """The text."""
        return "".join(self.tokens[i] for i in numbers)

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = list(word)
            while len(parts) > 1:
                best = min(itertools.pairwise(parts), key=lambda pair: self.rank.get(pair, len(self.rank)))
                if best not in self.rank:
                    break
                parts = _merged(parts, best)
            self._known[word] = [self.numbers[part] for part in parts]
        return self._known[word]


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found


def windows(documents: list[str], tokenizer: Tokenizer, context: int) -> tuple[Tensor, list[int]]:
    """The whole windows of each document, ``[N, context]``, and whose each is: the number of its document."""
    rows: list[list[int]] = []
    owners: list[int] = []
    for owner, text in enumerate(documents):
        ids = tokenizer.encode(text)
        whole = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
        rows += whole
        owners += [owner] * len(whole)
    return torch.tensor(rows), owners
