"""The torch reference of `plan.Attention`: rotate, append to the paged cache, attend through the block table.

T: tokens.  B: sequences.  H, Hkv: heads of q and of k, v.  G = H / Hkv.  D, Dv: head widths.  S: keys gathered.
A step in which every sequence has one token is one batched product; otherwise sequences are attended one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dscompile.runtime.executor import StepInputs
from dscompile.runtime.kv_cache import KVPool
from dscompile.runtime.ops_linear import join_columns
from dscompile.runtime.ops_norm import bind_norm, compute_dtype
from dscompile.runtime.ops_paged import Int8LayerCache, Keys, LayerCache, bind_cache, key_ranges, whole_sequences
from dscompile.runtime.plan import Attention

Tensors = dict[str, torch.Tensor]
Prepare = Callable[[StepInputs], tuple[torch.Tensor, torch.Tensor]]

MAX_SCORES = 1 << 25
NEVER = float("-inf")


def bind_attention(
    spec: Attention, inputs: Tensors, outputs: Tensors, weights: Tensors, pool: KVPool | None
) -> Callable[[StepInputs], None]:
    """Prepare the step. Roles as in plan.Attention; `pool` is that of spec.group, None for whole sequences."""
    dtype = compute_dtype(inputs["q"])
    attend = _Attend(spec, weights, dtype)
    y = outputs["y"]
    y_heads = y.view(-1, spec.num_heads, spec.v_head_dim)
    y_groups = None
    if y.is_contiguous() and y.dtype == dtype:
        y_groups = y.view(-1, spec.num_heads // spec.num_kv_heads, spec.v_head_dim)
    gate = inputs["gate"].view(len(y), spec.num_heads, -1) if spec.gate != "none" else None
    if pool is None:
        prepare, values = _bind_prepare(spec, inputs, weights, dtype), _bind_values(spec, inputs, weights, dtype)
        return _bind_whole(prepare, values, attend, y_heads, gate)
    layer = bind_cache(pool, spec.group, spec.index, dtype)
    queries = _bind_append(spec, inputs, weights, dtype, layer)

    def run(step: StepInputs) -> None:
        q = queries(step)
        for keys in key_ranges(step, spec, pool):
            k_found, v_found = layer.gather(keys)
            if keys.num == len(q):
                attend.decode(q, k_found, v_found, keys, y_heads, y_groups)
            else:
                attend.prefill(q[keys.queries], k_found, v_found, keys, y_heads[keys.queries])
        if gate is not None:
            y_heads.mul_(gate)

    return run


def _bind_append(
    spec: Attention, inputs: Tensors, weights: Tensors, dtype: torch.dtype, layer: LayerCache | Int8LayerCache
) -> Callable[[StepInputs], torch.Tensor]:
    """Append k and v to the cache, unless an earlier step has, and return q [T, H, D]."""
    if not spec.appends:
        return _bind_operand(spec, inputs["q"], "q_norm", weights, dtype)
    prepare, values = _bind_prepare(spec, inputs, weights, dtype), _bind_values(spec, inputs, weights, dtype)

    def run(step: StepInputs) -> torch.Tensor:
        q, k = prepare(step)
        layer.append(step, k, values())
        return q

    return run


def _bind_whole(
    prepare: Prepare, values: Callable[[], torch.Tensor], attend: _Attend, y: torch.Tensor, gate: torch.Tensor | None
) -> Callable[[StepInputs], None]:
    """Attention without a cache: each sequence's keys are those of this step. values: v [T, Hkv, Dv]; y [T, H, Dv]."""

    def run(step: StepInputs) -> None:
        q, k = prepare(step)
        v = values()
        for keys in whole_sequences(step, attend.spec):
            rows = keys.queries
            attend.prefill(q[rows], k[rows].transpose(0, 1), v[rows].to(q.dtype).transpose(0, 1), keys, y[rows])
        if gate is not None:
            y.mul_(gate)

    return run


# ---------------------------------------------------------------- q, k and v


