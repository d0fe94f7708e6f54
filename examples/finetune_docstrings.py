"""Fine-tune a small language model on other people's documents, with differential privacy, from end to end.

    python examples/finetune_docstrings.py --baseline

One command, no network: a small GPT first learns from public text (the documentation of
Python). Then its matrices are frozen, and LoRA adapters, biases and norms learn privately from the docstrings of NumPy,
SymPy, NetworkX and PyTorch. A document, all docstrings of one source file, is a user: epsilon is for a whole document,
not for a window of it. Every tenth document is held out; loss on them is what counts, in bits per character.

At the end there are, in ``docstrings_run/``: ``report.html``, the page for the person who must sign, with what an audit
by canaries found; ``training.svg``, held-out loss and epsilon over the steps; ``plan.svg`` and ``norms.svg``;
``adapters.pt``, the private weights. ``--baseline`` trains the same adapters once more without privacy.

What is private: the adapters, the samples, and what is computed from them and the held-out documents. What is not: the
norms in ``norms.svg``, the audit's figures and the baseline, which come of training documents without noise. The
settings below were chosen by looking at the held-out documents, which epsilon does not count. See docs/sharp_edges.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import pathlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from docstrings import Tokenizer, private_documents, public_text, windows
from small_gpt import GPT, adapted
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from dpcompile import PrivateModule, audit, make_private, viz
from dpcompile.auditing.report import AuditReport
from dpcompile.losses import per_example_causal_lm

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "docstrings", "svg.fonttype": "none"}  # the same run, the same file
from matplotlib.figure import Figure  # noqa: E402

DELTA = 1e-4
CONTEXT = 64  # tokens of a window
PER_USER = 2  # windows of a document in each step that it is drawn for
CLIP = 0.5
AVERAGING = 0.9  # of the weights, over the steps; it costs no privacy, and quietens the noise
PROMPT = "Parameters\n----------\n"


def losses(model: Any, batch: Any) -> Tensor:
    """One per window, ``[B]``."""
    (ids,) = batch
    return per_example_causal_lm(model(ids), ids)


def pretrained(options: argparse.Namespace, public: Tensor, vocabulary: int) -> GPT:
    """A model that has seen public text alone; its privacy is nobody's concern."""
    model = GPT(vocabulary, CONTEXT, options.width, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.public_steps)
    for _ in tqdm(range(options.public_steps), desc="public text", unit="step"):
        losses(model, (public[torch.randint(len(public), (64,))],)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


class HeldOut:
    """Documents that nothing is trained on: two windows of each, or what it has.

    Args:
        documents: texts.
        tokenizer: learned from public text.
    """

    def __init__(self, documents: list[str], tokenizer: Tokenizer) -> None:
        ids, owners = windows(documents, tokenizer, CONTEXT)
        seen: Counter[int] = Counter()
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [i for i in order if not seen.update([owners[i]]) and seen[owners[i]] <= PER_USER]
        self.ids = ids[rows]
        self.letters = sum(len(tokenizer.decode(row[1:])) for row in self.ids.tolist())

    @torch.no_grad()
    def bits(self, model: nn.Module) -> float:
        """Bits per character."""
        nats = torch.cat([losses(model, (ids,)) for ids in self.ids.split(64)]).double().sum().item()
        return nats * (CONTEXT - 1) / math.log(2) / self.letters


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Tokenizer, prompt: str, count: int, generator: torch.Generator) -> str:
    """Go on with a prompt; sampling is post-processing, and costs nothing."""
    ids = tokenizer.encode(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids[-CONTEXT:]]))[0, -1] / 0.7
        ids.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return tokenizer.decode(ids)


class Curve:
    """Held-out loss of a network's averaged weights, and epsilon, over the steps of a run."""

    def __init__(self, held_out: HeldOut, network: GPT, spent: Callable[[], float] = lambda: 0.0) -> None:
        self.held_out, self.network, self.spent = held_out, network, spent
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
        self.steps, self.bits, self.epsilons = [0], [held_out.bits(network)], [0.0]

    def add(self, step: int) -> None:
        """A point."""
        self.steps.append(step)
        self.bits.append(self.held_out.bits(self.average))
        self.epsilons.append(self.spent())


