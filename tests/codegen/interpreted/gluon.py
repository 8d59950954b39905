"""Gluon for Triton's interpreter: layouts mean nothing, shared memory is checked as strictly as the GPU is careless.

A block of shared memory can be read once the group of its copy was waited for, or the barrier at which it arrives, and
can be written once the products that read it were. Warps with functions of their own take turns, each until it has to
wait. A program that waits for others of its grid lets another of them run. `install` puts these in the place of
Gluon's modules.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder


class Block:
    """A block of the ring, or some of its rows, or its transpose: a tensor once its copy has landed."""

    def __init__(self, origin: Block | None = None, rows: slice | None = None, transposed: bool = False) -> None:
        self.value: Any = None
        self.origin, self.rows, self.transposed = origin or self, rows, transposed

    def permute(self, order: tuple[int, int]) -> Block:
        assert tuple(order) == (1, 0)
        return Block(self.origin, self.rows, not self.transposed)

    def slice(self, start: Any, length: Any) -> Block:
        first = _number(start) + (self.rows.start if self.rows else 0)
        return Block(self.origin, slice(first, first + _number(length)))

    def store(self, value: Any) -> None:
        if self.rows is None:
            self.origin.value = tl.trans(value) if self.transposed else value
        else:
            self.origin.value.handle.data[self.rows] = value.handle.data

    @property
    def dtype(self) -> Any:
        return self.origin.value.dtype

    def load(self, layout: None) -> Any:
        value = self.origin.value
        assert value is not None, "a block is read before its copy was waited for"
        if self.rows is not None:
            data = value.handle.data[self.rows]
            value = tl.tensor(TensorHandle(data, value.handle.dtype), tl.block_type(value.dtype, list(data.shape)))
        return tl.trans(value) if self.transposed else value


class Ring:
    """What allocate_shared_memory returns."""

    def __init__(self, blocks: int, kind: type = Block) -> None:
        self._blocks = [kind() for _ in range(blocks)]

    def index(self, i: Any) -> Any:
        return self._blocks[_number(i)]


class Barrier:
    """An mbarrier: a phase is over when as many have arrived as it counts; then the copies that came along landed."""

    def __init__(self) -> None:
        self.count = self.arrived = self.phase = 0
        self._copies: list[tuple[Block, Any]] = []

    def init(self, count: Any) -> None:
        self.count, self.arrived, self.phase = _number(count), 0, 0

    def arrive(self, count: int, copies: list[tuple[Block, Any]]) -> None:
        self.arrived += count
        self._copies += copies
        assert self.arrived <= self.count, "more arrive at a barrier than it counts"
        if self.arrived == self.count:
            for block, value in self._copies:
                block.value = value
            self.arrived, self.phase, self._copies = 0, self.phase + 1, []


class Roles:
    """Functions of warps of their own: one runs at a time, until it ends or waits for a barrier."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._running: list[int] = []
        self._now, self._idle = 0, 0
        self._error: BaseException | None = None
        self.mine = threading.local()

    def run(self, functions: list, num_warps: list, num_registers: list) -> None:
        assert len(functions) == len(num_warps) + 1 == len(num_registers) + 1
        self._running, self._now, self._idle, self._error = list(range(len(functions))), 0, 0, None
        warps = [num_warps[0], *num_warps]
        threads = [threading.Thread(target=self._play, args=(i, warps[i], *f)) for i, f in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error:
            raise self._error

    def wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._idle += 1
            assert self._idle <= len(self._running), "every part of a program waits for another"
            self.pass_on()
        self._idle = 0

    def pass_on(self) -> None:
        """Let the others run until each waits or ends."""
        role = self.mine.role
        place = self._running.index(role)
        self._now = self._running[(place + 1) % len(self._running)]
        self._turn.notify_all()
        self._turn.wait_for(lambda: self._now == role)
        if self._error:
            raise RuntimeError("another part of the program failed")

    def _play(self, role: int, num_warps: Any, function: Any, arguments: tuple) -> None:
        self.mine.role, self.mine.threads = role, 32 * _number(num_warps)
        with self._turn:
            self._turn.wait_for(lambda: self._now == role)
            try:
                if self._error is None:
                    function(*arguments)
            except BaseException as error:
                self._error = self._error or error
            following = self._running[self._running.index(role) + 1 :] + self._running
            self._running.remove(role)
            self._now = next((r for r in following if r != role), -1)
            self._idle = 0
            self._turn.notify_all()


class Products(threading.local):
    """Blocks that products under way read, of the warps that asked for them."""

    def __init__(self) -> None:
        self.reading: list[tuple[Block | None, Block]] = []


class Pipeline:
    """Copies that were asked for, by group, and blocks that products under way read."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Block, Any]]] = []
        self.open: list[tuple[Block, Any]] = []
        self.products = Products()
        self.read: list[Block] = []  # by any warps

    @property
    def reading(self) -> list[tuple[Block | None, Block]]:
        return self.products.reading

    def copy(self, block: Block, pointer: Any, mask: Any = None, eviction_policy: str = "") -> None:
        assert not any(block is one for one in self.read), "a block is written while a product reads it"
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
        self.read += [block for block in self.reading[-1] if block is not None]
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        return acc + product if use_acc else product

    def wait_products(self, pending: Any, deps: list) -> Any:
        done = max(0, len(self.reading) - _number(pending))
        for block in [block for pair in self.reading[:done] for block in pair if block is not None]:
            self.read.remove(block)
        del self.reading[:done]
        return deps[0] if len(deps) == 1 else tuple(deps)


class Programs:
    """The function of a kernel: its programs run one after another, and while one waits others that have not begun.

    The last runs first, so that what a program writes into its successor's place is not written over.
    """

    running: Programs | None = None

    def __init__(self, function: Callable) -> None:
        self._function = function
        self._begun: set[tuple[int, ...]] = set()
        self._arguments: dict[str, Any] = {}
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__annotations__, self.__signature__ = function.__annotations__, inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        self._arguments, Programs.running = arguments, self
        here, size = interpreter_builder.grid_idx, interpreter_builder.grid_dim
        self._run(tuple(n - 1 - i for i, n in zip(here, size, strict=True)))

    def _run(self, place: tuple[int, ...]) -> None:
        if place not in self._begun:
            self._begun.add(place)
            here = interpreter_builder.grid_idx
            interpreter_builder.set_grid_idx(*place)
            self._function(**self._arguments)
            interpreter_builder.set_grid_idx(*here)

    def let_another_run(self) -> None:
        x, y, z = (range(size) for size in interpreter_builder.grid_dim)
        following = next((place for place in itertools.product(x, y, z) if place not in self._begun), None)
        assert following, "every program waits for another"
        self._run(following)


@functools.cache
def _let_programs_wait() -> None:
    """A program that looks at a counter without changing it waits for others. Once in a process."""
    add = interpreter_builder.create_atomic_rmw
    start = GridExecutor.__init__

    def look(operation: Any, pointer: Any, value: Any, *more: Any) -> Any:
        if not value.data.any() and Programs.running:
            Programs.running.let_another_run()
        return add(operation, pointer, value, *more)

    def begin(executor: GridExecutor, function: Callable, *more: Any, **options: Any) -> None:
        start(executor, Programs(function), *more, **options)  # type: ignore[arg-type]

    vars(interpreter_builder).update(create_atomic_rmw=look)
    GridExecutor.__init__ = begin  # type: ignore[method-assign]


def _number(x: Any) -> int:
    if isinstance(x, tl.tensor):
        return int(x.handle.data.item())
    return int(getattr(x, "value", x))


def install() -> None:
    """Put these in the place of what our templates take from Gluon, in this process."""
    _let_programs_wait()
    pipeline, roles, barriers = Pipeline(), Roles(), object()

    def allocate(dtype: Any, shape: list, layout: object) -> Ring | Block:
        """A ring of blocks or barriers, or else of less than three dimensions one block."""
        if layout is barriers:
            return Ring(_number(shape[0]), Barrier)
        if len(shape) == 3:
            assert not (pipeline.groups or pipeline.open or pipeline.read), "a program left work behind"
            return Ring(_number(shape[0]))
        block = Block()
        block.value = tl.full(shape, float("nan"), dtype)
        return block

    def land(barrier: Barrier, increment_count: bool) -> None:
        """All threads of the warps that copied arrive at the barrier once their copies have landed."""
        assert not increment_count
        copies, pipeline.open = pipeline.open, []
        barrier.arrive(roles.mine.threads, copies)

    def arrive(barrier: Barrier, count: int) -> None:
        """Others go on at once: what is arrived for too early is overwritten."""
        barrier.arrive(count, [])
        roles.pass_on()

    layouts = ("NVMMADistributedLayout", "BlockedLayout", "NVMMASharedLayout", "SliceLayout")
    layouts += ("DotOperandLayout", "SwizzledSharedLayout")
    language = SimpleNamespace(
        arange=lambda start, stop, layout: tl.arange(start, stop),
        full=lambda shape, value, dtype, layout: tl.full(shape, value, dtype),
        constexpr=tl.constexpr,
        zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
        convert_layout=lambda x, layout: x,
        allocate_shared_memory=allocate,
        warp_specialize=roles.run,
        int64=tl.int64,
        **dict.fromkeys(layouts, lambda *args, **options: None),
    )
    async_copy = SimpleNamespace(
        async_copy_global_to_shared=pipeline.copy,
        commit_group=pipeline.commit,
        wait_group=pipeline.wait,
        mbarrier_arrive=land,
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: barriers,
        init=Barrier.init,
        wait=lambda barrier, phase: roles.wait(lambda: barrier.phase % 2 != _number(phase)),
        arrive=arrive,
    )
    vars(gluon).update(jit=triton.jit, language=language)
    vars(hopper).update(
        async_copy=async_copy,
        mbarrier=mbarrier,
        fence_async_shared=lambda: None,
        warpgroup_mma=pipeline.multiply,
        warpgroup_mma_wait=pipeline.wait_products,
    )
