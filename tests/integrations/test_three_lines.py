"""The page's scripts, with privacy and without: both run, and few lines tell them apart."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

ROOT = pathlib.Path(__file__).parents[2]
SECTION = (ROOT / "docs/frameworks.md").read_text().partition("## Three lines\n")[2].partition("\n## ")[0]
SCRIPTS = dict(re.findall(r"^([A-Z][A-Za-z]+|timm|torchmetrics)\b[^\n]*:\n\n```diff\n(.*?)^```", SECTION, re.M | re.S))
_ROW = r"^\| \[?(\w+)[^|]*\| (\S+) (\S+) \| (\d) \| ([^|]+) \|$"
TABLE = {row[0]: row[1:] for row in re.findall(_ROW, SECTION, re.MULTILINE)}
# As short as a test should be: uncompiled, nothing reported, one process on a CPU.
_QUICK = (
    ("target_delta=1e-3", "target_delta=1e-3, backend='eager'"),
    ('"a_run", per', '"a_run", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, per'),
    ("max_epochs=1", "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False"),
    ("Accelerator()", "Accelerator(cpu=True)"),
)  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:target_epsilon"),
]


def both(script: str) -> tuple[list[str], list[str]]:
    """The lines without privacy, and with it."""
    lines = script.splitlines()
    return [x[1:] for x in lines if x[:1] != "+"], [x[1:] for x in lines if x[:1] != "-"]


def changed(plain: list[str], private: list[str]) -> int:
    """Lines that somebody who has one script must write to have the other."""
    blocks = difflib.SequenceMatcher(None, plain, private, autojunk=False).get_opcodes()
    return sum(max(a - b, c - d) for tag, b, a, d, c in blocks if tag != "equal")


def test_the_table_has_every_script_its_version_and_its_lines() -> None:
    assert TABLE.keys() == SCRIPTS.keys() and len(TABLE) == 9
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, (package, version, lines, _) in TABLE.items():
        assert pinned[package] == version, f"{name}: constraints.txt has {pinned.get(package)}"
        plain, private = both(SCRIPTS[name])
        assert changed(plain, private) == int(lines) <= 3, name


def test_what_is_counted() -> None:
    assert changed(["a", "b"], ["a", "c", "d"]) == 2 and changed(["a"], ["a", "b"]) == changed(["a", "b"], ["a"]) == 1
    assert changed(["a", "b", "c"], ["c", "b", "a"]) > 1


def images(count: int = 64) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(0, 3, (count,)))


def small() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))


def of_lightning() -> dict[str, Any]:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return {"module": Module(), "dataset": images()}


def llama() -> Any:
    from integrations.test_trl import llama

    return llama()


def of_trl(kind: str) -> dict[str, Any]:
    pytest.importorskip("trl")
    from integrations import test_trl

    return {
        "model": llama(),
        "tokenizer": test_trl.tokenizer(),
        "dataset": test_trl.texts(kind, 64),
        "lora": test_trl.adapter(),
    }


def of_trainer() -> dict[str, Any]:
    pytest.importorskip("accelerate")
    ids = torch.randint(3, 20, (64, 5))
    return {"model": llama(), "dataset": [{"input_ids": row, "labels": row} for row in ids]}


def of_loop(package: str) -> dict[str, Any]:
    pytest.importorskip(package)
    return {"model": small(), "dataset": images(), "held_out": images(20)}


def of_peft() -> dict[str, Any]:
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    return {"model": llama(), "dataset": list(torch.randint(3, 20, (64, 5)))}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "Trainer": of_trainer,
    "SFTTrainer": functools.partial(of_trl, "text"),
    "DPOTrainer": functools.partial(of_trl, "pairs"),
    "Lightning": of_lightning,
    "Accelerate": functools.partial(of_loop, "accelerate"),
    "PEFT": of_peft,
    "timm": functools.partial(of_loop, "timm"),
    "torchmetrics": functools.partial(of_loop, "torchmetrics"),
    "TensorBoard": functools.partial(of_loop, "tensorboard"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", TABLE)
def test_both_scripts_run(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")
    package, version = TABLE[name][:2]
    given = GIVEN[name]()
    if importlib.metadata.version(package) != version:
        pytest.skip(f"{package} is another than the one pinned")
    for private, script in enumerate(both(SCRIPTS[name])):
        names = dict(given) if not private else GIVEN[name]()
        trained = names.get("model", names.get("module"))
        before = None if trained is None else [p.detach().clone() for p in trained.parameters()]
        text = "\n".join(script)
        for old, new in _QUICK:
            text = text.replace(old, new)
        exec(compile(text, f"{name}.py", "exec"), names)
        if name in ("Trainer", "SFTTrainer", "DPOTrainer"):
            optimizer = names["trainer"].optimizer.optimizer
        elif name == "Lightning":
            optimizer = names["trainer"].strategy.optimizers[0]
        else:
            optimizer = (
                getattr(names["optimizer"], "optimizer", names["optimizer"])
                if name == "Accelerate"
                else names["optimizer"]
            )
        assert (getattr(optimizer, "logical_step", None) is not None) is bool(private), name
        if private:
            assert 0 < optimizer.accountant.epsilon(1e-3) <= 3.0
        if trained is not None and before is not None and name not in ("SFTTrainer", "DPOTrainer"):
            after = list(trained.parameters())
            assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=False)), name
