"""W8A8: weights per output channel, activations by one scale that calibration found."""

from __future__ import annotations

from torch import Tensor

from dscompile.passes.quantize import int8
from dscompile.passes.quantize.scheme import Scheme
from dscompile.runtime.int8 import round_rows, row_scales
from dscompile.runtime.plan import Quantization


def rounded_by(x: Tensor, largest: Tensor) -> Tensor:
    """x [M, K] as int8 represents it in steps of largest / 127."""
    scale = row_scales(largest.reshape(1, 1)).expand(len(x))
    return round_rows(x, scale).to(x.dtype) * scale[:, None]


SCHEME = Scheme(Quantization("tensor"), int8.rounded, rounded_by, int8.SCHEME.exponents)
