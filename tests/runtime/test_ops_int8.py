"""Quantized linears against integer arithmetic, and int8 against what it stands for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dscompile.runtime import int8, ops
from dscompile.runtime.plan import Linear, Norm, Quantization, Segment
from tests.helpers import rms_ratio
from tests.runtime.test_ops import step


@pytest.mark.parametrize("shape", [(1, 64, 8), (17, 533, 63), (3, 5000, 33)])
def test_products_are_exact(shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    a[0], b[0], b[1] = 127, 127, -127
    expected = (a.long() @ b.long().T).int()
    assert torch.equal(int8.int8_product(a, b), expected)
    assert torch.equal(int8.float_product(a, b), expected)


def test_a_saturating_product_is_found_out(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-32768, 32767))
    int8.has_exact_int_mm.cache_clear()
    try:
        assert not int8.has_exact_int_mm()
    finally:
        monkeypatch.undo()
        int8.has_exact_int_mm.cache_clear()


def test_rows_round_to_the_nearest_step():
    x = torch.randn(7, 129, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 7)[:, None]
    q, scale = int8.quantize_rows(x)
    assert q.abs().amax(-1).eq(127).all()
    assert ((q.double() * scale.double()[:, None] - x.double()).abs() <= 0.5001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_rows_of_nothing_stay_nothing(value):
    q, scale = int8.quantize_rows(torch.full((2, 5), value))
    assert not q.any() and scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(value):
    x = torch.ones(2, 5)
    x[1, 3] = value
    _, scale = int8.quantize_rows(x)
    assert scale[0] == torch.tensor(1 / 127) and scale[1].isnan()


def _linear(activations: str, dtype: torch.dtype = torch.float32):
    """A linear with everything around its product, its inputs and weights."""
    generator = torch.Generator().manual_seed(2)
    k, n = 65, 34
    segment = Segment(0, n, "silu", gated=True)
    spec = Linear(k, n, (segment,), bias=True, norm=Norm("rms", 1e-5), quantization=Quantization(activations))
    x = torch.randn(9, k, generator=generator).to(dtype)
    x[4] = 0
    w = torch.randn(n, k, generator=generator)
    w[3] = 0
    q, scale = int8.quantize_rows(w)
    bias = torch.randn(n, generator=generator)
    weights = {"weight": q, "weight_scale": scale, "bias": bias}
    if activations == "tensor":
        weights["input_scale"] = torch.tensor([1.5 / 127])
    return spec, {"x": x}, weights


def _execute(spec, inputs, weights):
    return ops.execute(spec, inputs, weights, step(len(inputs["x"])))["y0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_only_is_the_linear_of_the_stored_weight(dtype):
    spec, inputs, weights = _linear("none", dtype)
    plain = {"weight": weights["weight"].float() * weights["weight_scale"][:, None], "bias": weights["bias"]}
    expected = _execute(dataclasses.replace(spec, quantization=None), inputs, plain)
    assert rms_ratio(_execute(spec, inputs, weights), expected) < (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_it_is_integer_arithmetic(activations):
    """The static scale is too small for some inputs: they are clamped."""
    spec, inputs, weights = _linear(activations)
    x = inputs["x"].double()
    v = torch.rms_norm(inputs["x"], (65,), eps=1e-5)
    scale = v.abs().amax(-1) / 127
    scale[4] = 1
    scale = weights["input_scale"].expand(len(v)) if activations == "tensor" else scale
    r = (v / scale[:, None]).round().clamp(-127, 127).long()
    assert activations == "token" or (r.abs() == 127).sum() > 2 * len(v)
    product = r @ weights["weight"].long().T
    p = product.double() * scale.double()[:, None] * weights["weight_scale"].double() + weights["bias"].double()
    gate, up = p.chunk(2, -1)
    actual = _execute(spec, inputs, weights)
    assert rms_ratio(actual, gate * torch.sigmoid(gate) * up) < 1e-6
    assert x[4].eq(0).all() and actual.isfinite().all()


@pytest.mark.parametrize("activations", ["none", "token", "tensor"])
def test_residuals_are_added(activations):
    spec, inputs, weights = _linear(activations)
    plain = dataclasses.replace(spec, segments=(Segment(0, 34),), bias=False)
    weights.pop("bias")
    residual = torch.randn(9, 34, generator=torch.Generator().manual_seed(3))
    alone = _execute(plain, inputs, weights)
    both = _execute(dataclasses.replace(plain, residuals=1), inputs | {"residual0": residual}, weights)
    assert rms_ratio(both, alone + residual) < 1e-6
