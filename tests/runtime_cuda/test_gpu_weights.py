"""Weights read onto a GPU are those of the files."""

from __future__ import annotations

import pytest
import torch

from dscompile.runtime.artifact import open_artifact
from dscompile.runtime.weights import load_weights

pytestmark = pytest.mark.gpu


def test_weights_are_those_of_the_files(artifacts):
    for path in artifacts.values():
        manifest, plan = open_artifact(path)
        on_cpu, on_gpu = (load_weights(path, manifest, plan, torch.device(d)) for d in ("cpu", "cuda"))
        assert on_cpu.keys() == on_gpu.keys()
        for name, weight in on_cpu.items():
            assert torch.equal(weight, on_gpu[name].cpu()), name
