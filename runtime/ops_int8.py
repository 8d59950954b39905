"""The torch reference of `plan.Quantization`: a linear's product in int8."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dscompile.runtime.int8 import int8_product, round_rows, row_scales
from dscompile.runtime.plan import Quantization

Tensors = dict[str, torch.Tensor]


def bind_int8(spec: Quantization, weights: Tensors) -> Callable[[torch.Tensor], torch.Tensor]:
    """Prepare v [rows, K] -> v @ (q * scale).T [rows, N] in v's type (at least float32), v quantized where asked.

    weights: by role, as of plan.Linear
    """
    q_NK, scale_N = weights["weight"], weights["weight_scale"]
    if spec.activations == "none":
        return lambda v: torch.mm(v, q_NK.to(v.dtype).t()).mul_(scale_N)
    if spec.activations == "token":
        return lambda v: _product(v, row_scales(v), q_NK, scale_N)
    return lambda v: _product(v, weights["input_scale"].expand(len(v)), q_NK, scale_N)


def _product(v: torch.Tensor, scale_M: torch.Tensor, q_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    product = int8_product(round_rows(v, scale_M), q_NK)
    return product.to(v.dtype).mul_(scale_M[:, None]).mul_(scale_N)
