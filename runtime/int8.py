"""Symmetric int8: how rows become integers, and their exact product."""

from __future__ import annotations

from functools import cache

import torch

LARGEST = 127
# A row whose step would be subnormal counts as zeros: the quotient of two such numbers is no longer exact.
SMALLEST = LARGEST * torch.finfo(torch.float32).tiny
# Products of int8 values that float32 adds up without rounding: 2^24 / 127^2.
EXACT_TERMS = 1024


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row symmetrically: scale = max|x| / 127, q = round half to even(x / scale).

    x_MK:    [M, K], any floating type
    returns: q_MK [M, K] int8 in [-127, 127]; scale_M [M] float32, the value of one step (x = q * scale), 1 for a row
             of zeros and NaN for a row that holds NaN or infinity
    """
    scale_M = row_scales(x_MK)
    return round_rows(x_MK, scale_M), scale_M


def row_scales(x_MK: torch.Tensor) -> torch.Tensor:
    """The value of one step of each row, [M] float32."""
    largest = x_MK.abs().amax(-1).float() if x_MK.shape[-1] else x_MK.new_zeros(len(x_MK)).float()
    scale = torch.where(largest < SMALLEST, 1.0, largest / LARGEST)
    return torch.where(largest.isfinite(), scale, torch.nan)


def round_rows(x_MK: torch.Tensor, scale_M: torch.Tensor) -> torch.Tensor:
    """x / scale rounded to int8 [M, K], clamped to [-127, 127]; 0 where the scale is NaN."""
    q = torch.div(x_MK, scale_M[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return q.nan_to_num_(0.0).to(torch.int8)


def int8_product(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """a @ b.T, exact. int8 [M, K], int8 [N, K] -> int32 [M, N]; K below 2^17."""
    if has_exact_int_mm():
        return torch._int_mm(a_MK, b_NK.t())
    return float_product(a_MK, b_NK)


def float_product(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """The same through float32, in pieces of K that are too short to round."""
    total = torch.zeros(len(a_MK), len(b_NK), dtype=torch.int32)
    for a, b in zip(a_MK.split(EXACT_TERMS, -1), b_NK.split(EXACT_TERMS, -1), strict=True):
        total += torch.mm(a.float(), b.float().t()).to(torch.int32)
    return total


@cache
def has_exact_int_mm() -> bool:
    """Whether torch._int_mm adds in 32 bits here: CPUs without VNNI can saturate pairs of products at 16."""
    signs = torch.tensor([LARGEST, -LARGEST], dtype=torch.int8)
    a, b = signs[:, None].expand(2, 64).contiguous(), signs[:, None].expand(2, 64).repeat(16, 1)
    try:
        product = torch._int_mm(a, b.t())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return torch.equal(product, float_product(a, b))
