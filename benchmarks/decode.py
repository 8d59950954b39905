"""Decode step and prefill of real shapes with dummy weights, beside transformers in the same run.

python -m benchmarks.decode --models gptj-6b,llama3-8b --batch 1,8,32,128 --against eager,compile
python -m benchmarks.decode --models llama3-8b --batch 1 --prompt 8064,32640 --against eager
python -m benchmarks.decode --models llama3-8b --quant none,int8,int8+head,int8+static --against eager
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.artifacts import QUANTIZATIONS, artifact_folder, artifact_of
from benchmarks.command import command_line, free_memory, names, numbers, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS, ONE_GPU
from benchmarks.peers import load_random, measure
from benchmarks.summary import quantization_of
from dscompile.runtime import load
from dscompile.runtime.bench import bench, kernel_times
from dscompile.runtime.kv_cache import dtype_of
from dscompile.runtime.plan import Linear, Plan, Weight
from dscompile.runtime.weights import weight_bytes

QUANTIZED_ROLES = ("weight", "weight_scale", "input_scale")


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with artifact_folder(args.artifacts) as folder:
        for name in args.models:
            first = len(rows)
            for quant in args.quant:
                rows.append(measure_ours(name, quant, folder, args))
                _show(rows[-1])
            for how in args.against:
                rows[first]["peers"] += measure_peer(name, how, args)
            path = write_result(args.name, {"command": command_line(parser, args), "models": rows}, args.out)
    print(path)


def measure_ours(name: str, quant: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure every length of prompt and batch size of one model. quant: a key of QUANTIZATIONS"""
    row: dict[str, Any] = {"model": name, "dtype": MODELS[name][1], "ours": [], "peers": []}
    quantization = QUANTIZATIONS[quant]
    longest = max(args.prompt) + args.new
    artifact = artifact_of(name, folder, longest, deterministic=args.deterministic, **quantization)
    # The rest of the memory is left to the measurement of the bandwidth.
    engine = load(artifact, device=args.device, max_kv_tokens=max(args.batch) * (longest + 64))
    row |= quantization | space(engine.plan)
    for prompt in args.prompt:
        row["ours"].append(bench(engine, args.batch, prompt, args.new, args.repeat))
        if args.kernels:
            ceiling = row["ours"][-1]["read_bandwidth"]
            row["ours"][-1]["kernels"] = {b: kernel_times(engine, b, prompt, bandwidth=ceiling) for b in args.batch}
    del engine
    free_memory()
    return row


def space(plan: Plan) -> dict[str, float]:
    """Bytes of all weights and of the quantized linears', and what these take of the same in 16 bits."""
    found: dict[str, float] = {"weight_gb": weight_bytes(plan) / 1e9}
    quantized = [s for s in plan.steps if isinstance(s.spec, Linear) and s.spec.quantization]
    held = sum(_bytes(plan.weights[n]) for s in quantized for r, n in s.weights.items() if r in QUANTIZED_ROLES)
    half = sum(2 * math.prod(plan.weights[s.weights["weight"]].shape) for s in quantized)
    return found | ({"quantized_gb": held / 1e9, "quantized_of_16_bit": held / half} if half else {})


def _bytes(weight: Weight) -> int:
    return math.prod(weight.shape) * dtype_of(weight.dtype).itemsize


def measure_peer(name: str, how: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of transformers; what it cannot run is a result too."""
    make, dtype = MODELS[name]
    config = make()
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = max(config.max_position_embeddings, max(args.prompt) + args.new)
    model = load_random(config, dtype)
    rows = []
    for prompt in args.prompt:
        for batch in args.batch:
            try:
                rows.append(measure(model, how, batch, prompt, args.peer_new))
            except Exception as error:  # a peer that cannot run the model is a result, whatever it raises
                reason = " ".join(str(error).split())[:200]
                rows.append({"peer": how, "batch": batch, "error": f"{type(error).__name__}: {reason}"})
            rows[-1]["prompt_tokens"] = prompt
            print(f"  {rows[-1]}", flush=True)
    del model
    free_memory()
    return rows


def _show(row: dict[str, Any]) -> None:
    for ours in row["ours"]:
        what = " ".join(filter(None, (row["model"], row["dtype"], quantization_of(row))))
        print(f"{what}, {ours['prompt_tokens']} tokens of prompt  {ours['device']}")
        for b in ours["batches"]:
            line = f"  batch {b['batch']:>3}: step {b['decode_step_ms']:.3f} ms, prefill {b['prefill_ms']:.1f} ms"
            if b["bandwidth_fraction"]:
                line += f", {100 * b['bandwidth_fraction']:.1f}% of read bandwidth, idle {100 * b['gpu_idle']:.1f}%"
            print(line, flush=True)
    line = f"  weights {row['weight_gb']:.3f} GB"
    if "quantized_gb" in row:
        line += f"; quantized linears {row['quantized_gb']:.3f} GB, {row['quantized_of_16_bit']:.4f} of 16 bits"
    print(line, flush=True)


def _quantizations(text: str) -> list[str]:
    found = names(text)
    for name in found:
        if name not in QUANTIZATIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(QUANTIZATIONS)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("decode", __doc__, "decode")
    parser.add_argument("--models", type=names, default=list(ONE_GPU), help="comma-separated: " + ", ".join(MODELS))
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32, 128], help="comma-separated batch sizes")
    parser.add_argument("--against", type=names, default=[], help="comma-separated peers: eager, compile")
    parser.add_argument("--prompt", type=numbers, default=[128], help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--peer-new", type=int, default=32, help="new tokens the peers generate (their step is long)")
    parser.add_argument(
        "--quant", type=_quantizations, default=["none"], help="comma-separated: " + ", ".join(QUANTIZATIONS)
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--deterministic", action="store_true", help="with kernels whose rows do not depend on others")
    parser.add_argument("--kernels", action="store_true", help="time every kernel of a decode step too")
    return parser


if __name__ == "__main__":
    main()
