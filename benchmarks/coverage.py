"""Compile a tiny random checkpoint of every architecture for the CPU and write docs/coverage.md.

    python -m benchmarks.coverage [NAME ...]

The configurations are those of tests/compiler/tiny.py. With names, only their rows are made anew.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from dscompile.compiler.compile import compile_model
from dscompile.runtime.errors import UserError
from dscompile.runtime.report import LayerClass, Report
from tests.compiler.tiny import CONFIGS, ENCODERS, OPTIONS, REFUSED, make_config, save_encoder, save_model

ENCODER_OPTIONS = {name: OPTIONS[name] for name in ("target", "max_batch")}
DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
HEAD = """# Coverage

What becomes of every architecture of the tests: a tiny random checkpoint as transformers saves it, compiled for the CPU
in float32 and compared with transformers in prefill, ragged batch and token-by-token decode. Written by
`python -m benchmarks.coverage`; a test compares each row (but its error) with the compiler.

`class xN`: N layers with equal regions; `norm` is a norm in a kernel of its own. Error: the largest
RMS(error) / RMS(logits), of encoders / RMS(hidden states); the limit is 1e-5.

The same in float16 by the kernels: `python -m benchmarks.coverage_gpu`, or `pytest -m gpu
tests/runtime_cuda/test_coverage.py`, on a GPU ([of one H200](../benchmarks/results/coverage_h200.json)), or, with
`TRITON_INTERPRET=1` set, in Triton's interpreter ([results](../benchmarks/results/coverage_interpreted.json)). Each
names its commit; kernels may have changed since.

| configuration | architecture | regions by layer class | refusals and fallbacks | error |
|---|---|---|---|---|
"""


def row(name: str, report: Report) -> str:
    """A line of the table, without the error."""
    layers = "; ".join(_describe(c) for c in report.classes if c.layers)
    misses = {f"{m.rule}: {_without_numbers(m.reason)}" for c in report.classes for m in c.near_misses}
    fallbacks = {f"{f.op} by torch: {f.reason}" for f in report.fallbacks}
    notes = "; ".join(sorted(fallbacks) + sorted(misses)).replace("|", "\\|")
    return f"| {name} | {report.model['architecture']} | {layers} | {notes} |"


def refusal(name: str, reason: str) -> str:
    """The line of an architecture that is refused."""
    return f"| {name} | {REFUSED[name][0].removesuffix('Config')} | refused | {reason} |"


def _describe(layer_class: LayerClass) -> str:
    names = ["+".join(names) for names, _ in layer_class.steps()]
    return " ".join(names) + (f" x{layer_class.count}" if layer_class.count > 1 else "")


def _without_numbers(text: str) -> str:
    """Text without the numbers that distinguish nodes of a graph, which differ between versions of torch."""
    return re.sub(r"_\d+\b", "", text)


def measure(name: str, scratch: Path) -> str:
    """The whole line of a configuration."""
    if name in REFUSED:
        make_config(REFUSED[name]).save_pretrained(scratch / "model")
        try:
            compile_model(scratch / "model", scratch / "out", dummy_weights=True, **OPTIONS)
        except UserError as reason:
            return f"{refusal(name, str(reason))} |"
        raise AssertionError(f"{name} was not refused")
    if name in ENCODERS:
        save_encoder(name, scratch / "model")
        report = compile_model(scratch / "model", scratch / "out", **ENCODER_OPTIONS)
    else:
        save_model(name, scratch / "model")
        report = compile_model(scratch / "model", scratch / "out", **OPTIONS)
    return f"{row(name, report)} {max(c.error for c in report.verification.checks):.0e} |"


def main(names: list[str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    for name in names or [*CONFIGS, *ENCODERS, *REFUSED]:
        with tempfile.TemporaryDirectory() as scratch:
            lines[name] = measure(name, Path(scratch))
        print(lines[name], flush=True)
    known = [lines[name] for name in (*CONFIGS, *ENCODERS, *REFUSED) if name in lines]
    DOCUMENT.write_text(HEAD + "\n".join(known) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
