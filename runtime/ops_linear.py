"""The torch reference of `plan.Linear`: prologue, one GEMM, epilogue.

T, R: rows.  K, N: columns in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dscompile.runtime.executor import StepInputs
from dscompile.runtime.ops_int8 import bind_int8
from dscompile.runtime.ops_norm import bind_norm, compute_dtype
from dscompile.runtime.plan import Linear, Segment

Tensors = dict[str, torch.Tensor]

ACTIVATIONS_: dict[str, Callable[[torch.Tensor], Any]] = {
    "relu": torch.relu_,
    "relu2": lambda x: torch.relu_(x).square_(),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": lambda x: torch.ops.aten.gelu_(x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "gelu_quick": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "softplus": lambda x: x.copy_(F.softplus(x)),
}


def xielu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """beta x + alpha_p x^2 where x > 0, else beta x + alpha_n (e^min(x, eps) - 1 - x) (Huang & Schlag 2024).

    alpha: [4], alpha_p, alpha_n, beta, eps
    """
    alpha_p, alpha_n, beta, eps = (alpha[i].to(x.dtype) for i in range(4))
    return beta * x + torch.where(x > 0, alpha_p * x * x, alpha_n * (torch.expm1(torch.minimum(x, eps)) - x))


class PackedWeights:
    """Copies of large float32 weights in layouts that multiply faster, made on first use, MAX_BYTES in all.

    Measured on one core of an EPYC, weight [8192, 256]: one row 218 us as it is, 140 us transposed; eight rows 919 us
    as it is, 393 us in oneDNN's own layout. Small products lose more by oneDNN's call than they gain.
    """

    MAX_BYTES = 1 << 30
    MIN_TRANSPOSED = 1 << 18
    MIN_PACKED = 3 << 16

    def __init__(self) -> None:
        self._copies: dict[tuple[str, int], torch.Tensor] = {}
        self._bytes = 0
        self._has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def transposed(self, weight: torch.Tensor, rows: int) -> torch.Tensor | None:
        """The weight [N, K] as contiguous [K, N], or None where that gains nothing."""
        n, k = weight.shape
        if rows != 1 or n <= k or weight.dtype != torch.float32 or weight.numel() < self.MIN_TRANSPOSED:
            return None
        return self._copy("transposed", weight, lambda w: w.t().contiguous())

    def onednn(self, weight: torch.Tensor, rows: int) -> torch.Tensor | None:
        """The weight [N, K] as oneDNN's linear wants it, or None where that gains nothing."""
        if not self._has_onednn or rows < 2 or weight.dtype != torch.float32 or weight.numel() < self.MIN_PACKED:
            return None
        return self._copy("onednn", weight, lambda w: torch.ops.mkldnn._reorder_linear_weight(w, None))

    def _copy(
        self, kind: str, weight: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        key = (kind, weight.data_ptr())
        if key not in self._copies:
            if self._bytes + weight.nbytes > self.MAX_BYTES:
                return None
            self._bytes += weight.nbytes
            with torch.inference_mode(False):
                self._copies[key] = make(weight)
        return self._copies[key]


def bind_linear(
    spec: Linear, inputs: Tensors, outputs: Tensors, weights: Tensors, packed: PackedWeights | None = None
) -> Callable[[StepInputs], None]:
    """Prepare the step. The GEMM writes the outputs themselves where nothing stands between."""
    dtype = compute_dtype(weights["weight"])
    prologue = _bind_prologue(spec, inputs, outputs, weights, dtype)
    ys = [outputs[f"y{i}"] for i in range(len(spec.segments))]
    residuals = [inputs[f"residual{i}"] for i in range(spec.residuals)]
    in_place = not any(s.gated for s in spec.segments) and all(y.dtype == dtype for y in ys)
    target = join_columns(ys) if in_place else None
    added = None
    if target is not None and not spec.bias and residuals and _is_plain(spec) and residuals[0].dtype == dtype:
        added, *residuals = residuals
    product = _bind_product(spec, weights, dtype, target, added, len(ys[0]), packed)
    parts = zip(spec.segments, ys, strict=True)
    finish = [_bind_epilogue(spec, s, y, residuals, target is not None, weights.get("alpha")) for s, y in parts]
    epilogues = [e for e in finish if e is not None]

    def run(step: StepInputs) -> None:
        p = product(prologue(step))
        for epilogue in epilogues:
            epilogue(p)

    return run


def _is_plain(spec: Linear) -> bool:
    return spec.scale == 1 and not spec.softcap and all(s.activation == "none" for s in spec.segments)


def _bind_prologue(spec: Linear, inputs: Tensors, outputs: Tensors, weights: Tensors, dtype: torch.dtype):
    x, add, total = inputs["x"], inputs.get("add"), outputs.get("sum")
    post_norm = bind_norm(spec.post_norm, weights, "post_norm", dtype)
    norm = bind_norm(spec.norm, weights, "norm", dtype)
    if add is None and spec.post_norm is None and total is None and x.dtype == dtype:
        return (lambda step: x) if spec.norm is None else (lambda step: norm(x))

    def run(step: StepInputs) -> torch.Tensor:
        v = post_norm(x.to(dtype))
        if add is not None:
            v = v + add
        if total is not None:
            total.copy_(v)
        return norm(v)

    return run


def _bind_product(
    spec: Linear,
    weights: Tensors,
    dtype: torch.dtype,
    target: torch.Tensor | None,
    added: torch.Tensor | None,
    rows: int,
    packed: PackedWeights | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """v [rows, K] -> v @ weight.T + bias or + added [rows, N], in `target` if there is one."""
    weight_NK = weights["weight"]
    bias = weights["bias"].to(dtype) if spec.bias else None
    if spec.quantization is not None:
        multiply = bind_int8(spec.quantization, weights)
        return _bind_sum(multiply, bias, target, added)
    pack = packed.onednn(weight_NK, rows) if packed else None
    if pack is not None:
        return _bind_packed(pack, bias, target, added)
    start = bias if added is None else added
    transposed = packed.transposed(weight_NK, rows) if packed else None
    weight_KN = weight_NK.t() if transposed is None else transposed

    def run(v: torch.Tensor) -> torch.Tensor:
        w = weight_KN if weight_KN.dtype == dtype else weight_KN.to(dtype)
        return torch.mm(v, w, out=target) if start is None else torch.addmm(start, v, w, out=target)

    return run


def _bind_packed(
    pack: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor | None, added: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return _bind_sum(lambda v: multiply(v, pack, bias, "none", [], ""), None, target, added)


def _bind_sum(
    multiply: Callable[[torch.Tensor], torch.Tensor],
    bias: torch.Tensor | None,
    target: torch.Tensor | None,
    added: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """multiply(v) + bias or + added, in `target` if there is one."""
    start = bias if added is None else added

    def run(v: torch.Tensor) -> torch.Tensor:
        product = multiply(v)
        if start is not None:
            return torch.add(product, start, out=target)
        return product if target is None else target.copy_(product)

    return run


def _bind_epilogue(
    spec: Linear,
    segment: Segment,
    y: torch.Tensor,
    residuals: list[torch.Tensor],
    in_place: bool,
    alpha: torch.Tensor | None,
):
    """Finish a segment's columns of the product and write them to y, or return None where the product is y as it is.

    The product is y itself or a temporary of the compute type, so working on it in place is free.
    """
    act_ = ACTIVATIONS_.get(segment.activation)
    if segment.activation == "xielu":
        assert alpha is not None
        act_ = lambda x: x.copy_(xielu(x, alpha))  # noqa: E731
    start, stop, half = segment.start, segment.stop, (segment.start + segment.stop) // 2
    scale, cap = spec.scale, spec.softcap
    if in_place and act_ is None and scale == 1 and not cap and not residuals:
        return None
    if segment.gated and scale == 1 and not cap and not residuals and y.dtype == compute_dtype(y):
        return _bind_gate(act_, start, half, stop, y)

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


def _bind_gate(act_: Callable[[torch.Tensor], Any] | None, start: int, half: int, stop: int, y: torch.Tensor):
    def run(product: torch.Tensor) -> None:
        gate = product[:, start:half]
        if act_ is not None:
            act_(gate)
        torch.mul(gate, product[:, half:stop], out=y)

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