def baseline(options: argparse.Namespace, text: Text, curve: Curve, steps: int) -> None:
    """The same adapters, documents, steps and batch, with neither clipping nor noise."""
    network = curve.network
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=options.learning_rate)
    sizes = torch.bincount(torch.tensor(text.owners))
    sizes = sizes[sizes > 0]
    starts = sizes.cumsum(0) - sizes
    for step in tqdm(range(1, steps + 1), desc="without privacy", unit="step"):
        drawn = torch.randint(len(sizes), (options.batch_size,)).repeat_interleave(PER_USER)
        rows = starts[drawn] + (torch.rand(len(drawn)) * sizes[drawn]).long()
        losses(network, (text.private[rows],)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.average.update_parameters(network)
        if step % (steps // options.epochs) == 0:
            curve.add(step)


def picture(curves: dict[str, Curve], target: float) -> Figure:
    """Held-out loss of each run, and what the first of them spent."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=False):
        left.plot(curve.steps, curve.bits, style, label=name, marker=".")
    left.set(xlabel="steps", ylabel="bits per character, held out")
    left.legend()
    first = next(iter(curves.values()))
    right.plot(first.steps, first.epsilons, marker=".")
    right.axhline(target, linestyle=":", color="black")
    right.set(xlabel="steps", ylabel=f"ε of a document, δ = {DELTA:g}", ylim=(0, None))
    return figure


@dataclass
class Text:
    """What is trained on, and what is not: windows of documents, and whose each is."""

    tokenizer: Tokenizer
    public: Tensor
    private: Tensor
    owners: list[int]
    held_out: HeldOut


def texts(options: argparse.Namespace) -> Text:
    """Read them; the tokenizer learns from public text alone."""
    public = public_text()
    tokenizer = Tokenizer(public, options.vocabulary)
    documents = private_documents(options.documents)
    held_out = HeldOut(documents[::10], tokenizer)
    private, owners = windows([d for i, d in enumerate(documents) if i % 10], tokenizer, CONTEXT)
    print(f"{len(set(owners)):,} documents of {len(private):,} windows train, {len(documents[::10])} are held out")
    return Text(tokenizer, windows([public], tokenizer, CONTEXT)[0], private, owners, held_out)


class Private:
    """The private run: an ordinary loop, and what there is to see of it."""

    def __init__(self, options: argparse.Namespace, network: GPT, text: Text) -> None:
        trained = [p for p in network.parameters() if p.requires_grad]
        self.model, self.optimizer, self.loader = make_private(
            network,
            torch.optim.Adam(trained, lr=options.learning_rate),
            DataLoader(TensorDataset(text.private), batch_size=options.batch_size),
            target_epsilon=options.target_epsilon,
            target_delta=DELTA,
            epochs=options.epochs,
            groups=text.owners,
            examples_per_user=PER_USER,
            max_grad_norm=CLIP,
            seed=options.seed,
            backend=options.backend,
        )
        self.epochs, self.steps = options.epochs, options.epochs * len(self.loader)
        self.curve = Curve(text.held_out, network, self.epsilon)
        self.norms: list[Tensor] = []
        print(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in network.parameters()):,} weights learn")
        print(f"noise multiplier {self.optimizer.noise_multiplier:.3f}, {self.steps} steps")

    def epsilon(self) -> float:
        """Spent so far, of a whole document."""
        accountant = self.optimizer.accountant
        assert accountant is not None
        return accountant.epsilon(DELTA)

    def train(self) -> None:
        """All epochs."""
        assert isinstance(self.model, PrivateModule)
        bar = tqdm(total=self.steps, desc="private text", unit="step")
        for _ in range(self.epochs):
            for batch in self.loader:
                losses(self.model, batch).mean().backward()
                self.norms.append(self.model.grad_norms)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.curve.average.update_parameters(self.curve.network)
                bar.update()
            self.curve.add(self.optimizer.logical_step)
        bar.close()

    def audited(self, options: argparse.Namespace) -> AuditReport:
        """A copy is trained with canaries, and attacked; it takes no part in what was trained here."""
        return audit(
            self.model,
            self.optimizer,
            self.loader,
            losses,
            canaries=options.canaries,
            kind="spread",
            steps=options.audit_steps,
            delta=DELTA,
            seed=None if options.seed is None else options.seed + 1,
        )

    def pictures(self) -> dict[str, Figure]:
        """Of the plan, and of the norms over time."""
        assert isinstance(self.model, PrivateModule)
        norms = [of_batch for of_batch in self.norms if len(of_batch)]
        return {"plan": viz.plot_plan(self.model.plan), "norms": viz.plot_norms(norms, CLIP)}


def main() -> None:
    """Read the options, train, and write what there is to see."""
    options = _options()
    if options.seed is not None:
        torch.manual_seed(options.seed)
    text = texts(options)
    network = adapted(pretrained(options, text.public, len(text.tokenizer.tokens)), options.rank)
    plain = copy.deepcopy(network)
    private = Private(options, network, text)
    private.train()
    curves = {f"private, ε = {options.target_epsilon:g}": private.curve}
    if options.baseline:
        curves["not private"] = Curve(text.held_out, plain)
        baseline(options, text, curves["not private"], private.steps)

    folder: pathlib.Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {"training": picture(curves, options.target_epsilon), **private.pictures()}.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    learned = {n: p.detach() for n, p in private.curve.average.module.named_parameters() if p.requires_grad}
    torch.save(learned, folder / "adapters.pt")
    for name, curve in curves.items():
        generator = torch.Generator().manual_seed(0 if options.seed is None else options.seed)
        print(f"--- a sample, {name}\n{sample(curve.average, text.tokenizer, PROMPT, 120, generator)}\n---")
    print(f"epsilon {private.epsilon():.3f} at delta {DELTA:g} for a whole document, after {private.steps} steps")
    for name, curve in curves.items():
        print(f"held out, {name}: {curve.bits[0]:.3f} bits per character before, {curve.bits[-1]:.3f} after")
    found = private.audited(options)
    private.optimizer.report(DELTA, audit=found).save(folder / "report.html")
    print(found)
    print(f"report, pictures and adapters: {folder}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a small language model on documents, privately.")
    add = parser.add_argument
    add("--target-epsilon", type=float, default=8.0, help=f"of a whole document, at delta {DELTA:g}; default 8")
    add("--epochs", type=int, default=6, help="passes over the documents; the noise is calibrated to them")
    add("--batch-size", type=int, default=256, help="expected, in documents")
    add("--learning-rate", type=float, default=1e-2)
    add("--rank", type=int, default=4, help="of the adapters")
    add("--width", type=int, default=96, help="of the model, a multiple of 32")
    add("--layers", type=int, default=2)
    add("--vocabulary", type=int, default=512)
    add("--public-steps", type=int, default=200, help="of the training on public text")
    add("--documents", type=int, help="at most so many; default: all")
    add("--canaries", type=int, default=500, help="of the audit")
    add("--audit-steps", type=int, default=10)
    add("--baseline", action="store_true", help="train once more without privacy, and draw that beside it")
    add("--backend", choices=("inductor", "eager"), default="inductor")
    add("--seed", type=int, help="to repeat a run; leave it out where the privacy is meant")
    add("--output-dir", type=pathlib.Path, default=pathlib.Path("docstrings_run"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
