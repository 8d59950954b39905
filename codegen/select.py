"""Chooses the kernels of a step: for each range of tokens, what is launched."""

from __future__ import annotations

from dscompile.codegen.attention_kernels import attention_program
from dscompile.codegen.deterministic import deterministic_program
from dscompile.codegen.emit import KernelRequest
from dscompile.codegen.int8_kernels import int8_linear_program
from dscompile.codegen.linear_kernels import linear_program
from dscompile.codegen.moe_kernels import moe_program
from dscompile.codegen.operands import KernelContext, Operand, Operands
from dscompile.codegen.row_kernels import embed_program, keep_rows_program, row_norm_program
from dscompile.codegen.targets import supports
from dscompile.codegen.tuned_table import rounds_rows
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention, Embed, KeepRows, Linear, Moe, Program, RowNorm

__all__ = ["KernelContext", "Operand", "programs_for"]


def programs_for(
    spec: Embed | Linear | Attention | Moe | RowNorm | KeepRows, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """Return the program of a step and the kernels it launches.

    operands: an entry for every role of the spec: "in.ROLE" and "out.ROLE" (dtype, row stride in elements, whether
              the first column is 16-byte aligned, shape [0 or any, columns]) and "w.ROLE" (dtype, stride, shape)
    Equal arguments give equal kernel names.
    Raises UserError where a target does not compute in the operands' dtype.
    """
    for target in context.targets:
        dtype = next(iter(operands.values())).dtype
        if not supports(target, dtype):
            raise UserError(f"{target} does not compute in {dtype}: choose --dtype float16 or another target")
    if context.deterministic and isinstance(spec, Moe):
        raise UserError("mixtures of experts have no deterministic kernels in this version: leave out deterministic")
    if context.deterministic and isinstance(spec, Linear | Attention):
        return deterministic_program(spec, operands, context)
    if isinstance(spec, Moe):
        return moe_program(spec, operands, context)
    if isinstance(spec, Linear):
        return (int8_linear_program if rounds_rows(spec) else linear_program)(spec, operands, context)
    if isinstance(spec, Attention):
        return attention_program(spec, operands, context)
    if isinstance(spec, Embed):
        return embed_program(spec, operands)
    if isinstance(spec, RowNorm):
        return row_norm_program(spec, operands, operands["in.x"].shape[-1])
    if isinstance(spec, KeepRows):
        return keep_rows_program(operands)
    raise TypeError(f"no kernels for {type(spec).__name__}")
