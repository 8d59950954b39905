"""The kernels that choose tokens, against the reference of runtime/sampler.py."""

from __future__ import annotations

import math

import pytest
import torch

from dscompile.codegen.step_kernels import BLOCK, LIST, MANY_IDS
from dscompile.runtime.executor import BatchRow
from tests.runtime_cuda.sampling import MAX_BATCH, OPTIONS, Sampler, expected, sequence


@pytest.mark.parametrize(
    ("vocab", "rows"),
    [*((v, 3) for v in (1, 37, BLOCK, BLOCK + 1, 2 * BLOCK + 533)), *((v, MAX_BATCH) for v in (37, MANY_IDS + 533))],
)
def test_greedy_takes_the_best_and_the_lowest_of_equals(tmp_path, vocab, rows):
    sampler = Sampler(tmp_path, vocab, cols=vocab + 11)
    torch.manual_seed(vocab)
    logits = torch.randn(rows, vocab) * 3
    logits[1, vocab // 2] = logits[1, -1] = 50.0
    sequences = [sequence(i, [0]) for i in range(rows)]
    tokens, logprobs = sampler(logits, sequences, "step.sample_greedy")
    assert tokens == logits.argmax(-1).tolist()
    assert tokens[1] == vocab // 2
    wanted = logits.double().log_softmax(-1)[range(rows), tokens]
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("vocab", "options"), [*((533, o) for o in OPTIONS), *((BLOCK + 700, o) for o in OPTIONS[4::4])], ids=str
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
    sequences = [sequence(i, [1], temperature=1.0, top_k=2) for i in range(8)]
    tokens, _ = sampler(logits, sequences, "step.sample")
    assert tokens == expected(logits, sequences)
    assert len(set(tokens)) > 2
    assert set(tokens) <= set(range(40, 46))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": LIST + 300, "top_p": 0.9},
        {"temperature": 1e9, "top_k": 3},
        {"temperature": 1e9, "top_k": 40, "top_p": 0.5},
        {"temperature": 1e4, "top_p": 0.999},
        {"temperature": 0.01, "top_k": 2},
    ],
    ids=str,
)
def test_thresholds_that_are_hard_to_find(tmp_path, options):
    """More ids than the list holds, distances that all fall into one part, and distances far apart."""
    vocab = LIST + 901
    sampler = Sampler(tmp_path, vocab)
    torch.manual_seed(1)
    logits = torch.randn(2, vocab)
    sequences = [sequence(i, [3, 7], **options) for i in range(2)]
    assert sampler(logits, sequences, "step.sample")[0] == expected(logits, sequences)


def test_more_ties_than_the_list_holds(tmp_path):
    sampler = Sampler(tmp_path, LIST + 500)
    logits = torch.zeros(1, LIST + 500)
    sequences = [sequence(0, [1], temperature=1.0, top_k=5, top_p=0.5)]
    assert sampler(logits, sequences, "step.sample")[0] == expected(logits, sequences)


def test_frequencies_follow_the_softmax(tmp_path):
    sampler = Sampler(tmp_path, 4)
    logits = torch.tensor([[1.0, 0.0, 2.0, -math.inf]]).expand(8, 4)
    counts = torch.zeros(4)
    for start in range(0, 96, 8):
        sequences = [sequence(start + i, [1], temperature=1.0) for i in range(8)]
        for token in sampler(logits, sequences, "step.sample")[0]:
            counts[token] += 1
    assert counts[3] == 0
    assert (counts / counts.sum() - logits[0].softmax(-1)).abs().max() < 0.12


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
