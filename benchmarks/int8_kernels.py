"""Time the kernels of int8 linears on the shapes of real models and write the best configurations.

    python -m benchmarks.int8_kernels --seconds 100 --out results.json [--models llama3-8b,gptj-6b] [--tokens 1,8,2048]

As benchmarks.kernels; figures are TB/s of weight bytes and, where products bound, T operations a second.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_shapes import LINEARS, linear_operands
from benchmarks.kernels import ERROR_LIMIT, Candidate, Kernels, LinearProblem, graph_us, read_bandwidth, write_tuned
from dscompile.codegen.bulk_kernels import bulk_request, takes_bulk
from dscompile.codegen.int8_kernels import int8_row_request, quantize_request
from dscompile.codegen.linear_kernels import prepared, row_request, tile_request, without_prologue
from dscompile.codegen.operands import KernelContext
from dscompile.codegen.tune import bulk_candidates, linear_candidates
from dscompile.codegen.tuned_table import WIDEST_TILE
from dscompile.runtime.int8 import quantize_rows
from dscompile.runtime.plan import Linear, Quantization


class Int8Problem(LinearProblem):
    """A linear of int8 weights with random operands on the GPU and its answer in float64."""

    def _bind_more(self) -> None:
        n = self.spec.out_features
        self.tensors["w.weight_scale"] = (0.5 + torch.rand(n, device="cuda")) * 2e-4
        if self.tokens > 1 and self.spec.quantization == Quantization("token"):
            rows, scales = quantize_rows(self._normalised().float())
            self.tensors |= {"scratch.rows": rows, "scratch.scales": scales}

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.ones((), device="cuda")
        if self.spec.quantization == Quantization("token"):
            scale = x.abs().amax(-1, keepdim=True) / 127
            x = (x / scale).round()
        parts = [x @ part.double().T for part in self.weights[0].split(8192)]
        return torch.cat(parts, 1) * scale * self.tensors["w.weight_scale"]

    def library_us(self) -> float:
        if self.tokens <= 16 or self.spec.quantization != Quantization("token"):
            return float("nan")
        x, weight = self.tensors["scratch.rows"], self.weights
        outs = torch.empty(self.tokens, self.spec.out_features, device="cuda", dtype=torch.int32)
        return graph_us([lambda _, w=w: torch._int_mm(x, w.T, out=outs) for w in weight] * max(1, 8 // len(weight)))


def candidates(spec: Linear, dtype: str, tokens: int, context: KernelContext, limit: int) -> list[Candidate]:
    operands = linear_operands(spec, dtype)
    by_token = spec.quantization == Quantization("token")
    found = []
    configs: Any = linear_candidates(spec, dtype, max(8, tokens) if tokens > 1 else 1, context)[:limit]
    if tokens == 1:
        for config in configs:
            if by_token:
                request, arguments, programs = int8_row_request(spec, operands, config, context)
            else:
                request, arguments, programs = row_request(spec, operands, config)
            found.append(Candidate(request, arguments.args, (programs, 1, 1), asdict(config)))
        return found
    inner, bound = spec, operands
    if by_token:
        inner, bound = without_prologue(spec), {**operands, "in.x": prepared(spec, "int8")}
    for bulk in bulk_candidates() if by_token and tokens > WIDEST_TILE else ():
        if takes_bulk(inner, bound, context, bulk):
            request, arguments, programs = bulk_request(inner, bound, bulk, context)
            args = tuple("scratch.rows" if a == "in.x" else a for a in arguments.args)
            found.append(Candidate(request, args, (programs, 1, 1), asdict(bulk)))
    for config in configs:
        request, arguments, tiles = tile_request(inner, bound, config)
        args = tuple("scratch.rows" if by_token and a == "in.x" else a for a in arguments.args)
        grid = (-(-tokens // config.block_t), int(request.constexprs["SPLITS"]), tiles)
        found.append(Candidate(request, args, grid, asdict(config)))
    return found


def main() -> None:
    args = _parse()
    began = time.time()
    torch.manual_seed(0)
    capability = torch.cuda.get_device_capability()
    target = f"sm_{capability[0]}{capability[1]}"
    context = KernelContext((target,), 16, max_seq_len=16384, max_batch=128, max_step_tokens=2048, kv_groups=())
    kernels = Kernels(target, args.processes)
    ceiling = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: read {ceiling:.2f} TB/s", flush=True)
    pool = torch.randint(-127, 128, (1_100_000_000,), device="cuda", dtype=torch.int8)
    scratch = {"parts": torch.empty(64 << 20, device="cuda"), "moments": torch.empty(16 << 20, device="cuda")}
    scratch["arrivals"] = torch.zeros(1 << 20, device="cuda", dtype=torch.int32)
    results: list[dict] = []
    for activations in args.activations:
        for tokens in args.tokens:
            results += _bench(args, kernels, context, pool, scratch, activations, tokens, began + args.seconds)
            args.out.write_text(json.dumps({"read_tbps": ceiling, "linear": results}))
    if args.tuned:
        write_tuned(results, args.tuned)
    for why in list(kernels.failed.values())[:10]:
        print(f"failed: {why}")
    print(f"{time.time() - began:.0f} s in all")


def _bench(
    args: argparse.Namespace,
    kernels: Kernels,
    context: KernelContext,
    pool: torch.Tensor,
    scratch: dict[str, torch.Tensor],
    activations: str,
    tokens: int,
    deadline: float,
) -> list[dict]:
    work = []
    for model in args.models:
        dtype, regions = LINEARS[model]
        for region, plain in regions.items():
            spec = replace(plain, quantization=Quantization(activations))  # type: ignore[arg-type]
            work.append((model, region, dtype, spec, candidates(spec, dtype, tokens, context, args.candidates)))
    start = time.time()
    if start > deadline:
        return []
    prologues = [quantize_request(s, linear_operands(s, d)) for *_, d, s, _ in work if activations == "token"]
    kernels.prepare([c.request for *_, found in work for c in found] + [r for r, _ in prologues])
    count = sum(len(found) for *_, found in work)
    print(f"{activations} T={tokens}: {count} candidates compiled in {time.time() - start:.0f} s", flush=True)
    results = []
    for model, region, dtype, spec, found in work:
        if time.time() > deadline:
            break
        problem = Int8Problem(spec, dtype, tokens, pool)
        runs = [r for c in found if (r := problem.measure(kernels, c, scratch))]
        right = sorted((r for r in runs if r.error <= ERROR_LIMIT[dtype]), key=lambda r: r.us)
        wrong = [r for r in runs if r.error > ERROR_LIMIT[dtype]]
        entry = {
            "model": model,
            "region": region,
            "shape": [spec.out_features, spec.in_features],
            "gated": any(s.gated for s in spec.segments),
            "tokens": tokens,
            "quantization": activations,
            "library_us": problem.library_us(),
            "rows_us": _rows_us(kernels, problem) if activations == "token" and tokens > 1 else 0.0,
            "runs": [asdict(r) for r in right],
            "wrong": [asdict(r) for r in wrong],
            "failed": len(found) - len(runs),
        }
        results.append(entry)
        _report(entry)
        del problem
    return results


def _rows_us(kernels: Kernels, problem: Int8Problem) -> float:
    """Time of normalising and rounding the rows."""
    request, launch = quantize_request(problem.spec, linear_operands(problem.spec, problem.dtype))
    bound = kernels.bind(request, [problem.tensors[a] for a in launch.args], (problem.tokens, 1, 1))
    return graph_us([bound.launch] * 20) if bound else float("nan")


def _report(entry: dict) -> None:
    n, k = entry["shape"]
    head = f"{entry['model']:10} {entry['region']:8} {n}x{k} T={entry['tokens']} {entry['quantization']}"
    print(f"{head}  library {entry['library_us']:.1f} us, rows {entry['rows_us']:.1f} us  ", end="")
    print(f"{len(entry['runs'])} right, {len(entry['wrong'])} wrong, {entry['failed']} failed", flush=True)
    for run in entry["runs"][:3]:
        config = " ".join(f"{key}={value}" for key, value in run["config"].items())
        rate = f"{n * k / run['us'] / 1e6:.2f} TB/s {2 * n * k * entry['tokens'] / run['us'] / 1e6:.0f} Top/s"
        print(f"    {rate} {run['us']:7.1f} us  error {run['error']:.1e}  {config}", flush=True)
    for run in entry["wrong"][:1]:
        print(f"    WRONG error {run['error']:.1e}  {run['config']}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--out", type=Path, default=Path("int8_kernels.json"))
    parser.add_argument("--models", type=lambda s: s.split(","), default=["llama3-8b", "gptj-6b"])
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1, 8, 32, 128, 2048])
    parser.add_argument("--activations", type=lambda s: s.split(","), default=["token"], help="token, none")
    parser.add_argument("--candidates", type=int, default=20, help="of each shape and number of tokens")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--tuned", type=Path, help="write the best configurations as a table for codegen/tuned")
    return parser.parse_args()


if __name__ == "__main__":
    main()
