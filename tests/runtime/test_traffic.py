"""Random traffic: requests join, leave and are preempted in any order, and every one gets its own tokens."""

import random

import pytest

from dscompile.runtime import scheduler
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.engine import Engine
from tests.runtime.models import make_model
from tests.runtime.test_engine import LateExecutor


@pytest.mark.parametrize("executor", [CpuExecutor, LateExecutor])
@pytest.mark.parametrize(("windows", "kv_tokens"), [((0, 0), 44), ((0, 5), 44), ((4, 4), 16)])
@pytest.mark.parametrize(("seed", "mixed_tokens"), [(0, 1024), (1, 1024), (2, 6)])
def test_random_traffic(monkeypatch, executor, windows, kv_tokens, seed, mixed_tokens):
    monkeypatch.setattr(scheduler, "MIXED_TOKENS", mixed_tokens)
    choose = random.Random(seed)
    model = make_model(windows=windows, max_step_tokens=11, max_batch=4)
    engine = Engine(executor(model.plan, model.weights, kv_tokens))
    engine.scheduler.max_logit_rows = 7
    expected, live = {}, {}
    for number in range(20):
        prompt = [choose.randrange(1, 37) for _ in range(choose.choice([1, 2, 9, 14]))]
        sampling = {
            "max_new_tokens": choose.choice([1, 25, 30]),
            "seed": number,
            "temperature": choose.choice([0, 1.0]),
        }
        expected[number] = prompt, sampling
        live[number] = engine.add_request(prompt, **sampling)
        for _ in range(choose.randrange(3)):
            engine.step()
        if choose.random() < 0.15:
            victim = choose.choice([n for n, r in live.items() if not r.done] or [None])
            if victim is not None:
                engine.cancel(live.pop(victim))
        if choose.random() < 0.1:
            (logits,) = engine.logits([prompt])
            assert len(logits) == len(prompt)
    while engine.has_work:
        engine.step()
    engine.step()
    assert engine.counters["preemptions"] > 0 or windows == (4, 4)
    assert all(a.num_used == 0 for a in engine.scheduler.tables.allocators)
    calm = Engine(CpuExecutor(make_model(windows=windows).plan, model.weights))
    for number, request in live.items():
        prompt, sampling = expected[number]
        assert request.result().tokens == calm.generate([prompt], **sampling)[0].tokens, number
