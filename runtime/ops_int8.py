"""The torch reference of `plan.Quantization`: a linear's product in int8."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dscompile.runtime.int8 import int8_product, quantize_rows
from dscompile.runtime.plan import Quantization


def bind_int8(spec: Quantization, q_NK: torch.Tensor, scale_N: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Prepare v [rows, K] -> v @ (q * scale).T [rows, N] in v's type (at least float32), v quantized where asked."""
    if spec.activations == "token":
        return lambda v: _by_token(v, q_NK, scale_N)
    return lambda v: torch.mm(v, q_NK.to(v.dtype).t()).mul_(scale_N)


def _by_token(v: torch.Tensor, q_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    r, scale_M = quantize_rows(v)
    return int8_product(r, q_NK).to(v.dtype).mul_(scale_M[:, None]).mul_(scale_N)
