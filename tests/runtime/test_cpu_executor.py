"""The CPU executor against the dense float64 oracle: prefill, chunks and decode, every feature of attention."""

import pytest
import torch

from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.kv_cache import BlockTables, block_bytes
from dscompile.runtime.sampler import SamplingParams
from dscompile.runtime.sequence import Sequence
from tests.helpers import rms_ratio
from tests.runtime.models import make_model, oracle, without_step

OPTIONS = {
    "llama": {},
    "bloom": {"kind": "bloom"},
    "no_gqa": {"kv_heads": 4},
    "wide_group": {"kv_heads": 1},
    "partial_rotary": {"rotary_dim": 4},
    "no_positions": {"rotary_dim": 0},
    "narrow_values": {"v_head_dim": 4},
    "window": {"windows": (5, 5)},
    "two_groups": {"windows": (0, 5)},
    "chunked": {"chunk": 6},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "qk_norm_head": {"qk_norm": "head"},
    "qk_norm_across": {"qk_norm": "across"},
    "qk_norm_rotated": {"qk_norm": "rotated"},
    "gated_heads": {"gate": "head", "v_head_dim": 4},
    "gated_columns": {"gate": "column", "v_head_dim": 4},
    "bloom_window_softcap_sinks": {"kind": "bloom", "windows": (7, 3), "softcap": 3.0, "sinks": True},
    "page_of_one": {"page_size": 1},
}


class Driver:
    """Feeds sequences to an executor in pieces of chosen sizes and collects the logits of every token."""

    def __init__(self, model, **options) -> None:
        self.executor = CpuExecutor(model.plan, model.weights, **options)
        self.executor.poison()
        self.tables = BlockTables(model.plan, self.executor.num_blocks)
        self.sequences = {}

    def step(self, pieces: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        rows = []
        for key, tokens in pieces.items():
            sequence = self.sequences.setdefault(key, Sequence(key, [], SamplingParams()))
            start = len(sequence.tokens)
            sequence.tokens += tokens
            assert self.tables.allocate(sequence.blocks, len(sequence.tokens))
            self.tables.free_behind(sequence.blocks, start)
            rows.append(BatchRow(sequence, start, tokens, len(tokens), sample=False, return_logits=True))
        result = self.executor.launch(Batch(tuple(rows))).wait()
        return dict(zip(pieces, result.logits, strict=True))


def prompts(lengths: list[int], vocab: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def run_in_pieces(driver: Driver, sequences: list[list[int]], sizes: list[int]) -> list[torch.Tensor]:
    """Each step takes the next `sizes[i]` tokens of every sequence that has some left."""
    done = [0] * len(sequences)
    found = [[] for _ in sequences]
    for size in sizes:
        pieces = {i: s[done[i] : done[i] + size] for i, s in enumerate(sequences) if done[i] < len(s)}
        for i, logits in driver.step(pieces).items():
            found[i].append(logits)
            done[i] += len(pieces[i])
    return [torch.cat(f) for f in found]


@pytest.mark.parametrize("pieces", ["prefill", "decode", "chunks"])
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_dense_formulas(name, pieces):
    model = make_model(**OPTIONS[name])
    sequences = prompts([13, 1, 9], model.shape.vocab)
    sizes = {"prefill": [13], "decode": [1] * 13, "chunks": [3, 1, 5, 1, 1, 2]}[pieces]
    found = run_in_pieces(Driver(model), sequences, sizes)
    for tokens, logits in zip(sequences, found, strict=True):
        assert rms_ratio(logits, oracle(model, tokens)) < 3e-6


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "page_of_one"])
def test_int8_cache(name):
    """In float64, where what is rounded differs too little to round otherwise."""
    model = make_model(**OPTIONS[name], dtype="float64", kv_dtype="int8")
    sequences = prompts([13, 1, 9], model.shape.vocab)
    for sizes in ([13], [1] * 13, [3, 1, 5, 1, 1, 2]):
        for tokens, logits in zip(sequences, run_in_pieces(Driver(model), sequences, sizes), strict=True):
            assert rms_ratio(logits, oracle(model, tokens)) < 1e-6
    assert rms_ratio(logits, oracle(make_model(**OPTIONS[name]), tokens)) > 1e-4, "nothing was rounded"


def test_int8_cache_of_half_precision():
    model = make_model(dtype="float16", kv_dtype="int8")
    sequences = prompts([12, 5], model.shape.vocab)
    for tokens, logits in zip(sequences, run_in_pieces(Driver(model), sequences, [6, 1, 5]), strict=True):
        assert rms_ratio(logits, oracle(model, tokens)) < 1e-2


def test_int8_cache_takes_half_of_float16():
    half, eighth = (make_model(dtype="float16", kv_dtype=k, head_dim=64, v_head_dim=64).plan for k in ("", "int8"))
    sizes = [sum(block_bytes(g, p.page_size) for g in p.kv_groups) for p in (half, eighth)]
    assert sizes[1] / sizes[0] == (64 + 4) / 128


def test_int8_cache_of_what_is_not_a_number():
    """A token whose key or value is infinite spoils what sees it, and nothing before it."""
    model = make_model(dtype="float32", kv_dtype="int8")
    model.weights["embed"][5] = torch.inf
    (logits,) = run_in_pieces(Driver(model), [[1, 2, 5, 3]], [1, 1, 1, 1])
    assert logits[:2].isfinite().all() and logits[2:].isnan().all()


