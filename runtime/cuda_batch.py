"""Turns batches into the arrays of cuda_state: seats for sequences, block tables and sampling by seat, rows by step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from itertools import accumulate, pairwise

import numpy as np

from dscompile.runtime.cuda_state import MAX_EOS_IDS, SEAT_FIELDS, TURNS, Staging, StateLayout
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.plan import Plan
from dscompile.runtime.sampler import fold_seed
from dscompile.runtime.sequence import Sequence

MIN_TEMPERATURE = 1e-30  # a positive number that float32 does not flush to zero


class Seats:
    """Host mirrors, by seat, of what changes seldom: a sequence's sampling and its block tables.

    A sequence keeps its seat while it runs. A seat is taken back when another sequence needs one, from the sequence
    that has not been in a batch for the longest time.
    """

    def __init__(self, plan: Plan) -> None:
        layout = StateLayout.of(plan)
        self._seats: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(layout.rows - 1, -1, -1))
        self._num_blocks = [0] * layout.rows
        self.tables = np.zeros((layout.groups, layout.rows, layout.blocks), np.int32)
        self.sampling = {name: np.zeros(layout.rows, kind) for name, kind in SEAT_FIELDS.items()}
        self.eos_ids = np.full((layout.rows, MAX_EOS_IDS), -1, np.int32)

    def seat(self, rows: Seq[BatchRow]) -> np.ndarray:
        """Seat the sequences of a batch and bring their mirrors up to date. returns [B] int32."""
        for row in rows:
            if row.sequence.id in self._seats:
                self._seats.move_to_end(row.sequence.id)
        return np.array([self._seat(row) for row in rows], np.int32)

    def append_blocks(self, sequence: Sequence, seat: int) -> None:
        """Take over the blocks that a running sequence got since the last call."""
        known = self._num_blocks[seat]
        for group, blocks in enumerate(sequence.blocks):
            if len(blocks) > known:
                self.tables[group, seat, known : len(blocks)] = blocks[known:]
        self._num_blocks[seat] = max(map(len, sequence.blocks), default=0)

    def num_blocks(self, seats: np.ndarray) -> int:
        """The longest block table of these seats."""
        return max((self._num_blocks[s] for s in seats), default=0)

    def _seat(self, row: BatchRow) -> int:
        sequence = row.sequence
        if sequence.id not in self._seats:
            if not self._free:
                self._free.append(self._seats.popitem(last=False)[1])
            self._seats[sequence.id] = self._free.pop()
        seat = self._seats[sequence.id]
        if row.tokens is not None:
            self._num_blocks[seat] = 0
            self._set_sampling(sequence, seat)
        self.append_blocks(sequence, seat)
        return seat

    def _set_sampling(self, sequence: Sequence, seat: int) -> None:
        params = sequence.params
        if params.min_new_tokens and len(sequence.eos_ids) > MAX_EOS_IDS:
            raise UserError(f"min_new_tokens works with at most {MAX_EOS_IDS} end-of-sequence ids on a GPU")
        values = {
            "temperature": max(params.temperature, MIN_TEMPERATURE) if params.temperature else 0.0,
            "repetition_penalty": params.repetition_penalty,
            "top_k": min(params.top_k, 2**31 - 1),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": fold_seed(sequence.seed),
            "min_position": sequence.num_prompt + params.min_new_tokens if params.min_new_tokens else 0,
        }
        for name, value in values.items():
            self.sampling[name][seat] = value
        self.eos_ids[seat] = -1
        if params.min_new_tokens:
            self.eos_ids[seat, : len(sequence.eos_ids)] = sorted(sequence.eos_ids)


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token and samples from it: what a captured graph runs."""
    return all(row.num_tokens == 1 and row.num_logits == 1 and row.sample for row in batch.rows)


def longest_context(batch: Batch) -> int:
    """Tokens of the longest sequence behind the step."""
    return max((row.start + row.num_tokens for row in batch.rows), default=0)


def continues(batch: Batch, last: Batch | None) -> bool:
    """Whether `batch` is the decode step `last` one token later, so that the device's state is already right."""
    if last is None or len(batch.rows) != len(last.rows):
        return False
    return all(
        row.tokens is None and row.sequence is before.sequence and row.start == before.start + 1
        for row, before in zip(batch.rows, last.rows, strict=True)
    )


