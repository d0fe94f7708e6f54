"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

__all__ = ["describe_machine", "revision"]

_LIBRARIES = ("torch", "dpcompile", "opacus", "transformers", "jax", "jax-privacy", "numpy")


def describe_machine(threads: int) -> dict[str, Any]:
    """CPU model, cores, memory, GPU, versions and threads."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads,
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def revision() -> str:
    """The commit of the sources, and whether they were changed since; "unknown revision" outside git."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(words, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown revision"
    return found.stdout.strip()


def _cpu() -> str:
    wanted = ("model name", "cpu family", "model")
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in wanted:
                    found.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or "unknown"
    return f"{found.get('model name', 'unknown')} (family {found.get('cpu family')}, model {found.get('model')})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
