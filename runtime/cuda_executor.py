"""Executes a plan on an NVIDIA GPU: cubins launched by address, decode steps as CUDA graphs, state on the device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dscompile.runtime.cuda_batch import (
    Seats,
    continues,
    is_decode,
    longest_context,
    stage_decode,
    stage_new_blocks,
    stage_ragged,
    stage_seen,
)
from dscompile.runtime.cuda_device import CudaDevice
from dscompile.runtime.cuda_memory import Arena, ScratchMemory
from dscompile.runtime.cuda_program import BoundPlan
from dscompile.runtime.cuda_state import TURNS, DeviceState, Staging
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, StepResult, max_logit_rows
from dscompile.runtime.kernels import KernelTable, Sizes, context_bounds
from dscompile.runtime.kv_cache import KVPool, size_pools
from dscompile.runtime.plan import Plan, Sample

RESERVED_BYTES = 512 << 20  # left to CUDA graphs, library workspaces and logits on their way to the host
SMALL_GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
GRAPH_STRIDE = 16


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes for which decode is captured: 1, 2, 4, 8, 16, 24, 32, 48, 64, then every 16, up to max_batch."""
    sizes = [*SMALL_GRAPHS, *range(SMALL_GRAPHS[-1] + GRAPH_STRIDE, max_batch, GRAPH_STRIDE)]
    return [*(s for s in sizes if s < max_batch), max_batch]


@dataclass
class Slot:
    """Pinned memory of one step in flight: what goes up, what comes back (its turn of `told`), the event after both."""

    turn: int
    staging: Staging
    told: np.ndarray
    event: Any


@dataclass
class CudaPending:
    """A step in flight. `wait` reads the pinned memory that the kernels of sampling fill, once the step is over."""

    batch: Batch
    seats: np.ndarray
    slot: Slot
    logits: list[torch.Tensor | None]
    _result: StepResult | None = field(default=None, init=False)

    def wait(self) -> StepResult:
        """Wait for the event of this step, and for nothing that was launched after it."""
        if self._result is None:
            self.slot.event.synchronize()
            self._result = self._read()
        return self._result

    def _read(self) -> StepResult:
        rows, told = self.batch.rows, self.slot.told[:, self.seats]
        tokens = [token if row.sample else -1 for row, token in zip(rows, told[0].tolist(), strict=True)]
        asked = [row.sample and row.sequence.params.logprobs for row in rows]
        logprobs = [math.nan] * len(rows)
        if any(asked):
            found = told[1].view(np.float32).tolist()
            logprobs = [value if wanted else math.nan for value, wanted in zip(found, asked, strict=True)]
        return StepResult(tokens, logprobs, self.logits)


@dataclass(frozen=True)
class Running:
    """The decode step launched last, which the next one may continue while no context is longer than `bound` (0: none
    is too long)."""

    batch: Batch
    seats: np.ndarray
    replay: Callable[[], None]
    bound: int

    def serves(self, batch: Batch) -> bool:
        """Whether a replay is the step of `batch`."""
        return continues(batch, self.batch) and not (self.bound and longest_context(batch) > self.bound)