def stage_decode(staging: Staging, batch: Batch, size: int, seats: np.ndarray, mirror: Seats, turn: int) -> None:
    """Write the state from which `step.advance` starts a decode step of `size` rows, the last ones padding.

    turn: of `DeviceState.told`, to which the step writes what it chooses
    """
    fields, count = staging.fields, len(batch.rows)
    fields["turn"][0] = (turn - 1) % TURNS
    starts = np.array([row.start for row in batch.rows], np.int32)
    for name, values in (("context_lens", starts), ("positions", starts - 1)):
        fields[name][:count], fields[name][count:size] = values, 0
    known = [row.tokens[0] if row.tokens is not None else 0 for row in batch.rows]
    sources = [seat if row.tokens is None else -1 for row, seat in zip(batch.rows, seats, strict=True)]
    for name, items, padding in (("tokens", known, 0), ("sources", sources, -1), ("seats", seats, -1)):
        fields[name][:count], fields[name][count:size] = items, padding
    fields["slots"][:] = -1
    fields["new_blocks"][:] = -1
    for name in ("seq_starts", "sample_rows", "logit_rows"):
        rows = size + 1 if name == "seq_starts" else size
        fields[name][:rows] = np.arange(rows)
    _stage_seats(staging, seats, mirror)


def stage_ragged(
    staging: Staging, batch: Batch, seats: np.ndarray, mirror: Seats, page_size: int, turn: int
) -> tuple[int, int]:
    """Write the inputs of any step, which writes what it chooses to `turn` of `DeviceState.told`. returns (T, R)."""
    fields = staging.fields
    fields["turn"][0] = turn
    starts = [0, *accumulate(row.num_tokens for row in batch.rows)]
    logits = [0, *accumulate(row.num_logits for row in batch.rows)]
    num_rows, num_tokens, num_logits = len(batch.rows), starts[-1], logits[-1]
    fields["seq_starts"][: num_rows + 1] = starts
    for i, ((first, stop), row) in enumerate(zip(pairwise(starts), batch.rows, strict=True)):
        positions = np.arange(row.start, row.start + row.num_tokens)
        fields["positions"][first:stop] = positions
        fields["context_lens"][i] = row.start + row.num_tokens
        fields["tokens"][first:stop] = 0 if row.tokens is None else row.tokens
        fields["sources"][first:stop] = seats[i] if row.tokens is None else -1
        blocks = mirror.tables[:, seats[i], positions // page_size]
        fields["slots"][:, first:stop] = blocks * page_size + positions % page_size
        fields["logit_rows"][logits[i] : logits[i + 1]] = np.arange(stop - row.num_logits, stop)
        fields["seats"][i] = seats[i] if row.sample else -1
        fields["sample_rows"][i] = max(logits[i + 1] - 1, 0)
    _stage_seats(staging, seats, mirror)
    return num_tokens, num_logits


def stage_new_blocks(staging: Staging, batch: Batch, seats: np.ndarray, mirror: Seats, page_size: int) -> bool:
    """Write the blocks that running sequences enter with this decode step. returns whether there are any."""
    crossing = [i for i, row in enumerate(batch.rows) if row.start % page_size == 0]
    if not crossing or not mirror.tables.shape[0]:
        return False
    new_blocks = staging.fields["new_blocks"]
    new_blocks[:] = -1
    for i in crossing:
        row = batch.rows[i]
        mirror.append_blocks(row.sequence, int(seats[i]))
        new_blocks[:, i] = mirror.tables[:, seats[i], row.start // page_size]
    return True


def stage_seen(staging: Staging, row: BatchRow, seat: int) -> None:
    """Write the bitmap of the tokens before the one that `row` samples."""
    assert row.tokens is not None
    words = staging.seen.numpy()[seat]
    bits = np.zeros(32 * len(words), np.uint8)
    bits[np.asarray(row.sequence.tokens[: row.start + row.num_tokens])] = 1
    words[:] = np.packbits(bits, bitorder="little").view(np.int32)


def _stage_seats(staging: Staging, seats: np.ndarray, mirror: Seats) -> None:
    count, width = len(seats), mirror.num_blocks(seats)
    for name, values in mirror.sampling.items():
        staging.fields[name][:count] = values[seats]
    staging.fields["eos_ids"][:count] = mirror.eos_ids[seats]
    staging.fields["block_table"][:, :count, :width] = mirror.tables[:, seats, :width]