def test_float64_reaches_rounding():
    model = make_model(dtype="float64", windows=(0, 5), softcap=2.0, sinks=True)
    sequences = prompts([11, 4], model.shape.vocab)
    for tokens, logits in zip(sequences, run_in_pieces(Driver(model), sequences, [5, 1, 1, 4]), strict=True):
        assert rms_ratio(logits, oracle(model, tokens)) < 1e-6  # results are handed out in float32


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 3e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_half_precision_rounds_once_per_output(kind, dtype, bound):
    model = make_model(kind=kind, dtype=dtype)
    sequences = prompts([12, 5], model.shape.vocab)
    for tokens, logits in zip(sequences, run_in_pieces(Driver(model), sequences, [6, 1, 5]), strict=True):
        assert rms_ratio(logits, oracle(model, tokens)) < bound


def test_not_causal():
    model = make_model(causal=False, rotary_dim=4)
    sequences = prompts([9, 1, 6], model.shape.vocab)
    for tokens, logits in zip(sequences, run_in_pieces(Driver(model), sequences, [9]), strict=True):
        assert rms_ratio(logits, oracle(model, tokens)) < 3e-6


def test_scores_in_pieces(monkeypatch):
    monkeypatch.setattr("dscompile.runtime.ops_attention.MAX_SCORES", 100)
    model = make_model(kind="bloom", sinks=True)
    (tokens,) = prompts([13], model.shape.vocab)
    (logits,) = run_in_pieces(Driver(model), [tokens], [13])
    assert rms_ratio(logits, oracle(model, tokens)) < 3e-6


@pytest.mark.parametrize("name", ["llama", "bloom", "two_groups"])
def test_rows_that_are_not_asked_for_are_dropped_behind_the_last_attention(name):
    """Sequences of which some, none or all rows are asked for, in one step; what is left of a prompt is there later."""
    model = make_model(**OPTIONS[name])
    sequences, asked = prompts([9, 6, 1, 5], model.shape.vocab), (2, 0, 1, 5)
    driver, rows = Driver(model), []
    for key, (tokens, count) in enumerate(zip(sequences, asked, strict=True)):
        sequence = driver.sequences[key] = Sequence(key, list(tokens), SamplingParams())
        driver.tables.allocate(sequence.blocks, len(tokens))
        rows.append(BatchRow(sequence, 0, tokens, count, sample=False, return_logits=True))
    result = driver.executor.launch(Batch(tuple(rows))).wait()
    for tokens, count, logits in zip(sequences, asked, result.logits, strict=True):
        expected = oracle(model, tokens)[len(tokens) - count :]
        assert logits.shape == expected.shape and (not count or rms_ratio(logits, expected) < 3e-6)
    after = driver.step({1: [7]})[1]
    assert rms_ratio(after, oracle(model, [*sequences[1], 7])[-1:]) < 3e-6


@pytest.mark.parametrize("index", [i for i, s in enumerate(make_model().plan.steps) if i and s.layer is not None])
def test_every_step_of_the_plan_matters(index):
    model = make_model()
    (tokens,) = prompts([7], model.shape.vocab)
    broken = without_step(model.plan, index)
    driver = Driver(type(model)(model.shape, broken, model.weights))
    (logits,) = run_in_pieces(driver, [tokens], [7])
    assert not rms_ratio(logits, oracle(model, tokens)) < 1e-2


def test_plan_without_sample_step_is_refused():
    model = make_model()
    plan = without_step(model.plan, len(model.plan.steps) - 1)
    with pytest.raises(UserError, match="no sample step"):
        Driver(type(model)(model.shape, plan, model.weights)).step({0: [1, 2]})


def test_windows_free_their_blocks():
    model = make_model(windows=(0, 5), max_seq_len=64)
    driver = Driver(model)
    (tokens,) = prompts([40], model.shape.vocab)
    run_in_pieces(driver, [tokens], [1] * 40)
    full, windowed = driver.tables.allocators
    assert full.num_used == 10
    assert windowed.num_used <= 3


def test_null_block_stays_zero():
    model = make_model(windows=(5, 5))
    driver = Driver(model)
    run_in_pieces(driver, prompts([30, 9, 2], model.shape.vocab), [4] * 8)
    assert all(not pool.data[0].any() for pool in driver.executor.pools)


def test_unused_logit_rows_cost_nothing():
    model = make_model()
    driver = Driver(model)
    sequence = driver.sequences[0] = Sequence(0, [3, 4, 5], SamplingParams())
    driver.tables.allocate(sequence.blocks, 3)
    row = BatchRow(sequence, 0, [3, 4, 5], num_logits=0, sample=False)
    result = driver.executor.launch(Batch((row,))).wait()
    assert result.tokens == [-1] and driver.executor.counters["logit_rows"] == 0
    assert rms_ratio(driver.step({0: [6]})[0], oracle(model, [3, 4, 5, 6])[-1:]) < 3e-6


def test_small_steps_take_one_thread_and_leave_the_setting_alone(monkeypatch):
    model, seen = make_model(), []
    driver = Driver(model)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        prepare = driver.executor._prepare

        def spy(*sizes):
            runs, logits = prepare(*sizes)
            return [*runs, lambda step: seen.append(torch.get_num_threads())], logits

        driver.executor._prepare = spy
        driver.step({0: [1, 2, 3]})
        monkeypatch.setattr("dscompile.runtime.cpu_executor.SMALL_STEP", 0)
        driver.step({0: [4]})
        assert seen == [1, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
