"""Time the generated kernels on the shapes of real models and write the best configurations.

    python -m benchmarks.kernels --seconds 400 --out results.json [--models llama3-8b,gptj-6b] [--tokens 1,8,16]

Each candidate runs from its cubin, in a CUDA graph over copies of the weight that together exceed the L2, and is
checked against float64. Figures are TB/s of weight bytes beside the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_shapes import ATTENTIONS, LINEARS, attention_operands, linear_operands
from dscompile.codegen.aot import KernelError, compile_kernels
from dscompile.codegen.attention_kernels import DecodeConfig, decode_request
from dscompile.codegen.emit import DESCRIPTOR_BYTES, KernelRequest
from dscompile.codegen.linear_kernels import prepares_rows, row_request, tile_request, without_prologue
from dscompile.codegen.operands import KernelContext, Operands
from dscompile.codegen.ring_kernels import ring_request, takes_ring
from dscompile.codegen.tune import ring_candidates, row_candidates, tile_candidates
from dscompile.codegen.tuned_table import RingConfig, RowConfig, TileConfig
from dscompile.runtime.driver import Driver, PreparedLaunch
from dscompile.runtime.kernels import KernelTable
from dscompile.runtime.plan import Attention, KVGroup, Linear

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
L2_BYTES = 300 << 20
# Keys of a step, pipeline depth, warps.
DECODE_SHAPES = (
    (16, 2, 1),
    (32, 1, 1),
    (64, 1, 2),
    (16, 3, 2),
    (32, 3, 4),
    (64, 1, 4),
    (64, 2, 8),
    (128, 2, 4),
    (128, 2, 8),
)
Config = RowConfig | TileConfig | RingConfig
ERROR_LIMIT = {"float16": 2e-3, "bfloat16": 1e-2}


@dataclass
class Candidate:
    """One kernel to be timed on one problem."""

    request: KernelRequest
    args: tuple[str, ...]
    grid: tuple[int, int, int]
    config: dict[str, Any]


@dataclass
class Measured:
    us: float
    error: float
    config: dict[str, Any]


class Kernels:
    """Compiles candidates in parallel and loads those that compile."""

    def __init__(self, target: str, processes: int) -> None:
        self.target, self.processes = target, processes
        self.directory = Path(tempfile.mkdtemp(prefix="dscompile-benchmark-"))
        self.driver = Driver()
        self.loaded: dict[str, tuple] = {}
        self.failed: dict[str, str] = {}
        self.descriptors: list[torch.Tensor] = []  # memory that bound launches use

    def prepare(self, requests: list[KernelRequest]) -> None:
        unique = {r.name: r for r in requests if r.name not in self.loaded and r.name not in self.failed}
        parts = [list(unique.values())[i :: self.processes] for i in range(self.processes)]
        with ThreadPoolExecutor(self.processes) as pool:
            list(pool.map(self._compile, parts))

    def _compile(self, requests: list[KernelRequest]) -> None:
        for request in requests:
            try:
                kernels = compile_kernels([request], (self.target,), self.directory / "kernels", processes=1)
                self.loaded[request.name] = (kernels[request.name], None)
            except KernelError as error:
                self.failed[request.name] = str(error)

    def bind(self, request: KernelRequest, values: list, grid: tuple[int, int, int]) -> PreparedLaunch | None:
        if request.name not in self.loaded:
            return None
        kernel, function = self.loaded[request.name]
        if function is None:
            table = KernelTable({request.name: kernel}, self.directory, self.target, self.driver)
            function = table.functions[request.name]
            self.loaded[request.name] = (kernel, function)
        numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        memory = torch.empty(math.prod(grid) * request.descriptors * DESCRIPTOR_BYTES, dtype=torch.uint8, device="cuda")
        self.descriptors.append(memory)
        launch = PreparedLaunch(self.driver, function, kernel.params, numbers, memory.data_ptr())
        launch.set_grid(grid)
        return launch


def graph_us(launches: list, repeats: int = 7) -> float:
    """Median time of one of `launches` (callables of a stream handle), captured one after another in a graph."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch(stream.cuda_stream)
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def read_bandwidth() -> float:
    """TB/s of a sum over 4 GiB."""
    x = torch.zeros(1 << 30, device="cuda", dtype=torch.float32).normal_()
    return 4 * (1 << 30) / graph_us([lambda _: x.sum()] * 2) / 1e6


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    ratio = ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()
    return ratio if ratio == ratio else float("inf")


# ---------------------------------------------------------------- linears


