"""Train a small convolutional network on handwritten digits, with differential privacy.

    python examples/train_digits.py

The loop is an ordinary one; ``make_private`` makes it private. The data are scikit-learn's digits (1797 real images of
8 x 8 pixels, which ship with the package), split once and for all into 1437 for training and 360 for testing.

What is private: the weights, and whatever is computed from them and the test images alone. What is not: the loss in the
bar and in the plot (it is computed from training images, without noise), and the checkpoint (it holds the seed: whoever
has that can subtract the noise). The hyper-parameters below were tuned on these same images, which the epsilon does not
count either. See docs/sharp_edges.md.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from dpcompile import make_private

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DELTA = 1e-4
BATCH_SIZE = 256  # expected: each image is drawn with probability 256/1437, by itself
LEARNING_RATE = 2.0
AVERAGING = 0.95  # of the weights, over the steps; it costs no privacy, and quietens the noise


@dataclass
class Settings:
    """What a resumed run takes over from the one it goes on with."""

    target_epsilon: float
    epochs: int
    clipping: str
    norm: str
    seed: int | None


class Network(nn.Module):
    """Two convolutions and a linear layer; GroupNorm, for BatchNorm would mix the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(4, 64),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Linear(64 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 1, 8, 8]`` to logits ``[B, 10]``."""
        return self.classifier(self.features(images).flatten(1))


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """Training set, test images, test labels.

    Pixels are divided by 16, their known maximum: a mean or a maximum over the images would depend on the data. The
    third entry of a training example is 1; the loader pads with zeros, so there it says which rows are real.
    """
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(classes)
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    return TensorDataset(images[train], labels[train], torch.ones(len(train))), images[test], labels[test]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are classified correctly."""
    return (model(images).argmax(1) == labels).float().mean().item()


def train(settings: Settings, saved: dict[str, Any] | None, backend: str, stop_after: int | None, folder: Path) -> None:
    """Train to the target, with a checkpoint and a plot in ``folder`` after every epoch."""
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    dataset, test_images, test_labels = digits()
    network = Network()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))

    model, optimizer, loader = make_private(
        network,
        torch.optim.SGD(network.parameters(), lr=LEARNING_RATE),
        DataLoader(dataset, batch_size=BATCH_SIZE),
        target_epsilon=settings.target_epsilon,
        target_delta=DELTA,
        epochs=settings.epochs,
        seed=settings.seed,
        max_grad_norm=1.0,
        clipping=settings.clipping,
        norm=settings.norm,
        backend=backend,
    )
    accountant = optimizer.accountant
    assert accountant is not None
    parts = {"model": model, "average": average, "optimizer": optimizer, "loader": loader}
    history: list[dict[str, float]] = []
    if saved is not None:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        history = saved["history"]

    model.trace(test_images[: loader.physical_batch_size])  # type: ignore[operator]
    print(model.plan)
    print(f"noise multiplier {optimizer.noise_multiplier:.3f}, {settings.epochs} epochs of {len(loader)} steps")

    last = settings.epochs if stop_after is None else min(stop_after, settings.epochs)
    bar = tqdm(total=settings.epochs * len(loader), initial=optimizer.logical_step, unit="step")
    for _ in range(len(history), last):
        total, count = 0.0, 0.0
        for images, labels, real in loader:
            losses = F.cross_entropy(model(images), labels, reduction="none")
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(network)
            bar.update()
            total += (losses.detach() * real).sum().item()  # padding rows have weight 0 in the gradient and here
            count += real.sum().item()
        history.append(
            {
                "step": optimizer.logical_step,
                "loss": total / max(count, 1.0),
                "accuracy": accuracy(average, test_images, test_labels),
                "epsilon": accountant.epsilon(DELTA),
            }
        )
        bar.set_postfix({"loss": f"{history[-1]['loss']:.3f}", "epsilon": f"{history[-1]['epsilon']:.2f}"})
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "history": history, "settings": asdict(settings)}, folder / "checkpoint.pt")
    bar.close()
    plot(history, folder / "training.png")
    print(f"epsilon {accountant.epsilon(DELTA):.3f} at delta {DELTA:g}, after {accountant.steps} steps")
    print(f"test accuracy {accuracy(average, test_images, test_labels):.3f}")
    print(f"plot: {folder / 'training.png'}")
    print(f"checkpoint: {folder / 'checkpoint.pt'} (a secret: it holds the seed of the noise)")


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Loss, accuracy and epsilon over the steps."""
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(6, 7))
    titles = {"loss": "training loss (not private)", "accuracy": "test accuracy", "epsilon": f"ε at δ = {DELTA:g}"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot([h["step"] for h in history], [h[name] for h in history], marker=".")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("logical steps")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Read the options, train."""
    parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits, privately.")
    parser.add_argument("--target-epsilon", type=float, default=3.0, help=f"at delta {DELTA:g}; default 3")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data; the noise is calibrated to them")
    parser.add_argument("--clipping", choices=("flat", "automatic", "per_layer", "per_block"), default="flat")
    parser.add_argument("--norm", choices=("auto", "ghost", "instantiate", "redo", "direct"), default="auto")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, help="to repeat a run; leave it out where the privacy is meant")
    parser.add_argument("--output-dir", type=Path, default=Path("digits_run"), help="for plot and checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS", help="stop early; --resume goes on")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="go on with a run, with its settings. The file holds the seed of the noise: it is a secret",
    )
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    saved = None if options.resume is None else torch.load(options.resume)
    if saved is None:
        settings = Settings(options.target_epsilon, options.epochs, options.clipping, options.norm, options.seed)
    else:
        settings = Settings(**saved["settings"])
    train(settings, saved, options.backend, options.stop_after, options.output_dir)


if __name__ == "__main__":
    main()
