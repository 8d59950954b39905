"""The kernels that choose tokens, against the reference of runtime/sampler.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dscompile.codegen.step_kernels import BLOCK, step_kernels
from dscompile.runtime.cuda_batch import Seats, stage_ragged, stage_seen
from dscompile.runtime.cuda_memory import Arena, ScratchMemory
from dscompile.runtime.cuda_program import BoundPlan
from dscompile.runtime.cuda_state import DeviceState, Staging
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.kernels import KernelTable, Sizes
from dscompile.runtime.plan import Buffer, Plan, Ref, Sample, Step
from dscompile.runtime.sampler import SamplingParams, sample_row
from dscompile.runtime.sequence import Sequence
from tests.runtime_cuda.simulated import TARGET, SimulatedDevice, write_kernels


class Sampler:
    """A plan that is nothing but sampling, on a simulated GPU."""

    def __init__(self, tmp_path, vocab: int, cols: int | None = None) -> None:
        plan = Plan(
            vocab_size=vocab,
            max_seq_len=64,
            max_batch=8,
            max_step_tokens=64,
            page_size=4,
            steps=(Step("sample", Sample(), ("sample",), None, {"logits": Ref("logits", 0, vocab)}),),
            buffers={"logits": Buffer("logits", "R", cols or vocab, "float32")},
            weights={},
            kv_groups=(),
        )
        programs, requests = step_kernels(plan)
        kernels = write_kernels(requests, tmp_path)
        self.plan = Plan(**{**plan.__dict__, "programs": programs, "kernels": kernels})
        device = SimulatedDevice(kernels, tmp_path)
        table = KernelTable(kernels, tmp_path, TARGET, device.driver)
        self.arena = Arena(self.plan, "R", device.device)
        scratch = ScratchMemory(self.plan, device.device)
        self.arena.allocate()
        scratch.allocate()
        self.state = DeviceState(self.plan, device.device, device.driver)
        self.pinned = device.pinned
        self.bound = BoundPlan(self.plan, {}, table, {"R": self.arena}, scratch, self.state, [])
        self.seats = Seats(self.plan)

    def __call__(self, logits: torch.Tensor, sequences: list[Sequence], program: str) -> tuple[list[int], list[float]]:
        """Sample every sequence's next token from its row of logits [B, V], twice: the second run must agree."""
        self.arena.view(Ref("logits", 0, self.plan.vocab_size), self.arena.rows)[: len(sequences)] = logits
        rows = [BatchRow(s, len(s.tokens) - 1, s.tokens[-1:]) for s in sequences]
        staging = Staging(self.state.layout, self.pinned)
        seats = self.seats.seat(rows)
        tokens, num_logits = stage_ragged(staging, Batch(tuple(rows)), seats, self.seats, 4)
        sizes = Sizes(tokens, len(rows), num_logits, self.state.layout.blocks)
        results = []
        for _ in range(2):
            self.state.chosen.fill_(-7)
            self.state.upload(staging, len(rows), 0, 0)
            for row, seat in zip(rows, seats, strict=True):
                stage_seen(staging, row, int(seat))
                self.state.upload_seen(staging, int(seat), 0)
            self.bound.eager(program).launch(sizes, True, 0)
            chosen = self.state.chosen.numpy()
            results.append((chosen[seats].tolist(), chosen[8 + seats].view(np.float32).tolist()))
        np.testing.assert_equal(results[0], results[1])
        return results[0]


def expected(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [
        sample_row(row, s.params, s.tokens, s.num_prompt, s.seed, sorted(s.eos_ids))
        for row, s in zip(logits, sequences, strict=True)
    ]


def sequence(index: int, prompt: list[int], new: list[int] = (), eos=(), **params) -> Sequence:
    s = Sequence(index, list(prompt), SamplingParams(**params), seed=12345678901 * (index + 1), eos_ids=frozenset(eos))
    s.tokens += new
    return s


@pytest.mark.parametrize("vocab", [1, 37, BLOCK, BLOCK + 1, 2 * BLOCK + 533])
def test_greedy_takes_the_best_and_the_lowest_of_equals(tmp_path, vocab):
    sampler = Sampler(tmp_path, vocab, cols=vocab + 11)
    torch.manual_seed(vocab)
    logits = torch.randn(3, vocab) * 3
    logits[1, vocab // 2] = logits[1, -1] = 50.0
    sequences = [sequence(i, [0]) for i in range(3)]
    tokens, logprobs = sampler(logits, sequences, "step.sample_greedy")
    assert tokens == logits.argmax(-1).tolist()
    assert tokens[1] == vocab // 2
    wanted = logits.double().log_softmax(-1)[range(3), tokens]
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted, atol=2e-6, rtol=1e-5)


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.5},
    {"min_new_tokens": 5},
    {"temperature": 1e-35},
    {"temperature": 1.5, "top_k": 3, "min_new_tokens": 5, "repetition_penalty": 0.7},
]


