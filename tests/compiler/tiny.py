"""Tiny random models of many architectures."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from dscompile.compiler.quiet import quiet
from tests.compiler import configs, more_configs

CONFIGS = configs.CONFIGS | more_configs.CONFIGS
ENCODERS = configs.ENCODERS | more_configs.ENCODERS
RECURRENT = configs.RECURRENT
REFUSED = RECURRENT | more_configs.REFUSED

# How the tests compile them: room for every prompt of the gate, and for one that reads a position table too far.
OPTIONS: dict = {"target": "cpu", "max_batch": 8, "max_seq_len": 60}

# Eager attention of transformers adds alibi twice here, scaled and unscaled; its sdpa path does not.
REFERENCE_ATTENTION = {"falcon_alibi": "sdpa"}


def make_config(spec: tuple[str, dict]) -> transformers.PretrainedConfig:
    class_name, arguments = spec
    return getattr(transformers, class_name)(**arguments)


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A float32 model with random weights in which no bias, norm or embedding is trivial."""
    attention = REFERENCE_ATTENTION.get(name, "eager")
    model = transformers.AutoModelForCausalLM.from_config(
        make_config(CONFIGS[name]), attn_implementation=attention, dtype=torch.float32
    )
    return _randomized(model, seed)


def _randomized(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.15)
        # Factors of whole rows, which a checkpoint holds and no layer starts with but as 1.
        for name, buffer in model.named_buffers():
            if name in model.state_dict() and buffer.is_floating_point() and buffer.numel() == 1:
                buffer.mul_(1 - 0.5 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def save_encoder(name: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Write a tiny encoder, with the head of its class if it has one, as transformers would; return it."""
    *spec, class_name = ENCODERS[name]
    model = _randomized(getattr(transformers, class_name)(make_config((spec[0], spec[1]))), seed).to(dtype)
    with quiet():
        model.save_pretrained(directory)
    return model


def save_model(
    name: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: object
) -> nn.Module:
    """Write a tiny model to a directory as transformers would; return it in that dtype."""
    model = make_model(name, seed).to(dtype)
    with quiet():
        model.save_pretrained(directory, **options)
    return model
