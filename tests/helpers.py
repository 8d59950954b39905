"""Helpers shared by the tests."""

from __future__ import annotations

import torch


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in float64; NaN anywhere gives infinity, shapes must be equal."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    error = actual.double().cpu() - expected.double().cpu()
    ratio = (error.square().mean().sqrt() / expected.double().cpu().square().mean().sqrt()).item()
    return ratio if ratio == ratio else float("inf")
