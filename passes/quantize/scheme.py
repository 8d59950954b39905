"""What a quantization scheme is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dscompile.runtime.plan import Quantization


@dataclass(frozen=True)
class Scheme:
    """How linears are quantized.

    spec:      what the plan says of each
    weight:    a weight [N, K] as the scheme represents it, in float32
    input:     an input [M, K] as the scheme represents it, given the largest value that calibration found in it
    exponents: those of SmoothQuant to be tried; 0 stands for no smoothing
    """

    spec: Quantization
    weight: Callable[[Tensor], Tensor]
    input: Callable[[Tensor, Tensor], Tensor]
    exponents: tuple[float, ...]
