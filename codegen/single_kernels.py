"""The kernel of attention for steps of one sequence with one token: a query head a program, sums in registers."""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.codegen.attention_structure import (
    bind_attention,
    multiplies_in_registers,
    numbers_of,
    structure_of,
)
from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import Arguments, KernelContext, Operands, ceil_div, next_power_of_2
from dscompile.codegen.tuned_table import num_sms
from dscompile.runtime.plan import Attention, Case, Extent, Launch

MAX_SPLITS = 2  # more have not been measured
KEYS = 256  # of a part
# Columns of values of a program, where there are as many programs: beside the keys, more do not fit the registers.
COLUMNS = 64
MIN_COLUMNS = 16  # as numbers_of pads heads
# What the registers of 8 warps hold beside sums.
TILE_BYTES = 96 << 10


@dataclass(frozen=True)
class SingleConfig:
    """attention_single: parts of a head's columns of values, parts of its keys."""

    column_parts: int = 1
    splits: int = 1
    num_warps: int = 8


def single_configs(spec: Attention, operands: Operands, context: KernelContext) -> list[SingleConfig]:
    """The configurations of attention_single, shortest contexts first; none where attention_decode serves all.

    All keys of a short context are under way before the wait, and every program has a multiprocessor. Of longer ones
    the heads of a group should read the keys that they share once.
    """
    dtype = context.kv_groups[spec.group].dtype
    wide = next_power_of_2(spec.head_dim) > 256 or next_power_of_2(spec.v_head_dim) > 256
    if ITEM_SIZE.get(dtype) != 2 or wide or multiplies_in_registers(operands, context):
        return []
    if not _plain(spec):
        return []
    sms = min(num_sms(t) for t in context.targets)
    parts = max(1, next_power_of_2(spec.v_head_dim) // COLUMNS)
    if spec.head_dim <= 128 and spec.num_heads * parts > sms:
        parts = 1
    programs = spec.num_heads * parts
    if programs > sms:
        return []
    columns = next_power_of_2(spec.head_dim) + next_power_of_2(spec.v_head_dim) // parts
    num_warps = 8 if 2 * KEYS * columns <= TILE_BYTES else 16
    most = min(sms // programs, MAX_SPLITS, ceil_div(context.max_seq_len - 1, KEYS))
    return [SingleConfig(parts, splits, num_warps) for splits in dict.fromkeys((1, max(1, most)))]


def _plain(spec: Attention) -> bool:
    """Whether all of earlier tokens count and scores are products: what the kernel has been measured with on a GPU."""
    shaped = spec.window or spec.chunk or spec.softcap or spec.sinks or spec.q_norm or spec.k_norm or spec.v_norm
    return spec.causal and spec.appends and spec.gate == "none" and not shaped


def single_case(
    spec: Attention, operands: Operands, context: KernelContext, config: SingleConfig
) -> tuple[Case, KernelRequest]:
    """The case of one sequence with one token and a short context, and its kernel."""
    request, arguments = single_request(spec, operands, context, config)
    grid = (Extent(1, "B"), Extent(spec.num_heads * config.column_parts), Extent(config.splits))
    launch = Launch("kernel", request.name, arguments.args, grid)
    keys = KEYS * config.splits
    # The new key is at hand.
    bound = keys + 1 if keys + 1 < context.max_seq_len else 0
    return Case(1, 1, (launch,), decode=True, max_context=bound), request


def single_sizes(spec: Attention, config: SingleConfig) -> dict[str, int]:
    """Bytes of scratch memory, by name, in which the parts of a sequence's keys are joined."""
    if config.splits == 1:
        return {}
    programs = spec.num_heads * config.column_parts
    columns = max(MIN_COLUMNS, next_power_of_2(spec.v_head_dim)) // config.column_parts
    parts = programs * config.splits
    return {"parts": 4 * parts * columns, "moments": 8 * parts, "arrivals": 4 * programs}


def single_request(
    spec: Attention, operands: Operands, context: KernelContext, config: SingleConfig
) -> tuple[KernelRequest, Arguments]:
    """The kernel for a step of one sequence with one token, and its arguments."""
    arguments = Arguments(operands)
    arguments.bind("in.q", "in.k", "in.v")
    positions = ["step.positions"] * bool(spec.rotary_dim)
    bind_attention(arguments, spec, context, "step.context_lens", "step.block_table", "step.slots", *positions)
    arguments.bind("out.y")
    if config.splits > 1:
        arguments.bind_memory("scratch.parts", "float32")
        arguments.bind_memory("scratch.moments", "float32")
        arguments.bind_memory("scratch.arrivals", "int32")
    arguments.bind("blocks")
    numbers = numbers_of(spec, operands, context)
    each = int(numbers.pop("DVP")) // config.column_parts
    numbers |= {"DVE": each, "COLUMN_PARTS": config.column_parts, "HEADS": spec.num_heads, "BN": KEYS}
    numbers |= {"SPLITS": config.splits, "WARPS": config.num_warps}
    most = KEYS // config.num_warps
    # Eight lanes share a key, whose scores they add up; values are spread over as many lanes as they have columns for.
    numbers |= {"K_ROWS": _rows(min(64, int(numbers["DP"])), most), "V_ROWS": _rows(each, most)}
    structure = structure_of(spec, operands) | {"full_v": spec.v_head_dim == each * config.column_parts}
    request = kernel_request(
        "attention_single",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=1,
    )
    return request, arguments


def _rows(columns: int, most: int) -> int:
    """Rows that a warp loads at once where its lanes have 8 of these columns each."""
    return min(most, max(1, 256 // columns))
