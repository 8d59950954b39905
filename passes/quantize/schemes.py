"""The quantization schemes, by the name that --quant takes."""

from __future__ import annotations

from dscompile.passes.quantize import int8, int8_static, int8_weight_only
from dscompile.passes.quantize.scheme import Scheme

SCHEMES: dict[str, Scheme] = {
    "int8": int8.SCHEME,
    "int8-weight-only": int8_weight_only.SCHEME,
}
# What --static-activations makes of them.
STATIC: dict[str, Scheme] = {"int8": int8_static.SCHEME}
