"""What the manifest and the report say about a model and its compilation."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

from dscompile.compiler.config import CompileConfig
from dscompile.compiler.dummy import SEED
from dscompile.compiler.pooling import read_max_tokens, read_pooling
from dscompile.compiler.source import ModelSource
from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Source
from dscompile.runtime.manifest import Manifest
from dscompile.runtime.plan import Plan

_TOOLS = ("dscompile", "torch", "transformers", "triton")


def count_parameters(graph: ModelGraph) -> int:
    """Elements of the checkpoint's tensors that a traced graph reads, tied ones once."""
    return sum(math.prod(recipe.shape) for recipe in graph.recipes.values() if isinstance(recipe, Source))


def make_manifest(source: ModelSource, config: CompileConfig, plan: Plan, dtype: str, num_params: int) -> Manifest:
    """The manifest, its table of files still empty."""
    pooling, normalize = read_pooling(source) if plan.is_encoder else ("", False)
    return Manifest(
        name=model_name(source),
        architecture=source.architecture(),
        num_params=num_params,
        dtype=dtype,
        max_seq_len=plan.max_seq_len,
        max_batch=plan.max_batch,
        max_step_tokens=plan.max_step_tokens,
        vocab_size=plan.vocab_size,
        kv_dtype=config.kv_dtype,
        quantization=config.quant,
        targets=config.targets,
        weights="dummy" if config.dummy_weights == "generated" else "stored",
        seed=SEED,
        eos_token_ids=source.eos_token_ids(),
        pooling=pooling,  # type: ignore[arg-type]
        normalize=normalize,
        max_text_tokens=read_max_tokens(source) if plan.is_encoder else 0,
        tool_versions={name: importlib.metadata.version(name) for name in _TOOLS},
    )


def report_facts(source: ModelSource, config: CompileConfig, dtype: str) -> dict[str, Any]:
    """The head of the report."""
    return {
        "name": model_name(source),
        "architecture": source.architecture(),
        "dtype": dtype,
        "target": ",".join(config.targets) or "cpu",
    }


def model_name(source: ModelSource) -> str:
    """The hub id, or the name of the directory: an artifact does not say where on a disk its model was."""
    return source.name if not Path(source.name).expanduser().is_dir() else source.directory.resolve().name
