"""The engine: identical tokens whatever the company, counters, preemption, overshoot, text."""

import pytest
import torch

from dscompile.runtime import load
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.engine import Engine
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import StepResult
from dscompile.runtime.sampler import SamplingParams, sample_row
from tests.helpers import rms_ratio
from tests.runtime.artifacts import EOS, write_artifact
from tests.runtime.models import make_model, oracle

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 3], [7, 8, 30, 31, 2]]


def make_engine(model=None, max_kv_tokens=None, **options) -> Engine:
    model = model or make_model(**options)
    executor = CpuExecutor(model.plan, model.weights, max_kv_tokens)
    executor.poison()
    return Engine(executor)


def dense_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_greedy_tokens_are_those_of_the_dense_formulas(kind):
    model = make_model(kind=kind)
    results = make_engine(model).generate(PROMPTS, max_new_tokens=8)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == dense_greedy(model, prompt, 8)
        assert result.finish_reason == "length" and result.num_prompt_tokens == len(prompt)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.3, "seed": 5}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}]
)
def test_tokens_do_not_depend_on_company(sampling):
    model = make_model()
    together = make_engine(model).generate(PROMPTS, max_new_tokens=12, **sampling)
    alone = [make_engine(model).generate(p, max_new_tokens=12, **sampling)[0] for p in PROMPTS]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_chunked_prefill():
    model = make_model(max_step_tokens=5)
    whole = make_model()
    engine = make_engine(model)
    prompt = list(range(1, 31))
    assert engine.generate([prompt, [4]], max_new_tokens=6) == make_engine(whole).generate(
        [prompt, [4]], max_new_tokens=6
    )
    assert engine.counters["tokens"] == 31 + 2 * 5


def test_decode_goes_on_while_a_long_prompt_is_read():
    model = make_model(max_step_tokens=5)
    engine = make_engine(model)
    short = engine.add_request([4], max_new_tokens=20)
    engine.step()
    engine.add_request(list(range(1, 31)), max_new_tokens=2)
    before = len(short.new_tokens)
    for _ in range(6):
        engine.step()
    assert len(short.new_tokens) == before + 6


def test_joining_and_leaving_recomputes_nothing():
    model = make_model()
    engine = make_engine(model)
    first = engine.add_request(PROMPTS[0], max_new_tokens=20)
    for _ in range(5):
        engine.step()
    second = engine.add_request(PROMPTS[2], max_new_tokens=4)
    for _ in range(3):
        engine.step()
    third = engine.add_request(PROMPTS[4], max_new_tokens=10)
    engine.step()
    engine.cancel(third)
    computed = engine.counters["tokens"]
    assert computed == 3 + 4 + 9 + (3 - 1) + 3 + 1 + 1 + 5
    while engine.has_work:
        engine.step()
    assert first.result().tokens == dense_greedy(model, PROMPTS[0], 20)
    assert second.result().tokens == dense_greedy(model, PROMPTS[2], 4)
    assert engine.counters["tokens"] == (3 + 19) + (9 + 3) + 5
    assert all(a.num_used == 0 for a in engine.scheduler.tables.allocators)


