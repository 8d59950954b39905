"""Seconds from starting `dscompile` to its exit, dummy weights of real shapes, with and without the verification.

python -m benchmarks.compile_time --models gptj-6b
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command import command_line, names, parser_for
from benchmarks.machine import write_result
from benchmarks.models import MODELS


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows.append(measure(name, args.target))
        print(rows[-1], flush=True)
        path = write_result(args.name, {"command": command_line(parser, args), "rows": rows}, args.out)
    print(path)


def measure(name: str, target: str) -> dict[str, Any]:
    """Each compilation is a process of its own with an empty kernel cache."""
    make, dtype = MODELS[name]
    row: dict[str, Any] = {"model": name, "dtype": dtype, "cores": len(os.sched_getaffinity(0))}
    for key, extra in (("seconds_without_verification", ["--no-verify"]), ("seconds", [])):
        with tempfile.TemporaryDirectory() as scratch:
            model, out = Path(scratch) / "model", Path(scratch) / "out"
            make().save_pretrained(model)
            options = ["--dummy-weights", "--dtype", dtype, "--target", target, *extra]
            command = [sys.executable, "-m", "dscompile.compiler.cli", str(model), "-o", str(out), *options]
            environment = {**os.environ, "XDG_CACHE_HOME": str(Path(scratch) / "cache")}
            start = time.perf_counter()
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            row[key] = time.perf_counter() - start
    return row


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("compile_time", __doc__, "compile_time")
    parser.add_argument("--models", type=names, default=["gptj-6b"], help="comma-separated: " + ", ".join(MODELS))
    parser.add_argument("--target", default="native")
    return parser


if __name__ == "__main__":
    main()
