"""Candidate configurations of the linear kernels, the most promising first, for a measurement to choose from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product

from dscompile.codegen.operands import KernelContext, ceil_div, next_power_of_2
from dscompile.codegen.ring_kernels import supports_ring
from dscompile.codegen.tuned_table import (
    RING_COLUMNS,
    WIDEST_TILE,
    BulkConfig,
    Int8RowConfig,
    RingConfig,
    RowConfig,
    TileConfig,
    even_rows,
    num_sms,
    ring_height,
    ring_rule,
    ring_tiles,
    rounds_rows,
)
from dscompile.runtime.plan import Linear

# block_n, block_k, num_warps, prefetch, stages
_ROWS = (
    (2, 2048, 4, 2, 3),
    (4, 1024, 4, 4, 3),
    (4, 2048, 4, 1, 3),
    (4, 1024, 4, 2, 3),
    (4, 2048, 8, 2, 3),
    (2, 2048, 4, 1, 3),
    (2, 2048, 4, 4, 3),
    (1, 4096, 4, 1, 3),
    (2, 4096, 8, 1, 3),
    (4, 2048, 4, 2, 0),
    (2, 1024, 2, 4, 3),
    (8, 1024, 8, 2, 3),
    (8, 512, 4, 4, 3),
    (4, 1024, 4, 1, 4),
    (2, 2048, 4, 0, 3),
    (4, 4096, 8, 1, 3),
    (8, 1024, 8, 1, 4),
    (1, 2048, 2, 2, 0),
    (2, 4096, 4, 1, 3),
    (16, 512, 8, 2, 3),
)


def linear_candidates(
    spec: Linear, dtype: str, tokens: int, context: KernelContext
) -> Sequence[RowConfig | Int8RowConfig | TileConfig | RingConfig]:
    """Configurations of a linear of activations of `dtype` for `tokens` tokens."""
    if 1 < tokens <= WIDEST_TILE and supports_ring(spec, dtype, context):
        return ring_candidates(spec, tokens, context)
    if tokens > 1:
        return tile_candidates(spec, tokens, context)
    return int8_row_candidates(spec) if rounds_rows(spec) else row_candidates(spec)


def bulk_candidates() -> list[BulkConfig]:
    """Configurations for many int8 rows that the copy engine brings."""
    return [BulkConfig(), BulkConfig(stages=3), BulkConfig(256, 128), BulkConfig(128, 128, stages=6)]


def row_candidates(spec: Linear) -> list[RowConfig]:
    """Configurations for one row."""
    least = 2 if any(s.gated for s in spec.segments) else 1
    return [
        RowConfig(n, k, warps, prefetch, stages)
        for n, k, warps, prefetch, stages in _ROWS
        if n >= least and k <= 2 * spec.in_features
    ]


# block_n, block_k, num_warps, prefetch
_INT8_ROWS = (
    (8, 1024, 4, 1),
    (4, 1024, 4, 2),
    (8, 512, 8, 4),
    (16, 1024, 4, 1),
    (8, 1024, 8, 1),
    (16, 1024, 8, 1),
    (4, 1024, 4, 1),
    (4, 1024, 8, 3),
)


def int8_row_candidates(spec: Linear) -> list[Int8RowConfig]:
    """Configurations for one row that is rounded to int8."""
    words = next_power_of_2(spec.in_features // 4)
    return list(dict.fromkeys(Int8RowConfig(n, min(k, words), warps, p) for n, k, warps, p in _INT8_ROWS))


# block_n, block_t, block_k, num_warps, stages
_WIDE = (
    (128, 128, 128, 8, 4),
    (128, 256, 128, 8, 3),
    (128, 256, 128, 8, 4),
    (256, 128, 128, 8, 4),
    (256, 128, 128, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 128, 64, 8, 6),
    (128, 128, 64, 4, 6),
    (256, 128, 64, 8, 6),
    (128, 256, 256, 8, 2),
    (256, 64, 128, 8, 4),
)


def tile_candidates(spec: Linear, tokens: int, context: KernelContext) -> list[TileConfig]:
    """Configurations for tiles of `tokens` tokens of int8 or 2-byte numbers.

    Ordered by how far they are from what streams best by reckoning (about two programs a multiprocessor in all, and
    the most bytes under way), but every size of tile comes once before any comes twice.
    """
    if tokens > WIDEST_TILE:
        return [TileConfig(*sizes, evict_first=False) for sizes in _WIDE]
    ranked = sorted(_tiles(spec, tokens, context), key=lambda scored: scored[0], reverse=True)
    seen: dict[tuple, int] = {}
    turns = []
    for score, config in ranked:
        size = (config.block_n, config.block_k, config.splits > 1)
        turns.append((seen.get(size, 0), -score, config))
        seen[size] = seen.get(size, 0) + 1
    return [config for _, _, config in sorted(turns, key=lambda turn: turn[:2])]


def _tiles(spec: Linear, tokens: int, context: KernelContext) -> Iterator[tuple[float, TileConfig]]:
    sms = min(num_sms(t) for t in context.targets)
    weight_size = 1 if spec.quantization else 2
    size = 1 if rounds_rows(spec) else 2
    columns = (64, 128, 256, 512) if size == 1 else (64, 128, 256)
    for n, k, splits, prefetch in product((16, 32, 64, 128), columns, (1, 2, 3, 4, 8), (0, 512)):
        programs = ceil_div(spec.out_features, n) * splits
        starved = programs < sms * 0.6 and splits < 8
        if k * splits * 4 > spec.in_features or (splits > 1 and programs > 4 * sms) or starved:
            continue
        for stages, warps in product((3, 4, 5, 6, 8), (4, 8)):
            shared = stages * k * (n * weight_size + tokens * size)
            if not 20_000 <= shared <= min(200_000, context.shared_budget - 8_192) or (warps == 8 and n < 128):
                continue
            resident = min(sms * max(1, 220_000 // shared), programs)
            under_way = min(resident / sms * shared, 160_000) / 160_000
            tail = programs / (resident * ceil_div(programs, resident))
            penalty = 0.03 * (prefetch == 0) + 0.05 * (splits > 1) + 0.05 * (warps == 8 and tokens < 64)
            score = under_way * (0.5 + 0.5 * tail) * n / (n + tokens) - penalty
            yield score, TileConfig(n, tokens, k, warps, stages, splits, prefetch)


def ring_candidates(spec: Linear, tokens: int, context: KernelContext) -> list[RingConfig]:
    """Configurations of linear_ring for tiles of `tokens` tokens, the rule's neighbours first."""
    first = ring_rule(spec, tokens, context)
    sms = min(num_sms(t) for t in context.targets)
    t, found = first.block_t, [first]
    heights = dict.fromkeys((64, 128, 256, even_rows(spec, sms) or 64, even_rows(spec, 2 * sms) or 64))
    sizes = product(heights, (1, 2, 4), (4, 8), (1, 2, 3, 4), (1, 2, 3, 4, 6))
    for n, wide, warps, share, splits in sizes:
        k = wide * RING_COLUMNS
        programs = ring_tiles(spec, n) * splits
        stages = min(8, (context.shared_budget // share - 2_048) // (2 * k * (ring_height(n) + t)))
        starved = programs < 0.6 * sms or stages < 2 or stages * wide < 4
        spread = splits > 1 and (programs > 4 * sms or spec.in_features < 4 * k * splits)
        if (
            starved
            or spread
            or ring_height(n) * t > 160 * 32 * warps
            or (warps == 8 and n == 64)
            or spec.in_features % k
        ):
            continue
        found.append(RingConfig(n, t, k, warps, stages, splits))
    return sorted(dict.fromkeys(found), key=lambda c: _distance(c, first))


def _distance(config: RingConfig, rule: RingConfig) -> float:
    """How far a configuration is from the rule's, in doublings."""
    pairs = zip(asdict(config).values(), asdict(rule).values(), strict=True)
    return sum(abs(math.log2(a / b)) for a, b in pairs)
