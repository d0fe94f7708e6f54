"""Docstrings for the site: what reStructuredText writes otherwise than Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe  # type: ignore[import-not-found]

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([^`]+)`")
_TABLE = re.compile(r"^=+(?: +=+)+\n.*?^=+(?: +=+)+\n(?:.*?^=+(?: +=+)+$)?", re.MULTILINE | re.DOTALL)


class Docstrings(griffe.Extension):
    """Roles become code, and tables stay as they are typed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Of every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = _TABLE.sub(lambda m: f"```text\n{m[0]}\n```", _ROLE.sub(r"`\1`", obj.docstring.value))
