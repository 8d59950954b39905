"""Prefill of one prompt beside the library's time for its linears alone, and beside transformers, in the same run.

python -m benchmarks.prefill --cases gptj-6b:128,llama3-8b:2040,llama3-8b:8191 --against eager
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.artifacts import artifact_folder, artifact_of
from benchmarks.command import command_line, free_memory, names, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS
from benchmarks.peers import load_random, measure
from dscompile.runtime import load
from dscompile.runtime.bench import prefill_ms
from dscompile.runtime.plan import KeepRows, Linear, Plan

WARM_UPS = 2


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with artifact_folder(args.artifacts) as folder:
        for case in args.cases:
            name, tokens = case.split(":")
            engine = load(artifact_of(name, folder, int(tokens) + 1), device=args.device)
            row: dict[str, Any] = {"model": name, "dtype": MODELS[name][1], "tokens": int(tokens)}
            row["prefill_ms"] = prefill_ms(engine, 1, int(tokens), args.repeat)
            plan = engine.plan
            del engine
            free_memory()
            if args.device != "cpu":
                row["library_linears_ms"] = library_ms(plan, int(tokens), args.repeat)
                row["over_library"] = row["prefill_ms"] / row["library_linears_ms"]
            row["peers"] = [measure_peer(name, how, int(tokens)) for how in args.against]
            rows.append(row)
            print(row, flush=True)
            path = write_result(args.name, {"command": command_line(parser, args), "rows": rows}, args.out)
    print(path)


@torch.no_grad()
def library_ms(plan: Plan, tokens: int, repeat: int) -> float:
    """Milliseconds that torch.mm takes for every linear of the model, of `tokens` rows, behind the last attention
    of one."""
    rows: dict[tuple, torch.Tensor] = {}

    def tensor(*key: Any) -> torch.Tensor:
        """Random numbers, the same tensor for the same key."""
        if key not in rows:
            *shape, dtype, _ = key
            rows[key] = torch.empty(shape, device="cuda", dtype=getattr(torch, dtype)).normal_(0, 0.02)
        return rows[key]

    calls: list[Callable[[], torch.Tensor]] = []
    count = tokens
    for step in plan.steps:
        if isinstance(step.spec, KeepRows):
            count = 1
        if isinstance(step.spec, Linear):
            name = step.weights["weight"]
            (n, k), dtype = plan.weights[name].shape, plan.weights[name].dtype
            x, w, y = tensor(count, k, dtype, "x"), tensor(n, k, dtype, name), tensor(count, n, dtype, "y")
            calls.append(lambda x=x, w=w, y=y: torch.mm(x, w.t(), out=y))
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(WARM_UPS + repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_UPS:])


def measure_peer(name: str, how: str, tokens: int) -> dict[str, Any]:
    make, dtype = MODELS[name]
    model = load_random(make(), dtype)
    found = measure(model, how, 1, tokens, 2)
    del model
    free_memory()
    return {"peer": how, "prefill_ms": found["prefill_ms"]}


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("prefill", __doc__, "prefill")
    cases = ["gptj-6b:128", "llama3-8b:2040", "llama3-8b:8191"]
    parser.add_argument("--cases", type=names, default=cases, help="comma-separated MODEL:TOKENS")
    parser.add_argument("--against", type=names, default=[], help="comma-separated peers: eager, compile")
    parser.add_argument("--repeat", type=int, default=7)
    return parser


if __name__ == "__main__":
    main()
