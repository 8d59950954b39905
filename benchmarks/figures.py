"""Every figure of the documentation in one run, the most important first, for as long as there is time.

    python -m benchmarks.figures --artifacts DIR --seconds 400
    python -m benchmarks.figures --artifacts DIR --jobs prefill,decode-llama3-8b,compile_time

Artifacts that jobs name are compiled first. A measurement that fails is printed and the next one begins; each writes
its result when it is done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks.artifacts import QUANTIZATIONS, artifact_of, artifact_path
from benchmarks.machine import RESULTS

COMPILING = 3  # models at a time; each takes all cores for some of the time


@dataclass(frozen=True)
class Job:
    """A command of benchmarks/ without what all share, and the artifacts it reads: models in each quantization."""

    command: str
    models: tuple[str, ...]
    quantizations: tuple[str, ...] = ("none",)

    @property
    def name(self) -> str:
        """Of its result."""
        words = self.command.split()
        return words[words.index("--name") + 1] if "--name" in words else words[0]


LLAMA, GPTJ, BLOOM = "llama3-8b", "gptj-6b", "bloom-7b1"
PROMPT = "--batch 1 --prompt 2048 --new 16"
ALL_INT8 = ("none", "int8+head", "int8", "int8+static")
BESIDE = f"--quant {','.join(ALL_INT8)} --against eager"
JOBS = (
    Job(f"decode --models {LLAMA} {BESIDE} --name decode-{LLAMA}", (LLAMA,), ALL_INT8),
    Job(f"decode --models {GPTJ} {BESIDE} --name decode-{GPTJ}", (GPTJ,), ALL_INT8),
    Job(f"decode --models {LLAMA} --batch 8,32,128 --new 256 --name decode-{LLAMA}-384", (LLAMA,)),
    Job(f"decode --models {BLOOM} --prompt 8 --new 100 --against eager --name decode-{BLOOM}-short", (BLOOM,)),
    Job(f"prefill --cases {GPTJ}:128,{LLAMA}:2040,{LLAMA}:8191", (GPTJ, LLAMA)),
    Job(
        f"decode --models {LLAMA} {PROMPT} --quant none,int8+head --name prompt-{LLAMA}",
        (LLAMA,),
        ("none", "int8+head"),
    ),
    Job("latency", (GPTJ,)),
    Job("throughput", (LLAMA,)),
    Job(f"decode --models {LLAMA} --batch 1 --prompt 8000,32000 --new 64 --name decode-long", ()),
    Job("cold_start", (GPTJ,)),
    Job("regions", (LLAMA, BLOOM, GPTJ)),
    Job(
        f"decode --models {LLAMA} --batch 1,8 --quant int8-weight-only --name decode-{LLAMA}-weights",
        (LLAMA,),
        ("int8-weight-only",),
    ),
    Job(f"decode --models {LLAMA} --batch 1,32 --deterministic --name deterministic", ()),
    Job("compile_time", ()),
    Job("rule", ()),
)


def main() -> None:
    args = _parse()
    end = time.monotonic() + args.seconds
    if args.compile_only:
        compile_artifacts(args.jobs, args.artifacts, end)
    else:
        run(args.jobs, args.artifacts, args.out, args.device, end)


def run(jobs: Sequence[Job], folder: Path, out: Path, device: str, end: float) -> list[str]:
    """Measure, until `end` on the monotonic clock; returns the commands that failed."""
    failed = []
    compile_artifacts(jobs, folder, end)
    for job in jobs:
        if time.monotonic() >= end:
            print(f"no time left for: {job.command}", flush=True)
            continue
        print(f"== {job.command}", flush=True)
        began = time.monotonic()
        module, *words = job.command.split()
        sys.argv = [module, *words, "--artifacts", str(folder), "--device", device, "--out", str(out)]
        try:
            import_module(f"benchmarks.{module}").main()
        except (Exception, SystemExit):  # the next figure does not depend on this one
            traceback.print_exc()
            failed.append(job.command)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    return failed


def compile_artifacts(jobs: Sequence[Job], folder: Path, end: float) -> None:
    """Compile what the jobs name and is not there yet, before anything is measured: steps would wait for the cores.

    What is not ready at `end` is left to the job that needs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {(model, quant) for job in jobs for model in job.models for quant in job.quantizations}
    needed = [(m, q) for m, q in sorted(named) if not artifact_path(m, folder, **QUANTIZATIONS[q]).exists()]
    if not needed:
        return
    with multiprocessing.get_context("spawn").Pool(COMPILING) as pool:
        compiled = pool.starmap_async(_compile, [(*what, folder) for what in needed], chunksize=1)
        compiled.wait(max(0.0, end - time.monotonic()))


def _compile(model: str, quant: str, folder: Path) -> None:
    try:
        artifact_of(model, folder, **QUANTIZATIONS[quant])
    except Exception:  # who needs it compiles it again, and fails alone
        traceback.print_exc()


def chosen(text: str) -> list[Job]:
    """Jobs by the names of their results, comma-separated, in this order."""
    jobs = {job.name: job for job in JOBS}
    unknown = [name for name in text.split(",") if name not in jobs]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(jobs)}")
    return [jobs[name] for name in text.split(",")]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifacts", type=Path, required=True, help="folder that keeps compiled artifacts")
    parser.add_argument("--seconds", type=float, default=600, help="no measurement begins later")
    parser.add_argument("--jobs", type=chosen, default=JOBS, help="names of results, comma-separated; in this order")
    parser.add_argument("--compile-only", action="store_true", help="compile what the jobs name, and measure nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
