"""Attention over ragged batches of many tokens, alone: time and TFLOP/s of its kernel, by case and configuration.

    python -m benchmarks.attention [--cases llama3-8b:8191,...] [--configs 64:32:4:528:2:ring,128:128:4:528:3:long]

Rows of the result are compared with softmax attention in float64.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import names
from benchmarks.kernel_shapes import ATTENTIONS, attention_operands
from benchmarks.kernels import TORCH, Kernels, error_of, graph_us
from benchmarks.machine import RESULTS, write_result
from dscompile.codegen.operands import KernelContext
from dscompile.codegen.prefill_kernels import PrefillConfig, prefill_configs, prefill_request
from dscompile.runtime.plan import Attention, KVGroup

PAGE, LIMIT, LAYERS = 16, 32768, 4
Sequences = tuple[tuple[int, int], ...]


def _ragged(count: int, seed: int = 0) -> Sequences:
    lengths = random.Random(seed)
    return tuple((n, n) for n in (lengths.randint(32, 512) for _ in range(count)))


def _decoding(count: int, seed: int = 1) -> Sequences:
    lengths = random.Random(seed)
    return tuple((lengths.randint(32, 600), 1) for _ in range(count))


# (tokens a sequence has, tokens of them in the step) of each case
CASES: dict[str, tuple[str, Sequences]] = {
    "llama3-8b:8191": ("llama3-8b", ((8191, 8191),)),
    "llama3-8b:2040": ("llama3-8b", ((2040, 2040),)),
    "llama3-8b:128": ("llama3-8b", ((128, 128),)),
    "llama3-8b:ragged": ("llama3-8b", _ragged(16)),
    "llama3-8b:mixed": ("llama3-8b", (*_decoding(200), *_ragged(4))),
    "llama3-8b:last": ("llama3-8b", ((8191, 2047),)),
    "llama3-8b:chunk": ("llama3-8b", ((32048, 2048),)),
    "gptj-6b:128": ("gptj-6b", ((128, 128),)),
    "gptj-6b:1900": ("gptj-6b", ((1900, 1900),)),
    "gptj-6b:mixed": ("gptj-6b", (*_decoding(100), *_ragged(4))),
    "bloom-7b1:2000": ("bloom-7b1", ((2000, 2000),)),
}
ERROR_LIMIT = {"float16": 2e-3, "bfloat16": 1e-2}


class Problem:
    """A ragged batch over a shuffled cache of random keys and values, and some rows of its answer in float64."""

    def __init__(self, spec: Attention, dtype: str, sequences: Sequences) -> None:
        self.spec, self.sequences = spec, sequences
        torch.manual_seed(0)
        kind, count = TORCH[dtype], sum(new for _, new in sequences)
        blocks = [-(-length // PAGE) for length, _ in sequences]
        order = (torch.randperm(sum(blocks), device="cuda") + 1).int()
        tables = torch.zeros(len(sequences), LIMIT // PAGE, device="cuda", dtype=torch.int32)
        for table, ids in zip(tables, order.split(blocks), strict=True):
            table[: len(ids)] = ids
        self.k_size = spec.num_kv_heads * PAGE * spec.head_dim
        size = self.k_size + spec.num_kv_heads * PAGE * spec.v_head_dim
        self.pool = torch.randn(1 + len(order), LAYERS, size, device="cuda", dtype=kind)
        starts = torch.tensor([0, *(new for _, new in sequences)], device="cuda").cumsum(0)
        positions = torch.cat([torch.arange(length - new, length, device="cuda") for length, new in sequences])
        half = spec.rotary_dim // 2
        frequency = 1e4 ** -(torch.arange(max(1, half), device="cuda") / max(1, half))
        angle = torch.arange(LIMIT, device="cuda")[:, None] * frequency
        self.tensors: dict[str, Any] = {
            "in.q": torch.randn(count, spec.num_heads * spec.head_dim, device="cuda").to(kind),
            "out.y": torch.empty(count, spec.num_heads * spec.v_head_dim, device="cuda", dtype=kind),
            "w.rope_cos": angle.cos().float(),
            "w.rope_sin": angle.sin().float(),
            "w.alibi_slopes": torch.rand(spec.num_heads, device="cuda") / 16,
            "step.positions": positions.int(),
            "step.seq_starts": starts.int(),
            "step.context_lens": torch.tensor([length for length, _ in sequences], device="cuda").int(),
            "step.block_table": tables,
            "T": count,
            "B": len(sequences),
            "blocks": tables.shape[1],
        }
        self.rows, self.expected = self._expected()

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products, over the pairs of tokens that see each other."""
        pairs = sum(new * length - new * (new - 1) // 2 for length, new in self.sequences)
        return 2.0 * pairs * self.spec.num_heads * (self.spec.head_dim + self.spec.v_head_dim)

    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to 48 tokens of each of the last 12 sequences."""
        s, starts = self.spec, self.tensors["step.seq_starts"].tolist()
        found, outs = [], []
        for b, (length, new) in list(enumerate(self.sequences))[-12:]:
            tokens = torch.randperm(new, device="cuda")[:48]
            ids = self.tensors["step.block_table"][b, : -(-length // PAGE)].long()
            halves = self.pool[ids, 0].split([self.k_size, self.pool.shape[-1] - self.k_size], -1)
            k, v = (
                half.view(len(ids), s.num_kv_heads, PAGE, -1).transpose(1, 2).flatten(0, 1)[:length].double()
                for half in halves
            )
            q = self.tensors["in.q"][starts[b] + tokens].double().view(len(tokens), s.num_heads, s.head_dim)
            place = length - new + tokens
            q = self._rotated(q, place).view(len(tokens), s.num_kv_heads, -1, s.head_dim)
            scores = torch.einsum("thgd,khd->hgtk", q, k) * s.scale
            j = torch.arange(length, device="cuda")
            if s.alibi:
                slopes = self.tensors["w.alibi_slopes"].double().view(s.num_kv_heads, -1, 1, 1)
                scores += slopes * (j - place[:, None])
            scores = scores.masked_fill(j > place[:, None], -torch.inf)
            outs.append(torch.einsum("hgtk,khd->thgd", scores.softmax(-1), v).flatten(1))
            found.append(starts[b] + tokens)
        return torch.cat(found), torch.cat(outs)

    def _rotated(self, q: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        half = self.spec.rotary_dim // 2
        cos, sin = (self.tensors[f"w.rope_{f}"][place][:, None, :half].double() for f in ("cos", "sin"))
        a, b = q[..., :half], q[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, q[..., 2 * half :]], -1)

    def measure(self, kernels: Kernels, request: Any, args: tuple[str, ...], grid: tuple[int, int, int]) -> dict | None:
        def values(layer: int) -> list:
            here = {**self.tensors, "kv": self.pool[0, layer]}
            return [here[a] for a in args]

        bound = [kernels.bind(request, values(layer), grid) for layer in range(self.pool.shape[1])]
        if bound[0] is None:
            return None
        y = self.tensors["out.y"]
        y.fill_(float("nan"))
        bound[0].launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        error = error_of(y[self.rows], self.expected) if not y.isnan().any() else float("inf")
        us = graph_us([b.launch for b in bound if b is not None], 5)
        return {"us": us, "tflops": self.flops / us / 1e6, "error": error}


def main() -> None:
    args = _parse()
    kernels = Kernels(args.target, args.processes)
    rows, work = [], []
    for case in args.cases:
        model, sequences = CASES[case]
        dtype, spec = ATTENTIONS[model]
        group = KVGroup(LAYERS, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, dtype)
        context = KernelContext((args.target,), PAGE, LIMIT, 256, 2048, (group,))
        operands = attention_operands(spec, dtype, LIMIT)
        configs = [_config(c) for c in args.configs] or [c for *_, c in prefill_configs(spec, operands, context)]
        made = [(c, *prefill_request(spec, operands, context, c)) for c in configs]
        work.append((case, spec, dtype, sequences, made))
    began = time.time()
    kernels.prepare([request for *_, made in work for _, request, _ in made])
    print(f"{len(kernels.loaded)} kernels compiled in {time.time() - began:.0f} s", flush=True)
    for case, spec, dtype, sequences, made in work:
        problem = Problem(spec, dtype, sequences)
        for config, request, arguments in made:
            tokens = int(request.constexprs["TOKENS"])
            grid = (-(-problem.tensors["T"] // tokens) + len(sequences), spec.num_kv_heads, 1)
            found = problem.measure(kernels, request, arguments.args, grid)
            if found:
                wrong = "" if found["error"] <= ERROR_LIMIT[dtype] else "  WRONG"
                rows.append({"case": case, "config": asdict(config), **found})
                figures = f"{found['us']:9.1f} us {found['tflops']:6.1f} TFLOP/s  error {found['error']:.1e}"
                print(f"{case:18} {figures}{wrong}  {_text(config)}", flush=True)
        write_result(args.name, {"command": "python -m benchmarks.attention", "rows": rows}, args.out)
    for why in kernels.failed.values():
        print(f"failed: {why}")


def _config(text: str) -> PrefillConfig:
    rows, keys, warps, programs, stages, kind = [*text.split(":"), "prefill"][:6]
    return PrefillConfig(int(rows), int(keys), int(warps), int(programs), int(stages), f"attention_{kind}")


def _text(config: PrefillConfig) -> str:
    sizes = f"{config.rows}:{config.keys}:{config.num_warps}:{config.programs}:{config.stages}"
    return f"{sizes}:{config.template.removeprefix('attention_')}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=names, default=list(CASES))
    parser.add_argument(
        "--configs", type=names, default=[], help="rows:keys:warps:programs:stages[:ring|:long], else the rule's"
    )
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--name", default="attention")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
