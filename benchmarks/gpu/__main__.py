"""``python -m benchmarks.gpu``: everything that is to be known of a GPU that is lent for eight minutes.

It needs torch 2.11 or later, and no network, C++ compiler or further package; Opacus is compared with where it is
there. ``gpu.json`` and ``gpu.md`` are written after every step, and whatever a step raises is written down, so that a
run that is cut short still tells. ``--rehearse`` goes through all of it on a CPU, with small sizes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.record import Record
from benchmarks.machine import describe_machine, revision

__all__ = ["PARTS", "main"]

ROOT = pathlib.Path(__file__).parent.parent.parent
VIT, GPT = "vit:width=768,depth=12,image=224,batch=64", "gpt:width=768,depth=12,context=1024,vocabulary=50257,batch=8"
LLAMA = "llama_block:width=4096,heads=32,groups=8,inside=14336,context=4096,batch=2"
SMALL_VIT, SMALL_GPT = "vit:width=64,depth=1,image=32,batch=4", "gpt:width=64,depth=1,context=16,vocabulary=64,batch=4"
SMALL_LLAMA = "llama_block:width=32,heads=4,groups=2,inside=64,context=16,batch=2"


def _kernels(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.answers import kernels

    return "Norm operators against float64", 40, kernels(options["device"])


def _noise(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.answers import noise

    return "Noise", 20, noise(options["device"], 2**14 if small else 2**24)


def _suite(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.answers import suite

    return "Models of the test suite, uncompiled", 60, suite(options["device"], 3 if small else 40, "eager")


def _models(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.answers import models

    names = ["tiny"] if small else ["mlp", "cnn", "vit", "gpt", "lora"]
    return "Models of the benchmarks, compiled", 80, models(options["device"], names, 4, options["backend"])


def _speed(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.speed import times

    names = (SMALL_VIT, SMALL_GPT) if small else (VIT, GPT)
    models: dict[str, str] = dict(zip(("ViT-B/16", "GPT-2 small, T=1024, head of its own"), names, strict=True))
    precisions = ("bfloat16",) if small else ("bfloat16", "tf32")
    return "Gradient steps", 150, times(models, precisions, options, 3 if small else 10)


def _llama(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.speed import times

    models = {"block of Llama-3-8B, T=4096": SMALL_LLAMA if small else LLAMA}
    return "One block of Llama 3, all of it trained", 40, times(models, ("bfloat16",), options, 3 if small else 10)


def _waits(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.speed import waits

    engines = {k: v for k, v in options.items() if k != "device"}
    return "Waiting for the device", 30, waits("tiny" if small else "gpt", engines)


def _largest(small: bool, options: dict[str, Any]) -> Any:
    from benchmarks.gpu.speed import largest

    models = {"GPT-2 small, T=1024": SMALL_GPT if small else GPT}
    return "Largest batch", 600 if small else 60, largest(models, options, 0.002 if small else 1e3, 2)


PARTS: dict[str, Callable[[bool, dict[str, Any]], Any]] = {
    "kernels": _kernels, "noise": _noise, "suite": _suite, "models": _models, "speed": _speed, "llama": _llama,
    "waits": _waits, "largest": _largest,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if an answer was wrong or a step failed, else 0."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=480.0, help="for the whole run")
    parser.add_argument("--output", default="benchmark_results", help="folder of gpu.json and gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on a CPU, uncompiled")
    asked = parser.parse_args(sys.argv[1:] if words is None else list(words))
    unknown = set(asked.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not asked.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse goes through all of it on a CPU")
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    small, device = asked.rehearse, "cpu" if asked.rehearse else "cuda"
    machine = describe_machine(torch.get_num_threads())
    data = {"machine": machine, "revision": revision(), "rehearsal": small, "parts": {}}
    record = Record(pathlib.Path(asked.output), asked.seconds, data)
    watch = threading.Timer(asked.seconds, _cut, [record])
    watch.daemon = True
    watch.start()
    try:
        for name in asked.parts.split(","):
            _part(record, name, small, {"device": device, "backend": "eager" if small else "inductor"})
    finally:
        watch.cancel()
    print(record.page())
    for step in record.wrong:
        print(f"failed: {step}")
    return 1 if record.wrong else 0


def _part(record: Record, name: str, small: bool, options: dict[str, Any]) -> None:
    """One part; if even its list of steps cannot be made, that is its row."""
    try:
        title, share, steps = PARTS[name](small, options)
    except Exception as error:
        failed = error

        def fail() -> Any:
            raise failed

        title, share, steps = name, 1.0, {"preparation": fail}
    record.part(name, title, share, steps)


def _cut(record: Record) -> None:
    """The time is over: what is there stays, and the process ends."""
    record.data["cut"] = True
    record.save()
    os._exit(2)


if __name__ == "__main__":
    sys.exit(main())
