"""Gluon for Triton's interpreter: layouts mean nothing, shared memory is checked as strictly as the GPU is careless.

A block of shared memory can be read once the group of its copy was waited for, and can be written once the products
that read it were. `install` puts these in the place of Gluon's modules.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper


class Block:
    """A block of the ring: a tensor once its copy has landed."""

    def __init__(self) -> None:
        self.value: Any = None
        self.transposed = False
        self.origin = self
        self.rows: slice | None = None

    def permute(self, order: tuple[int, int]) -> Block:
        assert tuple(order) == (1, 0)
        view = Block()
        view.origin, view.transposed = self.origin, not self.transposed
        return view

    def store(self, value: Any) -> None:
        if self.rows is None:
            self.value = value
        else:
            self.origin.value.handle.data[self.rows] = value.handle.data

    def slice(self, start: int, length: int) -> Block:
        view = Block()
        view.origin, view.rows = self, slice(start, start + length)
        return view

    @property
    def dtype(self) -> Any:
        return self.origin.value.dtype

    def load(self, layout: None) -> Any:
        assert self.origin.value is not None, "a block is read before its copy was waited for"
        return tl.trans(self.origin.value) if self.transposed else self.origin.value


class Ring:
    """What allocate_shared_memory returns."""

    def __init__(self, blocks: int) -> None:
        self._blocks = [Block() for _ in range(blocks)]

    def index(self, i: Any) -> Block:
        return self._blocks[_number(i)]


class Pipeline:
    """Copies that were asked for, by group, and blocks that products under way read."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Block, Any]]] = []
        self.open: list[tuple[Block, Any]] = []
        self.reading: list[tuple[Block | None, Block]] = []

    def copy(self, block: Block, pointer: Any, mask: Any = None, eviction_policy: str = "") -> None:
        assert not any(block in pair for pair in self.reading), "a block is written while a product reads it"
        block.value = None
        nothing = {} if mask is None else {"mask": mask, "other": float("nan")}
        self.open.append((block, tl.load(pointer, **nothing)))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: Any) -> None:
        done = max(0, len(self.groups) - _number(pending))
        for block, value in [copy for group in self.groups[:done] for copy in group]:
            block.value = value
        del self.groups[:done]

    def multiply(self, a: Any, b: Block, acc: Any, is_async: bool, use_acc: bool = True) -> Any:
        """The left operand is a block, or in registers."""
        assert is_async
        left, right = a.load(None) if isinstance(a, Block) else a, b.load(None)
        self.reading.append((a.origin if isinstance(a, Block) else None, b.origin))
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        return acc + product if use_acc else product

    def wait_products(self, pending: Any, deps: list) -> Any:
        del self.reading[: max(0, len(self.reading) - _number(pending))]
        return deps[0] if len(deps) == 1 else tuple(deps)


def _number(x: Any) -> int:
    if isinstance(x, tl.tensor):
        return int(x.handle.data.item())
    return int(getattr(x, "value", x))


def install() -> None:
    """Put these in the place of what our templates take from Gluon, in this process."""
    pipeline = Pipeline()

    def allocate(dtype: Any, shape: list, layout: None) -> Ring | Block:
        """A ring of blocks, or of less than three dimensions one block."""
        if len(shape) == 3:
            assert not (pipeline.groups or pipeline.open or pipeline.reading), "a program left work behind"
            return Ring(_number(shape[0]))
        block = Block()
        block.value = tl.full(shape, float("nan"), dtype)
        return block

    layouts = ("NVMMADistributedLayout", "BlockedLayout", "NVMMASharedLayout", "SliceLayout")
    layouts += ("DotOperandLayout", "SwizzledSharedLayout")
    language = SimpleNamespace(
        arange=lambda start, stop, layout: tl.arange(start, stop),
        full=lambda shape, value, dtype, layout: tl.full(shape, value, dtype),
        to_tensor=lambda x: tl.full((), x, tl.int32),
        constexpr=tl.constexpr,
        zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
        convert_layout=lambda x, layout: x,
        allocate_shared_memory=allocate,
        **dict.fromkeys(layouts, lambda *args, **options: None),
    )
    async_copy = SimpleNamespace(
        async_copy_global_to_shared=pipeline.copy, commit_group=pipeline.commit, wait_group=pipeline.wait
    )
    vars(gluon).update(jit=triton.jit, language=language)
    vars(hopper).update(
        async_copy=async_copy,
        fence_async_shared=lambda: None,
        warpgroup_mma=pipeline.multiply,
        warpgroup_mma_wait=pipeline.wait_products,
    )
