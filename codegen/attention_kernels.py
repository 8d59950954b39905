"""Kernels of attention over the paged cache: one for decoding, two for ragged batches of many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.operands import Arguments, KernelContext, Operands, ceil_div, next_power_of_2
from dscompile.codegen.targets import capability
from dscompile.codegen.tuned_table import num_sms
from dscompile.runtime.int8 import SMALLEST
from dscompile.runtime.kv_cache import block_elements
from dscompile.runtime.plan import Attention, Case, Extent, KVGroup, Launch, Program, Scratch

# Ranges of sequences with a number of splits each.
DECODE_RANGES = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 0))
MAX_SPLITS = 32
# Shares of the softmax take in the scales of int8 values, which are 127 times smaller than the values: times this, they
# are far from the smallest numbers of float16, and still below its largest.
VALUE_UNIT = 64.0


def attention_program(
    spec: Attention, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """One launch where every sequence has one token; else one that fills the cache and one that attends."""
    requests: list[KernelRequest] = []
    cases: list[Case] = []
    sizes = {"parts": 0, "moments": 0, "arrivals": 0}
    for low, high in DECODE_RANGES:
        config = decode_config(spec, operands, context, low, high or context.max_batch)
        splits = config.splits
        request, arguments = decode_request(spec, operands, context, config)
        requests.append(request)
        grid = (Extent(1, "B"), Extent(spec.num_kv_heads), Extent(splits))
        cases.append(Case(low, high, (Launch("kernel", request.name, arguments.args, grid),), decode=True))
        if splits > 1:
            tasks = (high or context.max_batch) * spec.num_kv_heads
            parts = tasks * splits * (spec.num_heads // spec.num_kv_heads)
            needed = {"parts": 4 * parts * spec.v_head_dim, "moments": 8 * parts, "arrivals": 4 * tasks}
            sizes = {name: max(size, sizes[name]) for name, size in needed.items()}
    append, prefill = _append_launch(spec, operands, context), _prefill_launch(spec, operands, context)
    requests += [append[0], prefill[0]]
    cases.append(Case(1, 0, (append[1], prefill[1])))
    scratch = tuple(Scratch(n, "1", s, zeroed=n == "arrivals") for n, s in sizes.items() if s)
    return Program(tuple(cases), scratch), tuple(requests)


@dataclass(frozen=True)
class DecodeConfig:
    """attention_decode: parts a sequence's keys may be cut into, keys of a step, pipeline depth."""

    splits: int
    keys: int
    stages: int = 3
    num_warps: int = 4


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
    if _multiplies_in_registers(operands, context) or context.kv_groups[spec.group].dtype == "int8":
        return DecodeConfig(splits, _keys(spec, operands, context))
    if tasks >= 512:
        return DecodeConfig(max(1, min(1024 // tasks, longest)), 16 if columns > 64 else 32, 2, 1)
    if columns > 128 or 64 <= tasks < 256:
        return DecodeConfig(splits, 64 if columns <= 256 else 32, 1)
    wide = DecodeConfig(splits, 128, 2, 8 if tasks >= 256 else 4)
    fits = 2 * wide.keys * wide.stages * 2 * next_power_of_2(columns) <= 0.9 * context.shared_budget
    return wide if fits else DecodeConfig(splits, 64, 2)


def _numbers(spec: Attention, operands: Operands, context: KernelContext) -> dict:
    group = context.kv_groups[spec.group]
    page = context.page_size
    tokens = group.num_kv_heads * page
    numbers = {
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "KV_HEADS": spec.num_kv_heads,
        "D": spec.head_dim,
        "DP": max(16, next_power_of_2(spec.head_dim)),
        "DV": spec.v_head_dim,
        "DVP": max(16, next_power_of_2(spec.v_head_dim)),
        "PAGE": page,
        "BLOCK_STRIDE": block_elements(group, page),
        "V_OFFSET": tokens * spec.head_dim,
        "ROTARY": spec.rotary_dim,
        "SCALE": spec.scale,
        "SOFTCAP": spec.softcap,
        "WINDOW": spec.window,
        "CHUNK": spec.chunk,
    } | {f"{r[-1].upper()}_STRIDE": operands[r].stride for r in ("in.q", "in.k", "in.v", "out.y")}
    return numbers | (_int8_numbers(numbers, group, page, operands["in.q"].dtype) if group.dtype == "int8" else {})


def _int8_numbers(numbers: dict, group: KVGroup, page: int, dtype: str) -> dict:
    """What differs where kernels see the cache as pairs of columns, and half a head is an operand of its own."""
    tokens = group.num_kv_heads * page
    return {
        "DP": max(32, numbers["DP"]),
        "DVP": max(32, numbers["DVP"]),
        "BLOCK_STRIDE": numbers["BLOCK_STRIDE"] // 2,
        "V_OFFSET": numbers["V_OFFSET"] // 2,
        "DTYPE": dtype,
        "SCALES": tokens * (group.head_dim + group.v_head_dim) // 2,
        "UNIT": VALUE_UNIT,
        "SMALLEST": SMALLEST,
    }


def _kv_type(spec: Attention, context: KernelContext) -> str:
    dtype = context.kv_groups[spec.group].dtype
    return "int16" if dtype == "int8" else dtype


def _norm_numbers(spec: Attention) -> dict:
    numbers: dict[str, float] = {}
    for x, norm, heads in (("Q", spec.q_norm, spec.num_heads), ("K", spec.k_norm, spec.num_kv_heads)):
        if norm:
            numbers |= {f"{x}_EPS": norm.eps, f"{x}_WIDTH": heads * spec.head_dim}
    return numbers


def _structure(spec: Attention, operands: Operands) -> dict:
    def fields(norm):
        return {"kind": norm.kind, "weight": norm.weight, "bias": norm.bias} if norm else None

    return {
        "norms": {"q": fields(spec.q_norm), "k": fields(spec.k_norm)},
        "across": spec.norm_across_heads,
        "alibi": spec.alibi,
        "sinks": spec.sinks,
        "causal": spec.causal,
        "ieee": operands["in.q"].dtype == "float32",
    }


def _bind_norms(arguments: Arguments, spec: Attention, which: str) -> None:
    for x, norm in (("q", spec.q_norm), ("k", spec.k_norm)):
        if norm and x in which:
            arguments.bind(*[f"w.{x}_norm_weight"] * norm.weight, *[f"w.{x}_norm_bias"] * norm.bias)


def _bind_attention(
    arguments: Arguments, spec: Attention, context: KernelContext, *step: str, rope: bool = True
) -> None:
    if spec.rotary_dim and rope:
        arguments.bind("w.rope_cos", "w.rope_sin", "step.positions")
    arguments.bind(*["w.alibi_slopes"] * spec.alibi, *["w.sinks"] * spec.sinks)
    arguments.bind_memory("kv", _kv_type(spec, context))
    arguments.bind(*step)


def decode_request(
    spec: Attention,
    operands: Operands,
    context: KernelContext,
    config: DecodeConfig,
) -> tuple[KernelRequest, Arguments]:
    """The kernel for steps in which every sequence has one token, and its arguments."""
    splits, keys = config.splits, config.keys
    arguments = Arguments(operands)
    arguments.bind("in.q", "in.k", "in.v")
    _bind_norms(arguments, spec, "qk")
    _bind_attention(arguments, spec, context, "step.context_lens", "step.block_table", "step.slots")
    arguments.bind("out.y")
    if splits > 1:
        arguments.bind_memory("scratch.parts", "float32")
        arguments.bind_memory("scratch.moments", "float32")
        arguments.bind_memory("scratch.arrivals", "int32")
    arguments.bind("blocks")
    group = spec.num_heads // spec.num_kv_heads
    use_dot = group > 1 or operands["in.q"].dtype != "float32"
    numbers = _numbers(spec, operands, context) | _norm_numbers(spec)
    numbers |= {"GP": max(16, next_power_of_2(group)) if use_dot else 1, "BN": keys, "SPLITS": splits}
    numbers["STAGES"] = config.stages
    if splits > 1:
        padded, most = next_power_of_2(group), next_power_of_2(splits)
        each = 1024 * config.num_warps // (padded * int(numbers["DVP"]))
        numbers |= {"GM": padded, "SPLITS_P": most, "EACH": max(1, min(most, each))}
    structure = _structure(spec, operands) | {"use_dot": use_dot, "one_page": context.page_size % keys == 0}
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
    _bind_norms(arguments, spec, "k")
    if spec.rotary_dim:
        arguments.bind("w.rope_cos", "w.rope_sin", "step.positions")
    arguments.bind_memory("kv", _kv_type(spec, context))
    arguments.bind("step.slots")
    numbers = _numbers(spec, operands, context) | _norm_numbers(spec)
    each = min(next_power_of_2(spec.num_kv_heads), max(1, 2048 // int(numbers["DP"])))
    numbers["HEADS_EACH"] = each
    request = kernel_request(
        "attention_append", numbers, arguments.params, structure=_structure(spec, operands), num_stages=1
    )
    grid = (Extent(1, "T"), Extent(ceil_div(spec.num_kv_heads, each)))
    return request, Launch("kernel", request.name, arguments.args, grid)


def _prefill_launch(spec: Attention, operands: Operands, context: KernelContext) -> tuple[KernelRequest, Launch]:
    arguments = Arguments(operands)
    arguments.bind("in.q")
    _bind_norms(arguments, spec, "q")
    step = ("step.seq_starts", "step.context_lens", "step.block_table")
    _bind_attention(arguments, spec, context, *step)
    arguments.bind("out.y", "B", "blocks")
    numbers = _numbers(spec, operands, context) | _norm_numbers(spec)
    group_padded = next_power_of_2(int(numbers["GROUP"]))
    columns = max(int(numbers["DP"]), int(numbers["DVP"]))
    wide, scalar = columns > 128, _multiplies_in_registers(operands, context)
    rows = max(group_padded, 16 if scalar else 64 if wide else 128)
    keys = _keys(spec, operands, context)
    numbers |= {"GP": group_padded, "BM": rows, "TOKENS": rows // group_padded, "BN": keys}
    numbers["STAGES"] = 2 if wide or scalar else 3
    structure = _structure(spec, operands) | {
        "one_page": context.page_size % keys == 0,
        "split_loop": spec.causal and not spec.window and not spec.chunk,
    }
    request = kernel_request(
        "attention_prefill",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=4 if rows * columns <= 8192 else 8,
        num_stages=int(numbers["STAGES"]),
    )
    grid = (Extent(1, "T", rows // group_padded, plus=1), Extent(spec.num_kv_heads))
    return request, Launch("kernel", request.name, arguments.args, grid)


def _keys(spec: Attention, operands: Operands, context: KernelContext) -> int:
    """Keys of a step: fewer where a head is wide, fewest where products take registers."""
    if _multiplies_in_registers(operands, context):
        return 16
    return 64 if max(spec.head_dim, spec.v_head_dim) <= 128 else 32


def _multiplies_in_registers(operands: Operands, context: KernelContext) -> bool:
    """Whether tensor cores are of no use: in float32, and before sm_80, for which Triton has none."""
    return operands["in.q"].dtype == "float32" or any(capability(t) < 80 for t in context.targets)
