"""What every test starts from: one thread, one seed, no compiled graphs of other tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

os.environ["DPCOMPILE_RATES"] = "typical"  # plans must not depend on the machine
os.environ["DPCOMPILE_LINT"] = "1"  # every pass leaves a graph that is well formed
os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is looked up

import pytest
import torch
from models import table

torch.set_num_threads(1)

_DRAWN: Counter[str] = Counter()
_SAMPLE = "DPCOMPILE_TESTS_SAMPLED"  # read in `tests/support/sampled.py`


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for two that torch raises about itself; without a path, a sample is taken."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers are given paths, whatever the user gave
        os.environ[_SAMPLE] = str(int(config.args_source == pytest.Config.ArgsSource.TESTPATHS))
    config.option.showcapture = "stdout"  # the log holds thousands of empty lines of torch's structured trace
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:two DPOptimizers of one seed")  # runs that are compared
    config.addinivalue_line("filterwarnings", "ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the sample: the first case of every test and each twentieth after it, and nothing that is marked ``full``."""
    if os.environ.get(_SAMPLE) != "1":
        return
    count: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        taken = count[test] % 20 == 0 and item.get_closest_marker("full") is None
        (kept if taken else left_out).append(item)
        count[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def drawn(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """How random models ended; printed at the end of the run."""
    counted: Counter[str] = Counter()
    yield counted
    request.node.user_properties.append(("drawn", dict(counted)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what tests recorded, in whichever process they ran."""
    if report.when == "teardown":
        for name, value in report.user_properties:
            if name == "model":
                table.add(str(value))
            elif name == "drawn":
                _DRAWN.update(value)  # type: ignore[arg-type]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of models, and how many random models were right and how many were refused."""
    table.render(terminalreporter.write_line)
    if _DRAWN:
        terminalreporter.write_line("random models: " + ", ".join(f"{n} {what}" for what, n in sorted(_DRAWN.items())))
