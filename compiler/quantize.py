"""What --quant adds to a compilation: its passes, its section of the report, its gate."""

from __future__ import annotations

from typing import Any

from dscompile.compiler.config import CompileConfig
from dscompile.passes.quantize.choose import choose_linears
from dscompile.passes.quantize.schemes import SCHEMES
from dscompile.passes.runner import Pass


class Quantizer:
    """The quantization that a configuration asks for."""

    def __init__(self, config: CompileConfig) -> None:
        self.config = config
        self.scheme = SCHEMES[config.quant]

    def passes(self) -> tuple[Pass, ...]:
        """The phase `quantize`."""
        return (choose_linears(self.scheme.spec, self.config.quant_lm_head),)

    def report(self) -> dict[str, Any]:
        """The report's section."""
        return {"scheme": self.config.quant}
