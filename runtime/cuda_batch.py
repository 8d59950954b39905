"""Turns batches into the arrays of cuda_state: seats for sequences, block tables and sampling by seat, rows by step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from struct import pack_into

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
        self.tables = np.zeros((layout.groups, layout.rows, layout.blocks), np.int64)
        self.sampling = np.zeros((len(SEAT_FIELDS), layout.rows), np.int32)
        kinds = zip(SEAT_FIELDS.items(), self.sampling, strict=True)
        self._sampling = {name: values.view(kind) for (name, kind), values in kinds}
        self.eos_ids = np.full((layout.rows, MAX_EOS_IDS), -1, np.int32)

    def seat(self, rows: Seq[BatchRow]) -> np.ndarray:
        """Seat the sequences of a batch and bring their mirrors up to date. returns [B] int64."""
        for row in rows:
            if row.sequence.id in self._seats:
                self._seats.move_to_end(row.sequence.id)
        return np.array([self._seat(row) for row in rows])

    def append_blocks(self, sequence: Sequence, seat: int) -> None:
        """Take over the blocks that a running sequence got since the last call."""
        known = self._num_blocks[seat]
        for group, blocks in enumerate(sequence.blocks):
            if len(blocks) > known:
                self.tables[group, seat, known : len(blocks)] = blocks[known:]
        self._num_blocks[seat] = max(map(len, sequence.blocks), default=0)

    def num_blocks(self, seats: np.ndarray) -> int:
        """The longest block table of these seats."""
        return max((self._num_blocks[s] for s in seats.tolist()), default=0)

    def blocks(self, pages: np.ndarray) -> np.ndarray:
        """The blocks of pages [n], counted through the tables of all seats one after another. returns [groups, n]"""
        groups, rows, columns = self.tables.shape
        return self.tables.reshape(groups, rows * columns).take(pages, axis=1)

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
            self._sampling[name][seat] = value
        if params.min_new_tokens:  # else nothing reads them
            self.eos_ids[seat] = -1
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
    span = mirror.tables.shape[2] * page_size  # tokens that a seat may hold
    tokens: list[int] = []
    shifts = []  # what makes an index among the step's tokens one among the tokens of all seats, `span` each
    seq_starts, context_lens, told_to, sample_rows = [0], [], [], []
    logit_rows: list[int] = []
    fields["sources"][:] = -1
    for row, seat in zip(batch.rows, seats.tolist(), strict=True):
        if row.tokens is None:
            fields["sources"][len(tokens)] = seat
        shifts.append(seat * span + row.start - len(tokens))
        tokens += (0,) if row.tokens is None else row.tokens
        seq_starts.append(len(tokens))
        context_lens.append(row.start + row.num_tokens)
        told_to.append(seat if row.sample else -1)
        logit_rows += range(len(tokens) - row.num_logits, len(tokens))
        sample_rows.append(max(len(logit_rows) - 1, 0))
    fields["turn"][0] = turn
    fields["seq_starts"][: len(seq_starts)] = seq_starts
    fields["context_lens"][: len(context_lens)] = context_lens
    fields["seats"][: len(told_to)] = told_to
    fields["sample_rows"][: len(sample_rows)] = sample_rows
    fields["logit_rows"][: len(logit_rows)] = logit_rows
    num_tokens = len(tokens)
    pack_into(f"{num_tokens}i", fields["tokens"], 0, *tokens)  # in half the time of assigning a list
    places = np.arange(num_tokens) + np.array(shifts).repeat([row.num_tokens for row in batch.rows])
    fields["positions"][:num_tokens] = places % span
    fields["slots"][:, :num_tokens] = mirror.blocks(places // page_size) * page_size + places % page_size
    _stage_seats(staging, seats, mirror)
    return num_tokens, len(logit_rows)


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
    staging.sampling[:, :count] = mirror.sampling.take(seats, axis=1)
    staging.fields["eos_ids"][:count] = mirror.eos_ids.take(seats, axis=0)
    staging.fields["block_table"][:, :count, :width] = mirror.tables[:, seats, :width]
