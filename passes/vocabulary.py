"""The closed vocabulary of the normalised graph, and the opaque operators that tracing leaves behind.

Traced graphs hold `dsc::attention` and `dsc::moe` among ATen operators. Normalised graphs hold the plain functions
below (call_function targets), each with a torch reference, so a graph runs at every level.
Activations keep tracing's leading dimension of 1: [1, T, features].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dscompile.runtime.ops_linear import xielu
from dscompile.runtime.ops_moe import gate as moe_gate
from dscompile.runtime.ops_moe import route
from dscompile.runtime.plan import Activation, Moe, Norm, Router
from dscompile.runtime.plan import Attention as AttentionSpec


@torch.library.custom_op("dsc::attention", mutates_args=())
def traced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Sequence[float] | None = None,
) -> Tensor:
    """Attention over the tokens of one sequence, as tracing sees it.

    q [1, Hq, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv], positions [1, T] -> [1, T, Hq, Dv].
    The rules of visibility and scoring are those of `plan.Attention`.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = positions[:, None, :, None], positions[:, None, None, :]
    if alibi is not None:
        scores = scores + torch.tensor(alibi, dtype=scores.dtype).view(1, -1, 1, 1) * (j - i)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        visible &= j <= i
    if window:
        visible &= (j > i - window) & (j < i + window)
    if chunk:
        visible &= j // chunk == i // chunk
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous()


