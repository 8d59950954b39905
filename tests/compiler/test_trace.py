"""Tracing: the graph computes what transformers computes, with one attention node per layer and nothing hidden."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import MODELS
from dscompile.compiler.rotary import freeze_rotary
from dscompile.compiler.trace import trace_model
from dscompile.passes.recipe import Source
from dscompile.runtime.errors import UserError
from tests.compiler import configs
from tests.compiler.tiny import CONFIGS, RECURRENT, make_config, make_model
from tests.helpers import rms_ratio


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_the_graph_agrees_with_transformers(name):
    graph = trace_model(make_config(CONFIGS[name]), max_seq_len=64)
    model = make_model(name)
    freeze_rotary(model, 64)
    tokens = torch.randint(3, 128, (1, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(19)[None]
    state = model.state_dict()
    actual = graph.run(tokens, positions, state.__getitem__)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    assert rms_ratio(actual, expected) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom", "gemma2", "opt"])
def test_positions_are_an_input(name):
    """Two sequences packed in one row need no more than their positions, but for attention across them."""
    graph = trace_model(make_config(CONFIGS[name]), max_seq_len=64)
    state = make_model(name).state_dict()
    tokens, positions = torch.randint(3, 128, (1, 9)), torch.arange(9)[None]
    shifted = graph.run(tokens, positions + torch.arange(9) * 3, state.__getitem__)
    assert rms_ratio(shifted, graph.run(tokens, positions, state.__getitem__)) > 1e-3


def test_one_attention_per_layer_and_no_mask():
    graph = trace_model(make_config(CONFIGS["mistral"]), max_seq_len=64)
    attentions = [n for n in graph.graph.nodes if n.target is torch.ops.dsc.attention.default]
    assert [n.args[4] for n in attentions] == [0, 1]
    assert all(n.args[7] == 4 for n in attentions), "the window"
    targets = {str(n.target) for n in graph.graph.nodes}
    assert not [t for t in targets if any(word in t for word in ("softmax", "arange", "where", "masked_fill", "triu"))]


def test_every_node_has_a_symbolic_value_and_weights_come_last():
    graph = trace_model(make_config(CONFIGS["llama"]), max_seq_len=64)
    nodes = [n for n in graph.graph.nodes if n.op != "output"]
    assert all("val" in n.meta for n in nodes)
    assert [n.name for n in nodes[:2]] == ["tokens", "positions"]
    assert isinstance(nodes[0].meta["val"].shape[1], torch.SymInt)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    assert all("weight" in n.meta for n in placeholders[2:])
    assert {n.meta["weight"] for n in placeholders[2:]} == graph.recipes.keys()


def test_tied_weights_share_one_name():
    tied = trace_model(make_config(CONFIGS["llama_tied"]), max_seq_len=64)
    assert "lm_head.weight" not in tied.recipes
    assert tied.recipes["model.embed_tokens.weight"] == Source("model.embed_tokens.weight", (128, 64))
    assert "lm_head.weight" in trace_model(make_config(CONFIGS["llama"]), max_seq_len=64).recipes


def test_longrope_takes_its_long_factors_beyond_the_pretrained_length():
    config = make_config(CONFIGS["phi3_longrope"])
    (short,) = trace_model(config, max_seq_len=32).constants.values()
    (long,) = trace_model(config, max_seq_len=33).constants.values()
    torch.testing.assert_close(long * 2, short)


def test_a_large_model_takes_no_memory():
    """Llama-3-70B's shapes, four layers of them: more bytes than this machine would give a test."""
    config = MODELS["llama3-70b"][0]()
    config.num_hidden_layers = 4
    graph = trace_model(config, max_seq_len=8192)
    assert all(n.meta["val"].device.type == "meta" for n in graph.graph.nodes if "weight" in n.meta)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_are_refused_by_operator(name):
    with pytest.raises(UserError, match=r"operator aten\.conv1d.* mixes tokens"):
        trace_model(make_config(RECURRENT[name]), max_seq_len=64)


def test_experts_with_an_unknown_gate_are_refused(monkeypatch):
    monkeypatch.setattr("dscompile.compiler.experts.read_gate", lambda apply: None)
    with pytest.raises(UserError, match="MixtralExperts computes its experts in a way"):
        trace_model(make_config(CONFIGS["mixtral"]), max_seq_len=64)


@pytest.mark.parametrize("name", ["codegen", "gptj", "gpt_neo", "bloom", "mpt"])
def test_attention_that_ignores_the_seam_is_found_in_the_graph(name, monkeypatch):
    """Without its adapter a model writes its attention out; the two graphs have the same attention nodes."""
    adapted = trace_model(make_config(CONFIGS[name]), max_seq_len=64)
    monkeypatch.setattr("dscompile.compiler.trace.adapt", lambda model: None)
    found = trace_model(make_config(CONFIGS[name]), max_seq_len=64)
    for a, b in zip(_attentions(adapted), _attentions(found), strict=True):
        assert (a[0], *a[2:6]) == (b[0], *b[2:6])
        assert a[1] == pytest.approx(b[1])
        assert (a[7] or []) == pytest.approx(b[7] or [], rel=1e-5)


def _attentions(graph):
    """layer, scale, causal, window, chunk, softcap, sinks, alibi of every attention node."""
    defaults = (None, None, True, 0, 0, 0.0, None, None)
    nodes = [n for n in graph.graph.nodes if n.target is torch.ops.dsc.attention.default]
    return [(*n.args[4:], *defaults[len(n.args) - 4 :]) for n in nodes]


def test_attention_that_is_not_understood_is_refused(monkeypatch):
    monkeypatch.setattr("dscompile.compiler.trace.adapt", lambda model: None)
    monkeypatch.setattr("dscompile.passes.read_scores.MOST_ELEMENTS", 100)
    with pytest.raises(UserError, match=r"written in its own code, and its mask can be checked .*; write an adapter"):
        trace_model(make_config(CONFIGS["codegen"]), max_seq_len=64)


def test_an_unknown_attention_keyword_is_refused():
    from dscompile.compiler.attention import _attention_function

    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match="position_bias"):
        _attention_function(torch.nn.Module(), q, q, q, None, position_bias=q)
    with pytest.raises(UserError, match="attention_mask"):
        _attention_function(torch.nn.Module(), q, q, q, torch.zeros(1, 1, 3, 3))
