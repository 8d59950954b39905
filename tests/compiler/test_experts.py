"""The gate of experts is read by evaluating it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dscompile.compiler.experts import Gate, read_gate


def clamped(h):
    g, u = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (u + 1) * (g * torch.sigmoid(1.702 * g))


GATES = {
    "silu": (lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], Gate("silu", 0.0, 0.0, False)),
    "gelu": (lambda h: h[..., 1::2] * F.gelu(h[..., ::2], approximate="tanh"), Gate("gelu_tanh", 0.0, 0.0, True)),
    "clamped": (clamped, Gate("gelu_quick", 7.0, 1.0, True)),
    "product": (lambda h: h.chunk(2, -1)[0] * h.chunk(2, -1)[1], Gate("none", 0.0, 0.0, False)),
    "up first": (lambda h: h.chunk(2, -1)[0] * F.silu(h.chunk(2, -1)[1]), None),
    "squared": (lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] ** 2, None),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    apply, expected = GATES[name]
    assert read_gate(apply) == expected
