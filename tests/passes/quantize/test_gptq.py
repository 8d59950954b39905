"""GPTQ's rounding: less error of the outputs, the same steps, nothing lost where there is nothing to see."""

from __future__ import annotations

import pytest
import torch

from dscompile.passes.quantize.gptq import gptq_rows
from dscompile.runtime.int8 import quantize_rows


def _problem(k: int, n: int = 37, rows: int = 700) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [rows, K] of few directions, as activations are, and a weight [N, K]."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(rows, max(2, k // 6), generator=generator) @ torch.randn(max(2, k // 6), k, generator=generator)
    x = (x + 0.1 * torch.randn(rows, k, generator=generator)) * torch.logspace(-1, 1, k)
    return x, torch.randn(n, k, generator=generator)


def _error(x: torch.Tensor, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> float:
    difference = x.double() @ (q.double() * scale.double()[:, None] - weight.double()).t()
    return difference.square().mean().sqrt().item()


@pytest.mark.parametrize("k", [1, 63, 128, 300])
def test_outputs_err_less_than_with_the_nearest_integers(k):
    x, weight = _problem(k)
    nearest, scale = quantize_rows(weight)
    q = gptq_rows(weight, x.t() @ x)
    assert q.dtype == torch.int8 and q.shape == weight.shape and q.abs().max() <= 127
    errors = [_error(x, weight, values, scale) for values in (q, nearest)]
    assert errors[0] <= errors[1] * (0.7 if k > 1 else 1.0)
    assert (q.int() - nearest.int()).abs().max() <= 20, "made up for, not made anew"


def test_inputs_that_do_not_correlate_round_to_the_nearest():
    weight = torch.randn(9, 40)
    assert torch.equal(gptq_rows(weight, torch.diag(torch.rand(40) + 0.1)), quantize_rows(weight)[0])


def test_zeros(monkeypatch):
    """Rows of zeros, channels that are never used, and inputs that are nothing but zeros."""
    x, weight = _problem(50)
    weight[3], x[:, 7] = 0, 0
    q = gptq_rows(weight, x.t() @ x)
    assert not q[3].any() and q[:, 7].any()
    assert torch.equal(gptq_rows(weight, torch.zeros(50, 50)), quantize_rows(weight)[0])


def test_rows_in_parts(monkeypatch):
    x, weight = _problem(70)
    whole = gptq_rows(weight, x.t() @ x)
    monkeypatch.setattr("dscompile.passes.quantize.gptq.ROWS", 8)
    assert torch.equal(gptq_rows(weight, x.t() @ x), whole)
