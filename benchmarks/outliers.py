"""Llamas with outlier channels, put in by rescalings that do not change what the model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FACTOR = 80.0
CHANNELS = 4
Tensors = dict[str, Tensor]


def inject(kind: str, source: Path, target: Path) -> Path:
    """Write a copy of the Llama in `source` with outliers of a kind of KINDS; returns `target`."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        KINDS[kind](tensors, f"model.layers.{layer}", config, generator)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def _norms(tensors: Tensors, layer: str, config: dict, generator: torch.Generator) -> None:
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for norm, linears in readers.items():
        channels = _choose(config["hidden_size"], generator)
        tensors[f"{layer}.{norm}.weight"][channels] *= FACTOR
        for linear in linears:
            tensors[f"{layer}.{linear}.weight"][:, channels] /= FACTOR


def _values(tensors: Tensors, layer: str, config: dict, generator: torch.Generator) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = len(tensors[f"{layer}.self_attn.v_proj.weight"]) // kv_heads
    rows = _choose(kv_heads * dim, generator)
    tensors[f"{layer}.self_attn.v_proj.weight"][rows] *= FACTOR
    columns = torch.arange(heads * dim)
    channel = columns // dim // (heads // kv_heads) * dim + columns % dim
    tensors[f"{layer}.self_attn.o_proj.weight"][:, torch.isin(channel, rows)] /= FACTOR


def _ups(tensors: Tensors, layer: str, config: dict, generator: torch.Generator) -> None:
    rows = _choose(config["intermediate_size"], generator)
    tensors[f"{layer}.mlp.up_proj.weight"][rows] *= FACTOR
    tensors[f"{layer}.mlp.down_proj.weight"][:, rows] /= FACTOR


def _choose(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[:CHANNELS]


KINDS: dict[str, Callable[[Tensors, str, dict, torch.Generator], None]] = {
    "norm": _norms,
    "v_proj": _values,
    "up_proj": _ups,
}
