"""Functions of elements that no rule knows are executed by torch, and verified like everything else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dscompile.compiler import compile_model
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.plan import Aten
from tests.compiler import tiny
from tests.compiler.configs import GPT2

WIDTH = 256


class Snake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        frequency = self.alpha.exp()
        return x + torch.sin(x * frequency).square() / (frequency + 1e-9)


class Mixture(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        floor = torch.zeros((), device=x.device)
        return torch.where(x > 0.3, x.clamp(max=2.0), torch.expm1(torch.minimum(x, floor)) * 0.5)


class Truths(nn.Module):
    """Comparisons that become numbers, a slope that is learned, and names that are others' aliases."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.powers = nn.PReLU(), nn.Parameter(torch.zeros(1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        inside = ((x > -1) & torch.less(x, 1)).to(x.dtype)
        return torch.multiply(inside, self.slope(x)) + self.powers[0, 0, 0] * x + self.powers[0, 0, 1] * x * x


class Read(nn.Module):
    """A function that no linear can take in, as what it reads has other readers, and torch has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square() * x.abs() + x * torch.sigmoid(1.702 * x)


STEPS = {
    Snake: ["mul.Tensor", "sin.default", "square.default", "div.Tensor", "add.Tensor"],
    Mixture: ["gt.Scalar", "clamp.default", "minimum.default", "expm1.default", "mul.Scalar", "where.self"],
    Truths: None,
    Read: None,
}


@pytest.mark.parametrize("kind", STEPS)
def test_unknown_functions_are_executed_by_torch(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(ACT2FN, "unknown", kind)
    monkeypatch.setitem(tiny.CONFIGS, "unknown", ("GPT2Config", {**GPT2, "activation_function": "unknown"}))
    tiny.save_model("unknown", tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", **tiny.OPTIONS)
    assert report.verification.status == "passed" and report.fallbacks
    specs = [s.spec for s in read_plan(tmp_path / "out").steps if s.layer == 1 and isinstance(s.spec, Aten)]
    assert STEPS[kind] in (None, [s.target.removeprefix("aten.") for s in specs])
