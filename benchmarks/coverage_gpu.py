"""Compile every architecture of the tests in float16 for the GPU at hand and hold it to the gate there.

    python -m benchmarks.coverage_gpu [NAME ...]

The configurations are those of docs/coverage.md. Each is compiled in a process of its own, one on each core, so that
one that fails, or takes its context down, leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from dscompile.compiler.compile import compile_model
from dscompile.runtime.report import Report
from tests.compiler.tiny import CONFIGS, ENCODERS, OPTIONS, save_encoder, save_model

SECONDS = 120
_MARK = "coverage: "


def compile_on_gpu(name: str, directory: Path) -> Report:
    """Compile a tiny random checkpoint in float16 and verify it, both on the GPU at hand.

    The checkpoint holds float16: what the gate compares is then the rounding of activations alone.
    Raises VerificationError where the artifact computes something else.
    """
    options = {"dtype": "float16", "target": "native", "max_batch": OPTIONS["max_batch"]}
    if name in ENCODERS:
        save_encoder(name, directory / "model", torch.float16)
    else:
        save_model(name, directory / "model", torch.float16)
        options["max_seq_len"] = OPTIONS["max_seq_len"]
    report = compile_model(directory / "model", directory / "out", **options)
    assert report.verification.kernels == "executed", "there is no GPU"
    return report


def measure(name: str) -> dict[str, Any]:
    """The row of a configuration; what went wrong, on one line, is part of it."""
    row: dict[str, Any] = {"name": name, "passed": False}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = compile_on_gpu(name, Path(scratch))
        except Exception as error:  # any failure is this row's result and must not end the others
            return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        row |= {"passed": True, "fallbacks": len(report.fallbacks)}
        row["kernels"] = len(list((Path(scratch) / "out" / "kernels").glob("*.cubin")))
        row["checks"] = [{"check": c.name, "error": c.error, "limit": c.limit} for c in report.verification.checks]
    return row


def measure_apart(name: str, core: int) -> dict[str, Any]:
    """The row of a configuration, measured by another process on one core."""
    command = [sys.executable, "-m", "benchmarks.coverage_gpu", name, "--core", str(core)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_MODULE_LOADING": "LAZY"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {"name": name, "passed": False, "error": f"not done after {SECONDS} s"}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    return {"name": name, "passed": False, "error": " ".join(done.stderr.split())[-400:]}


def main() -> None:
    args = _parse()
    if args.core is not None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {args.core})
        print(_MARK + json.dumps(measure(args.names[0])), flush=True)
        return
    began = time.perf_counter()
    cores: SimpleQueue[int] = SimpleQueue()
    available = sorted(os.sched_getaffinity(0))
    for core in available:
        cores.put(core)

    def take_core(name: str) -> dict[str, Any]:
        core = cores.get()
        try:
            row = measure_apart(name, core)
        finally:
            cores.put(core)
        _show(row)
        return row

    names = args.names or [*CONFIGS, *ENCODERS]
    with ThreadPoolExecutor(len(available)) as pool:
        rows = list(pool.map(take_core, names))
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} passed in {time.perf_counter() - began:.0f} s")
    result = {
        "command": " ".join(["python -m benchmarks.coverage_gpu", *args.names]),
        "dtype": "float16",
        "passed": passed,
        "configurations": rows,
    }
    print(write_result(args.result, result, args.out))
    sys.exit(passed != len(rows))


def _show(row: dict[str, Any]) -> None:
    checks = "  ".join(f"{c['check']} {c['error']:.1e} (limit {c['limit']:.1e})" for c in row.get("checks", ()))
    print(f"{row['name']:20} {'passed' if row['passed'] else 'FAILED'}  {checks or row.get('error', '')}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations of tests/compiler/tiny.py; all by default")
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", default="coverage_h200", help="name of the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.core is None and not torch.cuda.is_available():
        parser.error("there is no GPU here; python -m benchmarks.coverage compiles for the CPU")
    return args


if __name__ == "__main__":
    main()
