"""Artifacts of real shapes with dummy weights, compiled once and shared by the commands that measure them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.models import MODELS

MAX_BATCH = 256
INT8 = {"quant": "int8"}
# The words of `benchmarks.decode --quant`, and options of compile_model.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": INT8,
    "int8+head": INT8 | {"quant_lm_head": True},
    "int8+static": INT8 | {"static_activations": True},
    "int8-weight-only": {"quant": "int8-weight-only"},
}


@contextlib.contextmanager
def artifact_folder(given: Path | None) -> Iterator[Path]:
    """The folder that keeps artifacts between commands, or one that is gone afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def artifact_path(name: str, folder: Path, limit: int = 0, **more: Any) -> Path:
    """Where `artifact_of` puts an artifact. limit: that of its sequences, if it is not the model's own"""
    words = (option if value is True else str(value) for option, value in more.items() if value)
    return folder / "-".join([name, *[str(limit)] * bool(limit), *words])


def artifact_of(name: str, folder: Path, tokens: int = 0, **more: Any) -> Path:
    """The artifact of a configuration of MODELS, compiled into `folder` if it is not there.

    tokens: the longest sequence to be measured; the limit is the model's own, or this where it is more.
    more: options of compile_model
    """
    make, dtype = MODELS[name]
    config = make()
    limit = getattr(config, "max_position_embeddings", 0)
    longer = tokens > limit > 0
    if longer:
        config.max_position_embeddings = tokens
    out = artifact_path(name, folder, tokens if longer else 0, **more)
    if not out.exists():
        from dscompile.compiler import compile_model

        model = folder / "configurations" / out.name
        config.save_pretrained(model)
        limits = {"max_batch": MAX_BATCH, "max_seq_len": tokens if longer else None}
        compile_model(model, out, dtype=dtype, dummy_weights="generated", verify=False, **limits, **more)
    return out
