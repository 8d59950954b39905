"""Device memory that a plan needs besides weights and cache: activations and scratch, each allocated once."""

from __future__ import annotations

import torch

from dscompile.runtime.executor import max_logit_rows
from dscompile.runtime.kv_cache import dtype_of
from dscompile.runtime.plan import Buffer, Plan, Program, Ref

ALIGNMENT = 256


def align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def max_rows(plan: Plan, symbol: str) -> int:
    """The most rows that a step has of a symbol."""
    return {
        "1": 1,
        "T": max(plan.max_step_tokens, plan.max_batch),
        "B": plan.max_batch,
        "R": max_logit_rows(plan),
    }[symbol]


class Arena:
    """Activations of one row symbol. A buffer begins at rows * offset, whatever number of rows a layout is made for."""

    def __init__(self, plan: Plan, symbol: str, device: torch.device) -> None:
        self._buffers = {name: b for name, b in plan.buffers.items() if b.rows == symbol}
        self._device = device
        self.rows = max_rows(plan, symbol)
        self.num_bytes = self.rows * max((b.offset + row_bytes(b) for b in self._buffers.values()), default=0)
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def allocate(self) -> None:
        self._memory = torch.zeros(self.num_bytes, dtype=torch.uint8, device=self._device)

    def view(self, ref: Ref, rows: int) -> torch.Tensor:
        """[rows, stop - start] of a buffer in the layout for `rows` rows."""
        buffer = self._buffers[ref.buffer]
        dtype = dtype_of(buffer.dtype)
        first = rows * buffer.offset
        whole = self._memory[first : first + rows * buffer.cols * dtype.itemsize].view(dtype)
        return whole.view(rows, buffer.cols)[:, ref.start : ref.stop]

    def address(self, ref: Ref, rows: int) -> int:
        """Address of a buffer's column `start` in the layout for `rows` rows."""
        buffer = self._buffers[ref.buffer]
        return self._memory.data_ptr() + rows * buffer.offset + ref.start * dtype_of(buffer.dtype).itemsize


def row_bytes(buffer: Buffer) -> int:
    return align(buffer.cols * dtype_of(buffer.dtype).itemsize)


class ScratchMemory:
    """Scratch of all programs. Programs run one after another, so they share memory, except what must stay zero."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._places: dict[tuple[str, str], tuple[bool, int, int, int]] = {}
        self._device = device
        shared, zeroed = 0, 0
        for name, program in plan.programs.items():
            zeroed, last = self._place(plan, name, program, zeroed)
            shared = max(shared, last)
        self.num_bytes = {False: shared, True: zeroed}
        self._memory: dict[bool, torch.Tensor] = {}

    def _place(self, plan: Plan, name: str, program: Program, zeroed: int) -> tuple[int, int]:
        first = 0
        for scratch in program.scratch:
            rows = max_rows(plan, scratch.symbol)
            start = zeroed if scratch.zeroed else first
            self._places[name, scratch.name] = (scratch.zeroed, start, rows, scratch.bytes)
            stop = start + align(rows * scratch.bytes)
            zeroed, first = (stop, first) if scratch.zeroed else (zeroed, stop)
        return zeroed, first

    def allocate(self) -> None:
        self._memory = {
            kind: torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
            for kind, num_bytes in self.num_bytes.items()
        }

    def view(self, program: str, name: str) -> torch.Tensor:
        """[rows, bytes] uint8."""
        zeroed, first, rows, num_bytes = self._places[program, name]
        return self._memory[zeroed][first : first + rows * num_bytes].view(rows, num_bytes)

    def address(self, program: str, name: str) -> int:
        zeroed, first, _, _ = self._places[program, name]
        return self._memory[zeroed].data_ptr() + first