@traced_attention.register_fake
def _(q, k, v, positions, layer, scale, causal=True, window=0, chunk=0, softcap=0.0, sinks=None, alibi=None):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("dsc::moe", mutates_args=())
def traced_moe(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float,
    shift: float,
    transposed: bool,
    interleaved: bool,
    scale_input: bool,
) -> Tensor:
    """The experts of a layer, as tracing sees them: x [T, K], index and weights [T, k] -> [T, K].

    gate_up [E, 2 F, K] and down [E, K, F], or each transposed; gate and up rows one after the other, or alternating if
    `interleaved`. The rest is that of `plan.Moe`.
    """
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    spec = Moe(0, 0, Router(len(down), 1, "none", False), activation, limit, shift)  # type: ignore[arg-type]
    y = torch.zeros_like(x)
    for token, (experts, factors) in enumerate(zip(index.tolist(), weights, strict=True)):
        for e, factor in zip(experts, factors, strict=True):
            v = x[token] * factor if scale_input else x[token]
            product = F.linear(v, gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
            if interleaved:
                product = torch.cat([product[::2], product[1::2]])
            out = F.linear(moe_gate(spec, product), down[e], None if down_bias is None else down_bias[e])
            y[token] += out if scale_input else out * factor
    return y


@traced_moe.register_fake
def _(x, index, weights, gate_up, down, gate_up_bias, down_bias, *_):
    return torch.empty_like(x)


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """[1, T] int64, [V, D] -> [1, T, D]"""
    return F.embedding(tokens, table)


def position_embedding(positions: Tensor, table: Tensor, offset: int) -> Tensor:
    """[1, T] int64, [P, D] -> [1, T, D], row position + offset"""
    return F.embedding(positions + offset, table)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[1, T, K], [N, K], [N] -> [1, T, N]"""
    return F.linear(x, weight, bias)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Norm) -> Tensor:
    """Normalise the last dimension, see `plan.Norm`."""
    if spec.kind == "rms":
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    else:
        y = F.layer_norm(x, x.shape[-1:], eps=spec.eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Norm, groups: int) -> Tensor:
    """[1, T, groups * P], [P], [P] -> [1, T, groups * P], each group of columns normalised by itself."""
    return norm(x.unflatten(-1, (groups, -1)), weight, bias, spec).flatten(-2)


def activation(x: Tensor, kind: Activation, alpha: Tensor | None = None) -> Tensor:
    """Element by element. alpha: what the layer learned for it, see `plan.Linear`."""
    return ACTIVATIONS[kind](x) if alpha is None else xielu(x, alpha)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)"""
    return cap * torch.tanh(x / cap)


def scale(x: Tensor, by: float) -> Tensor:
    """x * by"""
    return x * by


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y"""
    return x + y


def mul(x: Tensor, y: Tensor) -> Tensor:
    """x * y"""
    return x * y


def columns(x: Tensor, start: int, stop: int) -> Tensor:
    """x[..., start:stop]"""
    return x[..., start:stop]


def repeat_columns(x: Tensor, times: int) -> Tensor:
    """[1, T, N] -> [1, T, N * times], each column `times` times in a row"""
    return x.repeat_interleave(times, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    weights: dict[str, Tensor],
    spec: AttentionSpec,
    gate: Tensor | None = None,
) -> Tensor:
    """[1, T, Hq * D], [1, T, Hkv * D], [1, T, Hkv * Dv] -> [1, T, Hq * Dv], see `plan.Attention`."""
    q, k = (
        _positioned(x, n, role, positions, weights, spec)
        for x, n, role in ((q, spec.num_heads, "q_norm"), (k, spec.num_kv_heads, "k_norm"))
    )
    v = _heads(v, spec.num_kv_heads)
    if spec.v_norm is not None:
        v = norm(v, weights.get("v_norm_weight"), weights.get("v_norm_bias"), spec.v_norm)
    slopes = weights["alibi_slopes"].tolist() if spec.alibi else None
    y = traced_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        positions,
        spec.index,
        spec.scale,
        spec.causal,
        spec.window,
        spec.chunk,
        spec.softcap,
        weights.get("sinks"),
        slopes,
    )
    if gate is not None:
        y = y * gate.view(*y.shape[:3], -1)
    return y.flatten(2)


def moe(
    x: Tensor,
    logits: Tensor,
    residuals: tuple[Tensor, ...],
    weights: dict[str, Tensor],
    spec: Moe,
    factor: Tensor | None = None,
) -> Tensor:
    """[1, T, K], [1, T, num_experts], [1, T, K] each, factor [1, T, 1] -> [1, T, K], see `plan.Moe`."""
    index, factors = route(logits[0], weights.get("correction"), spec.router)
    y = traced_moe(
        x[0],
        index,
        factors,
        weights["gate_up"],
        weights["down"],
        weights.get("gate_up_bias"),
        weights.get("down_bias"),
        spec.activation,
        spec.limit,
        spec.shift,
        False,
        False,
        spec.scale_input,
    )
    if factor is not None:
        residuals = (residuals[0] * factor, *residuals[1:])
    return sum(residuals, y[None])


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def _positioned(
    x: Tensor, num_heads: int, role: str, positions: Tensor, weights: dict[str, Tensor], spec: AttentionSpec
) -> Tensor:
    """Heads of q or k after their norm `role` and the rotation."""
    y = _rotate(_head_norm(_heads(x, num_heads), weights, role, spec), positions, weights, spec)
    weight = weights.get(f"{role}_weight")
    if weight is None or not spec.weigh_rotated:
        return y
    return y * (weight.view(y.shape[-2:]) if spec.norm_across_heads or spec.norm_by_head else weight)


def _head_norm(x: Tensor, weights: dict[str, Tensor], role: str, spec: AttentionSpec) -> Tensor:
    rule = getattr(spec, role)
    if rule is None:
        return x
    weight, bias = weights.get(f"{role}_weight"), weights.get(f"{role}_bias")
    if spec.weigh_rotated:
        weight = None
    if spec.norm_across_heads:
        return norm(x.flatten(-2), weight, bias, rule).view(x.shape)
    by_head = spec.norm_by_head
    weight, bias = (w.view(x.shape[-2:]) if by_head and w is not None else w for w in (weight, bias))
    return norm(x, weight, bias, rule)


def _rotate(x: Tensor, positions: Tensor, weights: dict[str, Tensor], spec: AttentionSpec) -> Tensor:
    if not spec.rotary_dim:
        return x
    half = spec.rotary_dim // 2
    cos, sin = (weights[name][positions][:, :, None] for name in ("rope_cos", "rope_sin"))
    x1, x2, rest = x[..., :half], x[..., half : spec.rotary_dim], x[..., spec.rotary_dim :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}
