"""``python -m benchmarks.digits``: ways of private training on real digits at equal epsilon, accuracy beside time.

The network and data of ``examples/train_digits.py``, Adam, which does not care for the size of C, and test accuracy of
the averaged weights: the mean over seeds, with its standard error. The best of each kind is chosen on the same test
images, which flatters the kinds with more to choose from: that is the sweep. Users are made up, of neighbouring images;
as many images are in a step as elsewhere.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown
from dpcompile import AdaptiveClip, make_private

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from train_digits import (  # type: ignore[import-not-found]  # noqa: E402
    AVERAGING,
    BATCH_SIZE,
    DELTA,
    Network,
    accuracy,
    digits,
)

__all__ = ["main"]

EPSILON, EPOCHS, RATE = 3.0, 20, 0.01

WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fixed C": [(f"{c:g}", {"max_grad_norm": c}) for c in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)],
    "C by a quantile": [
        (f"{q:g} from {c:g}", {"max_grad_norm": AdaptiveClip(quantile=q, initial=c)})
        for q in (0.3, 0.5, 0.7)
        for c in (0.1, 10.0)
    ],
    "correlated noise": [(f"{b} bands", {"bands": b}) for b in (2, 4)],
    "a cap on draws": [("auto", {"max_grad_norm": 10.0, "max_batch_size": "auto"})],
    "exact noise": [("", {"max_grad_norm": 10.0, "exact": True})],
    "users": [(f"of {k} images", {"max_grad_norm": 10.0, "examples_per_user": k}) for k in (1, 2, 4)],
    "in turn": [(kind, {"max_grad_norm": 10.0, "in_turn": kind}) for kind in ("buffers", "tree")],
    "automatic": [("", {"clipping": "automatic"})],
    "per layer": [(f"{c:g}", {"clipping": "per_layer", "max_grad_norm": c}) for c in (0.3, 1.0)],
    "per layer, by quantiles": [
        (f"{q:g} from {c:g}", {"clipping": "per_layer", "max_grad_norm": AdaptiveClip(quantile=q, initial=c)})
        for q in (0.3, 0.5, 0.7)
        for c in (0.1, 10.0)
    ],
}


def trained(seed: int, backend: str, options: dict[str, Any]) -> tuple[float, float, float, float]:
    """Accuracy, epsilon, the last C, and seconds of a run without its first epoch."""
    torch.manual_seed(seed)
    dataset, images, labels = digits()
    network = Network()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    of_user = options.get("examples_per_user")
    if of_user is not None:
        options = {**options, "groups": torch.arange(len(dataset)) // of_user}
    model, optimizer, loader = make_private(
        network,
        torch.optim.Adam(network.parameters(), lr=RATE),
        DataLoader(dataset, batch_size=BATCH_SIZE // (of_user or 1)),
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=EPOCHS,
        seed=seed,
        backend=backend,
        **options,
    )
    start = 0.0
    for epoch in range(EPOCHS):
        start = time.perf_counter() if epoch == 1 else start
        for x, y, _ in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(network)
    seconds = time.perf_counter() - start
    assert optimizer.accountant is not None
    return accuracy(average, images, labels), optimizer.accountant.epsilon(DELTA), optimizer.max_grad_norm, seconds


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    asked = parser.parse_args()
    machine = describe_machine(torch.get_num_threads())
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {asked.seeds} seeds")
    chosen = [(way, name, options) for way in asked.ways for name, options in WAYS[way]]
    rows = []
    for way, name, options in tqdm(chosen, unit="way"):
        runs = [trained(seed, asked.backend, options) for seed in range(asked.seeds)]
        accuracies, epsilons, bounds, seconds = zip(*runs, strict=True)
        error = statistics.stdev(accuracies) / asked.seeds**0.5 if asked.seeds > 1 else float("nan")
        mean: Callable[[Any], float] = statistics.fmean
        found = f"{mean(accuracies):.4f} ± {error:.4f}"
        rows.append([way, name, found, f"{max(epsilons):.4f}", f"{mean(bounds):.3g}", f"{mean(seconds):.1f}"])
    print(markdown(["way", "setting", "accuracy", "ε", "last C", "s"], rows))


if __name__ == "__main__":
    main()
