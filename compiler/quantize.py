"""What quantization adds to a compilation: its passes, its section of the report, its accuracy gate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from dscompile.compiler.budget import NONE, BudgetMissed, Kept, worst_first
from dscompile.compiler.calibration import CalibrationText
from dscompile.compiler.config import CompileConfig
from dscompile.compiler.progress import Progress
from dscompile.passes.graph import ModelGraph
from dscompile.passes.quantize.calibrate import Trial, calibrate
from dscompile.passes.quantize.choose import choose_linears
from dscompile.passes.quantize.packed import Regions, assume_inputs, round_weights, scale_inputs
from dscompile.passes.quantize.schemes import SCHEMES, STATIC
from dscompile.passes.quantize.sites import Site
from dscompile.passes.quantize.smooth import LinearError, smooth_linears
from dscompile.passes.quantize.walk import Values, leaves, walk
from dscompile.passes.runner import Pass
from dscompile.runtime import load
from dscompile.runtime.perplexity import perplexity

BATCH = 4
ACTIVATIONS = {"none": "as they are", "token": "int8 per token", "tensor": "int8, static"}


class Quantizer:
    """The quantization that a configuration asks for.

    text, read: what to calibrate on, and the checkpoint's tensors by name; None for dummy weights, which are only
                rounded
    kept:       linears that stay as they are to meet the accuracy budget
    """

    def __init__(
        self,
        config: CompileConfig,
        text: CalibrationText | None,
        read: Callable[[str], Tensor] | None,
        progress: Progress,
        kept: Kept = NONE,
    ) -> None:
        self.config = config
        self.scheme = (STATIC if config.static_activations else SCHEMES).get(config.quant)
        self.text = text
        self.kept = kept
        self.errors: list[LinearError] = []
        self._read = read
        self._progress = progress

    def passes(self) -> tuple[Pass, ...]:
        """The phase `quantize`; none where the cache alone is in int8."""
        if self.scheme is None:
            return ()
        choose = choose_linears(self.scheme.spec, self.config.quant_lm_head, self.kept.names)
        return (choose, smooth_linears(self._calibrate, self.errors)) if self.text else (choose,)

    def packed_passes(self, directory: Path) -> tuple[Pass, ...]:
        """Those of the phase that need packed linears. directory: for files that are gone when the plan is."""
        passes: list[Pass] = []
        if self.config.static_activations:
            passes.append(scale_inputs(self._walk if self.text else assume_inputs))
        if self.config.rounding == "gptq" and self._read is not None:
            passes.append(round_weights(self._walk, self._read, directory))
        return tuple(passes)

    def _walk(self, graph: ModelGraph, regions: Regions) -> Iterator[tuple[fx.Node, Values]]:
        assert self.text and self._read, "there is nothing to run on"
        self._progress.finish()
        self._progress.start("calibration", len(regions), "linears")
        for found in walk(graph, regions, self.text.windows, leaves(graph, self._read)):
            yield found
            self._progress.advance()
        self._progress.finish()
        self._progress.start("fusion")

    def _calibrate(self, graph: ModelGraph, sites: Sequence[Site]) -> list[list[Trial]]:
        assert self.text and self._read and self.scheme, "the pass runs only where there is a text"
        self._progress.finish()
        self._progress.start("calibration", len(sites), "inputs")
        trials = calibrate(graph, sites, self.text.windows, self._read, self.scheme, self._progress.advance)
        self._progress.finish()
        self._progress.start("fusion")
        return trials

    def report(self) -> dict[str, Any]:
        """The report's section: scheme, text, each linear's error, the worst first, and those kept as they are."""
        facts: dict[str, Any] = {"scheme": self.config.quant, "kv_dtype": self.config.kv_dtype}
        if self.scheme is not None:
            facts |= {"activations": ACTIVATIONS[self.scheme.spec.activations], "rounding": self.config.rounding}
        if self.text is None:
            return facts | {"calibration": "none: the weights are dummies"}
        facts |= {
            "calibration": self.text.name,
            "windows": len(self.text.windows),
            "window": len(self.text.windows[0]),
            "linears": [_facts(e) for e in worst_first(self.errors)],
        }
        if self.kept.linears:
            facts["kept"] = [_facts(e) for e in worst_first(self.kept.linears)]
            facts["kept_because"] = "; ".join(
                f"perplexity grew by {percent:.2f} % with {number or 'none'} kept"
                for number, percent in self.kept.rounds
            )
        return facts

    def gate(self, artifact: Path, twin: Path) -> dict[str, Any]:
        """Perplexity of the held-out text with and without quantization, for the report.

        Raises BudgetMissed where it grows by more than the budget.
        """
        if self.text is None or not self.text.held_out:
            return {"perplexity": "not measured: there is no text"}
        before, after = (_perplexity(a, self.text.held_out) for a in (twin, artifact))
        percent = 100 * (after / before - 1)
        budget = self.config.max_perplexity_increase
        if not percent <= budget:
            raise BudgetMissed(_options(self.config), percent, budget, self.errors, self.kept)
        return {
            "held_out_windows": len(self.text.held_out),
            "perplexity_before": round(before, 4),
            "perplexity_after": round(after, 4),
            "increase_percent": round(percent, 3),
            "max_increase_percent": budget,
        }


def _options(config: CompileConfig) -> str:
    """What a user wrote to have the model quantized."""
    options = {"--quant": (config.quant, "none"), "--kv-dtype": (config.kv_dtype, "auto")}
    return " ".join(f"{name} {value}" for name, (value, default) in options.items() if value != default)


def _facts(error: LinearError) -> dict[str, Any]:
    return {"weight": error.weight, "sqnr_db": round(error.sqnr_db, 2), "exponent": error.exponent}


def _perplexity(artifact: Path, windows: list[list[int]]) -> float:
    length = len(windows[0])
    engine = load(artifact, max_kv_tokens=2 * BATCH * (length + 64))
    tokens = [token for window in windows for token in window]
    found = perplexity(engine, tokens, length, len(windows), batch=min(BATCH, engine.plan.max_batch))
    del engine
    gc.collect()
    return float(found["perplexity"])
