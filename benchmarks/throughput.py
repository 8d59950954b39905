"""Output tokens per second of many requests given at once, prompts and outputs of different lengths.

python -m benchmarks.throughput --models llama3-8b --requests 256
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.artifacts import artifact_folder, artifact_of
from benchmarks.command import command_line, free_memory, names, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS, ONE_GPU
from dscompile.runtime import SamplingParams, load

PROMPT_TOKENS = (32, 512)
NEW_TOKENS = (32, 256)


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with artifact_folder(args.artifacts) as folder:
        for name in args.models:
            rows.append(measure(name, artifact_of(name, folder), args))
            print(rows[-1], flush=True)
            path = write_result(args.name, {"command": command_line(parser, args), "rows": rows}, args.out)
    print(path)


def measure(name: str, artifact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The best of `repeat` runs after one that warms the machine up; all runs serve the same requests."""
    engine = load(artifact, device=args.device)
    engine.warm_up()
    draw = random.Random(0)
    prompts = [
        [draw.randrange(engine.plan.vocab_size) for _ in range(draw.randint(*PROMPT_TOKENS))]
        for _ in range(args.requests)
    ]
    params = [SamplingParams(max_new_tokens=draw.randint(*NEW_TOKENS), ignore_eos=True) for _ in prompts]
    runs = []
    for _ in range(1 + args.repeat):
        before, start = engine.counters, time.perf_counter()
        results = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        steps = engine.counters - before
        runs.append({"seconds": seconds, "steps": steps["steps"], "preemptions": steps["preemptions"]})
    produced = sum(len(result.tokens) for result in results)
    row = {
        "model": name,
        "dtype": MODELS[name][1],
        "requests": args.requests,
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": produced,
        "graphs": engine.counters["graphs"],
        "max_batch": engine.plan.max_batch,
        "output_tokens_per_second": produced / min(run["seconds"] for run in runs[1:]),
        "runs": runs,
    }
    del engine
    free_memory()
    return row


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("throughput", __doc__, "throughput")
    parser.add_argument("--models", type=names, default=["llama3-8b"], help="comma-separated: " + ", ".join(ONE_GPU))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
