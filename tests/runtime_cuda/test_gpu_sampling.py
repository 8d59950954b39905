"""The sampling kernels on a GPU at the vocabulary of a real model, against the reference."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from dscompile.runtime.kernels import Sizes
from tests.runtime_cuda.sampling import MAX_BATCH, OPTIONS, Sampler, expected, sequence

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab", [128256, 50257])
def test_sampling_equals_the_reference(tmp_path, target, summary, vocab):
    sampler = Sampler(tmp_path, vocab, target=target)
    torch.manual_seed(vocab)
    same = total = 0
    for n, options in enumerate(OPTIONS):
        sequences = [
            sequence(i, [3, 7, vocab - 1], list(range(10, 10 + i)), eos=[i + 20, 5], **options)
            for i in range(MAX_BATCH)
        ]
        logits = torch.randn(MAX_BATCH, vocab) * (1 + n % 3)
        logits[:, 5] = 16.0
        tokens, logprobs = sampler(logits, sequences, "step.sample")
        same += sum(a == b for a, b in zip(tokens, expected(logits, sequences), strict=True))
        total += MAX_BATCH
        wanted = logits.double().log_softmax(-1)[range(MAX_BATCH), tokens]
        torch.testing.assert_close(torch.tensor(logprobs).double(), wanted, atol=1e-4, rtol=1e-4)
    summary(f"vocabulary {vocab}: {same} of {total} sampled tokens are the reference's")
    assert same >= total - 1  # logarithms and exponentials of the two may differ in the last bit


@pytest.mark.parametrize("vocab", [1, 533, 128256])
def test_greedy_takes_the_best(tmp_path, target, vocab):
    sampler = Sampler(tmp_path, vocab, cols=vocab + 3, target=target)
    logits = torch.randn(MAX_BATCH, vocab) * 4
    logits[0, vocab // 3] = logits[0, -1] = 99.0
    tokens, _ = sampler(logits, [sequence(i, [0]) for i in range(MAX_BATCH)], "step.sample_greedy")
    assert tokens == logits.argmax(-1).tolist()
    assert tokens[0] == vocab // 3


def mean_us(replay, device, count=200):
    """Microseconds of a replay among `count` of them."""
    start = time.perf_counter()
    for _ in range(count):
        replay()
    device.synchronize()
    return (time.perf_counter() - start) / count * 1e6


@pytest.mark.parametrize(
    ("program", "options", "limit_us"),
    [
        ("step.sample_greedy", {}, 15),
        ("step.sample", {"temperature": 1.0, "top_k": 50, "top_p": 0.9}, 35),
        ("step.sample", {"temperature": 1.0, "top_p": 0.9}, 35),
    ],
    ids=str,
)
def test_time_of_sampling(tmp_path, target, summary, program, options, limit_us):
    """Replays of the captured programs at batch 1 and a vocabulary of 128256; others on the GPU may slow some down."""
    sampler = Sampler(tmp_path, 128256, target=target)
    sampler(torch.randn(1, 128256), [sequence(0, [1], **options)], program)
    stream, sizes = sampler.device.stream, Sizes(1, 1, 1, 16)
    launch = partial(sampler.bound.eager(program).launch, sizes, True, stream)
    with sampler.device.active():
        replay = sampler.device.capture(launch)
        sampler.device.synchronize()
        elapsed_us = min(mean_us(replay, sampler.device) for _ in range(10))
    summary(f"{program} {options}: {elapsed_us:.1f} us at batch 1, vocabulary 128256")
    assert elapsed_us <= limit_us
