"""Reads tensors from files onto a GPU: threads fill pinned memory while what they read before is on its way.

Copying from the mapped file, one tensor after another, waits for a page fault every 4 KiB and then for the bus.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dscompile.runtime.errors import UserError

PIECE_BYTES = 8 << 20
THREADS = 8


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and where they go. target: [n] uint8 on the device."""

    path: Path
    offset: int
    target: torch.Tensor


def pieces_of(path: Path, offset: int, tensor: torch.Tensor) -> Iterator[Piece]:
    """A contiguous tensor, which stands at `offset` of a file, in pieces of at most PIECE_BYTES."""
    whole = tensor.view(-1).view(torch.uint8)
    for first in range(0, len(whole), PIECE_BYTES):
        yield Piece(path, offset + first, whole[first : first + PIECE_BYTES])


def read_pieces(pieces: Iterable[Piece], device: torch.device) -> None:
    """Read every piece; returns when all have arrived. Raises UserError where a file ends early or cannot be read."""
    work = list(pieces)
    threads = min(THREADS, len(work))
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: _read_some(work[first::threads], device), range(threads)))


def fill(file: int, offset: int, buffer: memoryview, path: Path) -> None:
    """Fill a buffer from an open file."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); copy the artifact again") from error
        if not count:
            raise UserError(f"{path}: ends too early; copy the artifact again")
        done += count


def _read_some(work: list[Piece], device: torch.device) -> None:
    """One thread's pieces, through two buffers in turn."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        arrived = [torch.cuda.Event() for _ in buffers]
        for number, piece in enumerate(work):
            buffer, event = buffers[number % 2], arrived[number % 2]
            event.synchronize()
            count = len(piece.target)
            file = os.open(piece.path, os.O_RDONLY)
            try:
                fill(file, piece.offset, buffer.numpy().data[:count], piece.path)
            finally:
                os.close(file)
            piece.target.copy_(buffer[:count], non_blocking=True)
            event.record()
        for event in arrived:
            event.synchronize()
