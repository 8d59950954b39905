"""Configurations of the linear kernels: measured ones by shape and architecture, and a rule for every other shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from dscompile.codegen.linear_structure import segment_tiles
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import KernelContext, ceil_div, next_power_of_2
from dscompile.codegen.targets import capability
from dscompile.runtime.plan import Linear

TUNED = Path(__file__).parent / "tuned"
WIDEST_TILE = 128
BULK_TOKENS = 2048
RESERVE = 8192  # bytes of shared memory left for what the compiler may add to a ring
LONG_ROW = 16384  # columns
TALLEST_RING = 256  # weight rows of a tile of linear_ring
EVEN_TOKENS = 64  # up to which every multiprocessor has as much of the weight, rather than tiles that are tall
RING_COLUMNS = 64  # 128 bytes, what tensor cores read from shared memory without conflicts
# Columns of a step by what the tensor cores multiply, which for int8 takes at least 32.
HALF_COLUMNS = (256, 128, 64, 32, 16)
COLUMNS = {"float32": (32, 16), "float16": HALF_COLUMNS, "bfloat16": HALF_COLUMNS, "int8": (512, 256, 128, 64, 32)}
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
class Int8RowConfig:
    """linear_int8_row: weight rows of a program, words of a piece of the row, pieces loaded ahead of the wait."""

    block_n: int = 8
    block_k: int = 1024
    num_warps: int = 4
    prefetch: int = 1


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


@dataclass(frozen=True)
class BulkConfig:
    """linear_int8_bulk: weight rows, tokens and columns of a tile, pipeline depth, blocks of tokens side by side."""

    block_n: int = 128
    block_t: int = 256
    block_k: int = 128
    num_warps: int = 8
    stages: int = 4
    group: int = 16


def rounds_rows(spec: Linear) -> bool:
    """Whether a linear multiplies integers: its rows are rounded to int8 as its weight is."""
    return spec.quantization is not None and spec.quantization.activations != "none"


@dataclass(frozen=True)
class RingConfig:
    """linear_ring: weight rows of a tile (a multiple of 16) and its tokens, columns of a block, blocks in the ring,
    programs that share a tile's columns."""

    block_n: int
    block_t: int
    block_k: int
    num_warps: int = 4
    stages: int = 4
    splits: int = 1


def num_sms(target: str) -> int:
    """Multiprocessors of the architecture's large GPU, or of a middling one where it is not known."""
    return NUM_SMS.get(capability(target), 100)


def row_config(spec: Linear, dtype: str, context: KernelContext) -> RowConfig:
    """The configuration for one row: as measured, or by rule."""
    entry = _measured(context, spec, dtype, 1, RowConfig)
    return RowConfig(**entry) if entry else row_rule(spec, dtype)


def row_rule(spec: Linear, dtype: str) -> RowConfig:
    """The configuration for one row of a shape that is in no table."""
    gated = any(s.gated for s in spec.segments)
    if dtype == "float32":
        return RowConfig(block_n=4 if gated else 2, block_k=1024)
    # Measured on an H200: short products want few rows a program, so that all multiprocessors stream; long or
    # tall ones want all of a row's first 4,096 columns under way before the wait.
    if gated or spec.in_features * spec.out_features <= 1 << 24:
        return RowConfig(block_n=2, block_k=2048, prefetch=2 if gated else 1)
    return RowConfig(block_n=4, block_k=1024, prefetch=4)


def int8_row_config(spec: Linear, context: KernelContext) -> Int8RowConfig:
    """The configuration for one row that is rounded to int8."""
    entry = _measured(context, spec, "int8", 1, Int8RowConfig)
    if entry:
        return Int8RowConfig(**entry)
    # Measured on an H200: all of a program's weights, or as many as the registers hold, under way before the wait.
    return Int8RowConfig() if spec.in_features <= 16384 else Int8RowConfig(block_n=4, prefetch=2)


