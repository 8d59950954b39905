"""The CUDA executor on a GPU, against the CPU executor on the same artifacts."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from dscompile.runtime import load
from dscompile.runtime.cuda_executor import graph_sizes
from dscompile.runtime.engine import Engine
from dscompile.runtime.kernels import context_bounds
from tests.helpers import rms_ratio

pytestmark = pytest.mark.gpu

LENGTHS = (1, 7, 16, 33, 5, 64)
LOGITS_TOLERANCE = 4e-3  # two executions in float16, which each round every activation to 2^-11
GREEDY_MARGIN = 2e-2  # of the deviation of a row's logits: how far below the CPU's best a GPU's choice may be


@pytest.fixture(scope="module")
def engines(artifacts) -> dict[str, tuple[Engine, Engine]]:
    """Name -> (engine on the GPU, engine on the CPU)."""
    return {
        name: (load(path, "cuda", max_kv_tokens=8192), load(path, "cpu", max_kv_tokens=8192))
        for name, path in artifacts.items()
    }


def prompts_for(engine: Engine, lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    limit = engine.plan.max_seq_len // 2
    return [torch.randint(engine.plan.vocab_size, (min(n, limit),), generator=generator).tolist() for n in lengths]


def assert_greedy(cpu: Engine, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the CPU's best after those before it, or as good within the margin of float16."""
    logits = cpu.logits([prompt + tokens])[0][len(prompt) - 1 : -1].double()
    chosen = logits[range(len(tokens)), tokens]
    gap = (logits.max(-1).values - chosen) / logits.std(-1)
    assert gap.max() <= GREEDY_MARGIN, f"token {int(gap.argmax())} is {gap.max():.3f} deviations below the best"


def test_logits_of_a_ragged_batch(engines, summary):
    for name, (gpu, cpu) in engines.items():
        prompts = prompts_for(gpu)
        pairs = list(zip(gpu.logits(prompts), cpu.logits(prompts), strict=True))
        worst = max(rms_ratio(a, b) for a, b in pairs)
        summary(f"{name}: logits of {len(prompts)} prompts, RMS ratio to the CPU at most {worst:.2e}")
        assert worst <= LOGITS_TOLERANCE


