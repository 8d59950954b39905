"""Rounding of a weight to given steps that takes its inputs into account (GPTQ, Frantar et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from dscompile.runtime.int8 import LARGEST, round_rows, row_scales

# Of the mean of the Hessian's diagonal: what is added to it, so that it can be inverted.
DAMPING = 0.01
BLOCK = 128
ROWS = 4096


def gptq_rows(weight_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """Integers [N, K] int8 whose product with runtime.int8.row_scales(weight) changes x W^T the least.

    weight_NK:  [N, K] float32
    hessian_KK: [K, K] float32, the sum of x^T x over inputs x
    Columns are rounded one after another, those of the largest inputs first; the error of each is made up for by those
    that are not rounded yet, in the way that lessens the squared error of the outputs the most.
    """
    scale_N = row_scales(weight_NK)
    order = hessian_KK.diagonal().argsort(descending=True)
    upper = _inverse_factor(hessian_KK[order][:, order])
    if upper is None:
        return round_rows(weight_NK, scale_N)
    q = torch.empty(weight_NK.shape, dtype=torch.int8)
    for rows in torch.arange(len(weight_NK)).split(ROWS):
        q[rows[:, None], order] = _round_columns(weight_NK[rows][:, order].double(), scale_N[rows].double(), upper)
    return q


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U of H^-1 = U^T U in float64, None where nothing was ever put in."""
    h = hessian.double()
    mean = h.diagonal().mean()
    if not mean > 0:
        return None
    h.diagonal().add_(DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_columns(w: Tensor, scale_N: Tensor, upper: Tensor) -> Tensor:
    """w is consumed. The update of the columns behind a block waits for its end."""
    q = torch.empty(w.shape, dtype=torch.int8)
    for first in range(0, w.shape[1], BLOCK):
        block = slice(first, min(first + BLOCK, w.shape[1]))
        part, u = w[:, block], upper[block, block]
        errors = torch.empty_like(part)
        for i in range(part.shape[1]):
            rounded = (part[:, i] / scale_N).round_().clamp_(-LARGEST, LARGEST)
            q[:, first + i] = rounded.to(torch.int8)
            errors[:, i] = (part[:, i] - rounded * scale_N) / u[i, i]
            part[:, i + 1 :] -= errors[:, i, None] * u[i, i + 1 :]
        w[:, block.stop :] -= errors @ upper[block, block.stop :]
    return q
