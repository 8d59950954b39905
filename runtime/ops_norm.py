"""The torch reference of `plan.Norm`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dscompile.runtime.plan import Norm


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type to compute in: float32 for half precision, else the tensor's own."""
    return torch.promote_types(x.dtype, torch.float32)


def bind_norm(
    norm: Norm | None, weights: dict[str, torch.Tensor], role: str, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Prepare a norm over the last dimension of `dtype` tensors; the identity for None."""
    if norm is None:
        return lambda x: x
    weight = weights[f"{role}_weight"].to(dtype) if norm.weight else None
    bias = weights[f"{role}_bias"].to(dtype) if norm.bias else None
    eps = norm.eps
    if norm.kind == "layer":
        return lambda x: torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if bias is None:
        return lambda x: torch.rms_norm(x, x.shape[-1:], weight, eps)
    return lambda x: torch.rms_norm(x, x.shape[-1:], weight, eps).add_(bias)
