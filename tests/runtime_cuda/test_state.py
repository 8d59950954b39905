"""What is staged for a step: seats, block tables, positions, and when nothing needs to be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dscompile.runtime.cuda_batch import (
    Seats,
    continues,
    is_decode,
    stage_decode,
    stage_new_blocks,
    stage_ragged,
    stage_seen,
)
from dscompile.runtime.cuda_executor import graph_sizes
from dscompile.runtime.cuda_memory import Arena, ScratchMemory
from dscompile.runtime.cuda_state import MAX_EOS_IDS, DeviceState, Staging, StateLayout
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.plan import Buffer, Case, KVGroup, Plan, Program, Ref, Scratch
from dscompile.runtime.sampler import SamplingParams, fold_seed
from dscompile.runtime.sequence import Sequence
from tests.runtime_cuda.simulated import SimulatedDriver

PAGE = 4
GROUPS = (KVGroup(1, 1, 8, 8, "float16"), KVGroup(2, 1, 8, 8, "float16", window=6))


def plan(**options) -> Plan:
    facts = {
        "vocab_size": 70,
        "max_seq_len": 30,
        "max_batch": 3,
        "max_step_tokens": 16,
        "page_size": PAGE,
        "steps": (),
        "buffers": {},
        "weights": {},
        "kv_groups": GROUPS,
    }
    return Plan(**{**facts, **options})


def pinned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, -99, dtype=dtype)


def sequence(index: int, length: int, blocks: int, **params) -> Sequence:
    s = Sequence(index, [(7 * index + i) % 70 for i in range(length)], SamplingParams(**params), seed=index << 33 | 5)
    s.blocks = [[100 * (g + 1) + 10 * index + i for i in range(blocks)] for g in range(2)]
    return s


def test_graph_sizes():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert graph_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 100]
    assert graph_sizes(256)[-3:] == [224, 240, 256]


def test_fields_do_not_overlap_and_are_aligned():
    layout = StateLayout.of(plan())
    spans = sorted(layout.fields.values())
    assert all(first + count <= following for (first, count), (following, _) in pairwise(spans))
    assert all(first % 64 == 0 for first, _ in spans)
    assert layout.blocks == 8
    assert layout.seen_words == 3
    assert layout.num_words == spans[-1][0] + spans[-1][1]


def test_a_ragged_step():
    p = plan()
    mirror, staging = Seats(p), Staging(StateLayout.of(p), pinned)
    a, b, c = sequence(0, 5, 2), sequence(1, 9, 3), sequence(2, 6, 2, temperature=0.5, top_k=4)
    rows = (
        BatchRow(a, 0, a.tokens, num_logits=1),
        BatchRow(b, 4, b.tokens[4:7], num_logits=0, sample=False),
        BatchRow(c, 6, None),
    )
    seats = mirror.seat(rows)
    assert stage_ragged(staging, Batch(rows), seats, mirror, PAGE, 2) == (9, 2)
    f = staging.fields
    assert f["tokens"][:8].tolist() == a.tokens + b.tokens[4:7]
    assert f["sources"][:9].tolist() == [-1] * 8 + [seats[2]]
    assert f["positions"][:9].tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert f["seq_starts"][:4].tolist() == [0, 5, 8, 9]
    assert f["context_lens"][:3].tolist() == [5, 7, 7]
    assert f["logit_rows"][:2].tolist() == [4, 8]
    assert f["seats"][:3].tolist() == [seats[0], -1, seats[2]]
    assert f["sample_rows"][[0, 2]].tolist() == [0, 1]
    assert f["slots"][1, :9].tolist() == [800, 801, 802, 803, 804, 844, 845, 846, 886]
    assert staging.fields["block_table"][0, 1, :3].tolist() == b.blocks[0]
    assert f["turn"].tolist() == [2]


def test_a_decode_step_starts_one_token_before():
    """step.advance adds one to positions and context lengths; padding rows have no seat."""
    p = plan()
    mirror, staging = Seats(p), Staging(StateLayout.of(p), pinned)
    a, b = sequence(0, 5, 2), sequence(1, 9, 3, temperature=0.5, top_p=0.25, seed=1, min_new_tokens=3)
    b.eos_ids = frozenset((4, 2))
    mirror.seat((BatchRow(b, 0, b.tokens),))
    rows = (BatchRow(a, 5, [42]), BatchRow(b, 9, None))
    seats = mirror.seat(rows)
    stage_decode(staging, Batch(rows), 3, seats, mirror, 0)
    f = staging.fields
    assert f["positions"][:3].tolist() == [4, 8, 0]
    assert f["context_lens"][:3].tolist() == [5, 9, 0]
    assert f["tokens"][:3].tolist() == [42, 0, 0]
    assert f["sources"][:3].tolist() == [-1, seats[1], -1]
    assert f["seats"][:3].tolist() == [*seats, -1]
    assert f["seq_starts"][:4].tolist() == [0, 1, 2, 3]
    assert f["turn"].tolist() == [2], "step.advance takes the next turn, the first of three"
    assert (f["slots"] == -1).all()
    assert (f["new_blocks"] == -1).all()
    assert f["temperature"][:2].tolist() == [0.0, 0.5]
    assert f["top_p"][1] == 0.25
    assert f["seed"][1] == fold_seed(b.seed)
    assert f["min_position"][:2].tolist() == [0, 12]
    assert f["eos_ids"][1].tolist() == [2, 4] + [-1] * (MAX_EOS_IDS - 2)
    assert staging.fields["block_table"][1, 1, :3].tolist() == b.blocks[1]


def test_blocks_are_sent_when_they_are_entered():
    p = plan()
    mirror, staging = Seats(p), Staging(StateLayout.of(p), pinned)
    a, b = sequence(0, 7, 2), sequence(1, 8, 2)
    seats = mirror.seat((BatchRow(a, 6, a.tokens[6:]), BatchRow(b, 7, b.tokens[7:])))
    inside = Batch((BatchRow(a, 7, None), BatchRow(b, 9, None)))
    assert not stage_new_blocks(staging, inside, seats, mirror, PAGE)
    for group, blocks in enumerate(b.blocks):
        blocks.append(55 + group)
    crossing = Batch((BatchRow(a, 7, None), BatchRow(b, 8, None)))
    assert stage_new_blocks(staging, crossing, seats, mirror, PAGE)
    assert staging.fields["new_blocks"].tolist() == [[-1, 55, -1], [-1, 56, -1]]
    assert mirror.tables[1, seats[1], :3].tolist() == b.blocks[1]


def test_what_continues():
    a, b = sequence(0, 5, 2), sequence(1, 5, 2)
    last = Batch((BatchRow(a, 5, [1]), BatchRow(b, 5, None)))
    following = (BatchRow(a, 6, None), BatchRow(b, 6, None))
    assert continues(Batch(following), last)
    assert not continues(Batch(following), None)
    assert not continues(Batch(following[:1]), last)
    assert not continues(Batch(following[::-1]), last)
    assert not continues(Batch((following[0], BatchRow(b, 6, [3]))), last)
    assert not continues(Batch((following[0], BatchRow(b, 7, None))), last)
    assert is_decode(last)
    assert not is_decode(Batch((BatchRow(a, 0, [1, 2]),)))
    assert not is_decode(Batch((BatchRow(a, 0, [1], num_logits=0, sample=False),)))


def test_a_seat_is_taken_from_who_has_been_away_longest():
    mirror = Seats(plan())
    rows = [BatchRow(sequence(i, 4, 1), 0, [1]) for i in range(5)]
    first = mirror.seat(rows[:3])
    assert sorted(first) == [0, 1, 2]
    mirror.seat(rows[:1])
    assert mirror.seat(rows[3:4])[0] == first[1]
    assert mirror.seat([rows[0], rows[4]]).tolist() == [first[0], first[2]]


def test_a_recomputed_sequence_has_its_new_blocks():
    mirror = Seats(plan())
    s = sequence(0, 9, 3)
    seat = int(mirror.seat([BatchRow(s, 0, s.tokens)])[0])
    s.blocks = [[7, 8], [9, 10]]
    mirror.seat([BatchRow(s, 0, s.tokens[:5])])
    assert mirror.tables[:, seat, :2].tolist() == s.blocks
    assert mirror.num_blocks(np.array([seat])) == 2


def test_tokens_seen_become_bits():
    p = plan()
    staging = Staging(StateLayout.of(p), pinned)
    s = sequence(0, 3, 1, repetition_penalty=2.0)
    s.tokens = [0, 33, 69, 1]
    stage_seen(staging, BatchRow(s, 0, s.tokens[:3]), 1)
    assert staging.seen[1].tolist() == [1, 2, 32]


def test_too_many_end_of_sequence_ids():
    s = sequence(0, 3, 1, min_new_tokens=1)
    s.eos_ids = frozenset(range(MAX_EOS_IDS + 1))
    with pytest.raises(UserError, match="at most 16"):
        Seats(plan()).seat([BatchRow(s, 0, s.tokens)])


def test_arena_layouts():
    """A buffer begins at rows * offset; a layout for few rows is packed, and no two buffers share bytes."""
    p = plan(buffers={"a": Buffer("a", "T", 5, "float16"), "b": Buffer("b", "T", 3, "float32", 256)})
    arena = Arena(p, "T", torch.device("cpu"))
    assert arena.num_bytes == 16 * 512
    arena.allocate()
    for rows in (1, 16):
        a, b = arena.view(Ref("a", 1, 4), rows), arena.view(Ref("b", 0, 3), rows)
        assert (a.shape, b.shape) == ((rows, 3), (rows, 3))
        assert a.data_ptr() == arena.address(Ref("a", 1, 4), rows)
        assert b.data_ptr() - (a.data_ptr() - 2) == 256 * rows
        a.fill_(1.0)
        b.fill_(2.0)
        assert (a == 1).all()


def test_scratch_is_shared_unless_it_must_stay_zero():
    programs = {
        name: Program(
            (Case(1, 0, ()),), (Scratch("sums", "T", size), Scratch("count", "1", 8, zeroed=True), Scratch("x", "B", 4))
        )
        for name, size in (("p", 16), ("q", 100))
    }
    scratch = ScratchMemory(plan(programs=programs), torch.device("cpu"))
    scratch.allocate()
    assert scratch.address("p", "sums") == scratch.address("q", "sums")
    assert scratch.address("p", "count") != scratch.address("q", "count")
    assert scratch.address("q", "x") - scratch.address("q", "sums") >= 16 * 100
    assert scratch.view("q", "sums").shape == (16, 100)
    assert scratch.num_bytes == {False: 1792 + 256, True: 512}


@pytest.mark.parametrize(("max_seq_len", "copies"), [(30, 2), (10_000, 3)])
def test_inputs_and_block_tables_are_uploaded(max_seq_len, copies):
    """The first group's rows with the inputs where they are short, those of the other groups by themselves."""
    p = plan(max_seq_len=max_seq_len)
    driver = SimulatedDriver({}, Path())
    state, staging = DeviceState(p, torch.device("cpu"), driver, pinned), Staging(StateLayout.of(p), pinned)
    staging.words.copy_(torch.arange(len(staging.words)))
    state.upload(staging, 1, 5, 0)
    first, count = state.layout.fields["block_table"]
    assert torch.equal(state.uploaded[:first], staging.words[:first])
    tables = state.uploaded[first : first + count].reshape(2, 3, -1)
    np.testing.assert_equal(tables[:, :1, :5].numpy(), staging.fields["block_table"][:, :1, :5])
    assert not tables[:, 1:].any()
    assert state.address("block_table", 1) == tables[1].data_ptr()
    assert len(driver.copies) == copies


def test_a_name_that_only_another_version_knows_is_refused_in_one_line():
    state = DeviceState(plan(), torch.device("cpu"), None, pinned)
    assert state.address("tokens")
    with pytest.raises(UserError, match=r"step\.logprobs, which this runtime lacks: compile the model again"):
        state.address("logprobs")
