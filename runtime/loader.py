"""An artifact on disk -> an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from dscompile.runtime.artifact import open_artifact
from dscompile.runtime.cpu_executor import CpuExecutor, available_bytes
from dscompile.runtime.engine import Engine
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Executor
from dscompile.runtime.manifest import Manifest
from dscompile.runtime.plan import Plan
from dscompile.runtime.tokenizer import load_tokenizer
from dscompile.runtime.weights import load_weights, weight_bytes


def load(
    out: str | Path,
    device: str | torch.device | None = None,
    max_kv_tokens: int | None = None,
    verify: Literal["quick", "full"] = "quick",
) -> Engine:
    """Load an artifact.

    device: "cpu", "cuda" or "cuda:N"; None: the GPU if there is one and the artifact holds kernels for it.
    max_kv_tokens: tokens of KV cache; None: what fits in free memory.
    verify: "quick" hashes the small files and reads the weights' sizes and headers, "full" hashes the weights too.
    Raises UserError, one line, if the artifact is damaged or does not fit the device.
    """
    if verify not in ("quick", "full"):
        raise UserError(f"verify must be 'quick' or 'full', got {verify!r}")
    root = Path(out)
    manifest, plan = open_artifact(root, full=verify == "full")
    chosen = _device(device, manifest)
    _check_memory(plan, chosen)
    executor = _executor(root, manifest, plan, chosen, max_kv_tokens)
    return Engine(executor, load_tokenizer(root), manifest.eos_token_ids, manifest)


def _executor(root: Path, manifest: Manifest, plan: Plan, device: torch.device, max_kv_tokens: int | None) -> Executor:
    weights = load_weights(root, manifest, plan, device)
    if device.type == "cpu":
        return CpuExecutor(plan, weights, max_kv_tokens)
    from dscompile.runtime.cuda_executor import CudaExecutor

    return CudaExecutor(plan, weights, root, device, max_kv_tokens)


def _device(device: str | torch.device | None, manifest: Manifest) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if runs_here(manifest) else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {str(device)!r}; use cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {str(device)!r}: no NVIDIA GPU is available to torch; use device='cpu'")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise UserError(f"device {str(device)!r}: this machine has {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise UserError(f"unknown device {str(device)!r}; use cpu, cuda or cuda:N")
    return torch.device("cpu")


def runs_here(manifest: Manifest) -> bool:
    """Whether there is a GPU, and one of the artifact's targets has its major version and is not newer."""
    if not manifest.targets or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    found = [t.removeprefix("sm_") for t in manifest.targets]
    return any(t.isdecimal() and int(t) // 10 == major and int(t) <= major * 10 + minor for t in found)


def _check_memory(plan: Plan, device: torch.device) -> None:
    needed = weight_bytes(plan)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if needed > free:
        kind = "GPU memory" if device.type == "cuda" else "memory"
        raise UserError(
            f"not enough {kind}: the weights need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        )
