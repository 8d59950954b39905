"""Encoders: whole sequences in a step, nothing kept after it, one vector per text."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dscompile.runtime import cli, load
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.engine import Engine
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention, Ref
from dscompile.runtime.plan_check import check_plan
from tests.helpers import rms_ratio
from tests.runtime.artifacts import write_artifact
from tests.runtime.models import hidden_oracle, make_encoder, make_model

TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 3], [7, 8, 30, 31, 2]]


def make_engine(model) -> Engine:
    executor = CpuExecutor(model.plan, model.weights)
    executor.poison()
    return Engine(executor)


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "bloom"}, {"softcap": 2.0}, {"sinks": True}, {"kv_heads": 4}, {"gate": "head"}, {"dtype": "float64"}],
)
def test_hidden_states_are_those_of_the_dense_formulas(options):
    model = make_encoder(**options)
    for text, hidden in zip(TEXTS, make_engine(model).hidden_states(TEXTS), strict=True):
        assert rms_ratio(hidden, hidden_oracle(model, text)) < 1e-5


def test_texts_do_not_depend_on_company_and_order():
    engine = make_engine(make_encoder())
    together = engine.embed(TEXTS)
    alone = torch.cat([engine.embed([text]) for text in TEXTS])
    assert rms_ratio(together, alone) < 1e-6
    assert rms_ratio(engine.embed(TEXTS[::-1]), together.flip(0)) < 1e-6


def test_a_text_is_never_cut():
    """Ten tokens fit in a step: texts wait for one that holds all of them, and steps are no more than that needs."""
    model = make_encoder(max_step_tokens=10, max_seq_len=10)
    engine = make_engine(model)
    hidden = engine.hidden_states(TEXTS)
    for text, rows in zip(TEXTS, hidden, strict=True):
        assert rms_ratio(rows, hidden_oracle(model, text)) < 1e-5
    assert engine.counters["tokens"] == sum(map(len, TEXTS))
    assert engine.counters["steps"] == 3


def test_nothing_is_kept_of_a_text():
    engine = make_engine(make_encoder())
    engine.embed(TEXTS)
    assert not engine.executor.pools
    assert [a.num_used for a in engine.scheduler.tables.allocators] == [0]
    assert not engine.has_work


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(pooling, normalize):
    model = make_encoder()
    rows = [hidden_oracle(model, text) for text in TEXTS]
    expected = torch.stack([{"mean": h.mean(0), "cls": h[0], "max": h.max(0).values}[pooling] for h in rows])
    if normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    actual = make_engine(model).embed(TEXTS, pooling=pooling, normalize=normalize)
    assert actual.dtype == torch.float32
    assert rms_ratio(actual, expected) < 1e-5


def test_no_texts():
    assert make_engine(make_encoder()).embed([]).shape == (0, 24)


def test_an_artifact_pools_as_its_manifest_says(tmp_path, capsys):
    out = write_artifact(tmp_path / "out", make_encoder(vocab=300), tokenizer=True, pooling="cls", normalize=True)
    engine = load(out, device="cpu")
    expected = engine.embed(["ab", "c"], pooling="cls", normalize=True)
    assert torch.equal(engine.embed(["ab", "c"]), expected)
    assert rms_ratio(engine.embed(["ab", "c"], pooling="mean"), expected) > 0.1
    assert cli.main(["embed", str(out), "-p", "ab", "c", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [entry["prompt"] for entry in printed] == ["ab", "c"]
    assert rms_ratio(torch.tensor([entry["embedding"] for entry in printed]), expected) < 1e-6
    assert cli.main(["embed", str(out), "-p", "ab", "--pooling", "median"]) == 2
    assert "choose from mean, cls, max" in capsys.readouterr().err


def test_long_texts_are_cut_as_the_manifest_says(tmp_path):
    out = write_artifact(tmp_path / "out", make_encoder(vocab=300), tokenizer=True, pooling="mean", max_text_tokens=5)
    engine = load(out, device="cpu")
    whole, cut = "abcdefgh", engine.encode("abcdefgh")[:5]
    assert torch.equal(engine.embed([whole, "ab"]), engine.embed([cut, "ab"]))
    assert len(engine.hidden_states([whole])[0]) == 8
    assert engine.embed([engine.encode(whole)]).shape == (1, 24)
    assert not torch.equal(engine.embed([engine.encode(whole)]), engine.embed([whole]))


@pytest.mark.parametrize(
    "call",
    [lambda e: e.generate([[1]]), lambda e: e.logits([[1]]), lambda e: e.add_request([1]), lambda e: e.stream([1])],
)
def test_an_encoder_does_not_generate(call):
    with pytest.raises(UserError, match=r"is an encoder, which has no .*use embed"):
        call(make_engine(make_encoder()))


@pytest.mark.parametrize("call", [lambda e: e.embed([[1]]), lambda e: e.hidden_states([[1]])])
def test_a_decoder_does_not_embed(call):
    with pytest.raises(UserError, match=r"is no encoder.*use generate"):
        call(make_engine(make_model()))


def test_texts_that_are_too_long_or_empty():
    engine = make_engine(make_encoder(max_seq_len=8))
    with pytest.raises(UserError, match="9 tokens, the artifact takes 8"):
        engine.embed([[1, 2], list(range(9))])
    with pytest.raises(UserError, match="empty"):
        engine.embed([[]])
    assert not engine.has_work


def _first_causal(plan):
    attention = next(i for i, s in enumerate(plan.steps) if isinstance(s.spec, Attention))
    step = plan.steps[attention]
    changed = dataclasses.replace(step, spec=dataclasses.replace(step.spec, causal=True))
    return dataclasses.replace(plan, steps=(*plan.steps[:attention], changed, *plan.steps[attention + 1 :]))


@pytest.mark.parametrize(
    "change, message",
    [
        (_first_causal, "not causal"),
        (lambda p: dataclasses.replace(p, hidden=Ref("nowhere", 0, 24)), "nowhere"),
        (lambda p: dataclasses.replace(p, hidden=Ref("h", 0, 25)), "columns"),
        (lambda p: dataclasses.replace(p, max_step_tokens=p.max_seq_len - 1), "longest sequence"),
        (lambda p: dataclasses.replace(p, hidden=None), "exactly one sample step"),
    ],
)
def test_plans_that_are_no_encoders(change, message):
    plan = make_encoder().plan
    check_plan(plan)
    with pytest.raises(UserError, match=message):
        check_plan(change(plan))
