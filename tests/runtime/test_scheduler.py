"""The order in which requests begin, and how many tokens a step has."""

import pytest

from dscompile.runtime import scheduler
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.engine import Engine
from dscompile.runtime.sampler import SamplingParams
from tests.runtime.models import make_model
from tests.runtime.test_engine import PROMPTS, LateExecutor, dense_greedy, make_engine


def prompts_by_start(engine):
    """A list that gathers the first token of each sequence when its first step is launched."""
    started, launch = [], engine.executor.launch

    def launched(batch):
        started.extend(row.tokens[0] for row in batch.rows if row.start == 0)
        return launch(batch)

    engine.executor.launch = launched
    return started


def test_a_call_begins_with_the_prompts_of_most_new_tokens():
    model = make_model(max_batch=2)
    engine = make_engine(model)
    started = prompts_by_start(engine)
    by_default = SamplingParams()
    params = [SamplingParams(max_new_tokens=n) if n else by_default for n in (3, 9, 0, 3, 12, 9)]
    prompts = [[i] for i in range(1, 7)]
    results = engine.generate(prompts, params)
    assert started == [3, 5, 2, 6, 1, 4]
    assert engine.counters["steps"] == 64  # the longest's, beside which all others have been served
    for prompt, one, result in zip(prompts, params, results, strict=True):
        assert result == make_engine(model).generate([prompt], one)[0]


def test_requests_that_are_added_are_first_come_first_served():
    engine = make_engine(max_batch=1)
    started = prompts_by_start(engine)
    for prompt, count in (([1], 2), ([2], 5), ([3], 1), ([4], 9)):
        engine.add_request(prompt, max_new_tokens=count)
    while engine.has_work:
        engine.step()
    assert started == [1, 2, 3, 4]


def sizes_of_steps(engine):
    """A list that gathers the tokens of each step, and of them those of sequences that decode."""
    sizes, launch = [], engine.executor.launch

    def launched(batch):
        decoding = sum(row.start >= row.sequence.num_prompt for row in batch.rows)
        sizes.append((sum(row.num_tokens for row in batch.rows), decoding))
        return launch(batch)

    engine.executor.launch = launched
    return sizes


@pytest.mark.parametrize("executor", [CpuExecutor, LateExecutor])
def test_a_long_prompt_stalls_nobody_by_more_than_a_bounded_step(executor):
    """While a prompt of eight steps is read, every step is bounded and gives every running request its token."""
    model = make_model(max_step_tokens=9, max_batch=4)
    engine = Engine(executor(model.plan, model.weights))
    sizes = sizes_of_steps(engine)
    short = [engine.add_request(p, max_new_tokens=30) for p in PROMPTS[:3]]
    while any(len(r.new_tokens) < 2 for r in short):
        engine.step()
    long = engine.add_request(list(range(36)) + [1] * 12, max_new_tokens=2)
    sizes.clear()
    steps = 0
    while not long.new_tokens:
        before = [len(r.new_tokens) for r in short]
        engine.step()
        assert [len(r.new_tokens) for r in short] == [n + 1 for n in before]
        steps += 1
    assert max(sizes) == (9, 3)
    assert steps >= 8


@pytest.mark.parametrize("executor", [CpuExecutor, LateExecutor])
@pytest.mark.parametrize(
    ("mixed", "largest", "beside_three"),
    [(12, 40, 12), (12, 9, 9), (4, 40, 6), (1, 40, 6), (1, 4, 4)],
)
def test_a_step_in_which_sequences_decode_is_short(monkeypatch, executor, mixed, largest, beside_three):
    """A prompt gets what three sequences leave, at least as many tokens as they; all of a step if none decodes."""
    monkeypatch.setattr(scheduler, "MIXED_TOKENS", mixed)
    model = make_model(max_step_tokens=largest, max_batch=4)
    engine = Engine(executor(model.plan, model.weights))
    sizes = sizes_of_steps(engine)
    short = [engine.add_request([i], max_new_tokens=55) for i in range(1, 4)]
    engine.step()
    assert sizes[0] == (3, 0)
    long = engine.add_request(list(range(36)), max_new_tokens=2)
    sizes.clear()
    while not long.new_tokens:
        engine.step()
    full = 36 // (beside_three - 3)
    assert sizes[:full] == [(beside_three, 3)] * full
    while engine.has_work:
        engine.step()
    assert [r.result().tokens for r in short] == [dense_greedy(model, [i], 55) for i in range(1, 4)]
    assert long.result().tokens == dense_greedy(model, list(range(36)), 2)
    sizes.clear()
    engine.generate([list(range(36))], max_new_tokens=1)
    assert sizes == [(largest, 0)] * (36 // largest) + [(36 % largest, 0)] * (36 % largest > 0)


def test_prompts_of_one_new_token_each_are_read_in_full_steps(monkeypatch):
    """While the step of one prompt's only token is in flight, nothing decodes."""
    monkeypatch.setattr(scheduler, "MIXED_TOKENS", 8)
    model = make_model(max_step_tokens=32)
    engine = Engine(LateExecutor(model.plan, model.weights))
    sizes = sizes_of_steps(engine)
    engine.generate([[i] * 32 for i in range(1, 5)], max_new_tokens=1)
    assert sizes == [(32, 0)] * 4
