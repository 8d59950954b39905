"""The paged cache as the CPU's attention uses it: where keys and values lie, and which of them a query sees.

T: tokens.  B: sequences.  Hkv: heads of k and v.  D, Dv: their widths.  S: keys gathered, whole pages.
Indices and masks are made once per step and KV group and shared by the group's layers through `StepInputs.cache`;
row indices live as long as the block tables do, in `StepInputs.table_cache`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dscompile.runtime.executor import StepInputs
from dscompile.runtime.int8 import quantize_rows
from dscompile.runtime.kv_cache import KVPool, first_visible
from dscompile.runtime.plan import Attention, KVGroup


class LayerCache:
    """One layer's part of a pool as a matrix of rows [., page * g] and of cells [., g], g = gcd(D, Dv).

    A (block, head) of K is D / g whole rows, one token of it D / g cells; likewise V. So appending and gathering are
    one indexed copy of contiguous pieces each, and the indices are the same for every layer of the group.
    """

    def __init__(self, pool: KVPool, group: int, layer: int, dtype: torch.dtype) -> None:
        shape = pool.group
        self.pool, self.group, self.dtype = pool, group, dtype
        unit = math.gcd(shape.head_dim, shape.v_head_dim)
        flat = pool.data.view(-1)[layer * (pool.data.shape[1] // shape.num_layers) :]
        self.cells = flat.view(-1, unit)
        self.rows = flat.view(-1, unit * pool.page_size)
        self._stored = pool.data.dtype
        self._k_shape = (shape.num_kv_heads, -1, shape.head_dim)
        self._v_shape = (shape.num_kv_heads, -1, shape.v_head_dim)

    def append(self, step: StepInputs, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] to the step's slots."""
        key = ("append", self.group)
        if key not in step.cache:
            step.cache[key] = _append_indices(self.pool, step.slots[self.group])
        k_cells, v_cells, kept = step.cache[key]
        if kept is not None:
            k, v = k[kept], v[kept]
        unit = self.cells.shape[1]
        k, v = k.reshape(-1, unit), v.reshape(-1, unit)
        if self._stored != self.dtype:
            k, v = k.to(self._stored), v.to(self._stored)
        self.cells.index_copy_(0, k_cells, k)
        self.cells.index_copy_(0, v_cells, v)

    def gather(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """k [n * Hkv, S, D] and v [n * Hkv, S, Dv] of n sequences, copied out of their blocks."""
        found = self.rows.index_select(0, keys.rows)
        if self._stored != self.dtype:
            found = found.to(self.dtype)
        (heads, _, wide), (_, _, v_wide) = self._k_shape, self._v_shape
        count = keys.num_k_rows
        return found[:count].view(keys.num * heads, -1, wide), found[count:].view(keys.num * heads, -1, v_wide)


class Int8LayerCache:
    """The same for an int8 group: what is appended is quantized, what is gathered is multiplied by its scales."""

    def __init__(self, pool: KVPool, group: int, layer: int, dtype: torch.dtype) -> None:
        self.group, self.dtype, self.page = group, dtype, pool.page_size
        self._k = pool.keys[layer], pool.k_scales[layer]
        self._v = pool.values[layer], pool.v_scales[layer]

    def append(self, step: StepInputs, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] to the step's slots."""
        key = ("append", self.group)
        if key not in step.cache:
            slots = step.slots[self.group].long()
            kept = (slots >= 0).nonzero()[:, 0]
            step.cache[key] = kept, slots[kept] // self.page, slots[kept] % self.page
        kept, block, offset = step.cache[key]
        for x, (cells, scales) in ((k, self._k), (v, self._v)):
            q, scale = quantize_rows(x[kept].reshape(-1, x.shape[-1]))
            cells[block, :, offset] = q.view(len(kept), -1, x.shape[-1])
            scales[block, :, offset] = scale.view(len(kept), -1)

    def gather(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """k [n * Hkv, S, D] and v [n * Hkv, S, Dv] of n sequences, copied out of their blocks."""
        if "blocks" not in keys.cache:
            keys.cache["blocks"] = keys.table.long()
        k, v = (self._gather(keys.cache["blocks"], *stored) for stored in (self._k, self._v))
        return k, v

    def _gather(self, blocks: torch.Tensor, cells: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        found = cells[blocks].transpose(1, 2) * scales[blocks].to(self.dtype).transpose(1, 2)[..., None]
        return found.reshape(-1, blocks.shape[1] * self.page, cells.shape[-1])


def bind_cache(pool: KVPool, group: int, layer: int, dtype: torch.dtype) -> LayerCache | Int8LayerCache:
    """One layer's part of a pool, which computes in `dtype`."""
    return (Int8LayerCache if pool.group.dtype == "int8" else LayerCache)(pool, group, layer, dtype)


def _units(group: KVGroup) -> tuple[int, int, int]:
    """(D / g, Dv / g, cells of one token in all layers of a block)."""
    unit = math.gcd(group.head_dim, group.v_head_dim)
    k, v = group.head_dim // unit, group.v_head_dim // unit
    return k, v, group.num_layers * group.num_kv_heads * (k + v)


def _append_indices(pool: KVPool, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cells of k and of v that the slots [T] name, and which tokens are written (None: all)."""
    used, kept = slots.numpy(), None
    if used.min() < 0:
        kept = torch.from_numpy((used >= 0).nonzero()[0])
        used = used[used >= 0]
    page, heads = pool.page_size, pool.group.num_kv_heads
    num_k, num_v, per_token = _units(pool.group)
    block, offset = np.divmod(used[:, None, None], page)
    head, base = np.arange(heads)[:, None], block * (per_token * page)
    k = base + offset * num_k + (head * (num_k * page) + np.arange(num_k))
    v = base + offset * num_v + (head * (num_v * page) + np.arange(num_v) + heads * num_k * page)
    return torch.from_numpy(k.reshape(-1)), torch.from_numpy(v.reshape(-1)), kept


# ---------------------------------------------------------------- which keys a query sees


@dataclass
class Keys:
    """The keys of `num` sequences that attend together: where they lie, and which are hidden.

    queries: their rows of T.
    rows: of the layer's row matrix, K's first `num_k_rows`, then V's; none where the cache is int8.
    table: their blocks [num, S / page].
    length: keys that belong to the longest sequence; what follows up to S is the rest of its last page.
    positions [1, 1, S] of the keys, q_positions [num, L, 1]; hidden [num, L, S] bool, or None if all is visible.
    square: one sequence from its beginning, causal and nothing else; or all of it, and nothing is hidden.
    cache: what layers derive from these.
    """

    queries: slice
    num: int
    rows: torch.Tensor
    num_k_rows: int
    table: torch.Tensor
    length: int
    positions: torch.Tensor
    q_positions: torch.Tensor
    hidden: torch.Tensor | None
    square: bool
    cache: dict[Any, Any] = field(default_factory=dict)


def key_ranges(step: StepInputs, spec: Attention, pool: KVPool) -> list[Keys]:
    """All sequences together if each has one token, else one by one."""
    key = ("keys", spec.group, spec.window, spec.chunk, spec.causal)
    found = step.cache.get(key)
    if found is None:
        starts, num = step.starts, len(step.contexts)
        if starts[-1] == num:
            parts = [(0, num)]
        else:
            parts = [(i, i + 1) for i in range(num) if starts[i + 1] > starts[i]]
        found = step.cache[key] = [_make_keys(step, spec, pool, a, b) for a, b in parts]
    return found


def whole_sequences(step: StepInputs, spec: Attention) -> list[Keys]:
    """The sequences of a step one by one, each all there; their keys lie in no cache."""
    key = ("whole sequences", spec.window)
    if key not in step.cache:
        step.cache[key] = [_whole(spec, first, stop) for first, stop in pairwise(step.starts)]
    return step.cache[key]


def _whole(spec: Attention, first: int, stop: int) -> Keys:
    length, nowhere = stop - first, torch.empty(0, dtype=torch.int64)
    keys, queries = torch.arange(length)[None, None], torch.arange(length)[None, :, None]
    hidden = _hidden(spec, keys, queries, torch.tensor([length])) if 0 < spec.window < length else None
    return Keys(slice(first, stop), 1, nowhere, 0, nowhere, length, keys, queries, hidden, hidden is None)


def _make_keys(step: StepInputs, spec: Attention, pool: KVPool, first: int, last: int) -> Keys:
    """Keys of the sequences [first, last), which all have the same number of new tokens."""
    page, num = pool.page_size, last - first
    queries = slice(step.starts[first], step.starts[last])
    contexts = step.contexts[first:last]
    new, stop = (queries.stop - queries.start) // num, max(contexts)
    begin = 0
    if spec.causal and (spec.window or spec.chunk):
        visible = KVGroup(0, 0, 0, 0, "", spec.window, spec.chunk)
        begin = min(first_visible(visible, c - new) for c in contexts)
    blocks = slice(begin // page, -(-stop // page))
    rows, num_k_rows = torch.empty(0, dtype=torch.int64), 0
    if pool.group.dtype != "int8":
        rows, num_k_rows = _row_indices(step, spec.group, pool, slice(first, last), blocks)
    table = step.block_tables[spec.group][first:last, blocks]
    origin = blocks.start * page
    positions = torch.arange(origin, blocks.stop * page).view(1, 1, -1)
    q_positions = step.positions[queries].view(num, new, 1)
    whole = stop == blocks.stop * page
    hidden = None
    if not (whole and num == new == 1 and not spec.chunk and (not spec.window or stop - origin <= spec.window)):
        hidden = _hidden(spec, positions, q_positions, step.context_lens[first:last])
    square = spec.causal and num == 1 and new == stop and not spec.window and not spec.chunk
    return Keys(queries, num, rows, num_k_rows, table, stop - origin, positions, q_positions, hidden, square)


def _row_indices(
    step: StepInputs, group: int, pool: KVPool, sequences: slice, blocks: slice
) -> tuple[torch.Tensor, int]:
    """Rows of K then of V, each [B, Hkv, blocks, D / g], of a part of the block table."""
    key = ("rows", group, sequences.start, sequences.stop, blocks.start, blocks.stop)
    found = step.table_cache.get(key)
    if found is None:
        table = step.block_tables[group].numpy()[sequences, blocks]
        heads = pool.group.num_kv_heads
        num_k, num_v, per_token = _units(pool.group)
        base = (table * per_token)[:, None, :, None]
        head = np.arange(heads)[:, None, None]
        k = (base + (head * num_k + np.arange(num_k))).reshape(-1)
        v = (base + (head * num_v + np.arange(num_v) + heads * num_k)).reshape(-1)
        found = step.table_cache[key] = torch.from_numpy(np.concatenate((k, v))), k.size
    return found


def _hidden(spec: Attention, j: torch.Tensor, i: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    """Whether key j is hidden from query i: [num, L, S]."""
    hidden = j > i if spec.causal else j >= context_lens.view(-1, 1, 1)
    if spec.window:
        hidden = hidden | (j <= i - spec.window)
        hidden = hidden if spec.causal else hidden | (j >= i + spec.window)
    if spec.chunk:
        hidden = hidden | (j // spec.chunk != i // spec.chunk)
    return hidden
