"""Each region of a layer, fused and as the same operators one by one through torch, on the same GPU: one new token.

python -m benchmarks.regions --models bloom-7b1,llama3-8b,gptj-6b

Microseconds in one layer. "launched": torch launches every operator from Python, as eager execution does; "graph": the
same operators in one CUDA graph, without what launching them costs. Ours always runs in graphs. Layers have weights of
their own, more than the L2 holds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.artifacts import artifact_folder, artifact_of
from benchmarks.command import command_line, free_memory, names, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS
from benchmarks.unfused import UNFUSED
from dscompile.runtime import load

LAYERS = 8
WARM_UPS = 3
REPEATS = 10


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with artifact_folder(args.artifacts) as folder:
        for name in args.models:
            engine = load(artifact_of(name, folder), device=args.device)
            fused = fused_us(engine, args.context)
            del engine
            free_memory()
            for regions, (steps, elapsed) in fused.items():
                launched, graph = unfused_us(name, regions.split("+"), args.context)
                row = {"model": name, "region": regions, "launches": steps, "fused_us": elapsed}
                row |= {"launched_us": launched, "graph_us": graph}
                row |= {"over_launched": launched / elapsed, "over_graph": graph / elapsed}
                rows.append(row)
                print(row, flush=True)
            free_memory()
            data = {"command": command_line(parser, args), "context": args.context, "rows": rows}
            path = write_result(args.name, data, args.out)
    print(path)


def fused_us(engine: Any, context: int) -> dict[str, tuple[int, float]]:
    """Regions of a step ("attn_in+mlp_in") -> (its steps in a layer, their microseconds in a decode step)."""
    engine.generate([list(range(1, context + 1))], max_new_tokens=4, ignore_eos=True)
    found: dict[str, list[str]] = {}
    for step in engine.plan.steps:
        if step.layer is not None:
            found.setdefault("+".join(step.regions), []).append(step.name)
    layers = 1 + max(step.layer for step in engine.plan.steps if step.layer is not None)
    return {
        regions: (len(steps) // layers, _graph_us(engine.executor.capture_steps(1, steps)) / layers)
        for regions, steps in found.items()
    }


@torch.no_grad()
def unfused_us(name: str, regions: list[str], context: int) -> tuple[float, float]:
    """Microseconds of the operators of some regions in one layer: launched one by one, and in a graph."""
    make, dtype = MODELS[name]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("cuda"):
            layers = [UNFUSED[name](make(), context) for _ in range(LAYERS)]
    finally:
        torch.set_default_dtype(torch.float32)

    def run() -> None:
        for layer in layers:
            for region in regions:
                getattr(layer, region)()

    run()
    launched = _median(run) / LAYERS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return launched, _graph_us(graph.replay) / LAYERS


def _graph_us(replay: Callable[[], None]) -> float:
    """Microseconds of a replay, by events."""
    times = []
    for _ in range(WARM_UPS + REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times[WARM_UPS:])


def _median(function: Callable[[], None]) -> float:
    """Microseconds of a call, the host's included."""
    times = []
    for _ in range(WARM_UPS + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UPS:])


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("regions", __doc__, "regions")
    parser.add_argument("--models", type=names, default=list(UNFUSED), help="comma-separated: " + ", ".join(UNFUSED))
    parser.add_argument("--context", type=int, default=128)
    return parser


if __name__ == "__main__":
    main()
