"""Kernels of attention over the paged cache: for decoding, and for ragged batches of many tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dscompile.codegen.attention_structure import (
    bind_attention,
    bind_norms,
    keys_of_a_step,
    kv_type,
    multiplies_in_registers,
    norm_numbers,
    numbers_of,
    structure_of,
)
from dscompile.codegen.decode_ring_kernels import RingDecodeConfig, ring_decode_config, ring_decode_request
from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.operands import Arguments, KernelContext, Operands, ceil_div, next_power_of_2
from dscompile.codegen.prefill_kernels import prefill_configs, prefill_launch
from dscompile.codegen.single_kernels import single_case, single_configs, single_sizes
from dscompile.codegen.tuned_table import num_sms
from dscompile.runtime.plan import Attention, Case, Extent, Launch, Program, Scratch

# Ranges of sequences with a number of splits each.
DECODE_RANGES = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 0))
MAX_SPLITS = 32
# The longest limit for which one sequence's keys are not read ahead of a step. On an H200 a layer of Llama-3-8B takes
# 1.6 us less of 1,000 tokens without, and 3.6 us more of 32,000.
SHORT_CONTEXTS = 8192


def attention_program(
    spec: Attention, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """One launch where every sequence has one token; else one that fills the cache, where that is this layer's to do,
    and one that attends."""
    requests: list[KernelRequest] = []
    cases: list[Case] = []
    sizes = {"parts": 0, "moments": 0, "arrivals": 0}
    for single in single_configs(spec, operands, context):
        case, request = single_case(spec, operands, context, single)
        cases.append(case)
        requests.append(request)
        _enlarge(sizes, single_sizes(spec, single))
    # Whether one sequence is served, however long.
    served = bool(cases) and not cases[-1].max_context
    for low, high, bound, config in _decode_configs(spec, operands, context, DECODE_RANGES[served:]):
        request, arguments = _request(spec, operands, context, config)
        requests.append(request)
        splits = config.splits if isinstance(config, DecodeConfig) else 1
        grid = (Extent(1, "B"), Extent(spec.num_kv_heads), Extent(splits))
        attend = Launch("kernel", request.name, arguments.args, grid)
        cases.append(Case(low, high, (attend,), decode=True, max_context=bound))
        if splits > 1:
            tasks = (high or context.max_batch) * spec.num_kv_heads
            parts = tasks * splits * (spec.num_heads // spec.num_kv_heads)
            needed = {"parts": 4 * parts * spec.v_head_dim, "moments": 8 * parts, "arrivals": 4 * tasks}
            _enlarge(sizes, needed)
    before: list[Launch] = []
    if spec.appends:
        append, fill = _append_launch(spec, operands, context)
        requests.append(append)
        before.append(fill)
    for low, high, bound, prefill in prefill_configs(spec, operands, context):
        request, attend = prefill_launch(spec, operands, context, prefill)
        requests.append(request)
        cases.append(Case(low, high, (*before, attend), decode=False if bound else None, max_context=bound))
    scratch = tuple(Scratch(n, "1", s, zeroed=n == "arrivals") for n, s in sizes.items() if s)
    return Program(tuple(cases), scratch), tuple(requests)


def _enlarge(sizes: dict[str, int], needed: dict[str, int]) -> None:
    sizes |= {name: max(size, sizes[name]) for name, size in needed.items()}


@dataclass(frozen=True)
class DecodeConfig:
    """attention_decode: parts a sequence's keys may be cut into, keys of a step, pipeline depth.

    alone: of one sequence, whose programs are few and wide: the next kernel's, if let in early, would be in their way
    """

    splits: int
    keys: int
    stages: int = 3
    num_warps: int = 4
    alone: bool = False


def _decode_configs(
    spec: Attention, operands: Operands, context: KernelContext, ranges: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, int, DecodeConfig | RingDecodeConfig]]:
    """Ranges of sequences, the longest context of a configuration (0: no bound), and the configuration."""
    for low, high in ranges:
        short = short_config(spec, operands, context, high)
        if short:
            # Its parts have a step each. The new key is at hand.
            yield low, high, short.splits * short.keys + 1, short
        most = high or context.max_batch
        ring = ring_decode_config(spec, operands, context, low, most)
        yield low, high, 0, ring or decode_config(spec, operands, context, low, most)


def _request(
    spec: Attention, operands: Operands, context: KernelContext, config: DecodeConfig | RingDecodeConfig
) -> tuple[KernelRequest, Arguments]:
    if isinstance(config, RingDecodeConfig):
        return ring_decode_request(spec, operands, context, config)
    return decode_request(spec, operands, context, config)


def short_config(spec: Attention, operands: Operands, context: KernelContext, high: int) -> DecodeConfig | None:
    """The configuration for short contexts of up to `high` sequences, or None where that for all contexts serves.

    Measured on an H200: of 8 sequences of 192 tokens a layer of Llama-3-8B takes 4 us less with it, and of 60 tokens
    one of BLOOM-7B1 1.2 us.
    """
    tasks, columns = spec.num_kv_heads * high, max(spec.head_dim, spec.v_head_dim)
    if high <= 1 or columns > 128 or context.kv_groups[spec.group].dtype == "int8" or not spec.causal:
        return None
    if multiplies_in_registers(operands, context):
        return None
    sms, group = min(num_sms(t) for t in context.targets), spec.num_heads // spec.num_kv_heads
    if 2 * tasks <= sms and group <= 16:
        short = DecodeConfig(2, 256, 1, 8)
    elif group == 1 and tasks <= 2 * sms:
        short = DecodeConfig(2, 64, 1, 4)
    else:
        return None
    return short if _fits(short, columns, context) and short.splits * short.keys < context.max_seq_len else None


def decode_config(spec: Attention, operands: Operands, context: KernelContext, low: int, high: int) -> DecodeConfig:
    """The configuration for steps of `low` to `high` sequences, each with one token.

    A program spends most of its time waiting. Measured on an H200: where there are many tasks (a sequence's key-value
    head each), programs of one warp with few keys, of which a multiprocessor holds many; where there are few, long
    steps of wide programs, the keys cut into parts that fill the GPU.
    """
    sms = min(num_sms(t) for t in context.targets)
    tasks, columns = spec.num_kv_heads * high, max(spec.head_dim, spec.v_head_dim)
    longest = ceil_div(spec.window or context.max_seq_len, 64)
    splits = max(1, min(2 * sms // (low * spec.num_kv_heads), MAX_SPLITS, longest))
    if multiplies_in_registers(operands, context):
        return DecodeConfig(splits, keys_of_a_step(spec, operands, context))
    if context.kv_groups[spec.group].dtype == "int8":
        return _int8_decode_config(splits, tasks, columns, high)
    if high == 1:
        return _one_sequence_config(spec, splits, columns, context)
    if tasks >= 512:
        return DecodeConfig(max(1, min(1024 // tasks, longest)), 16 if columns > 64 else 32, 2, 1)
    if columns > 128 or 64 <= tasks < 256:
        return DecodeConfig(splits, 64 if columns <= 256 else 32, 1)
    wide = DecodeConfig(splits, 128, 2, 8 if tasks >= 256 else 4)
    return wide if _fits(wide, columns, context) else DecodeConfig(splits, 64, 2)


def _one_sequence_config(spec: Attention, splits: int, columns: int, context: KernelContext) -> DecodeConfig:
    if columns > 256:
        return DecodeConfig(splits, 32, 1, alone=True)
    if columns > 128:
        return DecodeConfig(splits, 32, 1, 8, alone=True)
    stages = 1 if (spec.window or context.max_seq_len) <= SHORT_CONTEXTS else 2
    wide = DecodeConfig(splits, 128, stages, alone=True)
    return wide if _fits(wide, columns, context) else DecodeConfig(splits, 64, stages, alone=True)


def _fits(config: DecodeConfig, columns: int, context: KernelContext) -> bool:
    return 2 * config.keys * config.stages * 2 * next_power_of_2(columns) <= 0.9 * context.shared_budget


def _int8_decode_config(splits: int, tasks: int, columns: int, high: int) -> DecodeConfig:
    """The configuration for a cache of int8. Measured on an H200: Llama-3-8B, 1 sequence of 192 to 32,000 tokens, and
    32 of 2,048."""
    if columns > 128:
        return DecodeConfig(splits, 32)
    if high == 1:
        return DecodeConfig(splits, 128, 2)
    return DecodeConfig(max(1, 512 // tasks), 64, 2, 2) if tasks >= 256 else DecodeConfig(splits, 64)


def decode_request(
    spec: Attention,
    operands: Operands,
    context: KernelContext,
    config: DecodeConfig,
) -> tuple[KernelRequest, Arguments]:
    """The kernel for steps in which every sequence has one token, and its arguments."""
    splits, keys = config.splits, config.keys
    arguments = Arguments(operands)
    arguments.bind("in.q", *["in.k", "in.v"] * spec.appends)
    bind_norms(arguments, spec, "qkv")
    more = [*["step.positions"] * bool(spec.rotary_dim), *["step.slots"] * spec.appends]
    bind_attention(arguments, spec, context, "step.context_lens", "step.block_table", *more)
    arguments.bind(*["in.gate"] * (spec.gate != "none"), "out.y")
    if splits > 1:
        arguments.bind_memory("scratch.parts", "float32")
        arguments.bind_memory("scratch.moments", "float32")
        arguments.bind_memory("scratch.arrivals", "int32")
    arguments.bind("blocks")
    group = spec.num_heads // spec.num_kv_heads
    use_dot = group > 1 or operands["in.q"].dtype != "float32"
    numbers = numbers_of(spec, operands, context) | norm_numbers(spec)
    numbers |= {"GP": max(16, next_power_of_2(group)) if use_dot else 1, "BN": keys, "SPLITS": splits}
    numbers["STAGES"] = config.stages
    if splits > 1:
        padded, most = next_power_of_2(group), next_power_of_2(splits)
        # Of one sequence a program may use all registers that a thread can have.
        values = (4096 if config.alone else 1024) * config.num_warps
        each = values // (padded * int(numbers["DVP"]))
        numbers |= {"GM": padded, "SPLITS_P": most, "EACH": max(1, min(most, each))}
    structure = structure_of(spec, operands) | {"use_dot": use_dot, "one_page": context.page_size % keys == 0}
    structure |= {"alone": True} if config.alone else {}
    request = kernel_request(
        "attention_decode",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=config.stages,
    )
    return request, arguments


def _append_launch(spec: Attention, operands: Operands, context: KernelContext) -> tuple[KernelRequest, Launch]:
    arguments = Arguments(operands)
    arguments.bind("in.k", "in.v")
    bind_norms(arguments, spec, "kv")
    if spec.rotary_dim:
        arguments.bind("w.rope_cos", "w.rope_sin", "step.positions")
    arguments.bind_memory("kv", kv_type(spec, context))
    arguments.bind("step.slots")
    numbers = numbers_of(spec, operands, context) | norm_numbers(spec)
    each = min(next_power_of_2(spec.num_kv_heads), max(1, 2048 // int(numbers["DP"])))
    numbers["HEADS_EACH"] = each
    request = kernel_request(
        "attention_append", numbers, arguments.params, structure=structure_of(spec, operands), num_stages=1
    )
    grid = (Extent(1, "T"), Extent(ceil_div(spec.num_kv_heads, each)))
    return request, Launch("kernel", request.name, arguments.args, grid)
