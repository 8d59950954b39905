"""Float64 formulas of the specs in runtime.plan, written apart from every implementation."""

from __future__ import annotations

import math

import torch

from dscompile.runtime.ops_moe import route
from dscompile.runtime.plan import Attention, Embed, Linear, Moe, Norm

Tensors = dict[str, torch.Tensor]

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0).square(),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.log1p(x.exp()),
}


def activation(kind: str, x: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """The activation of a segment; alpha: its linear's, if it has one."""
    if kind != "xielu":
        return ACTIVATIONS[kind](x)
    assert alpha is not None
    p, n, beta, eps = alpha
    return beta * x + torch.where(x > 0, p * x**2, n * (torch.exp(torch.minimum(x, eps)) - 1 - x))


def norm(spec: Norm, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Normalise the last dimension; weight and bias where the spec's flags say so."""
    if spec.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    if spec.weight:
        x = x * weight
    return x + bias if spec.bias else x


def linear(spec: Linear, tensors: Tensors) -> Tensors:
    """Every output of a linear, from tensors by role ("in.x", "w.weight"), in float64."""
    t = {k: v.double() for k, v in tensors.items()}
    v = t["in.x"]
    if spec.post_norm:
        v = norm(spec.post_norm, v, t.get("w.post_norm_weight"), t.get("w.post_norm_bias"))
    if spec.add:
        v = v + t["in.add"]
    outputs = {"out.sum": v} if spec.store else {}
    if spec.norm:
        v = norm(spec.norm, v, t.get("w.norm_weight"), t.get("w.norm_bias"))
    p = product(spec, v, t)
    if spec.bias:
        p = p + t["w.bias"]
    for i, s in enumerate(spec.segments):
        part = p[:, s.start : s.stop]
        if s.gated:
            z = activation(s.activation, part[:, : s.width], t.get("w.alpha")) * part[:, s.width :]
        else:
            z = activation(s.activation, part, t.get("w.alpha"))
        if spec.softcap:
            z = spec.softcap * torch.tanh(z / spec.softcap)
        z = z * spec.scale
        for r in range(spec.residuals):
            z = z + t[f"in.residual{r}"]
        outputs[f"out.y{i}"] = z
    return outputs


def product(spec: Linear, v: torch.Tensor, t: Tensors) -> torch.Tensor:
    """v times the weight; both rounded to integers where the linear is quantized."""
    if spec.quantization is None:
        return v @ t["w.weight"].T
    if spec.quantization.activations == "none":
        return v @ t["w.weight"].T * t["w.weight_scale"]
    largest = v.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    if spec.quantization.activations == "tensor":
        scale = t["w.input_scale"]
    return (v / scale).round().clamp(-127, 127) @ t["w.weight"].T * scale * t["w.weight_scale"]


def moe(spec: Moe, tensors: Tensors) -> torch.Tensor:
    """A mixture of experts in float64, token by token."""
    t = {k: v.double() for k, v in tensors.items()}
    t |= {"in.residual0": t["in.residual0"] * t["in.factor"]} if spec.factor else {}
    y = sum((t[f"in.residual{i}"] for i in range(spec.residuals)), torch.zeros_like(t["in.x"]))
    index, factors = route(t["in.logits"], t.get("w.correction"), spec.router)
    for token, (experts, weights) in enumerate(zip(index.tolist(), factors, strict=True)):
        for e, factor in zip(experts, weights, strict=True):
            v = t["in.x"][token] * (factor if spec.scale_input else 1)
            g, u = (t["w.gate_up"][e] @ v + (t["w.gate_up_bias"][e] if spec.bias else 0)).chunk(2)
            if spec.limit:
                g, u = g.clamp(max=spec.limit), u.clamp(-spec.limit, spec.limit)
            z = ACTIVATIONS[spec.activation](g) * (u + spec.shift)
            out = t["w.down"][e] @ z + (t["w.down_bias"][e] if spec.bias else 0)
            y[token] = y[token] + (out if spec.scale_input else out * factor)
    return y


def embed(spec: Embed, tensors: Tensors, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The embedded tokens in float64."""
    t = {k: v.double() for k, v in tensors.items()}
    y = t["w.table"][tokens.long()] if spec.table else torch.zeros(())
    if spec.position_offset is not None:
        y = y + t["w.positions_table"][positions.long() + spec.position_offset]
    y = y * spec.scale
    return norm(spec.norm, y, t.get("w.norm_weight"), t.get("w.norm_bias")) if spec.norm else y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of the first 2 * cos.shape[-1] columns of heads [T, H, D]; cos, sin [T, half]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def heads(spec: Attention, tensors: Tensors, x: str, positions: torch.Tensor) -> torch.Tensor:
    """q or k as normed and rotated heads [T, H, D], v as normed heads [T, Hkv, Dv]."""
    y = tensors[f"in.{x}"]
    if x == "v":
        y = y.reshape(y.shape[0], spec.num_kv_heads, spec.v_head_dim)
        return (
            y
            if spec.v_norm is None
            else norm(spec.v_norm, y, *(tensors.get(f"w.v_norm_{p}") for p in ("weight", "bias")))
        )
    count, spec_norm = (spec.num_heads, spec.q_norm) if x == "q" else (spec.num_kv_heads, spec.k_norm)
    shape = (y.shape[0], count, spec.head_dim)
    if spec_norm:
        y = y if spec.norm_across_heads else y.reshape(shape)
        own = [tensors.get(f"w.{x}_norm_{part}") for part in ("weight", "bias")]
        own = [torch.ones_like(own[0]), None] if spec.weigh_rotated else own
        own = [w.reshape(shape[1:]) if spec.norm_by_head and w is not None else w for w in own]
        y = norm(spec_norm, y, *own)
    y = y.reshape(shape)
    if spec.rotary_dim:
        y = rotate(y, tensors["w.rope_cos"][positions.long()], tensors["w.rope_sin"][positions.long()])
    return y * tensors[f"w.{x}_norm_weight"].reshape(-1, spec.head_dim) if spec.weigh_rotated else y


def attend(spec: Attention, tensors: Tensors, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last len(q) queries of one sequence against all of its keys: [n, H * Dv]."""
    n, length, group = q.shape[0], k.shape[0], spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(length - n, length)[:, None], torch.arange(length)[None, :]
    scores = torch.einsum("ihd,jhd->hij", q, k) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.alibi:
        scores = scores + tensors["w.alibi_slopes"][:, None, None] * (j - i)
    seen = torch.ones(n, length, dtype=torch.bool)
    if spec.causal:
        seen &= j <= i
    if spec.window:
        seen &= (j > i - spec.window) & (j < i + spec.window)
    if spec.chunk:
        seen &= j // spec.chunk == i // spec.chunk
    scores = scores.masked_fill(~seen, float("-inf"))
    if spec.sinks:
        sink = tensors["w.sinks"][:, None, None].expand(-1, n, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).reshape(n, -1)
