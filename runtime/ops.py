"""A torch reference of every spec of the plan: how the CPU executes an artifact, and what kernels are tested against.

`bind` prepares a step over fixed views of its buffers and returns a function of the step's inputs; `execute` allocates
the outputs and runs it once. Half-precision models compute in float32 and round once at each output, as the kernels
do; float32 and float64 models compute in their own type.

T, R: rows.  K, N: columns in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import StepInputs
from dscompile.runtime.kv_cache import KVPool
from dscompile.runtime.ops_aten import bind_aten
from dscompile.runtime.ops_attention import bind_attention
from dscompile.runtime.ops_norm import bind_norm, compute_dtype
from dscompile.runtime.plan import Aten, Attention, Embed, Linear, RowNorm, Sample, Segment, Spec

Tensors = dict[str, torch.Tensor]
Run = Callable[[StepInputs], None]

ACTIVATIONS_: dict[str, Callable[[torch.Tensor], Any]] = {
    "relu": torch.relu_,
    "relu2": lambda x: torch.relu_(x).square_(),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": lambda x: torch.ops.aten.gelu_(x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "gelu_quick": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


def bind(spec: Spec, inputs: Tensors, outputs: Tensors, weights: Tensors, pool: KVPool | None = None) -> Run:
    """Prepare one step. All tensors are keyed by the roles of the spec; outputs may be column ranges of wider buffers.

    pool: that of the spec's KV group, for Attention.
    """
    match spec:
        case Linear():
            return _bind_linear(spec, inputs, outputs, weights)
        case Attention():
            assert pool is not None, "attention needs the pool of its group"
            return bind_attention(spec, inputs, outputs, weights, pool)
        case Embed():
            return _bind_embed(spec, outputs, weights)
        case RowNorm():
            return _bind_row_norm(spec, inputs, outputs, weights)
        case Aten():
            return bind_aten(spec, inputs, outputs, weights)
        case Sample():
            return lambda step: None
    raise UserError(f"the plan has an operation this runtime does not know: {type(spec).__name__}")


def execute(
    spec: Spec, inputs: Tensors, weights: Tensors, step: StepInputs, pool: KVPool | None = None, dtype=None
) -> Tensors:
    """Run one step once: outputs by role, freshly allocated, poisoned before and of `dtype` (default: the inputs')."""
    dtype = dtype or next((x.dtype for x in inputs.values()), None) or weights["table"].dtype
    rows = len(step.logit_rows) if isinstance(spec, Linear) and spec.rows == "R" else len(step.tokens)
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
            return {"y": weights["table"].shape[1]}
        case RowNorm():
            return {"y": inputs["x"].shape[1]}
    raise TypeError(f"no output widths for {type(spec).__name__}")


def _bind_embed(spec: Embed, outputs: Tensors, weights: Tensors) -> Run:
    table, y = weights["table"], outputs["y"]
    positions = weights.get("positions_table")
    dtype = compute_dtype(table)
    norm = bind_norm(spec.norm, weights, "norm", dtype)

    def run(step: StepInputs) -> None:
        x = F.embedding(step.tokens, table).to(dtype)
        if positions is not None:
            x = x.add_(F.embedding(step.positions + spec.position_offset, positions))
        if spec.scale != 1:
            x = x.mul_(spec.scale)
        y.copy_(norm(x))

    return run


def _bind_row_norm(spec: RowNorm, inputs: Tensors, outputs: Tensors, weights: Tensors) -> Run:
    x, add, y = inputs["x"], inputs.get("add"), outputs["y"]
    dtype = compute_dtype(x)
    norm = bind_norm(spec.norm, weights, "norm", dtype)

    def run(step: StepInputs) -> None:
        v = x.to(dtype)
        y.copy_(norm(v if add is None else v + add))

    return run


def _bind_linear(spec: Linear, inputs: Tensors, outputs: Tensors, weights: Tensors) -> Run:
    """Prologue, one GEMM, epilogue. The GEMM writes the outputs themselves where nothing stands between."""
    weight, dtype = weights["weight"], compute_dtype(weights["weight"])
    weight_KN = weight.t()
    bias = weights["bias"].to(dtype) if spec.bias else None
    prologue = _bind_prologue(spec, inputs, outputs, weights, dtype)
    ys = [outputs[f"y{i}"] for i in range(len(spec.segments))]
    residuals = [inputs[f"residual{i}"] for i in range(spec.residuals)]
    in_place = not any(s.gated for s in spec.segments) and all(y.dtype == dtype for y in ys)
    target = join_columns(ys) if in_place else None
    start = bias
    if target is not None and bias is None and residuals and _is_plain(spec) and residuals[0].dtype == dtype:
        start, *residuals = residuals
    epilogues = [
        _bind_epilogue(spec, s, y, residuals, target is not None) for s, y in zip(spec.segments, ys, strict=True)
    ]
    epilogues = [e for e in epilogues if e is not None]

    def run(step: StepInputs) -> None:
        v = prologue(step)
        w = weight_KN if weight_KN.dtype == dtype else weight_KN.to(dtype)
        if start is None:
            product = torch.mm(v, w, out=target) if target is not None else torch.mm(v, w)
        else:
            product = torch.addmm(start, v, w, out=target) if target is not None else torch.addmm(start, v, w)
        for epilogue in epilogues:
            epilogue(product)

    return run


def _is_plain(spec: Linear) -> bool:
    return spec.scale == 1 and not spec.softcap and all(s.activation == "none" for s in spec.segments)


def _bind_prologue(spec: Linear, inputs: Tensors, outputs: Tensors, weights: Tensors, dtype: torch.dtype):
    x, add, total = inputs["x"], inputs.get("add"), outputs.get("sum")
    post_norm = bind_norm(spec.post_norm, weights, "post_norm", dtype)
    norm = bind_norm(spec.norm, weights, "norm", dtype)
    if spec.rows == "R":
        num_rows = outputs["y0"].shape[0]

        def gather(rows: torch.Tensor, step: StepInputs) -> torch.Tensor:
            return rows if rows.shape[0] == num_rows else rows.index_select(0, step.logit_rows)
    else:

        def gather(rows: torch.Tensor, step: StepInputs) -> torch.Tensor:
            return rows

    def run(step: StepInputs) -> torch.Tensor:
        v = post_norm(gather(x, step).to(dtype))
        if add is not None:
            v = v + gather(add, step)
        if total is not None:
            total.copy_(v)
        return norm(v)

    return run


def _bind_epilogue(spec: Linear, segment: Segment, y: torch.Tensor, residuals: list[torch.Tensor], in_place: bool):
    """Finish a segment's columns of the product and write them to y, or return None where the product is y as it is.

    The product is a temporary of the compute type, so working on it in place is free.
    """
    act_ = ACTIVATIONS_.get(segment.activation)
    start, stop, half = segment.start, segment.stop, (segment.start + segment.stop) // 2
    scale, cap = spec.scale, spec.softcap
    if in_place and act_ is None and scale == 1 and not cap and not residuals:
        return None

    def run(product: torch.Tensor) -> None:
        p = y if in_place else product[:, start : half if segment.gated else stop]
        if act_ is not None:
            act_(p)
        if segment.gated:
            p = p.mul_(product[:, half:stop])
        if cap:
            p = p.div_(cap).tanh_().mul_(cap)
        if scale != 1:
            p = p.mul_(scale)
        for residual in residuals:
            p = p.add_(residual)
        if not in_place:
            y.copy_(p)

    return run


def join_columns(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """One view over matrices [T, n_i] that are neighbouring column ranges of one buffer, in this order; else None."""
    first, position = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.data_ptr() - first.data_ptr() == (position - first.storage_offset()) * first.element_size()
        if not same or part.stride() != first.stride() or part.dtype != first.dtype:
            return None
        position += part.shape[1]
    return first.as_strided((first.shape[0], position - first.storage_offset()), first.stride())
