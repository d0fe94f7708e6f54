"""What is installed: its version, its types, what importing it brings along, and the files that pip gets."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from typing import Any

import pytest

import dpcompile

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(dpcompile.__file__).parent


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", dpcompile.__version__)
    assert 'version = {attr = "dpcompile.__version__"}' in (ROOT / "pyproject.toml").read_text()


HEAVY = ("torch._inductor.compile_fx", "torch._inductor.scheduler", "torch._inductor.lowering",
    "torch._inductor.decomposition", "dp_accounting", "scipy", "jax", "matplotlib", "transformers")  # fmt: skip


@pytest.mark.parametrize(
    ("program", "more"),
    [
        ("import dpcompile", ("torch",)),
        ("from dpcompile import *", ()),
        ("import dpcompile; dpcompile.make_private; dpcompile.auditing; dpcompile.runtime.base", ()),
    ],
)
def test_what_importing_brings_along(program: str, more: tuple[str, ...]) -> None:
    """A compiler, an accountant and a plotter are imported when they are used."""
    program += f"\nimport sys\nprint([m for m in {(*HEAVY, *more)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


USER = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile import DPOptimizer, PoissonLoader, PrivateModule, compile_step, dp_compile, make_private


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.width = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


@dp_compile(max_grad_norm=0.5)
class Decorated(Net):
    pass


@dp_compile
class Bare(Net):
    pass


model = dp_compile(Net(), backend="eager", max_grad_norm=1.0)
reveal_type(model)
reveal_type(model.width)
reveal_type(Decorated())
reveal_type(Bare())
data = DataLoader(TensorDataset(torch.randn(8, 5), torch.zeros(8)), batch_size=4)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
private, optimizer, loader = make_private(Net(), inner, data, noise_multiplier=1.0, clipping="flat")
reveal_type(private)
reveal_type(optimizer)
reveal_type(loader)
reveal_type(optimizer.epsilon(1e-5))
reveal_type(dpcompile.__version__)
step = compile_step(private, torch.nn.functional.cross_entropy, optimizer)
reveal_type(step)
reveal_type(step(torch.randn(8, 5), torch.zeros(8)))
assert isinstance(private, PrivateModule)
reveal_type(private)
reveal_type(private.width)
reveal_type(private.grad_norms)
reveal_type(private.plan)
reveal_type(private.certificate)
"""
REVEALED = [
    "Net", "int", "Decorated", "Bare", "Net", "DPOptimizer", "PoissonLoader", "float", "str",
    "CompiledStep", "Tensor",
    '<subclass of "Net" and "PrivateModule">', "int", "Tensor", "Plan | RegionPlans", "Certificate",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("", None),
        ("\ndp_compile(Net(), max_grad_nrom=1.0)\n", "max_grad_nrom"),
        ("\nmake_private(Net(), inner, data, noise_multiplier=1.0, norm=3)\n", 'has incompatible type "int"'),
    ],
)
def test_mypy_on_a_users_script(more: str, error: str | None, tmp_path: Any) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(USER + more)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "c")]
    done = subprocess.run([*command, "script.py"], capture_output=True, text=True, cwd=tmp_path)
    found = [line for line in done.stdout.splitlines() if "error:" in line]
    assert (found == []) if error is None else (found != [] and error in found[0]), done.stdout
    told = re.findall(r'Revealed type is "(.*)"$', done.stdout, re.MULTILINE)
    short = [re.sub(r"[\w.]*\.(?=[\w<])", "", kind) for kind in told]
    assert short == REVEALED, done.stdout


@pytest.mark.slow
def test_pyright_on_a_users_script(tmp_path: Any) -> None:
    pytest.importorskip("pyright")
    (tmp_path / "script.py").write_text(USER)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    told = re.findall(r'information: Type of ".*" is "(.*)"$', done.stdout, re.MULTILINE)
    assert (done.returncode, told) == (0, [kind.replace('"', "") for kind in REVEALED]), done.stdout


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package(tmp_path: Any) -> None:
    pytest.importorskip("setuptools", minversion="77")
    program = (
        "import sys, setuptools.build_meta as b; to = sys.argv[1]; "
        "print(b.build_wheel(to), b.build_sdist(to), sep='\\n')"
    )
    copied = tmp_path / "copy"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=copied)
    assert done.returncode == 0, done.stderr
    wheel, source = (tmp_path / name for name in done.stdout.split("\n")[-3:-1])
    assert wheel.name == f"dpcompile-{dpcompile.__version__}-py3-none-any.whl"
    wanted = {f"dpcompile/{p.relative_to(PACKAGE).as_posix()}" for s in ("*.py", "*.cpp") for p in PACKAGE.rglob(s)}
    with zipfile.ZipFile(wheel) as held:
        inside = {n for n in held.namelist() if n.startswith("dpcompile/")}
        assert inside == wanted | {"dpcompile/py.typed"}
        held.extractall(tmp_path / "installed")
    with tarfile.open(source) as held:
        names = {n.partition("/")[2] for n in held.getnames()}
        assert wanted | {"dpcompile/py.typed", "pyproject.toml", "README.md", "LICENSE"} <= names
    tried = "import dpcompile as d; print(d.__file__, d.__version__); d.make_private; d.PrivacyAccountant"
    done = subprocess.run(
        [sys.executable, "-c", tried], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    )  # fmt: skip
    assert done.stdout == f"{tmp_path}/installed/dpcompile/__init__.py {dpcompile.__version__}\n", done.stderr
