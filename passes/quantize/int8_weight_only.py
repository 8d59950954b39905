"""Weights per output channel, activations as they are."""

from dscompile.passes.quantize.int8 import rounded
from dscompile.passes.quantize.scheme import Scheme
from dscompile.runtime.plan import Quantization

SCHEME = Scheme(Quantization("none"), rounded, lambda x, largest: x, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
