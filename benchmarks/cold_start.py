"""From starting a process to its first token, weights in files that the operating system has cached.

python -m benchmarks.cold_start --models gptj-6b

The weights are random, written once as a compilation of a checkpoint writes them. Python finds the bytecode of what it
imports, as where pip has installed it: processes share a cache of it, which the first one, left out, fills.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.artifacts import artifact_folder, artifact_of
from benchmarks.command import command_line, free_memory, names, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS, ONE_GPU
from dscompile.compiler.shards import write_shards
from dscompile.runtime.artifact import WEIGHTS_DIR, atomic_directory, read_plan, write_manifest
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.weights import load_weights

# Prints the moments, in seconds since the epoch, at which each stage was over.
CHILD = """
import json, sys, time
began = time.time()
import torch
from dscompile.runtime import load
loaded = load
imported = time.time()
torch.zeros(1, device=sys.argv[2])
context = time.time()
engine = load(sys.argv[1], device=sys.argv[2])
weights = time.time()
result = engine.generate([[1] * 128], max_new_tokens=1, ignore_eos=True)
token = time.time()
engine.generate([[1] * 128], max_new_tokens=2, ignore_eos=True)
print(json.dumps([began, imported, context, weights, token, time.time()]))
"""
STAGES = ("interpreter_s", "import_s", "device_s", "load_s", "first_token_s", "second_call_s")


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with artifact_folder(args.artifacts) as folder:
        for name in args.models:
            start = time.perf_counter()
            artifact = with_weights(artifact_of(name, folder), args.device)
            size = sum(path.stat().st_size for path in (artifact / WEIGHTS_DIR).iterdir())
            print(f"{name}: {size / 2**30:.1f} GiB of weights in {time.perf_counter() - start:.0f} s", flush=True)
            row = {"model": name, "dtype": MODELS[name][1], "weight_bytes": size}
            rows.append(row | measure(artifact, args.device, args.repeat))
            print(rows[-1], flush=True)
            path = write_result(args.name, {"command": command_line(parser, args), "rows": rows}, args.out)
    print(path)


def with_weights(artifact: Path, device: str) -> Path:
    """A copy of an artifact whose weights are in its files, not made at load."""
    stored = artifact.with_name(artifact.name + "-stored")
    if not stored.exists():
        manifest, plan = read_manifest(artifact), read_plan(artifact)
        weights = load_weights(artifact, manifest, plan, torch.device(device))
        with atomic_directory(stored) as directory:
            ignored = shutil.ignore_patterns(WEIGHTS_DIR)
            shutil.copytree(artifact, directory, ignore=ignored, dirs_exist_ok=True)
            write_shards(directory / WEIGHTS_DIR, plan.weights, lambda name: weights[name].cpu())
            write_manifest(directory, dataclasses.replace(manifest, files={}))
        del weights
        free_memory()
    return stored


def measure(artifact: Path, device: str, repeat: int) -> dict[str, Any]:
    """Medians over processes; the first one, which fills the system's caches and that of bytecode, is left out."""
    command = [sys.executable, "-c", CHILD, str(artifact), device]
    runs = []
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(1 + repeat):
            start = time.time()
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            moments = [start, *json.loads(done.stdout.splitlines()[-1])]
            stages = [stop - first for first, stop in pairwise(moments)]
            runs.append({"process_to_first_token_s": moments[-2] - start, **dict(zip(STAGES, stages, strict=True))})
            print(f"  {runs[-1]}", flush=True)
    medians = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
    return medians | {"bytecode": "cached", "runs": runs[1:]}


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("cold_start", __doc__, "cold_start")
    parser.add_argument("--models", type=names, default=["gptj-6b"], help="comma-separated: " + ", ".join(ONE_GPU))
    parser.add_argument("--repeat", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
