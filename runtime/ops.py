"""A torch reference of every spec of the plan: how the CPU executes an artifact, and what kernels are tested against.

`bind` prepares a step over fixed views of its buffers and returns a function of the step's inputs; `execute` allocates
the outputs and runs it once. Half-precision models compute in float32 and round once at each output, as the kernels
do; float32 and float64 models compute in their own type.

T, R: rows.  K, N: columns in and out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import StepInputs
from dscompile.runtime.kv_cache import KVPool
from dscompile.runtime.ops_aten import bind_aten
from dscompile.runtime.ops_attention import bind_attention
from dscompile.runtime.ops_linear import PackedWeights, bind_linear
from dscompile.runtime.ops_moe import bind_moe
from dscompile.runtime.ops_norm import bind_norm, compute_dtype
from dscompile.runtime.plan import Aten, Attention, Embed, KeepRows, Linear, Moe, RowNorm, Sample, Spec

Tensors = dict[str, torch.Tensor]
Run = Callable[[StepInputs], None]


def bind(
    spec: Spec,
    inputs: Tensors,
    outputs: Tensors,
    weights: Tensors,
    pool: KVPool | None = None,
    packed: PackedWeights | None = None,
) -> Run:
    """Prepare one step. All tensors are keyed by the roles of the spec; outputs may be column ranges of wider buffers.

    pool: that of the spec's KV group, for Attention; None: whole sequences, no cache.
    packed: faster layouts of weights, shared between bindings.
    """
    match spec:
        case Linear():
            return bind_linear(spec, inputs, outputs, weights, packed)
        case Attention():
            return bind_attention(spec, inputs, outputs, weights, pool)
        case Moe():
            return bind_moe(spec, inputs, outputs, weights)
        case Embed():
            return _bind_embed(spec, outputs, weights)
        case RowNorm():
            return _bind_row_norm(spec, inputs, outputs, weights)
        case KeepRows():
            return _bind_keep_rows(inputs)
        case Aten():
            return bind_aten(spec, inputs, outputs, weights)
        case Sample():
            return lambda step: None
    raise UserError(f"the plan has an operation this runtime does not know: {type(spec).__name__}")


def execute(
    spec: Spec, inputs: Tensors, weights: Tensors, step: StepInputs, pool: KVPool | None = None, dtype=None
) -> Tensors:
    """Run one step once: outputs by role, freshly allocated, poisoned before and of `dtype` (default: the inputs')."""
    dtype = dtype or next(x.dtype for x in (*inputs.values(), *weights.values()))
    rows = len(inputs["x"]) if isinstance(spec, Linear) else len(step.tokens)
    outputs = {
        role: torch.full((rows, width), torch.nan, dtype=dtype, device=step.tokens.device)
        for role, width in output_widths(spec, inputs, weights).items()
    }
    bind(spec, inputs, outputs, weights, pool)(step)
    return outputs


def output_widths(spec: Spec, inputs: Tensors, weights: Tensors) -> dict[str, int]:
    """Columns of each output role (not for Aten, whose output only the plan knows)."""
    match spec:
        case Linear():
            widths = {f"y{i}": s.width for i, s in enumerate(spec.segments)}
            return widths | ({"sum": spec.in_features} if spec.store else {})
        case Attention():
            return {"y": spec.num_heads * spec.v_head_dim}
        case Embed():
            return {"y": weights["table" if spec.table else "positions_table"].shape[1]}
        case RowNorm() | Moe():
            return {"y": inputs["x"].shape[1]}
    raise TypeError(f"no output widths for {type(spec).__name__}")


def _bind_embed(spec: Embed, outputs: Tensors, weights: Tensors) -> Run:
    table = weights["table"] if spec.table else None
    positions = None if spec.position_offset is None else weights["positions_table"]
    offset = spec.position_offset or 0
    y = outputs["y"]
    dtype = compute_dtype(y)
    norm = bind_norm(spec.norm, weights, "norm", dtype)

    if spec == Embed() and table is not None and table.dtype == y.dtype and y.is_contiguous():

        def look_up(step: StepInputs) -> None:
            torch.index_select(table, 0, step.tokens, out=y)

        return look_up

    def run(step: StepInputs) -> None:
        found = [table.index_select(0, step.tokens)] if table is not None else []
        found += [positions.index_select(0, step.positions + offset)] if positions is not None else []
        x = sum(found[1:], found[0].to(dtype))
        if spec.scale != 1:
            x = x.mul_(spec.scale)
        y.copy_(norm(x))

    return run


def _bind_row_norm(spec: RowNorm, inputs: Tensors, outputs: Tensors, weights: Tensors) -> Run:
    def grouped(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (spec.groups, -1)) if spec.groups > 1 else rows

    x, y = grouped(inputs["x"]), grouped(outputs["y"])
    add = grouped(inputs["add"]) if "add" in inputs else None
    dtype = compute_dtype(x)
    norm = bind_norm(spec.norm, weights, "norm", dtype)

    def run(step: StepInputs) -> None:
        v = x.to(dtype)
        y.copy_(norm(v if add is None else v + add))

    return run


def _bind_keep_rows(inputs: Tensors) -> Run:
    def run(step: StepInputs) -> None:
        rows = step.logit_rows
        for x in inputs.values():
            x[: len(rows)] = x.index_select(0, rows)

    return run
