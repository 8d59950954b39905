"""Compile every architecture of the tests in float16 for the GPU at hand and hold it to the gate there.

    python -m benchmarks.coverage_gpu [NAME ...] [--seconds 65]
    TRITON_INTERPRET=1 python -m benchmarks.coverage_gpu [NAME ...]    # without a GPU: kernels in the interpreter

The configurations are those of docs/coverage.md. One process on each core takes them in turn; one that dies is
replaced, so that a configuration that takes its GPU context down leaves the others alone. The result is written as it
grows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from dscompile.compiler.compile import compile_model
from dscompile.runtime.report import Report
from tests.compiler import configs, more_configs
from tests.compiler.tiny import ENCODERS, OPTIONS, save_encoder, save_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SECONDS_EACH = 600 if INTERPRETED else 90
_MARK = "coverage: "


def compile_on_gpu(name: str, directory: Path) -> Report:
    """Compile a tiny random checkpoint in float16 and verify it, both on the GPU at hand.

    Raises VerificationError where the artifact computes something else.
    """
    report = compile_model(*_saved(name, directory), target="native", **_options(name))
    assert report.verification.kernels == "executed", "there is no GPU"
    return report


def compile_without_gpu(name: str, directory: Path) -> Report:
    """The same with the kernels in Triton's interpreter."""
    from tests.runtime_cuda.interpreted_gate import compile_interpreted

    return compile_interpreted(*_saved(name, directory), **_options(name))


def _saved(name: str, directory: Path) -> tuple[Path, Path]:
    """Write a checkpoint; where it is, and where its artifact goes.

    It holds float16: what the gate compares is then the rounding of activations alone.
    """
    (save_encoder if name in ENCODERS else save_model)(name, directory / "model", torch.float16)
    return directory / "model", directory / "out"


def _options(name: str) -> dict[str, Any]:
    own = {} if name in ENCODERS else {"max_seq_len": OPTIONS["max_seq_len"]}
    return {"dtype": "float16", "max_batch": OPTIONS["max_batch"], **own}


def measure(name: str) -> dict[str, Any]:
    """The row of a configuration; what went wrong, on one line, is part of it."""
    row: dict[str, Any] = {"name": name, "passed": False}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = (compile_without_gpu if INTERPRETED else compile_on_gpu)(name, Path(scratch))
        except Exception as error:  # any failure is this row's result and must not end the others
            return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        row |= {"passed": True, "fallbacks": len(report.fallbacks)}
        row["kernels"] = len(list((Path(scratch) / "out" / "kernels").glob("*.cubin")))
        row["checks"] = [{"check": c.name, "error": c.error, "limit": c.limit} for c in report.verification.checks]
    return row


class Worker:
    """A process on one core that measures the configurations it is given, started anew after one that broke it."""

    def __init__(self, core: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.coverage_gpu", "--core", str(core)]
        self._process: subprocess.Popen | None = None

    def measure(self, name: str) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(SECONDS_EACH, process.kill)
        timer.start()
        row = {"name": name, "passed": False, "error": f"the process ended, or took more than {SECONDS_EACH} s"}
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(_MARK):
                    row = json.loads(line.removeprefix(_MARK))
                    break
        except BrokenPipeError:
            pass
        timer.cancel()
        if not row["passed"]:
            self.close()
        return row

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self._process


class Run:
    """All configurations, measured by one worker a core until they are done or the time is up."""

    def __init__(self, names: list[str], args: argparse.Namespace) -> None:
        self._left, self._rows, self._args = deque(names), list[dict[str, Any]](), args
        self._lock, self._end = threading.Lock(), time.monotonic() + args.seconds

    def __call__(self) -> bool:
        """Whether all were measured and passed."""
        threads = [threading.Thread(target=self._work, args=(core,)) for core in sorted(os.sched_getaffinity(0))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        passed = sum(row["passed"] for row in self._rows)
        print(f"{passed} of {len(self._rows)} passed, not run: {', '.join(self._left) or 'none'}", flush=True)
        return passed == len(self._rows) and not self._left

    def _work(self, core: int) -> None:
        worker = Worker(core)
        while self._left and time.monotonic() < self._end:
            try:
                name = self._left.popleft()
            except IndexError:
                break
            row = worker.measure(name)
            with self._lock:
                self._rows.append(row)
                _show(row)
                self._write()
        worker.close()

    def _write(self) -> None:
        result = {
            "command": "TRITON_INTERPRET=1 " * INTERPRETED + "python -m benchmarks.coverage_gpu",
            "dtype": "float16",
            "passed": sum(row["passed"] for row in self._rows),
            "measured": len(self._rows),
            "configurations": sorted(self._rows, key=lambda row: row["name"]),
        }
        write_result(self._args.result, result, self._args.out)


def main() -> None:
    args = _parse()
    if args.core is None:
        sys.exit(not Run(args.names or _all_names(), args)())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    for name in sys.stdin:
        print(_MARK + json.dumps(measure(name.strip())), flush=True)


def _all_names() -> list[str]:
    """Those that take longest first, and last those that no rule was written for."""
    return [*reversed(configs.CONFIGS), *configs.ENCODERS, *more_configs.CONFIGS, *more_configs.ENCODERS]


def _show(row: dict[str, Any]) -> None:
    checks = "  ".join(f"{c['check']} {c['error']:.1e} (limit {c['limit']:.1e})" for c in row.get("checks", ()))
    print(f"{row['name']:20} {'passed' if row['passed'] else 'FAILED'}  {checks or row.get('error', '')}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations of tests/compiler/tiny.py; all by default")
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=36000.0, help="start no configuration after so long")
    name = "coverage_interpreted" if INTERPRETED else "coverage_h200"
    parser.add_argument("--result", default=name, help="name of the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.core is None and not INTERPRETED and not torch.cuda.is_available():
        parser.error("there is no GPU here; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
    return args


if __name__ == "__main__":
    main()
