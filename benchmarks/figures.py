"""Every figure of the documentation in one run, the most important first, for as long as there is time.

    python -m benchmarks.figures --artifacts DIR --seconds 400

Artifacts are compiled beside the measurements, each before the first that needs it. A measurement that fails is
printed and the next one begins; each writes its result when it is done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.artifacts import artifact_of
from benchmarks.machine import RESULTS

INT8 = {"quant": "int8"}
WITH_HEAD = INT8 | {"quant_lm_head": True}
WORDS_HEAD = "--quant int8 --quant-lm-head"
WEIGHTS = {"quant": "int8-weight-only"}


@dataclass(frozen=True)
class Job:
    """A command of benchmarks/ without what all share, and the artifacts it reads: models with options."""

    command: str
    models: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


LLAMA, GPTJ, BLOOM = "llama3-8b", "gptj-6b", "bloom-7b1"
PROMPT = f"--models {LLAMA} --batch 1 --prompt 2048 --new 16"
WEIGHTS_ALONE = f"--models {LLAMA} --batch 1,8 --quant int8-weight-only"
JOBS = (
    Job(f"decode --models {LLAMA} --name decode-{LLAMA}", (LLAMA,)),
    Job(f"decode --models {LLAMA} --batch 8,32,128 --new 256 --name decode-{LLAMA}-384", (LLAMA,)),
    Job(f"decode --models {LLAMA} {WORDS_HEAD} --name decode-{LLAMA}-int8", (LLAMA,), WITH_HEAD),
    Job(f"decode --models {BLOOM} --prompt 8 --new 100 --name decode-{BLOOM}-short", (BLOOM,)),
    Job(f"decode --models {GPTJ} --name decode-{GPTJ}", (GPTJ,)),
    Job(f"prefill --cases {GPTJ}:128,{LLAMA}:2040,{LLAMA}:8191", (GPTJ, LLAMA)),
    Job(f"decode {PROMPT} --name prompt-{LLAMA}", (LLAMA,)),
    Job(f"decode {PROMPT} {WORDS_HEAD} --name prompt-{LLAMA}-int8", (LLAMA,), WITH_HEAD),
    Job(f"decode --models {GPTJ} {WORDS_HEAD} --name decode-{GPTJ}-int8", (GPTJ,), WITH_HEAD),
    Job("latency", (GPTJ,)),
    Job("throughput", (LLAMA,)),
    Job(f"decode --models {LLAMA} --batch 1 --quant int8 --name decode-{LLAMA}-int8-head16", (LLAMA,), INT8),
    Job(f"decode --models {GPTJ} --batch 1 --quant int8 --name decode-{GPTJ}-int8-head16", (GPTJ,), INT8),
    Job(f"decode --models {LLAMA} --batch 1 --prompt 8000,32000 --new 64 --name decode-long", ()),
    Job("cold_start", (GPTJ,)),
    Job("regions", (LLAMA, BLOOM, GPTJ)),
    Job(f"decode {WEIGHTS_ALONE} --name decode-{LLAMA}-weights", (LLAMA,), WEIGHTS),
    Job("rule", ()),
    Job(f"decode --models {LLAMA} --batch 1,32 --deterministic --name deterministic", ()),
    Job("compile_time", ()),
)


def main() -> None:
    args = _parse()
    end = time.monotonic() + args.seconds
    run(JOBS, args.artifacts, args.out, args.device, end)


def run(jobs: Sequence[Job], folder: Path, out: Path, device: str, end: float) -> list[str]:
    """Measure, until `end` on the monotonic clock; returns the commands that failed."""
    failed = []
    needed = {(model, *sorted(job.options.items())): (model, job.options) for job in jobs for model in job.models}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        compiled = {key: pool.apply_async(_compile, (*what, folder)) for key, what in needed.items()}
        for job in jobs:
            for model in job.models:
                compiled[model, *sorted(job.options.items())].wait(max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                print(f"no time left for: {job.command}", flush=True)
                continue
            print(f"== {job.command}", flush=True)
            module, *words = job.command.split()
            sys.argv = [module, *words, "--artifacts", str(folder), "--device", device, "--out", str(out)]
            try:
                import_module(f"benchmarks.{module}").main()
            except (Exception, SystemExit):  # the next figure does not depend on this one
                traceback.print_exc()
                failed.append(job.command)
    return failed


def _compile(model: str, options: dict[str, Any], folder: Path) -> None:
    artifact_of(model, folder, **options)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifacts", type=Path, required=True, help="folder that keeps compiled artifacts")
    parser.add_argument("--seconds", type=float, default=600, help="no measurement begins later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
