"""Every sampling option against a plain formula, and the noise against an integer reference."""

import math

import pytest
import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.sampler import SamplingParams, gumbel_noise, sample_row, scores

V = 53


@pytest.fixture
def logits():
    return torch.randn(V, generator=torch.Generator().manual_seed(3)) * 3


def kept(z):
    return set(torch.isfinite(z).nonzero()[:, 0].tolist())


def fmix32(h: int) -> int:
    h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
    h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
    return h ^ h >> 16


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 5])
@pytest.mark.parametrize("position", [0, 1, 4095])
def test_noise_is_the_documented_hash(seed, position):
    key = fmix32((fmix32((seed ^ seed >> 32) % 2**32) + position) % 2**32)
    expected = []
    for i in range(V):
        bits = fmix32((fmix32(i ^ key) + key) % 2**32)
        expected.append(-math.log(-math.log(((bits >> 9) + 0.5) * 2.0**-23)))
    torch.testing.assert_close(
        gumbel_noise(seed, position, V).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5
    )


def test_noise_is_gumbel_distributed():
    noise = torch.cat([gumbel_noise(11, p, 5000) for p in range(40)]).double()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02
    assert torch.isfinite(noise).all()


def test_sampled_frequencies_follow_the_distribution(logits):
    params = SamplingParams(temperature=1.5)
    counts = torch.zeros(V)
    for position in range(4000):
        counts[sample_row(logits, params, [0] * position, 0, seed=5)] += 1
    p = (logits / 1.5).softmax(-1)
    chi2 = ((counts - 4000 * p) ** 2 / (4000 * p))[4000 * p > 5]
    assert chi2.sum() < len(chi2) + 5 * (2 * len(chi2)) ** 0.5


def test_greedy_is_argmax_and_ties_go_to_the_lowest_id():
    assert sample_row(torch.tensor([0.0, 2.0, 2.0]), SamplingParams(), [1], 1, 0) == 1


def test_greedy_ignores_filters(logits):
    params = SamplingParams(top_k=3, top_p=0.1, min_p=0.5)
    assert kept(scores(logits, params, [], 0)) == set(range(V))


def test_temperature(logits):
    z = scores(logits, SamplingParams(temperature=0.5), [], 0)
    torch.testing.assert_close(z.softmax(-1), (logits * 2).softmax(-1))
    tiny = SamplingParams(temperature=1e-40)
    assert sample_row(logits, tiny, [1], 1, 9) == int(logits.argmax())


@pytest.mark.parametrize("k", [1, 5, V - 1, V, V + 10])
def test_top_k(logits, k):
    expected = set(logits.argsort(descending=True)[:k].tolist())
    assert kept(scores(logits, SamplingParams(temperature=1.0, top_k=k), [], 0)) == expected


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p(logits, p):
    order = logits.argsort(descending=True).tolist()
    mass, expected = 0.0, set()
    for i in order:
        expected.add(i)
        mass += float(logits.double().softmax(-1)[i])
        if mass >= p:
            break
    assert kept(scores(logits, SamplingParams(temperature=1.0, top_p=p), [], 0)) == expected


def test_top_p_acts_on_what_top_k_left(logits):
    z = scores(logits, SamplingParams(temperature=1.0, top_k=4, top_p=0.9), [], 0)
    top = logits.topk(4)
    cut = int((top.values.softmax(-1).cumsum(-1) < 0.9).sum()) + 1
    assert kept(z) == set(top.indices[:cut].tolist())


def test_min_p(logits):
    p = logits.softmax(-1)
    expected = set((p >= 0.05 * p.max()).nonzero()[:, 0].tolist())
    assert kept(scores(logits, SamplingParams(temperature=1.0, min_p=0.05), [], 0)) == expected


def test_repetition_penalty(logits):
    logits[4], logits[9] = 2.0, -1.0
    z = scores(logits, SamplingParams(repetition_penalty=1.7), [4, 9, 9, 4], 2)
    assert z[4] == pytest.approx(2.0 / 1.7) and z[9] == pytest.approx(-1.7)
    others = [i for i in range(V) if i not in (4, 9)]
    assert torch.equal(z[others], logits[others])


def test_min_new_tokens(logits):
    params = SamplingParams(min_new_tokens=2)
    assert kept(scores(logits, params, [1, 2], 1, [3, 5])) == set(range(V)) - {3, 5}
    assert kept(scores(logits, params, [1, 2, 3], 2, [3, 5])) == set(range(V))


def test_order_of_filters_as_in_transformers(logits):
    """Against transformers' own processors, in the order its generate() applies them."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    ids, eos = [4, 9, 11], [2, 40]
    params = SamplingParams(
        temperature=0.7, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.3, min_new_tokens=3, eos_token_ids=eos
    )
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        processors.MinNewTokensLengthLogitsProcessor(1, 3, eos),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.8),
        processors.MinPLogitsWarper(0.02),
    ]
    expected = logits[None].clone()
    for processor in chain:
        expected = processor(torch.tensor([ids]), expected)
    z = scores(logits, params, ids, 2, eos)
    assert kept(z) == kept(expected[0])
    torch.testing.assert_close(z.softmax(-1), expected[0].softmax(-1))


BAD = {
    "temperature": [-1, float("nan"), float("inf"), "hot", None, True],
    "top_k": [-1, 1.5, float("nan")],
    "top_p": [0, -0.1, 1.1, float("nan")],
    "min_p": [-0.1, 1.1, float("nan")],
    "repetition_penalty": [0, -1, float("nan")],
    "max_new_tokens": [0, -1, 2.5],
    "min_new_tokens": [-1],
    "seed": [-1, 2**64, 0.5],
    "stop": ["", (1,)],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_bad_values_are_refused_by_name(name, value):
    if name == "stop" and value == "":
        value = ("",)
    with pytest.raises(UserError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)
