"""What the rule for shapes in no table costs on the shapes of the table: its configuration beside the measured one.

python -m benchmarks.rule --table codegen/tuned/sm_90.json

The rule knows nothing of the table, so every row leaves itself out. Each kernel runs alone, as in benchmarks.kernels.
With --candidates N the N most promising configurations are timed too, to see what either misses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command_line, parser_for
from benchmarks.kernel_shapes import LINEARS, linear_operands
from benchmarks.kernels import (
    TORCH,
    Candidate,
    Config,
    Kernels,
    LinearProblem,
    inner_spec,
    linear_candidate,
    linear_candidates,
    linear_scratch,
    read_bandwidth,
)
from benchmarks.machine import write_result
from dscompile.codegen.operands import KernelContext
from dscompile.codegen.ring_kernels import takes_ring
from dscompile.codegen.tuned_table import (
    TUNED,
    RingConfig,
    RowConfig,
    TileConfig,
    ring_rule,
    row_rule,
    tile_rule,
)
from dscompile.runtime.plan import Linear

WEIGHTS = 1_100_000_000  # numbers of the pool that weights are cut from


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    print(f"read bandwidth {read_bandwidth():.2f} TB/s", flush=True)
    rows = measure_rule(args.table, args.processes, args.candidates)
    worst = max(row["ratio"] for row in rows)
    print(f"worst: {worst:.3f}")
    data = {"command": command_line(parser, args), "worst": worst, "rows": rows}
    print(write_result(args.name, data, args.out))


def measure_rule(table: Path, processes: int, candidates: int = 0) -> list[dict[str, Any]]:
    """Microseconds of the measured configuration and of the rule's, and their ratio, for every entry of a table."""
    target = table.stem
    context = KernelContext((target,), 16, 8192, 128, 2048, ())
    kernels = Kernels(target, processes)
    listed = json.loads(table.read_text())["linear"]
    entries = [(entry, *_spec_of(entry, context)) for entry in listed if "quantization" not in entry]
    found = [_candidates(entry, spec, dtype, context, candidates) for entry, spec, dtype in entries]
    kernels.prepare([c.request for group in found for c in group])
    pools = {d: torch.empty(WEIGHTS, device="cuda", dtype=TORCH[d]).normal_(0, 0.02) for d in ("float16", "bfloat16")}
    scratch = linear_scratch()
    rows = []
    for (entry, spec, dtype), group in zip(entries, found, strict=True):
        problem = LinearProblem(spec, dtype, entry["tokens"], pools[dtype])
        runs = [run for run in (problem.measure(kernels, c, scratch) for c in group) if run is not None]
        tuned, rule, *others = runs
        row = {key: entry[key] for key in ("shape", "gated", "tokens")}
        row |= {"tuned_us": tuned.us, "rule_us": rule.us, "ratio": rule.us / tuned.us, "rule": rule.config}
        if others:
            best = min(others, key=lambda run: run.us)
            row |= {"best_us": best.us, "best": best.config}
        rows.append(row)
        print(json.dumps(row), flush=True)
        del problem
        torch.cuda.empty_cache()
    return rows


def _candidates(entry: dict[str, Any], spec: Linear, dtype: str, context: KernelContext, more: int) -> list[Candidate]:
    """The table's, the rule's, and `more` of those that tuning would try first."""
    operands, tokens = linear_operands(spec, dtype), entry["tokens"]
    tuned: Config
    rule: Config
    if tokens == 1:
        tuned, rule = RowConfig(**entry["config"]), row_rule(spec, dtype)
    elif takes_ring(spec, operands, context):
        tuned, rule = RingConfig(**entry["config"]), ring_rule(spec, tokens, context)
    else:
        tuned, rule = TileConfig(**entry["config"]), tile_rule(spec, dtype, tokens, context)
    others = linear_candidates(spec, dtype, tokens, context, more) if more else []
    return [*(linear_candidate(spec, operands, config, tokens) for config in (tuned, rule)), *others]


def _spec_of(entry: dict[str, Any], context: KernelContext) -> tuple[Linear, str]:
    """The linear of a known model that has an entry's shape, as its kernel sees it, and its dtype."""
    for dtype, linears in LINEARS.values():
        for spec in linears.values():
            shape = [spec.out_features, spec.in_features]
            if shape == entry["shape"] and any(s.gated for s in spec.segments) == entry["gated"]:
                return inner_spec(spec, dtype, entry["tokens"], context), dtype
    raise LookupError(f"no model of benchmarks.kernel_shapes has a linear of {entry['shape']}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("rule", __doc__, "rule")
    parser.add_argument("--table", type=Path, default=TUNED / "sm_90.json")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
