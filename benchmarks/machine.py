"""What a result must say about where it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@cache
def machine_facts() -> dict[str, Any]:
    """GPU and its clocks, versions, commit."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _command("git", "rev-parse", "HEAD"),
    }
    for package in ("torch", "triton", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_count"] = torch.cuda.device_count()
        query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,driver_version"
        facts["clocks"] = _command("nvidia-smi", query, "--format=csv,noheader")
    return facts


def write_result(name: str, data: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write a result with the machine's facts as JSON; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_facts(), **data}, indent=1) + "\n")
    return path


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
