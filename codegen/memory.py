"""Arena offsets for activations: buffers whose lives do not overlap share memory."""

from __future__ import annotations

import dataclasses

from dscompile.runtime.plan import Buffer, Step

ALIGNMENT = 256
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1, "bool": 1}


def assign_offsets(steps: tuple[Step, ...], buffers: dict[str, Buffer]) -> dict[str, Buffer]:
    """Return the buffers with offsets, in bytes per row, first fit in the order they are first written.

    A buffer lives from the first step that writes any of its columns to the last that reads any. All buffers of an
    arena have as many rows, so an offset of bytes per row holds for every T.
    """
    lives = _lives(steps)
    placed: dict[str, Buffer] = {}
    for name in sorted(lives, key=lambda n: lives[n]):
        buffer = buffers[name]
        overlapping = sorted(
            (b.offset, b.offset + row_bytes(b))
            for n, b in placed.items()
            if b.rows == buffer.rows and lives[n][0] <= lives[name][1] and lives[name][0] <= lives[n][1]
        )
        offset = 0
        for start, stop in overlapping:
            if offset + row_bytes(buffer) <= start:
                break
            offset = max(offset, stop)
        placed[name] = dataclasses.replace(buffer, offset=offset)
    return placed


def row_bytes(buffer: Buffer) -> int:
    """Bytes of a row, rounded up so that every buffer starts aligned."""
    return -(-buffer.cols * ITEM_SIZE[buffer.dtype] // ALIGNMENT) * ALIGNMENT


def _lives(steps: tuple[Step, ...]) -> dict[str, tuple[int, int]]:
    lives: dict[str, tuple[int, int]] = {}
    for i, step in enumerate(steps):
        for ref in (*step.outputs.values(), *step.inputs.values()):
            first, _ = lives.get(ref.buffer, (i, i))
            lives[ref.buffer] = (first, i)
    return lives
