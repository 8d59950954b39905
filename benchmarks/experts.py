"""Time the kernels of a mixture of experts for one token in several tilings, on the GPU at hand.

    python -m benchmarks.experts

Shapes of Mixtral-8x7B, float16. Every launch goes to other experts than the last, so that nothing comes from the L2.
Figures are TB/s of the weights of the experts chosen, beside the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import Kernels, graph_us, read_bandwidth
from benchmarks.machine import RESULTS, write_result
from dscompile.codegen.moe_kernels import RowTile, moe_program
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.runtime.plan import Launch, Moe, Router

SPEC = Moe(4096, 14336, Router(8, 2, "softmax", True), "silu", residuals=1)
TILES = [
    RowTile(4, 1024, 4, 3),
    RowTile(4, 512, 4, 3),
    RowTile(4, 512, 4, 5),
    RowTile(2, 1024, 4, 4),
    RowTile(8, 512, 4, 3),
    RowTile(8, 512, 8, 3),
    RowTile(2, 2048, 8, 3),
    RowTile(4, 2048, 8, 2),
    RowTile(16, 256, 4, 3),
]
LAUNCHES = 8


def main() -> None:
    args = _parse()
    tensors = _tensors()
    operands = {
        role: Operand(str(t.dtype).removeprefix("torch."), t.stride(0), tuple(t.shape)) for role, t in tensors.items()
    }
    context = KernelContext((args.target,), 16, 512, 1, 2048, ())
    programs = [moe_program(SPEC, operands, context, tile) for tile in TILES]
    kernels = Kernels(args.target, args.processes)
    kernels.prepare([r for _, requests in programs for r in requests if "_row" in r.name])
    bandwidth = read_bandwidth()
    requests = {r.name: r for _, found in programs for r in found}
    rows = []
    for tile, (program, _) in zip(TILES, programs, strict=True):
        _, up, down = program.cases[0].launches
        row: dict[str, Any] = {"tile": vars(tile)}
        for name, launch in (("up", up), ("down", down)):
            us = _time(kernels, requests[launch.target], launch, tensors)
            row[name] = None if us is None else {"us": us, "tbps": _weight_bytes(name) / us / 1e6}
        rows.append(row)
        print(row, flush=True)
    print(f"read bandwidth {bandwidth:.2f} TB/s; failed: {kernels.failed}")
    result = {"command": "python -m benchmarks.experts", "read_bandwidth_tbps": bandwidth, "tiles": rows}
    print(write_result("experts", result, args.out))


def _tensors() -> dict[str, torch.Tensor]:
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    experts, k, f = SPEC.router.num_experts, SPEC.in_features, SPEC.hidden_features
    return {
        "in.x": torch.randn(1, k, **half),
        "in.logits": torch.randn(1, experts, **half),
        "in.residual0": torch.randn(1, k, **half),
        "w.gate_up": torch.randn(experts, 2 * f, k, **half) * 0.02,
        "w.down": torch.randn(experts, k, f, **half) * 0.02,
        "out.y": torch.empty(1, k, **half),
    }


def _time(kernels: Kernels, request: Any, launch: Launch, tensors: dict[str, torch.Tensor]) -> float | None:
    top_k, experts = SPEC.router.top_k, SPEC.router.num_experts
    memory = {
        **tensors,
        "scratch.factors": torch.full((top_k,), 0.5, device="cuda"),
        "scratch.hidden": torch.randn(top_k, SPEC.hidden_features, device="cuda", dtype=torch.float16),
    }
    bound = []
    for i in range(LAUNCHES):
        chosen = torch.tensor([(top_k * i + s) % experts for s in range(top_k)], device="cuda", dtype=torch.int32)
        values = [{**memory, "scratch.chosen": chosen}[arg] for arg in launch.args]
        sizes = [e.factor for e in launch.grid] + [1, 1]
        prepared = kernels.bind(request, values, (sizes[0], sizes[1], 1))
        if prepared is None:
            return None
        bound.append((prepared, values))
    return graph_us([prepared.launch for prepared, _ in bound])


def _weight_bytes(product: str) -> int:
    rows = 2 if product == "up" else 1
    return 2 * SPEC.router.top_k * rows * SPEC.hidden_features * SPEC.in_features


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
