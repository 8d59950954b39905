"""Decode steps of a few layers under other configurations of their linears.

python -m benchmarks.steps --model llama3-8b --layers 8 --batch 8,32,128 --tables taller.json,lower.json

A table is one of codegen/tuned: {"linear": [{"shape": [28672, 4096], "gated": true, "tokens": 32, "config": {...}}]},
where tokens are those of a tile (8, 16, 32, 64 or 128). The configurations as they are come first and again last, so
that a GPU that grows slower meanwhile can be told from a table that is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command_line, free_memory, names, numbers, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS
from dscompile.compiler.trace import trace_model
from dscompile.compiler.tune import StepBench
from dscompile.passes.lower.lower import Limits
from dscompile.passes.pipeline import PIPELINE
from dscompile.passes.runner import run_pipeline
from dscompile.runtime.bench import bench

AS_IT_IS = "as it is"


def main() -> None:
    parser = parser_for("steps", __doc__, "steps")
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=numbers, default=[8, 32, 128], help="comma-separated batch sizes")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256, help="new tokens")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tables", type=names, default=[], help="files, comma-separated")
    args = parser.parse_args()
    tables = {Path(path).stem: tuple(json.loads(Path(path).read_text())["linear"]) for path in args.tables}
    rows: list[dict[str, Any]] = []
    kernels: Collection[str] = ()
    with tempfile.TemporaryDirectory() as scratch:
        steps = bench_of(args.model, args.layers, args.prompt + args.new, max(args.batch), args.device, Path(scratch))
        for label, table in [(AS_IT_IS, ()), *tables.items(), *[(AS_IT_IS, ())] * bool(tables)]:
            engine = steps.engine(table, max(args.batch) * (args.prompt + args.new + 64))
            kernels = kernels or engine.plan.kernels.keys()
            if table and args.device != "cpu" and engine.plan.kernels.keys() == kernels:
                parser.error(
                    f"{label} changes no kernel: no linear has its shapes and tokens, or its fields are others"
                )
            found = bench(engine, args.batch, args.prompt, args.new, args.repeat)
            rows.append({"table": label, "configurations": list(table), **found})
            del engine
            free_memory()
            each = (f"batch {b['batch']} {1e3 * b['decode_step_ms']:.1f} us" for b in found["batches"])
            print(f"{label}: {', '.join(each)}", flush=True)
    data = {"command": command_line(parser, args), "model": args.model, "layers": args.layers, "rows": rows}
    print(write_result(args.name, data, args.out))


def bench_of(model: str, layers: int, tokens: int, sequences: int, device: str, scratch: Path) -> StepBench:
    """A model of MODELS with so many layers, for so many sequences of so many tokens."""
    make, dtype = MODELS[model]
    config = make()
    config.update({config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): layers})
    graph = trace_model(config, tokens)
    run_pipeline(graph, PIPELINE)
    targets: tuple[str, ...] = ()
    if device != "cpu":
        targets = ("sm_{}{}".format(*torch.cuda.get_device_capability(device)),)
    return StepBench(graph, dtype, targets, Limits(tokens, sequences), scratch, device)


if __name__ == "__main__":
    main()
