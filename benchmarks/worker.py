"""A process for one job: ``python -m benchmarks.worker JOB.json``.

The job says which function to call, with what, and where the result goes. What the function raises is a result too.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from typing import Any

__all__ = ["describe", "do", "main"]


def main() -> None:
    """Read the job, do it, write the result."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    result = do(job)
    with open(job["result"], "w") as file:
        json.dump(result, file)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Call ``job["call"]`` (``module:function``) with ``job["arguments"]`` and ``job["threads"]`` threads."""
    import torch

    torch.set_num_threads(job["threads"])
    module, _, function = job["call"].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(**job["arguments"])
    except Exception as error:
        traceback.print_exc()
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """A table cell: the class of the exception and its first words."""
    if isinstance(error, ModuleNotFoundError) or (isinstance(error, ImportError) and "path" in str(error)):
        return f"not installed ({' '.join(str(error).split())[:60]})"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:77] + '...' if len(words) > 80 else words}"


if __name__ == "__main__":
    main()