def bulk_config(spec: Linear, context: KernelContext) -> BulkConfig:
    """The configuration for many int8 rows that the copy engine brings."""
    entry = _measured(context, spec, "int8", BULK_TOKENS, BulkConfig)
    if entry:
        return BulkConfig(**entry)
    # Measured on an H200: the sums of a gate and its up half are best as tall as wide, others wide in tokens.
    return BulkConfig(256, 128) if any(s.gated for s in spec.segments) else BulkConfig()


def tile_config(spec: Linear, dtype: str, tokens: int, context: KernelContext) -> TileConfig:
    """The configuration for tiles of `tokens` tokens of `dtype`, within the shared memory of every target."""
    entry = _measured(context, spec, dtype, tokens, TileConfig)
    if entry and _fits(TileConfig(**entry), spec, context):
        return TileConfig(**entry)
    return tile_rule(spec, dtype, tokens, context)


def tile_rule(spec: Linear, dtype: str, tokens: int, context: KernelContext) -> TileConfig:
    """The configuration for tiles of a shape that is in no table.

    Of many tokens: the largest tile whose sums fit the registers. Of few: the tallest tile that still occupies most
    multiprocessors, the columns of a long product shared where even the lowest tile does not, and as many bytes under
    way as the shared memory holds.
    """
    if tokens > WIDEST_TILE:
        # 1.05 to 1.19 Pop/s on an H200, and 15 to 20% less of 128 x 128.
        roomy = context.shared_budget >= 160_000
        sizes = (128, 256, 128, 8, 3) if roomy else (128, 128, 64, 8, 4)
        return TileConfig(*sizes, evict_first=False)
    sms = min(num_sms(t) for t in context.targets)
    block_t = max(8, next_power_of_2(tokens))
    lowest = 32 if block_t <= 16 else 64
    heights = [n for n in (128, 64, 32) if n >= lowest]
    block_n = next((n for n in heights if ceil_div(spec.out_features, n) >= 0.68 * sms), lowest)
    tiles = ceil_div(spec.out_features, block_n)
    block_k, stages = _pipeline(spec, dtype, _staged_bytes(spec, dtype, block_n, block_t), context)
    splits = 1 if tiles >= 0.68 * sms else max(1, min(8, sms // tiles, spec.in_features // (4 * block_k)))
    num_warps = 8 if block_n * block_t >= (2048 if dtype == "float32" else 16384) else 4
    return TileConfig(block_n, block_t, block_k, num_warps, stages, splits, prefetch=512)


def ring_config(spec: Linear, dtype: str, tokens: int, context: KernelContext) -> RingConfig:
    """The configuration for tiles of `tokens` tokens: as measured, or by rule."""
    entry = _measured(context, spec, dtype, tokens, RingConfig)
    return RingConfig(**entry) if entry else ring_rule(spec, tokens, context)


def ring_rule(spec: Linear, tokens: int, context: KernelContext) -> RingConfig:
    """The configuration for tiles of a shape that is in no table.

    Where tiles are no more than multiprocessors, each has one with all of its shared memory, and programs share the
    columns of tiles that are fewer: measured on an H200, that beats more programs of less. Else each program takes half
    of the memory, so that the next kernel's weights are under way while this one ends. Each turn of the ring waits for
    the tensor cores once: blocks are of 256 bytes for few tokens and for long rows.
    """
    sms = min(num_sms(t) for t in context.targets)
    block_t = min(WIDEST_TILE, max(8, next_power_of_2(tokens)))
    block_n = _many_tokens_rows(spec, sms) if block_t > EVEN_TOKENS else even_rows(spec, sms) or 64
    tiles = ring_tiles(spec, block_n)
    alone = tiles <= sms
    long = spec.in_features >= LONG_ROW and alone and block_n == 64
    block_k = RING_COLUMNS * (2 if block_t < 64 or long else 1)
    splits = max(1, min(sms // tiles, 4, spec.in_features // (4 * block_k)))
    stage_bytes = 2 * block_k * (ring_height(block_n) + block_t)
    room = context.shared_budget - RESERVE if alone else context.shared_budget // 2
    stages = min(12 if alone else 6, room // stage_bytes)
    return RingConfig(block_n, block_t, block_k, 4 if block_n == 64 else 8, max(2, stages), splits)


def even_rows(spec: Linear, sms: int) -> int:
    """Rows of the lowest tiles, 16 at a time, of which there are no more than multiprocessors; 0 if none are.

    A tile that every multiprocessor reads in the same time: 129 tiles of 96 rows take 12288 x 4096 in 25 us on an H200,
    where 192 of 64 rows take 30.
    """
    return next((n for n in range(64, TALLEST_RING + 1, 16) if ring_tiles(spec, n) <= sms), 0)


def _many_tokens_rows(spec: Linear, sms: int) -> int:
    """Rows of a tile of 128 tokens, which is read once for each: as many as leave most multiprocessors a tile.

    Long rows are shared by programs of tall tiles. Of more tiles than multiprocessors two programs run on each.
    """
    occupied = 0.7 * sms
    if occupied <= ring_tiles(spec, TALLEST_RING) <= sms:
        return TALLEST_RING
    tiles = ring_tiles(spec, 128)
    shared = spec.in_features >= LONG_ROW and 4 * tiles >= occupied
    return 128 if tiles >= occupied or shared else 64


def ring_tiles(spec: Linear, rows: int) -> int:
    """Tiles of so many rows, of which none belongs to two outputs."""
    return segment_tiles(spec.segments, rows)[-1]["end"]


def ring_height(rows: int) -> int:
    """Rows that the tensor cores multiply for a tile of `rows`, and that its blocks take in shared memory."""
    return max(64, next_power_of_2(rows))


def _staged_bytes(spec: Linear, dtype: str, block_n: int, block_t: int) -> int:
    """Bytes of a column that a step of the pipeline holds: of the weight, of x and of what is added to it."""
    weight_size = ITEM_SIZE["int8" if spec.quantization else dtype]
    return block_n * weight_size + block_t * ITEM_SIZE[dtype] * (2 if spec.add else 1)


def _fits(config: TileConfig, spec: Linear, context: KernelContext) -> bool:
    """Whether a configuration measured without an added input also fits shared memory with it."""
    used = config.stages * config.block_k * _staged_bytes(spec, "float16", config.block_n, config.block_t)
    return not spec.add or used <= 0.9 * context.shared_budget


def _pipeline(spec: Linear, dtype: str, column_bytes: int, context: KernelContext) -> tuple[int, int]:
    """Columns of a step and depth of the pipeline: the most columns that leave room for four steps."""
    budget = int(0.8 * context.shared_budget)
    widest = max(COLUMNS[dtype][-1], next_power_of_2(spec.in_features))
    for block_k in COLUMNS[dtype]:
        stages = budget // (block_k * column_bytes)
        if block_k <= widest and stages >= 4:
            return block_k, min(stages, 8)
    return COLUMNS[dtype][-1], 2


def _measured(context: KernelContext, spec: Linear, dtype: str, tokens: int, kind: type) -> dict | None:
    """The fields of a measured `kind`, where one architecture is asked for and its table holds the shape."""
    if len(context.targets) != 1 or dtype == "float32":
        return None
    gated = any(s.gated for s in spec.segments)
    names = {field.name for field in fields(kind)}
    quantization = spec.quantization.activations if spec.quantization else ""
    for entry in (*context.measured, *_table(context.targets[0])):
        same = entry["shape"] == [spec.out_features, spec.in_features] and entry.get("gated", False) == gated
        same = same and entry["tokens"] == tokens and entry.get("quantization", "") == quantization
        if same and entry["config"].keys() == names:
            return entry["config"]
    return None


@cache
def _table(target: str) -> list[dict]:
    path = TUNED / f"{target}.json"
    return json.loads(path.read_text())["linear"] if path.exists() else []
