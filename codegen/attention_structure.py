"""What the kernels of attention over the paged cache have in common: numbers, structure, arguments."""

from __future__ import annotations

from dscompile.codegen.operands import Arguments, KernelContext, Operands, next_power_of_2
from dscompile.codegen.targets import capability
from dscompile.runtime.int8 import SMALLEST
from dscompile.runtime.kv_cache import block_elements
from dscompile.runtime.plan import Attention, KVGroup

# Shares of the softmax take in the scales of int8 values, which are 127 times smaller than the values: times this, they
# are far from the smallest numbers of float16, and still below its largest.
VALUE_UNIT = 64.0


def numbers_of(spec: Attention, operands: Operands, context: KernelContext) -> dict:
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
    } | {f"{r[-1].upper()}_STRIDE": operands[r].stride for r in ("in.q", "in.k", "in.v", "out.y") if r in operands}
    if spec.gate != "none":
        numbers["GATE_STRIDE"] = operands["in.gate"].stride
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


def kv_type(spec: Attention, context: KernelContext) -> str:
    dtype = context.kv_groups[spec.group].dtype
    return "int16" if dtype == "int8" else dtype


def norm_numbers(spec: Attention) -> dict:
    numbers: dict[str, float] = {}
    for x, norm, heads in (("Q", spec.q_norm, spec.num_heads), ("K", spec.k_norm, spec.num_kv_heads)):
        if norm:
            numbers |= {f"{x}_EPS": norm.eps, f"{x}_WIDTH": heads * spec.head_dim}
    if spec.v_norm:
        numbers["V_EPS"] = spec.v_norm.eps
    return numbers


def structure_of(spec: Attention, operands: Operands) -> dict:
    def fields(norm):
        if norm is None:
            return None
        own = {"by_head": True} if spec.norm_by_head else {}
        own |= {"rotated": True} if spec.weigh_rotated else {}
        return {"kind": norm.kind, "weight": norm.weight, "bias": norm.bias} | own

    norms = {"q": fields(spec.q_norm), "k": fields(spec.k_norm)}
    if spec.v_norm:
        norms["v"] = {"kind": spec.v_norm.kind, "weight": spec.v_norm.weight, "bias": spec.v_norm.bias}
    gate = {"gate": spec.gate} if spec.gate != "none" else {}
    reads = {} if spec.appends else {"reads": True}
    return (
        gate
        | reads
        | {
            "norms": norms,
            "across": spec.norm_across_heads,
            "alibi": spec.alibi,
            "sinks": spec.sinks,
            "causal": spec.causal,
            "ieee": operands["in.q"].dtype == "float32",
        }
    )


def bind_norms(arguments: Arguments, spec: Attention, which: str) -> None:
    for x, norm in (("q", spec.q_norm), ("k", spec.k_norm), ("v", spec.v_norm)):
        if norm and x in which:
            arguments.bind(*[f"w.{x}_norm_weight"] * norm.weight, *[f"w.{x}_norm_bias"] * norm.bias)


def bind_attention(arguments: Arguments, spec: Attention, context: KernelContext, *step: str) -> None:
    if spec.rotary_dim:
        arguments.bind("w.rope_cos", "w.rope_sin")
    arguments.bind(*["w.alibi_slopes"] * spec.alibi, *["w.sinks"] * spec.sinks)
    arguments.bind_memory("kv", kv_type(spec, context))
    arguments.bind(*step)


def keys_of_a_step(spec: Attention, operands: Operands, context: KernelContext) -> int:
    """Keys of a step: fewer where a head is wide, fewest where products take registers."""
    if multiplies_in_registers(operands, context):
        return 16
    return 64 if max(spec.head_dim, spec.v_head_dim) <= 128 else 32


def multiplies_in_registers(operands: Operands, context: KernelContext) -> bool:
    """Whether tensor cores are of no use: in float32, and before sm_80, for which Triton has none."""
    return operands["in.q"].dtype == "float32" or any(capability(t) < 80 for t in context.targets)
