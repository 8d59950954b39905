"""Decode step and prefill of real shapes with dummy weights, beside transformers in the same run.

python -m benchmarks.decode --models gptj-6b,llama3-8b --batch 1,32 --against eager,compile
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from benchmarks.models import MODELS, ONE_GPU
from benchmarks.peers import load_random, measure
from dscompile.runtime import load
from dscompile.runtime.bench import bench, kernel_times


def main() -> None:
    args = _parse()
    rows = []
    for name in args.models.split(","):
        row = measure_ours(name, args)
        rows.append(row)
        for how in filter(None, args.against.split(",")):
            row["peers"] += measure_peer(name, how, args)
            _write(rows, args)
        _show(row)
        path = _write(rows, args)
    print(path)


def _write(rows: list[dict[str, Any]], args: argparse.Namespace) -> Path:
    result = {"command": f"python -m benchmarks.decode {_words(args)}", "models": rows}
    return write_result(args.name, result, args.out)


def measure_ours(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compile (or take a compiled artifact), load, and measure every batch size."""
    batches = [int(b) for b in args.batch.split(",")]
    row: dict[str, Any] = {"model": name, "dtype": MODELS[name][1], "peers": []}
    artifact = args.artifacts / name if args.artifacts else None
    with tempfile.TemporaryDirectory() as scratch:
        if artifact is None:
            start = time.perf_counter()
            artifact = compile_shapes(name, Path(scratch), max(batches), args.prompt + args.new)
            row["compile_s"] = time.perf_counter() - start
        start = time.perf_counter()
        engine = load(artifact, device="cuda")
        row["load_s"] = time.perf_counter() - start
        row["ours"] = bench(engine, batches, args.prompt, args.new, args.repeat)
        if args.kernels:
            row["kernels"] = {b: kernel_times(engine, b, args.prompt) for b in batches}
        del engine
    _free()
    return row


def compile_shapes(name: str, directory: Path, max_batch: int, max_seq_len: int) -> Path:
    """Compile a configuration with dummy weights for the GPU at hand; returns the artifact."""
    from dscompile.compiler import compile_model

    make, dtype = MODELS[name]
    make().save_pretrained(directory / "model")
    out = directory / "artifact"
    compile_model(
        directory / "model",
        out,
        dtype=dtype,
        target="native",
        dummy_weights="generated",
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        verify=False,
    )
    return out


def measure_peer(name: str, how: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    make, dtype = MODELS[name]
    model = load_random(make(), dtype)
    rows = []
    for batch in map(int, args.batch.split(",")):
        try:
            rows.append(measure(model, how, batch, args.prompt, args.peer_new))
        except Exception as error:  # a peer that cannot run the model is a result, whatever it raises
            reason = " ".join(str(error).split())[:200]
            rows.append({"peer": how, "batch": batch, "error": f"{type(error).__name__}: {reason}"})
        print(f"  {rows[-1]}", flush=True)
    del model
    _free()
    return rows


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def _show(row: dict[str, Any]) -> None:
    print(f"{row['model']} {row['dtype']}  {row['ours']['device']}", flush=True)
    for b in row["ours"]["batches"]:
        peers = "  ".join(
            f"{p['peer']} {p.get('decode_step_ms', float('nan')):.2f}" for p in row["peers"] if p["batch"] == b["batch"]
        )
        print(
            f"  batch {b['batch']:>3}: step {b['decode_step_ms']:.3f} ms ({100 * b['bandwidth_fraction']:.0f}% of read "
            f"bandwidth), prefill {b['prefill_ms']:.1f} ms   {peers}",
            flush=True,
        )


def _words(args: argparse.Namespace) -> str:
    shown = ("models", "batch", "against", "prompt", "new")
    return " ".join(f"--{name} {getattr(args, name)}" for name in shown if getattr(args, name) != "")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(ONE_GPU), help="comma-separated: " + ", ".join(MODELS))
    parser.add_argument("--batch", default="1,32", help="comma-separated batch sizes")
    parser.add_argument("--against", default="eager", help="comma-separated peers: eager, compile; empty for none")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--peer-new", type=int, default=32, help="new tokens the peers generate (their step is long)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="time every kernel of a decode step too")
    parser.add_argument("--artifacts", type=Path, help="directory of artifacts by model name, instead of compiling")
    parser.add_argument("--name", default="decode", help="name of the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