class CudaExecutor:
    """The executor of a CUDA device; see runtime.executor.Executor.

    Step n + 1 may be launched before step n is read: `Slot`s are used in turn, one more than steps in flight. The host
    uploads whose turn it is with a batch; a replay that continues it takes the next turn itself.
    """

    max_in_flight = TURNS - 1

    def __init__(
        self,
        plan: Plan,
        weights: dict[str, torch.Tensor],
        artifact_dir: Path,
        device: torch.device | str | CudaDevice = "cuda",
        max_kv_tokens: int | None = None,
    ) -> None:
        self._gpu = gpu = device if not isinstance(device, str | torch.device) else CudaDevice(device)
        self.plan, self.device = plan, gpu.device
        self.counters: Counter[str] = Counter()
        self.max_logit_rows = max_logit_rows(plan)
        with gpu.active():
            target = gpu.target(plan.kernels)
            table = KernelTable(plan.kernels, Path(artifact_dir), target, gpu.driver, gpu.library)
            self._allocate(max_kv_tokens)
        self._bound = BoundPlan(plan, weights, table, self._arenas, self._scratch, self._state, self._pools)
        self._seats = Seats(plan)
        self._graphs: dict[tuple[int, bool, int], Callable[[], None]] = {}
        self._graph_sizes = graph_sizes(plan.max_batch)
        self._bounds = {size: context_bounds(plan.programs.values(), size) for size in self._graph_sizes}
        self._last: Running | None = None
        self._slots = [self._make_slot(turn) for turn in range(TURNS)]
        sampled = (s.inputs["logits"] for s in plan.steps if isinstance(s.spec, Sample))
        self._output = plan.hidden or next(sampled, None)
        gpu.synchronize()

    @property
    def num_blocks(self) -> list[int]:
        return [pool.num_blocks for pool in self._pools]

    def launch(self, batch: Batch) -> CudaPending:
        """Start a step; waits only for a slot that is still in use, which is two steps back."""
        slot = self._slots[self.counters["steps"] % len(self._slots)]
        slot.event.synchronize()
        with self._gpu.active():
            seats = self._decode(batch, slot) if is_decode(batch) else self._ragged(batch, slot)
            logits = self._copy_logits(batch)
            self._gpu.record(slot.event)
        self.counters["steps"] += 1
        self.counters["tokens"] += sum(row.num_tokens for row in batch.rows)
        self.counters["logit_rows"] += sum(row.num_logits for row in batch.rows)
        return CudaPending(batch, seats, slot, logits)

    def warm_up(self) -> None:
        """Capture the decode steps of every size and bound now, which otherwise happens when a batch first has one."""
        slot = self._slots[self.counters["steps"] % len(self._slots)]
        slot.event.synchronize()
        with self._gpu.active():
            for size in self._graph_sizes:
                for bound in (*self._bounds[size], 0):
                    for plain in (True, False):
                        self._graph(size, plain, bound, slot)
        self._last = None  # the state on the device is now that of padding

    def _decode(self, batch: Batch, slot: Slot) -> np.ndarray:
        last, stream = self._last, self._gpu.stream
        if last is not None and last.serves(batch):
            seats, replay, bound = last.seats, last.replay, last.bound
            if stage_new_blocks(slot.staging, batch, seats, self._seats, self.plan.page_size):
                self._state.upload_field(slot.staging, "new_blocks", stream)
        else:
            size = self._graph_size(len(batch.rows))
            bound = self._context_bound(batch, size)
            replay = self._graph(size, all(row.sequence.params.plain for row in batch.rows), bound, slot)
            seats = self._seats.seat(batch.rows)
            stage_decode(slot.staging, batch, size, seats, self._seats, slot.turn)
            self._upload(batch, seats, slot)
        replay()
        self._last = Running(batch, seats, replay, bound)
        return seats

    def watch_replays(self) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        """Put the replays of the decode step under way between two timing events each, until its graph changes.

        returns: the list in which they gather; empty for ever where no decode step is under way
        """
        watched: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._last is not None:
            replay = self._last.replay

            def watch() -> None:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                replay()
                end.record()
                watched.append((begin, end))

            self._last = replace(self._last, replay=watch)
        return watched

    def _graph_size(self, num_rows: int) -> int:
        return next(size for size in self._graph_sizes if size >= num_rows)

    def _ragged(self, batch: Batch, slot: Slot) -> np.ndarray:
        self._last = None
        seats = self._seats.seat(batch.rows)
        num_tokens, num_logits = stage_ragged(slot.staging, batch, seats, self._seats, self.plan.page_size, slot.turn)
        self._upload(batch, seats, slot)
        sizes = Sizes(num_tokens, len(batch.rows), num_logits, self._state.layout.blocks, longest_context(batch))
        sampled = [row for row in batch.rows if row.sample]
        decode = num_tokens == len(batch.rows)
        stream = self._gpu.stream
        if any(row.tokens is None for row in batch.rows):
            self._bound.eager("step.gather").launch(sizes, decode, stream)
        self._bound.eager().launch(sizes, decode, stream)
        if sampled:
            sampler = self._bound.eager(_sampler(all(r.sequence.params.plain for r in sampled)))
            sampler.launch(replace(sizes, T=sizes.B), decode, stream)
        return seats

    def _upload(self, batch: Batch, seats: np.ndarray, slot: Slot) -> None:
        stream = self._gpu.stream
        self._state.upload(slot.staging, len(seats), self._seats.num_blocks(seats), stream)
        for row, seat in zip(batch.rows, seats.tolist(), strict=True):
            if row.sample and row.tokens is not None and row.sequence.params.repetition_penalty != 1:
                stage_seen(slot.staging, row, seat)
                self._state.upload_seen(slot.staging, seat, stream)

    def _context_bound(self, batch: Batch, size: int) -> int:
        """The least bound on which launches depend that no context of the batch exceeds, 0 where there is none."""
        longest = longest_context(batch) if self._bounds[size] else 0
        return next((bound for bound in self._bounds[size] if longest <= bound), 0)

    def _graph(self, size: int, plain: bool, bound: int, slot: Slot) -> Callable[[], None]:
        """The captured decode step of `size` rows with contexts up to `bound` (0: any).

        It is run once on padding alone before it is captured, which leaves no trace in the cache or the sampled tokens,
        so that libraries have set themselves up.
        """
        if (size, plain, bound) not in self._graphs:
            stage_decode(slot.staging, Batch(()), size, np.zeros(0, np.int32), self._seats, slot.turn)
            self._state.upload(slot.staging, 0, 0, self._gpu.stream)
            self._gpu.synchronize()
            parts = [self._bound.sized(size, name) for name in ("step.advance", None, _sampler(plain))]
            sizes = Sizes(size, size, size, self._state.layout.blocks, bound)

            def run() -> None:
                for part in parts:
                    part.launch(sizes, True, self._gpu.stream)

            run()
            self._graphs[size, plain, bound] = self._gpu.capture(run)
            self.counters["graphs"] += 1
        return self._graphs[size, plain, bound]

    def capture_steps(self, size: int, names: Collection[str]) -> Callable[[], None]:
        """Some of the plan's steps as a graph of `size` rows, to be timed alone after a decode step of as many, whose
        state it reads. It leaves the executor as it is; what it computes means nothing."""
        part = self._bound.sized(size, only=names)
        bound = self._last.bound if self._last is not None else 0
        sizes = Sizes(size, size, size, self._state.layout.blocks, bound)
        with self._gpu.active():
            part.launch(sizes, True, self._gpu.stream)
            self._gpu.synchronize()
            return self._gpu.capture(lambda: part.launch(sizes, True, self._gpu.stream))

    def _copy_logits(self, batch: Batch) -> list[torch.Tensor | None]:
        if self._output is None or not any(row.return_logits for row in batch.rows):
            return [None] * len(batch.rows)
        arena = self._arenas["T" if self.plan.is_encoder else "R"]
        rows = arena.rows if self._last is None else self._graph_size(len(batch.rows))
        view, first = arena.view(self._output, rows), 0
        copies: list[torch.Tensor | None] = []
        for row in batch.rows:
            part = view[first : first + row.num_logits]
            first += row.num_logits
            host = self._gpu.pinned(*part.shape, dtype=part.dtype) if row.return_logits else None
            copies.append(None if host is None else host.copy_(part, non_blocking=True))
        return copies

    def _allocate(self, max_kv_tokens: int | None) -> None:
        plan = self.plan
        self._arenas = {symbol: Arena(plan, symbol, self.device) for symbol in ("T", "R")}
        self._scratch = ScratchMemory(plan, self.device)
        needed = sum(a.num_bytes for a in self._arenas.values()) + sum(self._scratch.num_bytes.values())
        free = self._gpu.free_bytes()
        if needed + RESERVED_BYTES > free:
            raise UserError(
                f"not enough GPU memory for activations: {(needed + RESERVED_BYTES) / 2**30:.2f} GiB needed, "
                f"{free / 2**30:.2f} GiB free; free memory or compile with a smaller --max-batch"
            )
        for arena in self._arenas.values():
            arena.allocate()
        self._scratch.allocate()
        self._state = DeviceState(plan, self.device, self._gpu.driver, self._gpu.pinned)
        blocks = size_pools(plan, self._gpu.free_bytes() - RESERVED_BYTES, max_kv_tokens)
        pairs = zip(plan.kv_groups, blocks, strict=True)
        self._pools = [KVPool(group, plan.page_size, n, self.device) for group, n in pairs]

    def _make_slot(self, turn: int) -> Slot:
        staging = Staging(self._state.layout, self._gpu.pinned)
        return Slot(turn, staging, self._state.told[turn].numpy(), self._gpu.event())


def _sampler(plain: bool) -> str:
    return "step.sample_greedy" if plain else "step.sample"
