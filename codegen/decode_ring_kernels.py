"""The kernel of attention for steps of as many sequences as fill the GPU, one token each, in Gluon for Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.codegen.attention_structure import bind_attention, bind_norms, norm_numbers, numbers_of, structure_of
from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.operands import Arguments, KernelContext, Operands, next_power_of_2
from dscompile.codegen.prefill_kernels import LOG2E, takes_ring
from dscompile.codegen.tuned_table import num_sms
from dscompile.runtime.plan import Attention

KEYS = 64  # of a block: what the tensor cores take as rows of a left operand
MOST_HEADS = 64  # of a group
PROGRAMS = 2  # that a multiprocessor holds at once
RESERVE = 6144  # bytes of a program's shared memory beside its ring
MOST_STAGES = 4


@dataclass(frozen=True)
class RingDecodeConfig:
    """attention_decode_ring: blocks of keys, and of values, in the ring."""

    stages: int
    num_warps: int = 4


def ring_decode_config(
    spec: Attention, operands: Operands, context: KernelContext, low: int, high: int
) -> RingDecodeConfig | None:
    """The configuration for steps of `low` to `high` sequences, or None where attention_decode serves them.

    A program has a sequence and key-value head. It takes at least one for each multiprocessor, and no more than all
    hold at once, each with its part of the shared memory. Measured on an H200, layers of decode steps: GPT-J, 16
    sequences, takes 4.5 us less than with attention_decode, Llama-3-8B, 32 sequences, 2.5 to 3.1. With two to sixteen
    times as many programs a layer takes between 2.8 us less and 2.9 more.
    """
    if not (takes_ring(spec, operands, context) and spec.causal and spec.appends) or context.deterministic:
        return None
    if spec.norm_across_heads or spec.v_norm or spec.num_heads // spec.num_kv_heads > MOST_HEADS:
        return None
    sms = min(num_sms(t) for t in context.targets)
    if low * spec.num_kv_heads < sms or high * spec.num_kv_heads > PROGRAMS * sms:
        return None
    block = 2 * KEYS * 2 * spec.head_dim
    return RingDecodeConfig(max(1, min(MOST_STAGES, (context.shared_budget // PROGRAMS - RESERVE) // block)))


def ring_decode_request(
    spec: Attention, operands: Operands, context: KernelContext, config: RingDecodeConfig
) -> tuple[KernelRequest, Arguments]:
    """The kernel for steps in which every sequence has one token, and its arguments."""
    arguments = Arguments(operands)
    arguments.bind("in.q", "in.k", "in.v")
    bind_norms(arguments, spec, "qk")
    positions = ["step.positions"] * bool(spec.rotary_dim)
    bind_attention(arguments, spec, context, "step.context_lens", "step.block_table", "step.slots", *positions)
    arguments.bind(*["in.gate"] * (spec.gate != "none"), "out.y", "blocks")
    numbers = numbers_of(spec, operands, context) | norm_numbers(spec)
    group = max(8, next_power_of_2(int(numbers["GROUP"])))
    numbers |= {"GP": group, "BN": KEYS, "STAGES": config.stages, "WARPS": config.num_warps}
    numbers |= {"LOG2E": LOG2E, "FACTOR": LOG2E * spec.scale}
    structure = structure_of(spec, operands) | {"shaped": bool(spec.softcap or spec.alibi or spec.scale <= 0)}
    request = kernel_request(
        "attention_decode_ring",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=1,
    )
    return request, arguments