@pytest.mark.parametrize(
    ("vocab", "options"), [*((533, o) for o in OPTIONS), *((BLOCK + 700, o) for o in OPTIONS[4::3])], ids=str
)
def test_sampling_equals_the_reference(tmp_path, vocab, options):
    sampler = Sampler(tmp_path, vocab)
    torch.manual_seed(len(str(options)))
    sequences = [
        sequence(i, [3, 7, 7, vocab - 1], list(range(10, 10 + i)), eos=[i + 20, 5], **options) for i in range(3)
    ]
    logits = torch.randn(3, vocab) * 2
    logits[:, 5] = 9.0
    logits[:, 7] = 8.0
    tokens, logprobs = sampler(logits, sequences, "step.sample")
    assert tokens == expected(logits, sequences)
    wanted = logits.double().log_softmax(-1)[range(3), tokens]
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted, atol=5e-6, rtol=1e-5)


def test_rows_of_different_parameters_share_a_launch(tmp_path):
    vocab = 700
    sampler = Sampler(tmp_path, vocab)
    torch.manual_seed(0)
    sequences = [sequence(i, [1, 2, 3], [4] * i, eos=[9], **o) for i, o in enumerate(OPTIONS[-8:])]
    logits = torch.randn(8, vocab) * 3
    tokens, _ = sampler(logits, sequences, "step.sample")
    assert tokens == expected(logits, sequences)


def test_ties_at_the_threshold_are_kept(tmp_path):
    """Six equal logits and top_k 2: every one of the six may be chosen, and no other."""
    sampler = Sampler(tmp_path, 100)
    logits = torch.full((8, 100), -1.0)
    logits[:, 40:46] = 1.0
    chosen = set()
    for start in range(0, 48, 8):
        sequences = [sequence(start + i, [1], temperature=1.0, top_k=2) for i in range(8)]
        tokens, _ = sampler(logits, sequences, "step.sample")
        assert tokens == expected(logits, sequences)
        chosen |= set(tokens)
    assert chosen == set(range(40, 46))


def test_frequencies_follow_the_softmax(tmp_path):
    sampler = Sampler(tmp_path, 4)
    logits = torch.tensor([[1.0, 0.0, 2.0, -math.inf]]).expand(8, 4)
    counts = torch.zeros(4)
    for start in range(0, 120, 8):
        sequences = [sequence(start + i, [1], temperature=1.0) for i in range(8)]
        for token in sampler(logits, sequences, "step.sample")[0]:
            counts[token] += 1
    assert counts[3] == 0
    assert (counts / counts.sum() - logits[0].softmax(-1)).abs().max() < 0.1


def test_a_sampled_token_counts_as_seen(tmp_path):
    """With an overwhelming penalty, a token sampled once by the kernel is not sampled again."""
    sampler = Sampler(tmp_path, 64)
    s = sequence(0, [1], repetition_penalty=1000.0)
    logits = torch.zeros(1, 64)
    logits[0, 33], logits[0, 63] = 5.0, 4.0
    assert sampler(logits, [s], "step.sample")[0] == [33]
    seat = int(sampler.seats.seat([BatchRow(s, 0, None)])[0])
    words = sampler.state.seen[seat]
    assert words.tolist() == [0b10, 0b10]


def test_nan_logits_give_a_valid_token(tmp_path):
    sampler = Sampler(tmp_path, 50)
    s = [sequence(0, [1])]
    for program in ("step.sample_greedy", "step.sample"):
        assert 0 <= sampler(torch.full((1, 50), math.nan), s, program)[0][0] < 50