class LinearProblem:
    """A linear with random operands on the GPU and its answer in float64."""

    def __init__(self, spec: Linear, dtype: str, tokens: int, weights: torch.Tensor) -> None:
        self.spec, self.dtype, self.tokens = spec, dtype, tokens
        n, k = spec.out_features, spec.in_features
        copies = max(1, min(weights.numel() // (n * k), -(-L2_BYTES // (weights.itemsize * n * k))))
        self.weights = [weights[i * n * k : (i + 1) * n * k].view(n, k) for i in range(copies)]
        kind = TORCH[dtype]
        # Rows with a mean, as real residual streams have.
        self.tensors: dict[str, Any] = {"in.x": (torch.randn(tokens, k, device="cuda") + 0.5).to(kind)}
        if spec.bias:
            self.tensors["w.bias"] = torch.randn(n, device="cuda").to(kind)
        for i in range(spec.residuals):
            self.tensors[f"in.residual{i}"] = torch.randn(tokens, spec.segments[0].width, device="cuda").to(kind)
        out = torch.float32 if spec.rows == "R" else kind
        for i, s in enumerate(spec.segments):
            self.tensors[f"out.y{i}"] = torch.empty(tokens, s.width, device="cuda", dtype=out)
        self.tensors |= {"T": tokens, "R": tokens, "B": tokens}
        self._bind_more()
        self.expected = self._expected()

    def _bind_more(self) -> None:
        self.tensors["w.row_sum"] = self.weights[0].sum(1, dtype=torch.float32)

    def _normalised(self) -> torch.Tensor:
        spec, x = self.spec, self.tensors["in.x"].double()
        if spec.norm:
            x = x - x.mean(-1, keepdim=True) if spec.norm.kind == "layer" else x
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm.eps)
        return x

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ part.double().T for part in self.weights[0].split(8192)], 1)

    def _expected(self) -> list[torch.Tensor]:
        spec, p = self.spec, self._product(self._normalised())
        if spec.bias:
            p = p + self.tensors["w.bias"].double()
        acts = {
            "none": lambda z: z,
            "silu": torch.nn.functional.silu,
            "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        }
        out = []
        for s in spec.segments:
            part = p[:, s.start : s.stop]
            y = acts[s.activation](part[:, : s.width]) * (part[:, s.width :] if s.gated else 1.0)
            for i in range(spec.residuals):
                y = y + self.tensors[f"in.residual{i}"].double()
            out.append(y)
        return out

    def measure(self, kernels: Kernels, candidate: Candidate, scratch: dict[str, torch.Tensor]) -> Measured | None:
        def values(weight: torch.Tensor) -> list:
            here = {**self.tensors, "w.weight": weight, **{f"scratch.{k}": v for k, v in scratch.items()}}
            return [here[a] for a in candidate.args]

        bound = [kernels.bind(candidate.request, values(w), candidate.grid) for w in self.weights]
        if bound[0] is None:
            return None
        outputs = [self.tensors[f"out.y{i}"] for i in range(len(self.spec.segments))]
        for y in outputs:
            y.fill_(float("nan"))
        bound[0].launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        error = max(error_of(y, e) for y, e in zip(outputs, self.expected, strict=True))
        repeat = max(1, 8 // len(bound))
        us = graph_us([b.launch for b in bound if b is not None] * repeat)
        return Measured(us, error, candidate.config)

    def library_us(self) -> float:
        x, weight = self.tensors["in.x"], self.weights
        outs = torch.empty(self.tokens, self.spec.out_features, device="cuda", dtype=x.dtype)
        torch.mm(x, weight[0].T, out=outs)
        return graph_us([lambda _, w=w: torch.mm(x, w.T, out=outs) for w in weight] * max(1, 8 // len(weight)))


def inner_spec(spec: Linear, dtype: str, tokens: int, context: KernelContext) -> Linear:
    """What the kernel of tiles computes, beside the one that prepares its rows."""
    ring = takes_ring(spec, linear_operands(spec, dtype), context)
    return without_prologue(spec) if tokens > 1 and prepares_rows(spec, tokens, ring) else spec


def linear_candidates(spec: Linear, dtype: str, tokens: int, context: KernelContext, limit: int) -> list[Candidate]:
    operands = linear_operands(spec, dtype)
    configs: Sequence[Config]
    if tokens == 1:
        configs = row_candidates(spec)
    elif takes_ring(spec, operands, context):
        configs = ring_candidates(spec, tokens, context)
    else:
        configs = tile_candidates(spec, max(8, tokens), context)
    return [linear_candidate(spec, operands, config, tokens) for config in configs[:limit]]


def linear_candidate(spec: Linear, operands: Operands, config: Config, tokens: int) -> Candidate:
    """The kernel of a configuration, launched for `tokens` rows."""
    if isinstance(config, RowConfig):
        request, arguments, programs = row_request(spec, operands, config)
        return Candidate(request, arguments.args, (programs, 1, 1), asdict(config))
    if isinstance(config, RingConfig):
        request, arguments, tiles = ring_request(spec, operands, config)
    else:
        request, arguments, tiles = tile_request(spec, operands, config)
    grid = (-(-tokens // config.block_t), int(request.constexprs["SPLITS"]), tiles)
    return Candidate(request, arguments.args, grid, asdict(config))


def linear_scratch() -> dict[str, torch.Tensor]:
    """Scratch that is large enough for every candidate."""
    scratch = {"parts": torch.empty(64 << 20, device="cuda"), "moments": torch.empty(16 << 20, device="cuda")}
    return scratch | {"arrivals": torch.zeros(1 << 20, device="cuda", dtype=torch.int32)}


def bench_linears(args: argparse.Namespace, kernels: Kernels, context: KernelContext, deadline: float) -> list[dict]:
    pools = {d: torch.empty(1_100_000_000, device="cuda", dtype=TORCH[d]).normal_() for d in ("float16", "bfloat16")}
    for pool in pools.values():
        pool *= 0.02
    scratch = linear_scratch()
    results = []
    for tokens in args.tokens:
        work = [
            (m, r, inner_spec(s, LINEARS[m][0], tokens, context)) for m in args.models for r, s in LINEARS[m][1].items()
        ]
        table = {(m, r): linear_candidates(s, LINEARS[m][0], tokens, context, args.candidates) for m, r, s in work}
        began = time.time()
        kernels.prepare([c.request for found in table.values() for c in found])
        print(
            f"T={tokens}: {sum(map(len, table.values()))} candidates compiled in {time.time() - began:.0f} s",
            flush=True,
        )
        for model, region, spec in work:
            if time.time() > deadline:
                return results
            dtype = LINEARS[model][0]
            problem = LinearProblem(spec, dtype, tokens, pools[dtype])
            runs = [problem.measure(kernels, c, scratch) for c in table[model, region]]
            right = [r for r in runs if r and r.error <= ERROR_LIMIT[dtype]]
            wrong = [r for r in runs if r and r.error > ERROR_LIMIT[dtype]]
            right.sort(key=lambda r: r.us)
            weight_bytes = 2 * spec.out_features * spec.in_features
            results.append(
                {
                    "model": model,
                    "region": region,
                    "shape": [spec.out_features, spec.in_features],
                    "gated": any(s.gated for s in spec.segments),
                    "tokens": tokens,
                    "library_us": problem.library_us(),
                    "runs": [asdict(r) | {"tbps": weight_bytes / r.us / 1e6} for r in right],
                    "wrong": [asdict(r) for r in wrong],
                    "failed": sum(r is None for r in runs),
                }
            )
            report_linear(results[-1])
    return results


def report_linear(entry: dict) -> None:
    n, k = entry["shape"]
    head = f"{entry['model']:10} {entry['region']:8} {n}x{k} T={entry['tokens']}"
    print(f"{head}  library {2 * n * k / entry['library_us'] / 1e6:.2f} TB/s  ", end="")
    print(f"{len(entry['runs'])} right, {len(entry['wrong'])} wrong, {entry['failed']} failed", flush=True)
    for run in entry["runs"][:3]:
        config = " ".join(f"{key}={value}" for key, value in run["config"].items())
        print(f"    {run['tbps']:.2f} TB/s {run['us']:7.1f} us  error {run['error']:.1e}  {config}", flush=True)
    for run in entry["wrong"][:1]:
        print(f"    WRONG error {run['error']:.1e}  {run['config']}", flush=True)


def write_tuned(entries: list[dict], path: Path) -> None:
    """Merge the best configuration of each shape and number of tokens into a table of codegen/tuned."""
    held = json.loads(path.read_text())["linear"] if path.exists() else []
    keys = ("shape", "gated", "tokens", "quantization")
    table = {_place(e): e for e in held}
    for entry in entries:
        if entry["runs"]:
            table[_place(entry)] = {k: entry[k] for k in keys if k in entry} | {"config": entry["runs"][0]["config"]}
    lines = ",\n  ".join(json.dumps(table[key]) for key in sorted(table))
    path.write_text(f'{{"linear": [\n  {lines}\n]}}\n')


def _place(entry: dict) -> tuple:
    return (*entry["shape"], entry["gated"], entry["tokens"], entry.get("quantization", ""))


# ---------------------------------------------------------------- attention


def bench_attention(args: argparse.Namespace, kernels: Kernels, context: KernelContext, deadline: float) -> list[dict]:
    results = []
    for model in args.models:
        dtype, spec = ATTENTIONS[model]
        for batch, length in ((1, 256), (1, 8192), (8, 256), (32, 384), (128, 384)):
            if time.time() > deadline:
                return results
            results.append(attention_entry(model, spec, dtype, batch, length, kernels, context))
    return results


def attention_entry(
    model: str, spec: Attention, dtype: str, batch: int, length: int, kernels: Kernels, context: KernelContext
) -> dict:
    layers, page = 8, context.page_size
    group = KVGroup(layers, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, dtype)
    here = KernelContext(
        context.targets, page, context.max_seq_len, context.max_batch, context.max_step_tokens, (group,)
    )
    operands = attention_operands(spec, dtype, context.max_seq_len)
    blocks = -(-length // page)
    per_layer = spec.num_kv_heads * page * (spec.head_dim + spec.v_head_dim)
    pool = torch.randn(1 + batch * blocks, layers, per_layer, device="cuda", dtype=TORCH[dtype])
    tensors: dict[str, Any] = {
        r: torch.randn(batch, o.stride, device="cuda").to(TORCH[dtype]) for r, o in operands.items() if r[:2] != "w."
    }
    tensors |= {r: torch.rand(o.shape, device="cuda") for r, o in operands.items() if r[:2] == "w."}
    tables = (torch.randperm(batch * blocks, device="cuda") + 1).view(batch, blocks).int()
    position = torch.full((batch,), length - 1, device="cuda", dtype=torch.int32)
    slots = tables[:, (length - 1) // page] * page + (length - 1) % page
    tensors |= {"step.positions": position, "step.context_lens": position + 1, "step.block_table": tables}
    tensors |= {"step.slots": slots.int(), "blocks": blocks}
    tensors["scratch.parts"] = torch.empty(16 << 20, device="cuda")
    tensors["scratch.moments"] = torch.empty(1 << 20, device="cuda")
    tensors["scratch.arrivals"] = torch.zeros(1 << 16, device="cuda", dtype=torch.int32)
    found = []
    for splits in (1, 2, 4, 8, 16, 32):
        if not 16 <= batch * spec.num_kv_heads * splits <= 2048 and splits > 1:
            continue
        for keys, stages, warps in DECODE_SHAPES:
            config = DecodeConfig(splits, keys, stages, warps)
            request, arguments = decode_request(spec, operands, here, config)
            found.append(Candidate(request, arguments.args, (batch, spec.num_kv_heads, splits), asdict(config)))
    kernels.prepare([c.request for c in found])
    first, runs = None, []
    for c in found:

        def launch_for(layer: int, c: Candidate = c) -> PreparedLaunch | None:
            values = {**tensors, "kv": pool[0, layer]}
            return kernels.bind(c.request, [values[a] for a in c.args], c.grid)

        bound = [launch_for(layer) for layer in range(layers)]
        if bound[0] is None:
            continue
        tensors["out.y"].fill_(float("nan"))
        bound[0].launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        first = tensors["out.y"].double().clone() if first is None else first
        error = error_of(tensors["out.y"], first)
        us = graph_us([b.launch for b in bound if b is not None] * 4)
        runs.append(asdict(Measured(us, error, c.config)))
    runs.sort(key=lambda r: r["us"])
    kv_bytes = batch * length * per_layer // page * 2
    entry = {"model": model, "batch": batch, "length": length, "kv_bytes": kv_bytes, "runs": runs}
    print(f"{model} attention B={batch} context={length}: {kv_bytes / 1e6:.1f} MB", flush=True)
    for run in runs[:4]:
        speed = f"{run['us']:7.1f} us {kv_bytes / run['us'] / 1e6:.2f} TB/s"
        print(f"    {speed}  against the first {run['error']:.1e}  {run['config']}", flush=True)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--models", type=lambda s: s.split(","), default=list(LINEARS))
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--candidates", type=int, default=20, help="of each shape and number of tokens")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--tuned", type=Path, help="write the best configurations as a table for codegen/tuned")
    parser.add_argument("--no-attention", action="store_true")
    args = parser.parse_args()
    began = time.time()
    torch.manual_seed(0)
    capability = torch.cuda.get_device_capability()
    target = f"sm_{capability[0]}{capability[1]}"
    context = KernelContext(
        (target,), page_size=16, max_seq_len=16384, max_batch=128, max_step_tokens=2048, kv_groups=()
    )
    kernels = Kernels(target, args.processes)
    ceiling = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: read {ceiling:.2f} TB/s", flush=True)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "read_tbps": ceiling}
    share = 1.0 if args.no_attention else 0.8
    results["linear"] = bench_linears(args, kernels, context, began + share * args.seconds)
    args.out.write_text(json.dumps(results))
    if not args.no_attention:
        results["attention"] = bench_attention(args, kernels, context, began + args.seconds)
    args.out.write_text(json.dumps(results))
    if args.tuned:
        write_tuned(results["linear"], args.tuned)
    for why in list(kernels.failed.values())[:10]:
        print(f"failed: {why}")
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
