"""Keys and values in paged pools: one pool and one allocator per KV group."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import KVGroup, Plan

NULL_BLOCK = 0
SCALE_BYTES = 4
ENCODER_STEPS = 2  # one that runs, one that is launched behind it


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype a plan names."""
    return getattr(torch, name)


class KVPool:
    """The blocks of one group: `data` [num_blocks, num_layers * elements of a layer's block], block 0 all zeros.

    keys[i]   [num_blocks, num_kv_heads, page_size, head_dim]     a view of layer i's part of every block
    values[i] [num_blocks, num_kv_heads, page_size, v_head_dim]
    k_scales[i], v_scales[i] [num_blocks, num_kv_heads, page_size] float32, where the group is int8
    """

    def __init__(self, group: KVGroup, page_size: int, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.group = group
        self.page_size = page_size
        self.num_blocks = num_blocks
        self.data = torch.zeros(
            num_blocks, block_elements(group, page_size), dtype=dtype_of(group.dtype), device=device
        )
        layers, tokens = range(group.num_layers), group.num_kv_heads * page_size
        self.keys = [self._view(i, 0, group.head_dim) for i in layers]
        self.values = [self._view(i, tokens * group.head_dim, group.v_head_dim) for i in layers]
        if group.dtype == "int8":
            skip = tokens * (group.head_dim + group.v_head_dim)
            self.k_scales = [self._scales(i, skip) for i in layers]
            self.v_scales = [self._scales(i, skip + SCALE_BYTES * tokens) for i in layers]

    def _view(self, layer: int, skip: int, width: int) -> torch.Tensor:
        heads, page = self.group.num_kv_heads, self.page_size
        stride = self.data.shape[1]
        start = layer * (stride // self.group.num_layers) + skip
        return self.data.as_strided((self.num_blocks, heads, page, width), (stride, page * width, width, 1), start)

    def _scales(self, layer: int, skip: int) -> torch.Tensor:
        heads, page, stride = self.group.num_kv_heads, self.page_size, self.data.shape[1] // SCALE_BYTES
        start = layer * (stride // self.group.num_layers) + skip // SCALE_BYTES
        words = self.data.view(torch.float32)
        return words.as_strided((self.num_blocks, heads, page), (stride, page, 1), start)


def block_elements(group: KVGroup, page_size: int) -> int:
    """Elements of one block: keys and values of `page_size` tokens in every layer of the group, scales included."""
    return group.num_layers * page_size * token_elements(group)


def token_elements(group: KVGroup) -> int:
    """Elements that a layer keeps of a token."""
    scales = 2 * SCALE_BYTES if group.dtype == "int8" else 0
    return group.num_kv_heads * (group.head_dim + group.v_head_dim + scales)


def block_bytes(group: KVGroup, page_size: int) -> int:
    return block_elements(group, page_size) * dtype_of(group.dtype).itemsize


def blocks_for(plan: Plan, tokens: int) -> int:
    return math.ceil(tokens / plan.page_size)


def size_pools(plan: Plan, free_bytes: int, max_kv_tokens: int | None = None) -> list[int]:
    """Blocks for each group's pool, the null block included.

    Every group holds the same number of tokens: max_kv_tokens if given, else what free_bytes hold, and never more
    than max_batch sequences of max_seq_len. An encoder's pool holds the sequences of the steps in flight, and nothing
    after them. Raises UserError if one sequence of one page does not fit.
    """
    if not plan.kv_groups:
        return []
    if plan.is_encoder:
        return [_step_blocks(plan) * ENCODER_STEPS + 1] * len(plan.kv_groups)
    most = blocks_for(plan, plan.max_seq_len) * plan.max_batch
    per_block = sum(block_bytes(g, plan.page_size) for g in plan.kv_groups)
    if max_kv_tokens is not None:
        if isinstance(max_kv_tokens, bool) or not isinstance(max_kv_tokens, int) or max_kv_tokens < 1:
            raise UserError(f"max_kv_tokens must be an integer >= 1, got {max_kv_tokens!r}")
        blocks = min(most, blocks_for(plan, max_kv_tokens))
    else:
        blocks = min(most, free_bytes // per_block - 1)
    needed = (blocks + 1) * per_block if max_kv_tokens is not None else 2 * per_block
    if blocks < 1 or needed > free_bytes:
        raise UserError(
            f"not enough memory for the KV cache: {needed / 2**30:.2f} GiB needed, {free_bytes / 2**30:.2f} GiB free; "
            "lower max_kv_tokens or free memory"
        )
    return [blocks + 1] * len(plan.kv_groups)


def _step_blocks(plan: Plan) -> int:
    """Blocks that the sequences of one step fill at most, each ending in a block of its own."""
    return blocks_for(plan, plan.max_step_tokens) + plan.max_batch


class BlockAllocator:
    """Hands out the blocks of one pool, lowest unused id first, so that a fresh sequence's blocks are adjacent."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def allocate(self) -> int:
        return self._free.pop()

    def free(self, blocks: Seq[int]) -> None:
        """Take blocks back; null blocks among them are skipped."""
        self._free.extend(b for b in reversed(blocks) if b != NULL_BLOCK)


class BlockTables:
    """The allocators of all groups: a sequence gets blocks in every group, or in none.

    A table is a list per group: the physical block of each logical block, the null block where the group's window or
    chunk has moved past it.
    """

    def __init__(self, plan: Plan, num_blocks: Seq[int]) -> None:
        self.page_size = plan.page_size
        self.groups = plan.kv_groups
        self.allocators = [BlockAllocator(n) for n in num_blocks]
        self._has_windows = any(g.window or g.chunk for g in plan.kv_groups)

    def holds(self, tables: list[list[int]], num_tokens: int) -> bool:
        """Whether a sequence's tables reach num_tokens already."""
        return bool(tables) and len(tables[0]) * self.page_size >= num_tokens

    def allocate(self, tables: list[list[int]], num_tokens: int) -> bool:
        """Extend a sequence's tables to hold num_tokens; False, with nothing changed, if a pool has too few blocks."""
        wanted = -(-num_tokens // self.page_size)
        if not tables:
            tables.extend([] for _ in self.groups)
        if any(wanted - len(t) > a.num_free for t, a in zip(tables, self.allocators, strict=True)):
            return False
        for table, allocator in zip(tables, self.allocators, strict=True):
            while len(table) < wanted:
                table.append(allocator.allocate())
        return True

    def room(self, tables: list[list[int]]) -> int:
        """How many tokens a sequence's tables could be extended to hold."""
        held = tables or [[] for _ in self.groups]
        blocks = (len(t) + a.num_free for t, a in zip(held, self.allocators, strict=True))
        return min(blocks, default=1 << 62) * self.page_size

    def free(self, tables: list[list[int]]) -> None:
        """Take back every block of a sequence and empty its tables."""
        for table, allocator in zip(tables, self.allocators, strict=False):
            allocator.free(table)
        tables.clear()

    def free_behind(self, tables: list[list[int]], position: int) -> None:
        """Take back the blocks that no query at `position` or later can see."""
        if not self._has_windows:
            return
        for group, table, allocator in zip(self.groups, tables, self.allocators, strict=False):
            first = first_visible(group, position)
            for i in range(min(first // self.page_size, len(table)) - 1, -1, -1):
                if table[i] == NULL_BLOCK:
                    break
                allocator.free([table[i]])
                table[i] = NULL_BLOCK


def first_visible(group: KVGroup, position: int) -> int:
    """The first key position that a query at `position` sees."""
    first = 0
    if group.window:
        first = max(first, position - group.window + 1)
    if group.chunk:
        first = max(first, position // group.chunk * group.chunk)
    return first
