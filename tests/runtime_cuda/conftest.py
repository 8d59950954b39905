"""Artifacts for the tests on a GPU, and the lines of their summary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SUMMARY: list[str] = []
EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "nano-llama"


@pytest.fixture(scope="session")
def summary():
    """Add a line to what is printed after the tests."""
    return SUMMARY.append


def pytest_terminal_summary(terminalreporter):
    if SUMMARY:
        terminalreporter.section("on the GPU")
        for line in SUMMARY:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def target() -> str:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@pytest.fixture(scope="session")
def artifacts(target, tmp_path_factory) -> dict[str, Path]:
    """Name -> artifact in float16: those in the directory DSCOMPILE_ARTIFACTS, or the models in DSCOMPILE_MODELS (the
    example model if unset) compiled for this GPU."""
    if "DSCOMPILE_ARTIFACTS" in os.environ:
        found = sorted(Path(os.environ["DSCOMPILE_ARTIFACTS"]).glob("*/manifest.json"))
        return {path.parent.name: path.parent for path in found}
    pytest.importorskip("transformers")
    from dscompile.compiler import compile_model

    models = [EXAMPLE]
    if "DSCOMPILE_MODELS" in os.environ:
        models = sorted(path.parent for path in Path(os.environ["DSCOMPILE_MODELS"]).glob("*/config.json"))
    folder = tmp_path_factory.mktemp("artifacts")
    for model in models:
        compile_model(model, folder / model.name, dtype="float16", target=target, verify=False)
    return {model.name: folder / model.name for model in models}
