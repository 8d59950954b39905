"""The torch reference of `plan.Attention`: rotate, append to the paged cache, attend through the block table.

T: tokens.  B: sequences.  H, Hkv: heads of q and of k, v.  G = H / Hkv.  D, Dv: head widths.  S: keys gathered.
A step in which every sequence has one token is one batched product; otherwise sequences are attended one by one.
Indices and masks are made once per step and KV group and shared by the group's layers through `StepInputs.cache`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dscompile.runtime.executor import StepInputs
from dscompile.runtime.kv_cache import KVPool, first_visible
from dscompile.runtime.ops_norm import bind_norm, compute_dtype
from dscompile.runtime.plan import Attention, KVGroup

MAX_SCORES = 1 << 25
NEVER = float("-inf")


def bind_attention(
    spec: Attention,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    pool: KVPool,
) -> Callable[[StepInputs], None]:
    """Prepare the step. Roles as in plan.Attention; `pool` is that of spec.group."""
    dtype = compute_dtype(inputs["q"])
    prepare = _bind_prepare(spec, inputs, weights, dtype)
    attend = _Attend(spec, weights, dtype)
    layer = _LayerCache(pool, spec.index, dtype)
    y = outputs["y"].view(-1, spec.num_heads, spec.v_head_dim)
    v = inputs["v"].view(-1, spec.num_kv_heads, spec.v_head_dim)

    def run(step: StepInputs) -> None:
        q, k = prepare(step)
        layer.append(step, spec.group, k, v)
        for queries, keys in _key_ranges(step, spec, layer.pool):
            attend(q[queries], *layer.gather(keys), keys, y[queries])

    return run


# ---------------------------------------------------------------- q and k


def _bind_prepare(spec: Attention, inputs, weights, dtype: torch.dtype):
    """q [T, H, D] and k [T, Hkv, D] after their norms and the rotary embedding."""
    q_norm, k_norm = (
        bind_norm(n, weights, role, dtype) for n, role in ((spec.q_norm, "q_norm"), (spec.k_norm, "k_norm"))
    )
    heads = (-1, spec.num_heads, spec.head_dim)
    kv_heads = (-1, spec.num_kv_heads, spec.head_dim)
    q, k = inputs["q"], inputs["k"]
    if not spec.norm_across_heads:
        q, k = q.view(heads), k.view(kv_heads)
    rotate = _bind_rotate(spec, weights, dtype) if spec.rotary_dim else lambda x, step: x

    def run(step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        rotated_q = rotate(q_norm(q.to(dtype)).view(heads), step)
        return rotated_q, rotate(k_norm(k.to(dtype)).view(kv_heads), step)

    return run


def _bind_rotate(spec: Attention, weights, dtype: torch.dtype):
    cos, sin, width = weights["rope_cos"], weights["rope_sin"], spec.rotary_dim
    key = ("rope", cos.data_ptr(), width)

    def run(x: torch.Tensor, step: StepInputs) -> torch.Tensor:
        if key not in step.cache:
            c, s = cos[step.positions].to(dtype), sin[step.positions].to(dtype)
            step.cache[key] = torch.cat((c, c), -1).unsqueeze(1), torch.cat((-s, s), -1).unsqueeze(1)
        c, s = step.cache[key]
        part = x[..., :width]
        rotated = torch.addcmul(part * c, part.roll(width // 2, -1), s)
        return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), -1)

    return run


# ---------------------------------------------------------------- the paged cache


class _LayerCache:
    """One layer's part of a pool as a matrix of rows [., page * g] and of cells [., g], g = gcd(D, Dv).

    A (block, head) of K is D / g whole rows, one token of it D / g cells; likewise V. So appending and gathering are
    one indexed copy of contiguous pieces each, and the indices are the same for every layer of the group.
    """

    def __init__(self, pool: KVPool, layer: int, dtype: torch.dtype) -> None:
        group = pool.group
        self.pool, self.dtype = pool, dtype
        unit = math.gcd(group.head_dim, group.v_head_dim)
        start = layer * (pool.data.shape[1] // group.num_layers)
        flat = pool.data.view(-1)[start:]
        self.cells = flat.view(-1, unit)
        self.rows = flat.view(-1, unit * pool.page_size)

    def append(self, step: StepInputs, group: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] to the step's slots."""
        key = ("append", group)
        if key not in step.cache:
            step.cache[key] = _append_indices(self.pool, step.slots[group])
        k_cells, v_cells, kept = step.cache[key]
        if kept is not None:
            k, v = k[kept], v[kept]
        unit, dtype = self.cells.shape[1], self.cells.dtype
        self.cells.index_copy_(0, k_cells, k.reshape(-1, unit).to(dtype))
        self.cells.index_copy_(0, v_cells, v.reshape(-1, unit).to(dtype))

    def gather(self, keys: _Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """k [n * Hkv, S, D] and v [n * Hkv, S, Dv] of n sequences, copied out of their blocks."""
        group = self.pool.group
        found = self.rows.index_select(0, keys.rows).to(self.dtype)
        k = found[: keys.num_k_rows].view(keys.num * group.num_kv_heads, -1, group.head_dim)
        v = found[keys.num_k_rows :].view(keys.num * group.num_kv_heads, -1, group.v_head_dim)
        return k[:, : keys.length], v[:, : keys.length]


def _units(group: KVGroup) -> tuple[int, int, int]:
    """(D / g, Dv / g, cells of one token in all layers of a block)."""
    unit = math.gcd(group.head_dim, group.v_head_dim)
    k, v = group.head_dim // unit, group.v_head_dim // unit
    return k, v, group.num_layers * group.num_kv_heads * (k + v)


def _append_indices(pool: KVPool, slots: torch.Tensor):
    """Cells of k and of v that the slots [T] name, and which tokens are written (None: all)."""
    kept = None
    if bool((slots < 0).any()):
        kept = (slots >= 0).nonzero()[:, 0]
        slots = slots[kept]
    page, heads = pool.page_size, pool.group.num_kv_heads
    num_k, num_v, per_token = _units(pool.group)
    block, offset = (slots // page).view(-1, 1, 1), (slots % page).view(-1, 1, 1)
    head, base = torch.arange(heads).view(1, -1, 1), block * (per_token * page)
    k = base + head * (num_k * page) + offset * num_k + torch.arange(num_k)
    v = base + (heads * num_k + head * num_v) * page + offset * num_v + torch.arange(num_v)
    return k.flatten(), v.flatten(), kept


# ---------------------------------------------------------------- which keys a query sees


@dataclass
class _Keys:
    """The keys of `num` sequences that attend together: where they lie, and what is added to their scores.

    rows: of the layer's row matrix, K's then V's; length: S.
    positions: [num, 1, S] of the keys, q_positions: [num, L, 1]; hidden: [num, L, S] bool, or None if all is visible.
    causal: the mask is exactly the causal one of L = S. bias: ALiBi and mask as added to scores, by slopes.
    """

    num: int
    rows: torch.Tensor
    num_k_rows: int
    length: int
    positions: torch.Tensor
    q_positions: torch.Tensor
    hidden: torch.Tensor | None
    causal: bool
    bias: dict[Any, torch.Tensor | None]


def _key_ranges(step: StepInputs, spec: Attention, pool: KVPool) -> list[tuple[slice, _Keys]]:
    """Slices of T that attend together, with their keys."""
    key = ("keys", spec.group, spec.window, spec.chunk, spec.causal)
    if key not in step.cache:
        starts, num = step.starts, len(step.contexts)
        if starts[-1] == num:
            parts = [(0, num)]
        else:
            parts = [(i, i + 1) for i in range(num) if starts[i + 1] > starts[i]]
        step.cache[key] = [(slice(starts[a], starts[b]), _make_keys(step, spec, pool, a, b)) for a, b in parts]
    return step.cache[key]


def _make_keys(step: StepInputs, spec: Attention, pool: KVPool, first: int, last: int) -> _Keys:
    """Keys of the sequences [first, last), which all have the same number of new tokens."""
    page, num = pool.page_size, last - first
    queries = slice(step.starts[first], step.starts[last])
    contexts = step.contexts[first:last]
    new = (queries.stop - queries.start) // num
    visible = KVGroup(0, 0, 0, 0, "", spec.window, spec.chunk)
    first_block = min(first_visible(visible, c - new) for c in contexts) // page if spec.causal else 0
    first_block, stop = max(first_block, 0), max(contexts)
    table = step.block_tables[spec.group][first:last, first_block : -(-stop // page)]
    length = stop - first_block * page
    positions = torch.arange(first_block * page, stop).view(1, 1, -1)
    q_positions = step.positions[queries].view(num, new, 1)
    rows, num_k_rows = _row_indices(pool, table)
    hidden = _hidden(spec, positions, q_positions, step.context_lens[first:last], contexts)
    square = spec.causal and num == 1 and new == length and not spec.window and not spec.chunk
    return _Keys(num, rows, num_k_rows, length, positions, q_positions, hidden, square, {})


def _row_indices(pool: KVPool, table: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows of K then of V, each [B, Hkv, blocks, D / g], for a block table [B, blocks]."""
    heads = pool.group.num_kv_heads
    num_k, num_v, per_token = _units(pool.group)
    base = (table * per_token).view(table.shape[0], 1, -1, 1)
    head = torch.arange(heads).view(1, -1, 1, 1)
    k = (base + head * num_k + torch.arange(num_k)).flatten()
    v = (base + (heads * num_k + head * num_v) + torch.arange(num_v)).flatten()
    return torch.cat((k, v)), k.numel()


def _hidden(spec: Attention, j: torch.Tensor, i: torch.Tensor, context_lens: torch.Tensor, contexts: list[int]):
    if i.shape[1] == 1 and len(contexts) == 1 and not spec.chunk and (not spec.window or j.shape[-1] <= spec.window):
        return None
    hidden = j > i if spec.causal else j >= context_lens.view(-1, 1, 1)
    if spec.window:
        hidden = hidden | (j <= i - spec.window)
    if spec.chunk:
        hidden = hidden | (j // spec.chunk != i // spec.chunk)
    return hidden


# ---------------------------------------------------------------- attend


class _Attend:
    """softmax(softcap(scale * q k^T) + bias) v for one layer's heads."""

    def __init__(self, spec: Attention, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.group = spec.num_heads // spec.num_kv_heads
        self.slopes = weights["alibi_slopes"].to(dtype) if spec.alibi else None
        self.slopes_key = weights["alibi_slopes"].data_ptr() if spec.alibi else 0
        self.sinks = weights["sinks"].to(dtype) if spec.sinks else None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _Keys, y: torch.Tensor) -> None:
        """q [n * L, H, D], k [n * Hkv, S, D], v [n * Hkv, S, Dv] -> y [n * L, H, Dv]"""
        if len(q) == keys.num:
            self._decode(q, k, v, keys, y)
        else:
            self._prefill(q, k, v, keys, y)

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _Keys, y: torch.Tensor) -> None:
        q = q.reshape(k.shape[0], self.group, -1)
        key = (self.slopes_key, self.spec.num_heads)
        if key not in keys.bias:
            bias = self._bias(keys)
            if bias is not None:
                bias = bias.expand(keys.num, self.spec.num_heads, 1, keys.length).reshape(k.shape[0], self.group, -1)
            keys.bias[key] = bias
        y.copy_(self._product(q, k, v, keys.bias[key]).view(y.shape))

    def _prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _Keys, y: torch.Tensor) -> None:
        """One sequence, queries in pieces that bound the memory of the scores."""
        step = max(1, MAX_SCORES // (self.spec.num_heads * keys.length))
        if keys.causal and not self.spec.alibi and not self.spec.softcap and self.sinks is None:
            q, k, v = q.transpose(0, 1)[None], k[None], v[None]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.spec.scale, enable_gqa=self.group > 1
            )
            y.copy_(out[0].transpose(0, 1))
            return
        bias = self._bias(keys)
        heads_kv, length = k.shape[0], len(q)
        q = q.view(length, heads_kv, self.group, -1).permute(1, 2, 0, 3)
        for a in range(0, length, step):
            part = q[:, :, a : a + step]
            rows = part.shape[2]
            piece = None
            if bias is not None:
                piece = bias[0, :, a : a + step].expand(self.spec.num_heads, rows, keys.length)
                piece = piece.reshape(heads_kv, self.group * rows, -1)
            out = self._product(part.reshape(heads_kv, self.group * rows, -1), k, v, piece)
            y[a : a + step].view(rows, heads_kv, self.group, -1).copy_(
                out.view(heads_kv, self.group, rows, -1).permute(2, 0, 1, 3)
            )

    def _product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """q [n, M, D], k [n, S, D], v [n, S, Dv], bias [n, M, S] -> [n, M, Dv]; M: heads of a group, then rows."""
        scale, cap = self.spec.scale, self.spec.softcap
        if cap:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale / cap).tanh_().mul_(cap)
            scores = scores if bias is None else scores.add_(bias)
        elif bias is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        else:
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        if self.sinks is None:
            return torch.bmm(scores.softmax(-1), v)
        return torch.bmm(torch.cat((scores, self._sink_column(scores)), -1).softmax(-1)[..., :-1], v)

    def _sink_column(self, scores: torch.Tensor) -> torch.Tensor:
        num, rows, _ = scores.shape
        assert self.sinks is not None
        sinks = self.sinks.view(1, self.spec.num_kv_heads, self.group, 1)
        sinks = sinks.expand(num // self.spec.num_kv_heads, -1, -1, rows // self.group)
        return sinks.reshape(num, rows, 1)

    def _bias(self, keys: _Keys) -> torch.Tensor | None:
        """What is added to the scores: [n, 1 or H, L, S] in the compute type, or None."""
        if self.slopes_key not in keys.bias:
            bias = None
            if self.slopes is not None:
                distance = (keys.positions - keys.q_positions).to(self.dtype)
                bias = distance[:, None] * self.slopes.view(1, -1, 1, 1)
            if keys.hidden is not None:
                bias = torch.zeros((), dtype=self.dtype) if bias is None else bias
                bias = bias.masked_fill(keys.hidden[:, None], NEVER)
            keys.bias[self.slopes_key] = bias
        return keys.bias[self.slopes_key]
