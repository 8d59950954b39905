"""An artifact of the example model, compiled once, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dscompile.compiler.cli import main as dscompile

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "nano-llama"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model for the CPU. Do not change it: ask for `artifact`."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    assert dscompile([str(MODEL), "-o", str(out), "--target", "cpu", "--max-batch", "8"]) == 0
    return out


@pytest.fixture
def artifact(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the artifact."""
    return Path(shutil.copytree(compiled, tmp_path / "artifact"))


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the example model's directory."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))
