"""Encoders compile to what transformers computes, with every linear and attention in a region, or are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from transformers import BertConfig

from benchmarks.coverage import DOCUMENT, row
from dscompile.compiler import compile as compile_module
from dscompile.compiler import compile_model
from dscompile.compiler.encoders import is_encoder
from dscompile.compiler.quiet import quiet
from dscompile.runtime import load
from dscompile.runtime.artifact import open_artifact, read_plan
from dscompile.runtime.errors import UserError, VerificationError
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.plan import Attention, Embed, Linear
from tests.compiler.tiny import ENCODERS, save_encoder
from tests.helpers import rms_ratio

OPTIONS = {"target": "cpu", "max_batch": 4}
_SIZES = ENCODERS["bert"][1]


@pytest.mark.parametrize("name", ENCODERS)
def test_artifacts_agree_with_their_models(name, tmp_path):
    save_encoder(name, tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)
    (check,) = report.verification.checks
    assert check.name == "hidden states" and check.passed and check.limit == 1e-5
    assert not report.fallbacks
    plan = read_plan(tmp_path / "out")
    assert plan.max_seq_len == 64
    attentions = [s.spec for s in plan.steps if isinstance(s.spec, Attention)]
    assert len(attentions) == 2 and not any(a.causal or a.index for a in attentions)
    assert sum(isinstance(s.spec, Linear) for s in plan.steps) <= 4 * 2 + 1
    lines = [known.rsplit(" | ", 1)[0].rstrip(" |") for known in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    assert row(name, report).rstrip(" |") in lines, "docs/coverage.md is stale; run python -m benchmarks.coverage"


def test_embeddings_are_those_of_transformers_in_a_padded_batch(tmp_path):
    """What users call: one padded batch and a mean over its mask, against rows without padding."""
    model = save_encoder("roberta", tmp_path / "model").roberta
    compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 128, (n,), generator=generator) for n in (3, 64, 17, 1, 9)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1)
    mask = (ids != 1).long()
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).last_hidden_state
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert rms_ratio(load(tmp_path / "out", device="cpu").embed([t.tolist() for t in texts]), expected) < 1e-5


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, ("mean", False)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls", True)),
        ({"pooling_mode": "max"}, ("max", True)),
    ],
)
def test_pooling_is_that_of_sentence_transformers(files, expected, tmp_path):
    save_encoder("bert", tmp_path / "model")
    if files:
        _write_modules(tmp_path / "model", files)
    compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.pooling, manifest.normalize) == expected


@pytest.mark.parametrize("length, expected", [(256, 256), (None, 0)])
def test_texts_are_cut_as_by_sentence_transformers(length, expected, tmp_path):
    save_encoder("bert", tmp_path / "model")
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)
    assert read_manifest(tmp_path / "out").max_text_tokens == expected


def test_lower_casing_is_refused(tmp_path):
    save_encoder("bert", tmp_path / "model")
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(UserError, match="lower-cases texts"):
        compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)


@pytest.mark.parametrize(
    "pooling, module, message",
    [
        ({"pooling_mode_weightedmean_tokens": True}, "Normalize", "pools by pooling_mode_weightedmean_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "Normalize", "pools by mean and cls"),
        ({"pooling_mode_mean_tokens": True}, "Dense", "holds Dense"),
    ],
)
def test_what_follows_an_encoder_and_is_not_known_is_refused(pooling, module, message, tmp_path):
    save_encoder("bert", tmp_path / "model")
    _write_modules(tmp_path / "model", pooling, module)
    with pytest.raises(UserError, match=message):
        compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)


def _write_modules(directory, pooling, last="Normalize"):
    paths = {"Transformer": "", "Pooling": "1_Pooling", last: f"2_{last}"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in paths.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    "class_name, arguments, message",
    [
        ("MPNet", _SIZES | {"pad_token_id": 1}, "found 0 attention operators"),
        ("DebertaV2", _SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "3 products"),
        ("XLM", {"vocab_size": 128, "emb_dim": 64, "n_layers": 2, "n_heads": 4}, "makes a tensor from numbers"),
        ("FNet", _SIZES, "mixes tokens"),
    ],
)
def test_encoders_that_are_not_understood_are_refused_in_one_line(class_name, arguments, message, tmp_path):
    config = getattr(transformers, f"{class_name}Config")(**arguments, architectures=[f"{class_name}Model"])
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        compile_model(tmp_path / "model", tmp_path / "out", dummy_weights=True, **OPTIONS)
    assert "\n" not in str(caught.value)


def test_the_architecture_decides():
    assert is_encoder(BertConfig(architectures=["BertForSequenceClassification"]))
    assert not is_encoder(BertConfig(architectures=["BertLMHeadModel"]))
    assert not is_encoder(BertConfig(is_decoder=True))
    assert not is_encoder(transformers.BartConfig())
    assert not is_encoder(transformers.LlamaConfig())


def test_a_language_model_that_sees_later_tokens_is_refused(tmp_path):
    with quiet():
        transformers.BertLMHeadModel(BertConfig(**_SIZES)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="sees later tokens"):
        compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)


def _changed(kind, **changes):
    def mutate(lowered):
        steps = tuple(
            dataclasses.replace(s, spec=dataclasses.replace(s.spec, **changes)) if isinstance(s.spec, kind) else s
            for s in lowered.plan.steps
        )
        return dataclasses.replace(lowered, plan=dataclasses.replace(lowered.plan, steps=steps))

    return mutate


@pytest.mark.parametrize("mutate", [_changed(Attention, scale=0.2), _changed(Embed, position_offset=1)])
def test_mutants_fail_the_gate(mutate, tmp_path, monkeypatch):
    save_encoder("roberta", tmp_path / "model")
    lower = compile_module.lower
    monkeypatch.setattr(compile_module, "lower", lambda *args: mutate(lower(*args)))
    with pytest.raises(VerificationError, match="hidden states"):
        compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_every_kernel_compiles(tmp_path):
    save_encoder("bert", tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", target="sm_90", dtype="float16", verify=False)
    _, plan = open_artifact(tmp_path / "out")
    assert plan.hidden is not None and plan.kv_groups[0].num_layers == 1
    assert all(s.program for s in plan.steps)
    launched = {x.target for p in plan.programs.values() for c in p.cases for x in c.launches if x.kind == "kernel"}
    assert any(name.startswith("attention_prefill") for name in launched)
    for name in launched:
        assert (tmp_path / "out" / plan.kernels[name].cubins["sm_90"].file).read_bytes()[:4] == b"\x7fELF"