@pytest.mark.parametrize("windows", [(0, 0), (0, 6)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_preemption_loses_nothing(windows, sampling):
    model = make_model(windows=windows)
    roomy = make_engine(model)
    tight = make_engine(model, max_kv_tokens=40)
    expected = roomy.generate(PROMPTS, max_new_tokens=20, **sampling)
    assert roomy.counters["preemptions"] == 0
    assert tight.generate(PROMPTS, max_new_tokens=20, **sampling) == expected
    assert tight.counters["preemptions"] > 0
    assert tight.counters["tokens"] > roomy.counters["tokens"]
    assert all(a.num_used == 0 for a in tight.scheduler.tables.allocators)


def test_logits():
    model = make_model(max_step_tokens=7)
    engine = make_engine(model)
    for prompt, logits in zip(PROMPTS, engine.logits(PROMPTS), strict=True):
        assert logits.dtype == torch.float32
        assert rms_ratio(logits, oracle(model, prompt)) < 3e-6


def test_logits_in_pieces_of_few_rows():
    model = make_model()
    engine = make_engine(model)
    engine.scheduler.max_logit_rows = 4
    for prompt, logits in zip(PROMPTS, engine.logits(PROMPTS), strict=True):
        assert rms_ratio(logits, oracle(model, prompt)) < 3e-6


def test_logits_survive_preemption():
    model = make_model()
    engine = make_engine(model, max_kv_tokens=24)
    long = [list(range(1, 23)), list(range(3, 20))]
    running = engine.add_request([9], max_new_tokens=20)
    for prompt, logits in zip(long, engine.logits(long), strict=True):
        assert rms_ratio(logits, oracle(model, prompt)) < 3e-6
    while engine.has_work:
        engine.step()
    assert running.result().tokens == dense_greedy(model, [9], 20)


def test_logprobs():
    model = make_model()
    for sampling in ({}, {"temperature": 1.0, "seed": 2}):
        (result,) = make_engine(model).generate([[1, 2, 3]], max_new_tokens=5, logprobs=True, **sampling)
        table = oracle(model, [1, 2, 3, *result.tokens]).log_softmax(-1)
        expected = [float(table[2 + i, t]) for i, t in enumerate(result.tokens)]
        assert result.logprobs == pytest.approx(expected, abs=1e-4)


def test_sampling_is_the_reference():
    model = make_model()
    params = SamplingParams(temperature=0.9, top_k=10, repetition_penalty=1.4, seed=17, max_new_tokens=8)
    (result,) = make_engine(model).generate([[1, 2, 3]], params)
    tokens = [1, 2, 3]
    for _ in range(8):
        tokens.append(sample_row(oracle(model, tokens)[-1].float(), params, tokens, 3, 17))
    assert result.tokens == tokens[3:]


def test_eos_ends_and_min_new_tokens_and_ignore_eos():
    model = make_model()
    engine = make_engine(model)
    free = engine.generate([[1, 2, 3]], max_new_tokens=6)[0].tokens
    eos = free[1]
    ended = engine.generate([[1, 2, 3]], max_new_tokens=6, eos_token_ids=(eos,))[0]
    assert ended.tokens == free[: free.index(eos) + 1] and ended.finish_reason == "stop"
    assert engine.generate([[1, 2, 3]], max_new_tokens=6, eos_token_ids=(eos,), ignore_eos=True)[0].tokens == free
    longer = engine.generate([[1, 2, 3]], max_new_tokens=6, eos_token_ids=(eos,), min_new_tokens=3)[0].tokens
    assert eos not in longer[:3] and len(longer) >= 3


def test_max_seq_len_ends_a_request():
    model = make_model(max_seq_len=16)
    engine = make_engine(model)
    (result,) = engine.generate([[1, 2, 3]], max_new_tokens=100)
    assert result.finish_reason == "length" and len(result.tokens) == 14
    assert result.tokens == dense_greedy(make_model(), [1, 2, 3], 14)
    assert len(engine.generate([[1] * 16], max_new_tokens=5)[0].tokens) == 1


def test_more_prompts_than_the_batch_takes():
    model = make_model(max_batch=2)
    prompts = [[i] for i in range(1, 8)]
    results = make_engine(model).generate(prompts, max_new_tokens=3)
    assert [r.tokens for r in results] == [dense_greedy(model, p, 3) for p in prompts]


# ---------------------------------------------------------------- steps in flight


class LateExecutor(CpuExecutor):
    """Runs a step only when it is read, with two in flight: the host must not need a token before."""

    max_in_flight = 2

    def launch(self, batch):
        late = Late(self, batch, [[list(b) for b in row.sequence.blocks] for row in batch.rows])
        self.pending = [p for p in getattr(self, "pending", []) if p.result is None] + [late]
        assert len(self.pending) <= 2
        return late


class Late:
    def __init__(self, executor, batch, blocks) -> None:
        self.executor, self.batch, self.blocks, self.result = executor, batch, blocks, None

    def wait(self) -> StepResult:
        """As on a device: the blocks of launch time, and for None the token of the step before."""
        assert self.executor.pending[0] is self, "steps are read in order"
        now = [row.sequence.blocks for row in self.batch.rows]
        for row, blocks in zip(self.batch.rows, self.blocks, strict=True):
            row.sequence.blocks = blocks
        self.result = CpuExecutor.launch(self.executor, self.batch).wait()
        for row, blocks in zip(self.batch.rows, now, strict=True):
            row.sequence.blocks = blocks
        self.executor.pending.pop(0)
        return self.result


@pytest.mark.parametrize("tight", [None, 40])
@pytest.mark.parametrize("windows", [(0, 0), (0, 6)])
def test_two_steps_in_flight_give_the_same_tokens(tight, windows):
    model = make_model(windows=windows)
    expected = make_engine(model).generate(PROMPTS, max_new_tokens=20)
    engine = Engine(LateExecutor(model.plan, model.weights, tight))
    assert engine.generate(PROMPTS, max_new_tokens=20) == expected
    assert (engine.counters["preemptions"] > 0) == (tight is not None)
    eos = expected[0].tokens[4]
    ended = engine.generate(PROMPTS, max_new_tokens=20, eos_token_ids=(eos,))
    for one, full in zip(ended, expected, strict=True):
        cut = full.tokens.index(eos) + 1 if eos in full.tokens else 20
        assert one.tokens == full.tokens[:cut]


def test_overshoot_is_discarded():
    model = make_model()
    full = make_engine(model).generate([[1, 2, 3]], max_new_tokens=6)[0].tokens
    engine = Engine(LateExecutor(model.plan, model.weights))
    eos = full[2]
    index = full.index(eos)
    (result,) = engine.generate([[1, 2, 3]], max_new_tokens=6, eos_token_ids=(eos,))
    assert result.tokens == full[: index + 1]
    assert engine.step() == []  # reads the step that overshot
    assert engine.counters["tokens"] == 3 + index + 1
    assert engine.generate([[1, 2, 3]], max_new_tokens=6)[0].tokens == full


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def text_engine(tmp_path_factory):
    model = make_model(vocab=257)
    return load(write_artifact(tmp_path_factory.mktemp("text") / "out", model, tokenizer=True), device="cpu")


def scripted(engine, data: bytes, **sampling):
    """Stream with an executor that says these bytes, whatever the model thinks; returns (pieces, result)."""
    said = iter([*data, EOS])
    launch = engine.executor.launch

    def speak(batch):
        launch(batch)
        result = StepResult([next(said)] * len(batch.rows), [0.0] * len(batch.rows), [None] * len(batch.rows))
        return type("Said", (), {"wait": lambda self: result})()

    engine.executor.launch = speak
    try:
        request = engine.add_request("Say: ", streaming=True, **sampling)
        pieces = []
        while not request.done:
            engine.step()
            pieces.append(request.new_text())
        return [p for p in pieces if p], request.result()
    finally:
        del engine.executor.launch


def test_text_is_that_of_the_new_tokens(text_engine):
    result = text_engine.generate(["Hello"], max_new_tokens=9)[0]
    tokens = text_engine.generate([list(b"Hello")], max_new_tokens=9)[0].tokens
    assert result.tokens == tokens
    assert result.text == bytes(t for t in tokens if t < 256).decode(errors="replace")


def test_stream_equals_text(text_engine):
    for seed in range(5):
        sampling = {"temperature": 1.5, "seed": seed, "max_new_tokens": 30, "ignore_eos": True}
        pieces = list(text_engine.stream("Hello", **sampling))
        assert "".join(pieces) == text_engine.generate("Hello", **sampling)[0].text


def test_characters_of_several_bytes_are_never_split(text_engine):
    pieces, result = scripted(text_engine, "aé€😀z".encode(), max_new_tokens=50)
    assert pieces == ["a", "é", "€", "😀", "z"]
    assert result.text == "aé€😀z" and result.finish_reason == "stop" and result.tokens[-1] == EOS


def test_incomplete_character_at_the_end(text_engine):
    pieces, result = scripted(text_engine, "é€".encode(), max_new_tokens=4)
    assert "".join(pieces) == result.text
    assert result.text.startswith("é") and result.text.endswith("\ufffd")
    assert result.finish_reason == "length"


def test_stop_string_cuts_text_and_is_never_shown(text_engine):
    pieces, result = scripted(text_engine, b"one END two", max_new_tokens=50, stop=("END", "zzz"))
    assert result.text == "one " and "".join(pieces) == "one "
    assert result.finish_reason == "stop" and bytes(result.tokens) == b"one END"


def test_what_only_looks_like_a_stop_string_is_shown(text_engine):
    pieces, result = scripted(text_engine, b"aENbEN", max_new_tokens=50, stop="END")
    assert result.text == "aENbEN" and "".join(pieces) == result.text
    assert pieces[:2] == ["a", "ENb"]


def test_chat_uses_the_template(text_engine):
    messages = [{"role": "user", "content": "hi"}]
    result = text_engine.chat(messages, max_new_tokens=5)
    assert result.tokens == text_engine.generate([list(b"<user>hi<a>")], max_new_tokens=5)[0].tokens


def test_chat_template_is_sandboxed(text_engine):
    from dscompile.runtime.chat import render_chat

    class Evil:
        path = text_engine.tokenizer.path

        def config(self):
            return {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"}

    with pytest.raises(UserError, match="chat template"):
        render_chat(Evil(), [])


def test_abandoned_stream_frees_its_blocks(text_engine):
    stream = text_engine.stream("Hello", max_new_tokens=30, ignore_eos=True)
    next(stream)
    stream.close()
    assert not text_engine.has_work
    assert all(a.num_used == 0 for a in text_engine.scheduler.tables.allocators)


# ---------------------------------------------------------------- bad input

BAD = {
    "empty list": ([[]], {}, "empty"),
    "long": ([[1] * 65], {}, "65 tokens"),
    "range": ([[1, 37]], {}, "token id 37"),
    "negative": ([[-1]], {}, "token id -1"),
    "float": ([[1.5]], {}, "whole numbers"),
    "text": (["hello"], {}, "no tokenizer"),
    "unknown": ([[1]], {"temprature": 1}, "temprature"),
    "sampling": ([[1]], {"temperature": float("nan")}, "temperature"),
    "stop": ([[1]], {"stop": "x"}, "no tokenizer"),
    "both": ([[1]], {"params": SamplingParams(), "seed": 1}, "not both"),
    "count": ([[1], [2]], {"params": [SamplingParams()]}, "2 prompts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_and_leave_nothing_behind(name):
    engine = make_engine()
    prompts, options, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        engine.generate([[1, 2], *prompts] if name != "count" else prompts, **options)
    assert "\n" not in str(caught.value)
    assert not engine.has_work
    assert len(engine.generate([[1, 2]], max_new_tokens=3)[0].tokens) == 3


def test_empty_text(text_engine):
    with pytest.raises(UserError, match="empty"):
        text_engine.generate("")


def test_request_larger_than_the_cache():
    engine = make_engine(max_kv_tokens=16)
    with pytest.raises(UserError, match="KV cache"):
        engine.generate([[1] * 10], max_new_tokens=20)
    with pytest.raises(UserError, match="max_kv_tokens"):
        make_engine(max_kv_tokens=0)


def test_stream_without_tokenizer():
    with pytest.raises(UserError, match="no tokenizer"):
        make_engine().stream([1, 2])


def test_prompts_may_be_tensors():
    engine = make_engine()
    expected = engine.generate([[1, 2, 3], [4, 5, 6]], max_new_tokens=3)
    assert engine.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=3) == expected
    assert engine.generate(torch.tensor([1, 2, 3]), max_new_tokens=3) == expected[:1]
