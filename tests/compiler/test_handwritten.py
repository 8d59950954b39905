"""Attention that a model writes out is read from its graph, or refused with the reason; it is never silently wrong."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dscompile.compiler.compile import compile_model
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention
from tests.compiler.handwritten import CAP, CHUNK, REFUSED, UNDERSTOOD, WINDOW, save_handwritten
from tests.compiler.tiny import OPTIONS

EXPECTED = {
    "window": {"window": WINDOW},
    "chunks": {"chunk": CHUNK},
    "softcap": {"softcap": pytest.approx(CAP, rel=1e-5)},
    "alibi": {"alibi": True},
    "alibi_of_keys": {"alibi": True},
    "alibi_of_numbers": {"alibi": True},
    "sdpa_mask": {"scale": pytest.approx(0.3)},
    "sdpa_grouped": {"num_kv_heads": 2},
}
REASONS = {
    "by_head": "heads see different keys",
    "quadratic": "not proportional to the distance",
    "temperatures": "scaled by head or position",
    "learned": "bias that is learned",
    "squared": "not the softmax of its scores",
    "normalised": "not the softmax of its scores",
}


def _attentions(artifact):
    return [s.spec for s in read_plan(artifact).steps if isinstance(s.spec, Attention)]


@pytest.mark.parametrize("spelling", UNDERSTOOD)
def test_masks_are_read_by_evaluating_them(spelling, tmp_path):
    save_handwritten(tmp_path / "model", spelling, num_kv_heads=2 if spelling == "sdpa_grouped" else 4)
    report = compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)
    assert report.verification.status == "passed" and not report.fallbacks
    wanted = {"causal": True, "window": 0, "chunk": 0, "softcap": 0.0, "alibi": False, "num_kv_heads": 4}
    for spec in _attentions(tmp_path / "out"):
        assert {name: getattr(spec, name) for name in wanted | EXPECTED.get(spelling, {})} == wanted | EXPECTED.get(
            spelling, {}
        )


@pytest.mark.parametrize("spelling", REFUSED)
def test_other_attention_is_refused_with_the_reason(spelling, tmp_path):
    save_handwritten(tmp_path / "model", spelling)
    with pytest.raises(UserError, match=REASONS.get(spelling, "neither causal nor a sliding window")) as caught:
        compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)
    assert "\n" not in str(caught.value) and "compiler/adapters" in str(caught.value)


def test_repeated_heads_of_keys_and_values_are_kept_once(tmp_path):
    save_handwritten(tmp_path / "model", "where", num_kv_heads=2)
    compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)
    assert [spec.num_kv_heads for spec in _attentions(tmp_path / "out")] == [2, 2]


def test_a_mask_is_checked_up_to_the_longest_sequence(tmp_path):
    """A key that is hidden at distance 50 does not matter to sequences of 40 tokens."""
    save_handwritten(tmp_path / "model", "late_gap")
    report = compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS | {"max_seq_len": 40})
    assert report.verification.status == "passed"


def test_a_mask_too_large_to_be_checked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dscompile.passes.read_scores.MOST_ELEMENTS", 4 * 30 * 30)
    save_handwritten(tmp_path / "model", "where")
    with pytest.raises(UserError, match="compile with --max-seq-len 30"):
        compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)


def test_a_checkpoint_with_another_mask_is_refused(tmp_path):
    save_handwritten(tmp_path / "model", "tril_buffer")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["h.1.attn.bias"] = torch.ones_like(weights["h.1.attn.bias"])
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"h\.1\.attn\.bias.*holds other values than the model's code"):
        compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)
