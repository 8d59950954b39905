"""Runs the tests in interpreted/ in their own process: Triton interprets or compiles, for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_numerics_of_every_template_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
