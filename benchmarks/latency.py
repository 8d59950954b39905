"""The protocol of DeepSpeed-Inference's users: one generate() call, 128 tokens of prompt, 128 new ones, batch 1.

python -m benchmarks.latency --models gptj-6b --against eager

"engine_ms" is engine.generate() on token ids; "generate_ms" is the call of a script that imports init_inference, from a
tensor of ids on the GPU to a tensor of ids on the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.artifacts import artifact_folder, artifact_of
from benchmarks.command import command_line, free_memory, names, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS, ONE_GPU
from benchmarks.peers import load_random, measure
from dscompile.compiler.inference import InferenceModel
from dscompile.runtime import load

WARM_UPS = 3


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with artifact_folder(args.artifacts) as folder:
        for name in args.models:
            row = measure_ours(name, artifact_of(name, folder), args)
            free_memory()
            row["peers"] = [measure_peer(name, how, args) for how in args.against]
            rows.append(row)
            print(row, flush=True)
            path = write_result(args.name, {"command": command_line(parser, args), "rows": rows}, args.out)
    print(path)


def measure_ours(name: str, artifact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over whole calls."""
    engine = load(artifact, device=args.device)
    config = MODELS[name][0]()
    model = InferenceModel(engine, artifact, config, GenerationConfig.from_model_config(config))
    ids = torch.randint(0, config.vocab_size, (1, args.prompt), device=args.device)
    prompt = ids[0].tolist()

    def call() -> None:
        model.generate(ids, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False).cpu()

    row = {
        "model": name,
        "dtype": MODELS[name][1],
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "engine_ms": _median(lambda: engine.generate([prompt], max_new_tokens=args.new, ignore_eos=True), args.repeat),
        "generate_ms": _median(call, args.repeat),
    }
    return row


def measure_peer(name: str, how: str, args: argparse.Namespace) -> dict[str, Any]:
    make, dtype = MODELS[name]
    model = load_random(make(), dtype)
    found = measure(model, how, 1, args.prompt, args.new)
    del model
    free_memory()
    return found


def _median(call: Any, repeat: int) -> float:
    times = []
    for _ in range(WARM_UPS + repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[WARM_UPS:])


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("latency", __doc__, "latency")
    parser.add_argument("--models", type=names, default=["gptj-6b"], help="comma-separated: " + ", ".join(ONE_GPU))
    parser.add_argument("--against", type=names, default=[], help="comma-separated peers: eager, compile")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=10)
    return parser


if __name__ == "__main__":
    main()
