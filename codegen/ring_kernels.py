"""The kernel of a packed linear for Hopper: blocks of weight and rows pass through a ring of shared memory."""

from __future__ import annotations

from math import gcd

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.linear_structure import arguments_of, numbers_of, structure_of
from dscompile.codegen.operands import Arguments, KernelContext, Operands, ceil_div
from dscompile.codegen.targets import are_hopper
from dscompile.codegen.tuned_table import RING_COLUMNS, RingConfig, ring_height
from dscompile.runtime.plan import Linear

LANES = 32
LAST_FINISHES = 64  # tokens up to which a shared tile is finished by the last of its programs
TYPES = ("float16", "bfloat16")


def supports_ring(spec: Linear, dtype: str, context: KernelContext) -> bool:
    """Whether every target has Hopper's tensor cores, and the columns are several whole blocks of 16-bit numbers."""
    blocks, rest = divmod(spec.in_features, RING_COLUMNS)
    return are_hopper(context.targets) and spec.quantization is None and dtype in TYPES and blocks > 1 and not rest


def takes_ring(spec: Linear, operands: Operands, context: KernelContext) -> bool:
    """The same for operands, blocks of which must be copied 16 bytes at a time."""
    copied = all(o.aligned and o.stride % 8 == 0 for o in (operands["in.x"], operands["w.weight"]))
    return copied and supports_ring(spec, operands["in.x"].dtype, context)


def ring_request(spec: Linear, operands: Operands, config: RingConfig) -> tuple[KernelRequest, Arguments, int]:
    """The kernel for tiles of tokens, its arguments and its tiles of weight rows."""
    block_k = gcd(config.block_k, spec.in_features)
    block_k = block_k // 2 if block_k == spec.in_features else block_k
    blocks = spec.in_features // block_k
    each = ceil_div(blocks, min(config.splits, blocks))
    splits = ceil_div(blocks, each)
    height = ring_height(config.block_n)
    structure = structure_of(spec, operands, config.block_n, two_pass=False)
    structure["copy_threads"] = min(LANES, block_k // 8)
    structure["out_threads"] = _out_threads(structure["gating"], height)
    tiles = structure["segments"][-1]["end"]
    least = blocks - (splits - 1) * each
    numbers = numbers_of(spec, operands)
    numbers |= {"ROWS": config.block_n, "BN": height, "BT": config.block_t, "BK": block_k, "WARPS": config.num_warps}
    numbers |= {"SPLITS": splits, "BF": _finished_tokens(spec, config.block_t, splits)}
    numbers["STAGES"] = max(2, min(config.stages, least + 1))
    if splits > 1:
        numbers |= {"TILES": tiles, "K_SPLIT": each * block_k}
    arguments = arguments_of(spec, operands, folded_norm=True)
    if splits > 1:
        arguments.bind_memory("scratch.parts", "float32")
        if spec.norm:
            arguments.bind_memory("scratch.moments", "float32")
        arguments.bind_memory("scratch.arrivals", "int32")
    arguments.bind(spec.rows)
    request = kernel_request(
        "linear_ring", numbers, arguments.params, structure=structure, num_warps=config.num_warps, num_stages=1
    )
    return request, arguments, tiles


def _finished_tokens(spec: Linear, block_t: int, splits: int) -> int:
    """Tokens that a program finishes: all of its tile if it is the last to come, or its share of them.

    Adding parts up takes the longer, the more tokens one program finishes; that all wait for each other takes about
    a microsecond. Measured on an H200.
    """
    share, rest = divmod(block_t, splits)
    return share if block_t > LAST_FINISHES and not (rest or spec.norm) else block_t


def _out_threads(gating: str, block_n: int) -> list[tuple[int, int]]:
    """(gated, threads that lie along an output row, 8 columns each) of each kind of segment."""
    widths = {0: block_n, 1: block_n // 2}
    kinds = {"none": (0,), "all": (1,), "some": (0, 1)}[gating]
    return [(kind, min(LANES, widths[kind] // 8)) for kind in kinds]
