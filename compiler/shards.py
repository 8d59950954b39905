"""Writes the artifact's weights: recipes evaluated one by one, straight into safetensors shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dscompile.runtime.plan import Weight
from dscompile.runtime.weights import SAFETENSORS_DTYPES

SHARD_BYTES = 1 << 30


def write_shards(
    directory: Path,
    weights: dict[str, Weight],
    make: Callable[[str], Tensor],
    progress: Callable[[int], None] = lambda count: None,
    rank: int = 0,
) -> None:
    """Write `weights`, in order, as rankN-00001.safetensors ... of at most 1 GiB (a larger tensor has its own).

    make:     returns the tensor of a name, of the weight's shape; it is rounded to the weight's dtype here
    progress: called with the bytes of each tensor written
    Shapes are known beforehand, so a shard's header is written first and one tensor is in memory at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(_split(weights), 1):
        with (directory / f"rank{rank}-{number:05d}.safetensors").open("wb") as file:
            file.write(_header({name: weights[name] for name in names}))
            for name in names:
                tensor = make(name)
                wanted = weights[name]
                assert tuple(tensor.shape) == wanted.shape, f"{name}: {tuple(tensor.shape)}, planned {wanted.shape}"
                tensor = tensor.to(getattr(torch, wanted.dtype)).contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                progress(num_bytes(wanted))


def num_bytes(weight: Weight) -> int:
    return math.prod(weight.shape) * getattr(torch, weight.dtype).itemsize


def _split(weights: dict[str, Weight]) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, weight in weights.items():
        if names and total + num_bytes(weight) > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += num_bytes(weight)
    if names:
        yield names


def _header(weights: dict[str, Weight]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, weight in weights.items():
        stop = start + num_bytes(weight)
        dtype = SAFETENSORS_DTYPES[weight.dtype]
        entries[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
