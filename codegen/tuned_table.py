"""Configurations of the linear kernels: measured ones by shape and architecture, and a rule for every other shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dscompile.codegen.operands import KernelContext, ceil_div, next_power_of_2
from dscompile.codegen.targets import capability
from dscompile.runtime.plan import Linear

TUNED = Path(__file__).parent / "tuned"
NUM_SMS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class RowConfig:
    """linear_row: weight rows and columns of a program's step, blocks loaded ahead of the wait, pipeline depth of the
    rest (0: unrolled)."""

    block_n: int = 2
    block_k: int = 2048
    num_warps: int = 4
    prefetch: int = 2
    stages: int = 3


@dataclass(frozen=True)
class TileConfig:
    """linear_tile: weight rows, tokens and columns of a tile, pipeline depth, programs that share a tile's columns,
    and columns brought to the L2 ahead of the wait."""

    block_n: int
    block_t: int
    block_k: int = 128
    num_warps: int = 4
    stages: int = 4
    splits: int = 1
    prefetch: int = 0
    evict_first: bool = True


def num_sms(target: str) -> int:
    """Multiprocessors of the architecture's large GPU, or of a middling one where it is not known."""
    return NUM_SMS.get(capability(target), 100)


def row_config(spec: Linear, dtype: str, context: KernelContext) -> RowConfig:
    """The configuration for one row."""
    entry = _measured(context, spec, dtype, 1)
    if entry:
        return RowConfig(**entry)
    block_n = 4 if any(s.gated for s in spec.segments) else 2
    if dtype == "float32":
        return RowConfig(block_n=block_n, block_k=1024)
    return RowConfig(block_n=block_n)


def tile_config(spec: Linear, dtype: str, tokens: int, context: KernelContext) -> TileConfig:
    """The configuration for tiles of `tokens` tokens, within the shared memory of every target."""
    entry = _measured(context, spec, dtype, tokens)
    if entry:
        return TileConfig(**entry)
    itemsize = 4 if dtype == "float32" else 2
    block_t = max(8, next_power_of_2(tokens))
    block_n = 64 if block_t < 128 or spec.out_features < 8192 else 128
    block_k = min(128 if itemsize == 2 else 32, max(16, next_power_of_2(spec.in_features)))
    sms = min(num_sms(t) for t in context.targets)
    tiles = ceil_div(spec.out_features, block_n)
    splits = max(1, min(8, sms // tiles, spec.in_features // (4 * block_k)))
    stages = 4
    while stages > 2 and stages * itemsize * block_k * (block_n + block_t) > context.shared_budget * 0.8:
        stages -= 1
    while stages * itemsize * block_k * (block_n + block_t) > context.shared_budget * 0.8:
        block_k //= 2
    return TileConfig(block_n, block_t, block_k, 4 if block_n * block_t <= 8192 else 8, stages, splits)


def _measured(context: KernelContext, spec: Linear, dtype: str, tokens: int) -> dict | None:
    """The fields of a measured configuration, where one architecture is asked for and its table holds the shape."""
    if len(context.targets) != 1 or dtype == "float32":
        return None
    gated = any(s.gated for s in spec.segments)
    for entry in (*context.measured, *_table(context.targets[0])):
        same = entry["shape"] == [spec.out_features, spec.in_features] and entry.get("gated", False) == gated
        if same and entry["tokens"] == tokens:
            return entry["config"]
    return None


@cache
def _table(target: str) -> list[dict]:
    path = TUNED / f"{target}.json"
    return json.loads(path.read_text())["linear"] if path.exists() else []