def _bind_values(spec: Attention, inputs: Tensors, weights: Tensors, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """v [T, Hkv, Dv] after its norm."""
    v = inputs["v"].view(-1, spec.num_kv_heads, spec.v_head_dim)
    if spec.v_norm is None:
        return lambda: v
    norm = bind_norm(spec.v_norm, weights, "v_norm", dtype)
    return lambda: norm(v.to(dtype))


def _bind_prepare(spec: Attention, inputs: Tensors, weights: Tensors, dtype: torch.dtype) -> Prepare:
    """q [T, H, D] and k [T, Hkv, D] after their norms and the rotary embedding."""
    q, k = inputs["q"], inputs["k"]
    joined = join_columns([q, k]) if spec.q_norm is None and spec.k_norm is None else None
    if joined is not None and q.dtype == dtype:
        rotate = _bind_rotate(spec, weights, dtype)
        both, split = joined.view(-1, spec.num_heads + spec.num_kv_heads, spec.head_dim), spec.num_heads

        def run_joined(step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
            rotated = rotate(both, step)
            return rotated[:, :split], rotated[:, split:]

        return run_joined
    queries, keys = (_bind_operand(spec, x, role, weights, dtype) for x, role in ((q, "q_norm"), (k, "k_norm")))
    return lambda step: (queries(step), keys(step))


def _bind_operand(
    spec: Attention, x: torch.Tensor, role: str, weights: Tensors, dtype: torch.dtype
) -> Callable[[StepInputs], torch.Tensor]:
    """q or k [T, n * D] as heads [T, n, D], after its norm `role` and the rotary embedding."""
    heads = (len(x), -1, spec.head_dim)
    norm, weigh = (bind(spec, weights, role, dtype) for bind in (_bind_head_norm, _bind_weigh_rotated))
    rotate = _bind_rotate(spec, weights, dtype)
    x = x if spec.norm_across_heads else x.view(heads)
    return lambda step: weigh(rotate(norm(x.to(dtype)).view(heads), step))


def _bind_head_norm(spec: Attention, weights: Tensors, role: str, dtype: torch.dtype):
    """The norm of q or k: of whole rows, or of heads [T, n, D] whose weights are shared or their own."""
    norm = getattr(spec, role)
    if norm is not None and spec.weigh_rotated:
        return bind_norm(dataclasses.replace(norm, weight=False), {}, role, dtype)
    if norm is None or not spec.norm_by_head:
        return bind_norm(norm, weights, role, dtype)
    bare = bind_norm(dataclasses.replace(norm, weight=False, bias=False), {}, role, dtype)
    weight, bias = (
        weights[f"{role}_{part}"].to(dtype).view(-1, spec.head_dim) if getattr(norm, part) else None
        for part in ("weight", "bias")
    )

    def run(x: torch.Tensor) -> torch.Tensor:
        y = bare(x)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return run


def _bind_weigh_rotated(spec: Attention, weights: Tensors, role: str, dtype: torch.dtype):
    """Rotated heads [T, n, D] times the weights of their norm, where those come after the rotation."""
    norm = getattr(spec, role)
    if norm is None or not norm.weight or not spec.weigh_rotated:
        return lambda x: x
    weight = weights[f"{role}_weight"].to(dtype)
    weight = weight.view(-1, spec.head_dim) if spec.norm_across_heads or spec.norm_by_head else weight
    return lambda x: x * weight


def _bind_rotate(spec: Attention, weights: Tensors, dtype: torch.dtype):
    """x [T, n, D] -> x * cos + swapped(x) * sin, where `swapped` exchanges the halves of the rotated columns."""
    width, rest = spec.rotary_dim, spec.head_dim - spec.rotary_dim
    if not width:
        return lambda x, step: x
    cos, sin = weights["rope_cos"], weights["rope_sin"]
    key = ("rope", cos.data_ptr(), width, spec.head_dim)
    half = width // 2
    order = torch.cat((torch.arange(half, width), torch.arange(half), torch.arange(width, spec.head_dim)))

    def run(x: torch.Tensor, step: StepInputs) -> torch.Tensor:
        table = step.cache.get(key)
        if table is None:
            c, s = cos[step.positions].to(dtype), sin[step.positions].to(dtype)
            one, zero = c.new_ones(len(c), rest), c.new_zeros(len(c), rest)
            table = torch.cat((c, c, one), -1).unsqueeze(1), torch.cat((-s, s, zero), -1).unsqueeze(1)
            step.cache[key] = table
        swapped = x.index_select(-1, order) if rest else x.roll(half, -1)
        return torch.addcmul(x * table[0], swapped, table[1])

    return run


# ---------------------------------------------------------------- attend


class _Attend:
    """softmax(softcap(scale * q k^T) + bias) v for one layer's heads."""

    def __init__(self, spec: Attention, weights: Tensors, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.group = spec.num_heads // spec.num_kv_heads
        self.slopes = weights["alibi_slopes"].to(dtype) if spec.alibi else None
        self.sinks = weights["sinks"].to(dtype) if spec.sinks else None
        # Layers with the same slopes share their bias.
        self.bias_key = weights["alibi_slopes"].data_ptr() if spec.alibi else 0
        self.zero = torch.zeros((), dtype=dtype)

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: Keys,
        y: torch.Tensor,
        y_groups: torch.Tensor | None,
    ) -> None:
        """One token each: q [B, H, D], k [B * Hkv, S, D], v [B * Hkv, S, Dv] -> y [B, H, Dv] or [B * Hkv, G, Dv]."""
        key = (self.bias_key, self.spec.num_heads)
        if key not in keys.cache:
            bias = self._bias(keys)
            if bias is not None:
                bias = bias.expand(keys.num, self.spec.num_heads, 1, -1).reshape(k.shape[0], self.group, -1)
            keys.cache[key] = bias
        q = q.reshape(k.shape[0], self.group, -1)
        found = self._product(q, k, v, keys.cache[key], y_groups)
        if y_groups is None:
            y.copy_(found.view(y.shape))

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys, y: torch.Tensor) -> None:
        """One sequence: q [L, H, D], k [Hkv, S, D], v [Hkv, S, Dv] -> y [L, H, Dv]."""
        spec, length, num_kv = self.spec, len(q), k.shape[0]
        if keys.square and not spec.alibi and not spec.softcap and self.sinks is None:
            k, v = k[None, :, : keys.length], v[None, :, : keys.length]
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], k, v, is_causal=spec.causal, scale=spec.scale, enable_gqa=self.group > 1
            )
            y.copy_(out[0].transpose(0, 1))
            return
        bias = self._bias(keys)
        q = q.view(length, num_kv, self.group, -1).permute(1, 2, 0, 3)
        # In pieces of queries, to bound the memory of the scores.
        size = max(1, MAX_SCORES // (spec.num_heads * k.shape[1]))
        for a in range(0, length, size):
            part = q[:, :, a : a + size]
            rows, piece = part.shape[2], None
            if bias is not None:
                piece = bias[0, :, a : a + size].expand(spec.num_heads, rows, -1)
                piece = piece.reshape(num_kv, self.group * rows, -1)
            out = self._product(part.reshape(num_kv, self.group * rows, -1), k, v, piece)
            out = out.view(num_kv, self.group, rows, -1).permute(2, 0, 1, 3)
            y[a : a + size].view(rows, num_kv, self.group, -1).copy_(out)

    def _product(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [n, M, D], k [n, S, D], v [n, S, Dv], bias [n, M, S] -> [n, M, Dv]; M: heads of a group, then rows."""
        cap, k = self.spec.softcap, k.transpose(1, 2)
        if cap:
            scores = torch.bmm(q, k).mul_(self.spec.scale / cap).tanh_().mul_(cap)
            scores = scores if bias is None else scores.add_(bias)
        elif bias is None:
            scores = torch.bmm(q, k).mul_(self.spec.scale)
        else:
            scores = torch.baddbmm(bias, q, k, alpha=self.spec.scale)
        if self.sinks is None:
            shares = torch.softmax(scores, -1)
        else:
            shares = torch.cat((scores, self._sink_column(scores)), -1).softmax(-1)[..., :-1]
        return torch.bmm(shares, v) if out is None else torch.bmm(shares, v, out=out)

    def _sink_column(self, scores: torch.Tensor) -> torch.Tensor:
        num, rows, _ = scores.shape
        assert self.sinks is not None
        sinks = self.sinks.view(1, self.spec.num_kv_heads, self.group, 1)
        sinks = sinks.expand(num // self.spec.num_kv_heads, -1, -1, rows // self.group)
        return sinks.reshape(num, rows, 1)

    def _bias(self, keys: Keys) -> torch.Tensor | None:
        """What is added to the scores: [n, 1 or H, L, S] in the compute type, or None."""
        key = ("bias", self.bias_key)
        if key not in keys.cache:
            bias = None
            if self.slopes is not None:
                distance = (keys.positions - keys.q_positions).to(self.dtype)
                bias = distance[:, None] * self.slopes.view(1, -1, 1, 1)
            if keys.hidden is not None:
                bias = (self.zero if bias is None else bias).masked_fill(keys.hidden[:, None], NEVER)
            keys.cache[key] = bias
        return keys.cache[key]
