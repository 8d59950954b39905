"""Writes a quantized artifact's unquantized twin, for as long as the two are compared."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dscompile.codegen.aot import compile_kernels
from dscompile.compiler.checkpoint import Checkpoint
from dscompile.compiler.progress import Silent
from dscompile.compiler.weights import write_weights
from dscompile.passes.lower.lower import Lowered, with_kernels
from dscompile.passes.quantize.twin import without_quantization
from dscompile.runtime.artifact import write_manifest, write_plan
from dscompile.runtime.loader import runs_here
from dscompile.runtime.manifest import Manifest


@contextmanager
def write_twin(
    directory: Path, lowered: Lowered, constants: dict[str, Tensor], checkpoint: Checkpoint, manifest: Manifest
) -> Iterator[Path]:
    """Yield an artifact beside `directory` that computes the same without quantization; it is gone afterwards.

    It has kernels where there is a GPU for them, so that both artifacts compute on one device.
    Raises UserError as write_weights does.
    """
    # One of the names that atomic_directory clears away after a process that was killed.
    twin = directory.with_name(".tmp-unquantized-".join(directory.name.rsplit(".tmp-", 1)))
    try:
        twin.mkdir()
        exact = without_quantization(lowered, manifest.dtype)
        targets = manifest.targets if runs_here(manifest) else ()
        if targets:
            exact = with_kernels(exact, targets)
        plan = write_weights(twin, exact, constants, checkpoint, None, Silent())
        if targets:
            plan = dataclasses.replace(plan, kernels=compile_kernels(exact.requests, targets, twin / "kernels"))
        write_plan(twin, plan)
        write_manifest(
            twin, dataclasses.replace(manifest, quantization="none", kv_dtype="auto", targets=targets, files={})
        )
        yield twin
    finally:
        shutil.rmtree(twin, ignore_errors=True)
