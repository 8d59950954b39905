"""A small model with the layers of a large one, for when the large one cannot be compared with its original."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from dscompile.compiler.config import CompileConfig
from dscompile.compiler.encoders import auto_class
from dscompile.compiler.model import build_on_meta
from dscompile.compiler.quiet import quiet
from dscompile.compiler.source import ModelSource, find_model
from dscompile.runtime.cpu_executor import available_bytes
from dscompile.runtime.report import Report

# Bytes of a parameter in the float32 reference, and what loading and computing need beside the parameters.
REFERENCE_BYTES = 4
HEADROOM = 1.2
# Where even the stand-in is too large, it is its vocabulary that is cut: no layer depends on it.
SMALL_VOCABULARY = 4096


def why_stand_in(config: CompileConfig, num_params: int) -> str | None:
    """Why a stand-in must be compared instead of the model, in words; None if the model itself can be."""
    if config.dummy_weights:
        return "the weights are dummies"
    needed = _reference_bytes(num_params)
    if needed > available_bytes():
        return f"the float32 original needs {needed / 2**30:.0f} GiB of memory"
    return None


def _reference_bytes(num_params: int) -> int:
    return int(num_params * REFERENCE_BYTES * HEADROOM)


@contextmanager
def write_stand_in(source: ModelSource, report: Report, directory: Path) -> Iterator[tuple[ModelSource, Path]]:
    """Write a model with random weights and the fewest layers that hold every layer class, at least two.

    Yields it and a scratch directory inside `directory`; both are gone afterwards.
    """
    dtype = getattr(torch, report.model["dtype"])
    num_layers = max([2, *(1 + c.layers[0] for c in report.classes if c.layers)])
    config = shrink(source.config, num_layers)
    num_params = sum(parameter.numel() for parameter in build_on_meta(config).parameters())
    if _reference_bytes(num_params) > available_bytes():
        config = shrink(config, num_layers, SMALL_VOCABULARY)
    with tempfile.TemporaryDirectory(prefix="stand-in-", dir=directory) as scratch:
        with quiet():
            model = auto_class(config).from_config(config, dtype=dtype)
            randomize(model)
            model.save_pretrained(Path(scratch) / "model")
        del model
        small = find_model(Path(scratch) / "model")
        name = f"a stand-in of {config.get_text_config(decoder=True).num_hidden_layers} layers with random weights"
        yield ModelSource(name, small.directory, small.config), Path(scratch)


def shrink(config: PretrainedConfig, num_layers: int, vocab_size: int | None = None) -> PretrainedConfig:
    """A copy of a configuration with its first layers only; lists that have an entry per layer are cut too.

    vocab_size: cut the vocabulary as well; special tokens beyond it are forgotten.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == total:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = min(num_layers, total)
    if vocab_size is not None:
        text.vocab_size = min(vocab_size, text.vocab_size)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, None)
    return config


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random weights of which none is trivial: norms and biases too, so that losing one of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(noise * 0.1)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
