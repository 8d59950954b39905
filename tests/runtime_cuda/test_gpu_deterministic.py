"""An artifact compiled with --deterministic: the same bits for a request whatever runs beside it."""

from __future__ import annotations

import pytest
import torch

from dscompile.runtime import load
from tests.runtime_cuda.conftest import EXAMPLE

pytestmark = pytest.mark.gpu

LENGTHS = (1, 5, 33, 64, 17, 120, 9, 2)


@pytest.fixture(scope="module")
def engine(target, tmp_path_factory):
    pytest.importorskip("transformers")
    from dscompile.compiler import compile_model

    out = tmp_path_factory.mktemp("deterministic") / "out"
    compile_model(EXAMPLE, out, dtype="float16", target=target, deterministic=True)
    return load(out, device="cuda", max_kv_tokens=16384)


def prompts(engine) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(engine.plan.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def test_logits_are_the_same_bits_in_every_batch(engine):
    together = engine.logits(prompts(engine))
    for prompt, logits in zip(prompts(engine), together, strict=True):
        assert torch.equal(engine.logits([prompt])[0], logits)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 3}], ids=str)
def test_tokens_and_their_probabilities_do_not_depend_on_the_batch(engine, sampling):
    options = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": True, **sampling}
    together = engine.generate(prompts(engine), **options)
    requests = []
    for prompt in prompts(engine):  # joining one by one, while the others decode
        requests.append(engine.add_request(prompt, **options))
        engine.step()
        engine.step()
    while not all(request.done for request in requests):
        engine.step()
    for prompt, result, request in zip(prompts(engine), together, requests, strict=True):
        (alone,) = engine.generate([prompt], **options)
        for other in (result, request.result()):
            assert other.tokens == alone.tokens
            assert other.logprobs == alone.logprobs
