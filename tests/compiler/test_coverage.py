"""Every architecture compiles to what transformers computes, or is refused in one line; docs/coverage.md says which."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.coverage import DOCUMENT, refusal, row
from dscompile.compiler.compile import compile_model
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention
from dscompile.runtime.plan_check import check_plan
from tests.compiler.tiny import CONFIGS, OPTIONS, RECURRENT, REFUSED, make_config, save_model

# Operators that torch runs: a sum of experts that is normalised, clamped queries, keys and values, positions added to a
# normalised embedding; factors of layers, sums of two norms, per-layer embeddings; sums between stacks of layers.
FALLBACKS = {"afmoe": 1, "olmo_clipped": 6, "blenderbot_small": 1, "gemma4": 4, "gemma4_e2b": 10, "gemma4_moe": 8}
FALLBACKS |= {"hrm_text": 3}
# Layers with a linear on its own: torch has the attention's operands in hand.
OPEN_ATTENTION = {"olmo_clipped"}
# Models with a linear between the embedding and the layers.
PROJECTED = {"opt_350m", "gemma4_e2b"}
# Layers with linears on their own around a product with a per-layer embedding.
PER_LAYER = {"gemma4_e2b"}


@pytest.mark.parametrize("name", CONFIGS)
def test_artifacts_agree_with_their_models(name, tmp_path):
    save_model(name, tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)
    assert report.verification.status == "passed"
    assert {c.name for c in report.verification.checks} == {"prefill", "decode", "greedy tokens"}
    assert all(c.limit <= 1e-4 for c in report.verification.checks)
    assert len(report.fallbacks) == FALLBACKS.get(name, 0)
    for layer_class in report.classes:
        names = {r.name for r in layer_class.regions}
        assert not layer_class.layers or names >= {"attn_in", "attention", "attn_out"} or name in OPEN_ATTENTION
        assert "linear" not in names or name in (OPEN_ATTENTION | PER_LAYER if layer_class.layers else PROJECTED)
    _assert_documented(row(name, report))


def test_layers_that_share_keys_keep_them_once(tmp_path):
    save_model("gemma4_e2b", tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS | {"verify": False})
    plan = read_plan(tmp_path / "out")
    attentions = [s for s in plan.steps if isinstance(s.spec, Attention)]
    assert [(s.spec.window, s.spec.appends, *s.inputs) for s in attentions] == [
        (8, True, "q", "k", "v"),
        (0, True, "q", "k", "v"),
        (8, False, "q"),
        (0, False, "q"),
    ]
    assert [group.num_layers for group in plan.kv_groups] == [1, 1]
    without = tuple(s for s in plan.steps if s.name != "layers.1.attention")
    with pytest.raises(UserError, match=r"layers\.3\.attention reads a place in the cache that no step before fills"):
        check_plan(dataclasses.replace(plan, steps=without))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_in_one_line(name, tmp_path):
    make_config(REFUSED[name]).save_pretrained(tmp_path / "model")
    reason = (
        r"operator \S+ in \w+ mixes tokens"
        if name in RECURRENT
        else "attention|not supported|mixes tokens|one vocabulary|the router"
    )
    with pytest.raises(UserError, match=reason) as caught:
        compile_model(tmp_path / "model", tmp_path / "out", dummy_weights=True, **OPTIONS)
    assert "\n" not in str(caught.value)
    _assert_documented(refusal(name, str(caught.value)))


def _assert_documented(line: str) -> None:
    lines = [known.rsplit(" | ", 1)[0].rstrip(" |") for known in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    assert line.rstrip(" |") in lines, f"docs/coverage.md is stale; run python -m benchmarks.coverage: {line}"


def test_the_short_rotary_table_serves_short_limits(tmp_path):
    """longrope chooses its table by max_seq_len, whatever the length of a sequence."""
    save_model("phi3_longrope", tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS | {"max_seq_len": 32})
    assert report.verification.status == "passed"


def test_a_temperature_that_sets_in_is_refused(tmp_path):
    """Beyond floor_scale Llama 4 scales queries by their position, which no plan can say."""
    config = make_config(CONFIGS["llama4_text"])
    config.floor_scale = 32
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="scaled by position from position 31 on"):
        compile_model(tmp_path / "model", tmp_path / "out", dummy_weights=True, **OPTIONS)


def test_only_adapters_know_model_types():
    root = Path(__file__).parents[2]
    names = {path.stem for path in (root / "compiler" / "adapters").glob("*.py")} - {"__init__"}
    quoted = re.compile(rf"""model_type\s*(==|in)|["']({"|".join(sorted(names))})["']""")
    for package in ("compiler", "passes", "codegen", "runtime"):
        for path in (root / package).rglob("*.py"):
            if path.parent.name != "adapters":
                assert not quoted.search(path.read_text(encoding="utf-8")), f"{path} knows a model type"