def test_greedy_decode(engines, summary):
    for name, (gpu, cpu) in engines.items():
        prompts = prompts_for(gpu)
        count = min(40, gpu.plan.max_seq_len // 2)
        results = gpu.generate(prompts, max_new_tokens=count, ignore_eos=True, logprobs=True)
        for prompt, result in zip(prompts, results, strict=True):
            assert len(result.tokens) == count
            assert_greedy(cpu, prompt, result.tokens)
            logits = cpu.logits([prompt + result.tokens])[0][len(prompt) - 1 : -1]
            wanted = logits.double().log_softmax(-1)[range(count), result.tokens]
            assert rms_ratio(torch.tensor(result.logprobs), wanted) <= 2e-2
        on_cpu = [cpu.generate([p], max_new_tokens=count, ignore_eos=True)[0].tokens for p in prompts]
        same = [r.tokens == tokens for r, tokens in zip(results, on_cpu, strict=True)]
        summary(f"{name}: {sum(same)} of {len(same)} greedy continuations of {count} tokens identical to the CPU's")


def test_a_sequence_that_outgrows_a_kernel(engines, summary):
    """From one graph of its contexts to the next, alone and with others."""
    crossed = 0
    for gpu, cpu in engines.values():
        for size, seed in ((1, 4), (3, 5)):
            for bound in context_bounds(gpu.plan.programs.values(), size):
                if bound + 20 > gpu.plan.max_seq_len:
                    continue
                generator = torch.Generator().manual_seed(seed)
                prompts = torch.randint(gpu.plan.vocab_size, (size, bound - 4), generator=generator).tolist()
                results = gpu.generate(prompts, max_new_tokens=16, ignore_eos=True, logprobs=True)
                for prompt, result in zip(prompts, results, strict=True):
                    assert_greedy(cpu, prompt, result.tokens)
                    logits = cpu.logits([prompt + result.tokens])[0][len(prompt) - 1 : -1]
                    wanted = logits.double().log_softmax(-1)[range(16), result.tokens]
                    assert rms_ratio(torch.tensor(result.logprobs), wanted) <= 2e-2
                crossed += 1
    summary(f"{crossed} bounds of contexts crossed")
    assert crossed


def test_requests_join_and_leave(engines):
    for gpu, cpu in engines.values():
        prompts = prompts_for(gpu, (9, 3, 21, 2, 40), seed=1)
        counts = [25, 4, 12, 18, 7]
        before = gpu.counters["tokens"]
        requests = []
        for prompt, count in zip(prompts, counts, strict=True):
            requests.append(gpu.add_request(prompt, max_new_tokens=count, ignore_eos=True))
            for _ in range(3):
                gpu.step()
        while not all(r.done for r in requests):
            gpu.step()
        for prompt, count, request in zip(prompts, counts, requests, strict=True):
            tokens = request.result().tokens
            assert len(tokens) == count
            assert_greedy(cpu, prompt, tokens)
        computed = gpu.counters["tokens"] - before
        needed = sum(map(len, prompts)) + sum(counts) - len(counts)
        assert needed <= computed <= needed + len(counts)  # at most one overshoot a request


def test_every_graph_size(engines):
    """Batches that fill a captured size, and batches padded up to one."""
    for gpu, cpu in engines.values():
        sizes = graph_sizes(gpu.plan.max_batch)
        for size in {3, 5, *(s for s in sizes if s <= 64)}:
            if size > gpu.plan.max_batch:
                continue
            prompts = prompts_for(gpu, [4 + i % 13 for i in range(size)], seed=size)
            results = gpu.generate(prompts, max_new_tokens=4, ignore_eos=True)
            for i in {0, size // 2, size - 1}:
                assert_greedy(cpu, prompts[i], results[i].tokens)


def test_sampled_tokens_do_not_depend_on_the_batch_much(engines, summary):
    """The noise is keyed by seed and position; only float16's rounding may tip a choice."""
    for name, (gpu, cpu) in engines.items():
        prompts = prompts_for(gpu, (5, 12, 30), seed=2)
        options = {"max_new_tokens": 16, "temperature": 0.9, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
        options |= {"seed": 11, "ignore_eos": True}
        together = [r.tokens for r in gpu.generate(prompts, **options)]
        alone = [gpu.generate([p], **options)[0].tokens for p in prompts]
        on_cpu = [cpu.generate([p], **options)[0].tokens for p in prompts]
        same = sum(a == b for a, b in zip(together, alone, strict=True))
        as_cpu = sum(a == b for a, b in zip(together, on_cpu, strict=True))
        summary(f"{name}: of 3 sampled continuations {same} are the same alone, {as_cpu} the same on the CPU")
        assert [t[0] for t in together] == [t[0] for t in alone]


def test_decode_neither_allocates_nor_waits(engines, summary):
    for name, (gpu, _) in engines.items():
        for batch in (1, 8):
            batch = min(batch, gpu.plan.max_batch)
            count = min(90, gpu.plan.max_seq_len - 10)
            prompts = prompts_for(gpu, [8] * batch)
            requests = [gpu.add_request(p, max_new_tokens=count, ignore_eos=True) for p in prompts]
            for _ in range(6):
                gpu.step()
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            times = []
            torch.cuda.set_sync_debug_mode("error")  # any wait but that for the event of the step that is read
            try:
                for _ in range(count // 2):
                    start = time.perf_counter()
                    gpu.step()
                    times.append(time.perf_counter() - start)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            for request in requests:
                gpu.cancel(request)
            summary(f"{name}: batch {batch}, {1e6 * statistics.median(times):.0f} us a decode step")


def test_a_launch_does_not_wait_for_the_step_before(engines):
    """With the GPU busy, a step is launched behind the work and the one before it is read; only the next read waits."""
    gpu, _ = next(iter(engines.values()))
    request = gpu.add_request(prompts_for(gpu, [8])[0], max_new_tokens=30, ignore_eos=True)
    for _ in range(6):
        gpu.step()
    torch.cuda.synchronize()
    with gpu.executor._gpu.active():
        torch.cuda._sleep(800_000_000)  # clock cycles: about 0.4 s
    start = time.perf_counter()
    gpu.step()
    launched = time.perf_counter() - start
    gpu.step()
    waited = time.perf_counter() - start
    gpu.cancel(request)
    assert launched < 0.1
    assert waited > 0.2
