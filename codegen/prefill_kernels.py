"""Kernels that attend in steps of many tokens: one in Triton for every architecture, two in Gluon for Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dscompile.codegen.attention_structure import (
    bind_attention,
    bind_norms,
    keys_of_a_step,
    multiplies_in_registers,
    norm_numbers,
    numbers_of,
    structure_of,
)
from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.operands import Arguments, KernelContext, Operands, next_power_of_2
from dscompile.codegen.ring_kernels import TYPES
from dscompile.codegen.targets import are_hopper
from dscompile.codegen.tuned_table import num_sms
from dscompile.runtime.plan import Attention, Extent, Launch

LOG2E = 1.4426950408889634
FEW_TOKENS = 512
# Contexts beyond this are long. Measured on an H200, Llama-3-8B: 16 prompts of 32 to 512 tokens take attention_ring
# 80 us and attention_long 103, one prompt of 2,040 tokens 97 and 84, and of 8,191 tokens 1188 and 993.
SHORT_PROMPT = 1024
# Registers of a thread of attention_long: of the second half of the rows (the first has what is left), and of those
# that copy. A multiprocessor has 64K.
ROW_REGISTERS, COPY_REGISTERS = 232, 48


@dataclass(frozen=True)
class PrefillConfig:
    """What attends: rows (tokens times heads of a group) of a program, keys of a step, programs that fill the GPU
    twice, depth of the pipeline (always two in attention_ring).

    num_warps: of a program; in attention_long of each of its three parts
    """

    rows: int
    keys: int
    num_warps: int
    programs: int
    stages: int = 2
    template: str = "attention_prefill"


def _common_config(spec: Attention, operands: Operands, context: KernelContext) -> PrefillConfig:
    """The configuration for steps of any number of tokens.

    Measured on an H200 (`python -m benchmarks.attention`): two small programs of four warps on a multiprocessor
    are faster than one of eight, as one multiplies while the other computes shares; in the ring, heads of 256 columns
    leave room for one program, which is best when large.
    """
    columns = next_power_of_2(max(spec.head_dim, spec.v_head_dim))
    least = next_power_of_2(spec.num_heads // spec.num_kv_heads)
    programs = 4 * min(num_sms(t) for t in context.targets)
    if takes_ring(spec, operands, context):
        rows = max(128 if columns > 128 else 64, least)
        return PrefillConfig(rows, 64, rows // 16, programs, template="attention_ring")
    keys = keys_of_a_step(spec, operands, context)
    if context.kv_groups[spec.group].dtype == "int8" and columns <= 128:
        return PrefillConfig(max(128, least), keys, 8, programs, stages=3)
    rows = max(16 if multiplies_in_registers(operands, context) else 64, least)
    if columns <= 256:
        return PrefillConfig(rows, keys, 4 if rows <= 64 else 8, programs)
    # Only some GPUs hold two blocks of so wide keys and values at once.
    options = ((keys, 2), (keys, 1), (16, 1))
    keys, stages = next((o for o in options if _shared_bytes(columns, rows, *o) <= context.shared_budget), options[-1])
    return PrefillConfig(rows, keys, 8, programs, stages)


def _shared_bytes(columns: int, rows: int, keys: int, stages: int) -> int:
    """Shared memory of attention_prefill in 16 bits: the queries, and blocks of keys and of values."""
    return 2 * columns * (rows + 2 * stages * keys)


def prefill_configs(
    spec: Attention, operands: Operands, context: KernelContext
) -> tuple[tuple[int, int, int, PrefillConfig], ...]:
    """Ranges of a step's tokens (first, last; 0: no last), the longest context (0: no bound) and the configuration of
    each; deterministic programs have one.

    Of heads of 256 columns, few tokens are few programs, and smaller ones end sooner. Measured on an H200, GPT-J: 128
    tokens 7.8 us instead of 10.7, but 1,900 tokens 104 instead of 79. Of narrower heads, long sequences want keys read
    seldom, and short ones small steps: Llama-3-8B, 16 prompts of 32 to 512 tokens, 79 us with 32 keys, 95 with 64.
    Heads of 64 columns have not been timed; their steps have as many bytes.
    """
    config = _common_config(spec, operands, context)
    least = next_power_of_2(spec.num_heads // spec.num_kv_heads)
    if config.template != "attention_ring" or least > 64 or context.deterministic:
        return ((1, 0, 0, config),)
    if spec.head_dim > 128:
        return (1, FEW_TOKENS, 0, replace(config, rows=64, keys=32, num_warps=4)), (FEW_TOKENS + 1, 0, 0, config)
    short = replace(config, keys=32 if spec.head_dim > 64 else 64)
    if context.max_seq_len <= SHORT_PROMPT:
        return ((1, 0, 0, short),)
    long = PrefillConfig(128, 128, 4, config.programs, 3, "attention_long")
    return (1, 0, SHORT_PROMPT, short), (1, 0, 0, long)


def takes_ring(spec: Attention, operands: Operands, context: KernelContext) -> bool:
    """Whether attention_ring serves: every target has Hopper's tensor cores, and heads and their cache are whole blocks
    of 16-bit numbers."""
    dtype = operands["in.q"].dtype
    halves = dtype in TYPES and context.kv_groups[spec.group].dtype == dtype
    return (
        are_hopper(context.targets) and halves and spec.head_dim == spec.v_head_dim and spec.head_dim in (64, 128, 256)
    )


def prefill_launch(
    spec: Attention, operands: Operands, context: KernelContext, config: PrefillConfig
) -> tuple[KernelRequest, Launch]:
    """The launch that attends in steps of many tokens, and its kernel."""
    request, arguments = prefill_request(spec, operands, context, config)
    grid = (Extent(1, "T", int(request.constexprs["TOKENS"]), plus=1), Extent(spec.num_kv_heads))
    return request, Launch("kernel", request.name, arguments.args, grid)


def prefill_request(
    spec: Attention, operands: Operands, context: KernelContext, config: PrefillConfig
) -> tuple[KernelRequest, Arguments]:
    """The kernel that attends in steps of many tokens, and its arguments."""
    arguments = Arguments(operands)
    arguments.bind("in.q")
    bind_norms(arguments, spec, "q")
    step = ("step.seq_starts", "step.context_lens", "step.block_table")
    bind_attention(arguments, spec, context, *step)
    arguments.bind(*["in.gate"] * (spec.gate != "none"), "out.y", "B", "blocks")
    numbers = numbers_of(spec, operands, context) | norm_numbers(spec)
    group_padded = next_power_of_2(int(numbers["GROUP"]))
    numbers |= {"GP": group_padded, "BM": config.rows, "TOKENS": config.rows // group_padded, "BN": config.keys}
    int8 = context.kv_groups[spec.group].dtype == "int8"
    numbers |= {"LOG2E": LOG2E, "FACTOR": LOG2E * (1.0 if int8 else spec.scale)}
    numbers |= {"PROGRAMS": config.programs, "SEQUENCES": next_power_of_2(context.max_batch)}
    structure = structure_of(spec, operands) | {
        "one_page": context.page_size % config.keys == 0,
        "split_loop": not spec.window and not spec.chunk and (spec.causal or config.template != "attention_prefill"),
        "shaped": bool(spec.softcap or spec.alibi or spec.scale <= 0),
    }
    if config.template != "attention_prefill":
        numbers |= {"WARPS": config.num_warps, "Q_ROWS": min(config.rows, 4 * config.num_warps)}
    if config.template != "attention_ring":
        numbers["STAGES"] = config.stages
    if config.template == "attention_long":
        numbers |= {"ROW_REGISTERS": ROW_REGISTERS, "COPY_REGISTERS": COPY_REGISTERS}
    request = kernel_request(
        config.template,
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=config.stages,
    )
    return request, arguments
