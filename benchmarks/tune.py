"""Tune the linears of real shapes inside their models' decode steps, and write the table of codegen/tuned.

python -m benchmarks.tune --models gptj-6b,llama3-8b --tokens 1,8 --table codegen/tuned/sm_90.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.models import MODELS, ONE_GPU
from dscompile.compiler.trace import trace_model
from dscompile.compiler.tune import tune
from dscompile.passes.lower.lower import Limits
from dscompile.passes.pipeline import PIPELINE
from dscompile.passes.runner import run_pipeline


class _Print:
    """Progress as lines, one a stage."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        self._stage, self._began = f"{stage}: {total} {unit}", time.perf_counter()

    def advance(self, amount: int = 1) -> None:
        pass

    def finish(self) -> None:
        print(f"  {self._stage}, {time.perf_counter() - self._began:.0f} s", flush=True)


def main() -> None:
    args = _parse()
    for name in args.models:
        make, dtype = MODELS[name]
        graph = trace_model(make(), 512)
        run_pipeline(graph, PIPELINE)
        print(name, flush=True)
        for tokens in args.tokens:
            entries = tune(graph, dtype, (args.target,), Limits(512, tokens), _Print(), (tokens,), args.candidates)
            for entry in entries:
                print("   ", json.dumps(entry), flush=True)
            merge(entries, args.table)


def merge(entries: tuple[dict, ...], path: Path) -> None:
    """Put entries into a table of codegen/tuned, in place of those of the same shape and number of tokens."""
    held = json.loads(path.read_text())["linear"] if path.exists() else []
    table = {(*e["shape"], e["gated"], e["tokens"]): e for e in [*held, *entries]}
    kept = [{k: e[k] for k in ("shape", "gated", "tokens", "config")} for _, e in sorted(table.items())]
    path.write_text('{"linear": [\n  ' + ",\n  ".join(map(json.dumps, kept)) + "\n]}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda s: s.split(","), default=list(ONE_GPU))
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--table", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
