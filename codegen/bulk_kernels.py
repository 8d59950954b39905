"""The kernel of int8 rows and weights for many tokens on Hopper, whose copy engine brings blocks by descriptor."""

from __future__ import annotations

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.linear_structure import arguments_of, bind_input_scale, numbers_of, structure_of
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import Arguments, KernelContext, Operands
from dscompile.codegen.targets import are_hopper
from dscompile.codegen.tuned_table import BulkConfig, num_sms
from dscompile.runtime.plan import Linear

DESCRIPTORS = 2
COPIED_BYTES = 16


def takes_bulk(spec: Linear, operands: Operands, context: KernelContext, config: BulkConfig) -> bool:
    """Whether every target has the copy engine, which reads rows of whole 16 bytes, and a tile is in one piece.

    spec: without a prologue. A tile is rows of one segment, or of the two halves of the only, gated one. A tile of
    float32 outputs (logits) would not fit shared memory beside the blocks under way.
    """
    structure = structure_of(spec, operands, config.block_n, two_pass=False)
    whole = structure["uniform"] or (structure["gating"] == "all" and len(spec.segments) == 1)
    copied = all(o.aligned and o.stride % COPIED_BYTES == 0 for o in (operands["in.x"], operands["w.weight"]))
    short = all(ITEM_SIZE[operands[f"out.y{i}"].dtype] <= 2 for i in range(len(spec.segments)))
    return whole and short and copied and are_hopper(context.targets)


def bulk_request(
    spec: Linear, operands: Operands, config: BulkConfig, context: KernelContext
) -> tuple[KernelRequest, Arguments, int]:
    """The kernel, its arguments and its number of programs, which is the same for any number of tokens."""
    structure = structure_of(spec, operands, config.block_n, two_pass=False)
    programs = min(num_sms(t) for t in context.targets)
    numbers = numbers_of(spec, operands)
    numbers |= {"BN": config.block_n, "BT": config.block_t, "BK": config.block_k, "GROUP": config.group}
    numbers |= {"TILES": structure["segments"][-1]["end"], "PROGRAMS": programs}
    if structure["gating"] == "all":
        numbers |= {"START": spec.segments[0].start, "WIDTH": spec.segments[0].width}
    arguments = arguments_of(spec, operands, folded_norm=False)
    bind_input_scale(spec, arguments)
    arguments.bind(spec.rows)
    request = kernel_request(
        "linear_int8_bulk",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=config.stages,
        descriptors=DESCRIPTORS,
    )
    return request, arguments, programs
