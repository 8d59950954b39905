"""The compiler's gate for machines without a GPU: it runs the kernels of an artifact in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dscompile.codegen.emit import KernelRequest
from dscompile.compiler.compile import compile_model
from dscompile.runtime.artifact import open_artifact
from dscompile.runtime.cuda_executor import CudaExecutor
from dscompile.runtime.engine import Engine
from dscompile.runtime.plan import Kernel
from dscompile.runtime.report import Report
from dscompile.runtime.weights import load_weights
from tests.codegen.interpreted import gluon
from tests.runtime_cuda.simulated import TARGET, SimulatedDevice, write_kernels


def compile_interpreted(model: Path, out: Path, **options: Any) -> Report:
    """compile_model for a GPU of the kind TARGET, whose cubins are empty and whose kernels the gate interprets.

    TRITON_INTERPRET=1 must be set before Triton is imported; Gluon is replaced in this process.
    Raises VerificationError where the kernels compute something else than the model.
    """
    gluon.install()
    with (
        patch("dscompile.compiler.compile.compile_kernels", _write_kernels),
        patch("dscompile.compiler.verify.load", _load),
    ):
        return compile_model(model, out, target=TARGET, **options)


def _write_kernels(
    requests: Iterable[KernelRequest],
    targets: Sequence[str],
    kernels_dir: Path,
    progress: Callable[[int], None] | None = None,
    provenance: dict[str, str] | None = None,
) -> dict[str, Kernel]:
    return write_kernels(requests, kernels_dir.parent)


def _load(artifact: Path, max_kv_tokens: int | None = None) -> Engine:
    manifest, plan = open_artifact(artifact)
    weights = load_weights(artifact, manifest, plan, torch.device("cpu"))
    device = SimulatedDevice(plan.kernels, artifact)
    return Engine(CudaExecutor(plan, weights, artifact, device, max_kv_tokens), manifest=manifest)
