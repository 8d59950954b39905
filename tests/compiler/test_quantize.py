"""Quantized artifacts: what is stored, what runs, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BloomConfig

from dscompile.compiler import compile_model
from dscompile.compiler.budget import BudgetMissed, Kept
from dscompile.compiler.calibration import read_calibration
from dscompile.compiler.source import find_model
from dscompile.compiler.trace import trace_model
from dscompile.passes.pipeline import PIPELINE
from dscompile.passes.quantize.choose import choose_linears
from dscompile.passes.quantize.sites import find_sites
from dscompile.passes.quantize.smooth import LinearError
from dscompile.passes.runner import Phase, run_pipeline
from dscompile.runtime import load
from dscompile.runtime.artifact import read_plan, verify_artifact
from dscompile.runtime.errors import UserError
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.plan import Linear, Quantization
from dscompile.runtime.report import read_report
from tests.compiler.tiny import CONFIGS, OPTIONS, make_config, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama"
    save_model("llama", directory)
    return directory


def _specs(artifact):
    return {s.name: s.spec for s in read_plan(artifact).steps if isinstance(s.spec, Linear)}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "int8"), ("gptj", "int8-weight-only"), ("bloom", "int8"), ("qwen3_moe", "int8"), ("gemma2", "int8")],
)
def test_models_compile(name, scheme, tmp_path):
    save_model(name, tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", quant=scheme, **OPTIONS)
    assert report.verification.status == "passed"
    names = [check.name for check in report.verification.checks]
    assert names[:3] == ["prefill", "decode", "greedy tokens"] and any("int8 prefill" in n for n in names)
    assert verify_artifact(tmp_path / "out").quantization == scheme
    wanted = Quantization("token" if scheme == "int8" else "none")
    specs = _specs(tmp_path / "out")
    kept = {n for n, spec in specs.items() if spec.quantization is None}
    assert all(spec.quantization in (None, wanted) for spec in specs.values())
    assert {n for n in kept if "layers" not in n} == {"head"}
    assert len(kept) == (3 if name == "qwen3_moe" else 1), "beside the head only routers"
    reasons = {m.reason for c in report.classes for m in c.near_misses}
    assert ("experts stay as they are in this version" in reasons) == (name == "qwen3_moe")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_linears_take_half_the_space_of_half_precision(model, tmp_path):
    """Rows of 128 and more: a row of K bytes has a scale of 4."""
    compile_model(model, tmp_path / "out", quant="int8", quant_lm_head=True, verify=False, **OPTIONS)
    plan = read_plan(tmp_path / "out")
    assert all(spec.quantization for spec in _specs(tmp_path / "out").values())
    for step in plan.steps:
        if isinstance(step.spec, Linear):
            weight, scale = (plan.weights[step.weights[role]] for role in ("weight", "weight_scale"))
            assert (weight.dtype, scale.dtype) == ("int8", "float32")
            assert scale.shape == weight.shape[:1]


def test_packing_is_that_of_the_float_model(model, tmp_path):
    compile_model(model, tmp_path / "int8", quant="int8", verify=False, **OPTIONS)
    compile_model(model, tmp_path / "plain", verify=False, **OPTIONS)
    assert [s.name for s in read_plan(tmp_path / "int8").steps] == [s.name for s in read_plan(tmp_path / "plain").steps]


def test_dummy_weights(tmp_path):
    make_config(CONFIGS["bloom"]).save_pretrained(tmp_path / "config")
    for kind in ("generated", "stored"):
        compile_model(tmp_path / "config", tmp_path / kind, quant="int8", dummy_weights=kind, verify=False, **OPTIONS)
    generated, stored = (load(tmp_path / kind).logits([[1, 2, 3]])[0] for kind in ("generated", "stored"))
    assert torch.equal(generated, stored)
    assert torch.isfinite(stored).all() and stored.std() > 1e-3
    assert read_manifest(tmp_path / "generated").quantization == "int8"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(model, tmp_path, value):
    broken = tmp_path / "broken"
    save_model("llama", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*NaN or inf"):
        compile_model(broken, tmp_path / "out", quant="int8", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_numbers_are_named(tmp_path):
    """Finite weights whose gated product is not: 1e30 times 1e30."""
    save_model("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    message = r"the input of model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"
    with pytest.raises(UserError, match=message) as caught:
        compile_model(tmp_path / "model", tmp_path / "out", quant="int8", **OPTIONS)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_rows_and_columns_of_zeros(tmp_path):
    save_model("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("v_proj", "o_proj"):
        weight = tensors[f"model.layers.0.self_attn.{name}.weight"]
        weight[5], weight[:, 7] = 0, 0
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    report = compile_model(tmp_path / "model", tmp_path / "out", quant="int8", **OPTIONS)
    assert report.verification.status == "passed"
    assert load(tmp_path / "out").logits([[1, 2, 3]])[0].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gptj", "qwen3_moe"])
def test_static_activations(name, tmp_path):
    """Packed linears and, in gptj, linears of a sum: each has one scale, of what it read on the calibration text."""
    save_model(name, tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", quant="int8", static_activations=True, **OPTIONS)
    assert report.verification.status == "passed" and report.quantization["activations"] == "int8, static"
    plan, loaded = read_plan(tmp_path / "out"), load(tmp_path / "out").executor.weights
    quantized = [s for s in plan.steps if isinstance(s.spec, Linear) and s.spec.quantization]
    assert {s.spec.quantization for s in quantized} == {Quantization("tensor")}
    scales = [loaded[s.weights["input_scale"]] for s in quantized]
    assert all(s.shape == (1,) and 1e-4 < s.item() < 10 for s in scales)
    assert len({s.item() for s in scales}) == len(scales)


@pytest.mark.parametrize("kind", ["generated", "stored"])
def test_static_activations_of_dummies(kind, tmp_path):
    make_config(CONFIGS["llama"]).save_pretrained(tmp_path / "config")
    options = OPTIONS | {"quant": "int8", "static_activations": True, "verify": False}
    compile_model(tmp_path / "config", tmp_path / "out", dummy_weights=kind, **options)
    assert load(tmp_path / "out").logits([[1, 2, 3]])[0].isfinite().all()


@pytest.mark.parametrize(("name", "scheme"), [("llama", "int8"), ("gptj", "int8-weight-only")])
def test_gptq(name, scheme, tmp_path):
    """The same plan and the same scales; some integers differ, by little."""
    save_model(name, tmp_path / "model")
    for rounding in ("nearest", "gptq"):
        report = compile_model(tmp_path / "model", tmp_path / rounding, quant=scheme, rounding=rounding, **OPTIONS)
        assert report.verification.status == "passed" and report.quantization["rounding"] == rounding
    plans = [read_plan(tmp_path / rounding) for rounding in ("nearest", "gptq")]
    assert plans[0] == plans[1]
    nearest, gptq = (load(tmp_path / rounding).executor.weights for rounding in ("nearest", "gptq"))
    changed = 0
    for name, weight in plans[0].weights.items():
        if weight.dtype == "int8":
            difference = (nearest[name].int() - gptq[name].int()).abs()
            assert difference.max() <= 30
            changed += int((difference > 0).any())
        else:
            assert torch.equal(nearest[name], gptq[name]), name
    assert changed == sum(w.dtype == "int8" for w in plans[0].weights.values())


@pytest.mark.parametrize(("name", "scheme"), [("llama", "none"), ("gemma2", "int8"), ("gpt_oss", "int8-weight-only")])
def test_an_int8_cache(name, scheme, tmp_path):
    save_model(name, tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "out", quant=scheme, kv_dtype="int8", **OPTIONS)
    assert report.verification.status == "passed"
    assert [c.name for c in report.verification.checks][-1] == "int8 decode against its prefill"
    assert report.quantization["kv_dtype"] == "int8" and report.quantization["scheme"] == scheme
    assert {g.dtype for g in read_plan(tmp_path / "out").kv_groups} == {"int8"}
    manifest = verify_artifact(tmp_path / "out")
    assert (manifest.kv_dtype, manifest.quantization) == ("int8", scheme)


def test_an_int8_cache_changes_nothing_else(model, tmp_path):
    for kv_dtype in ("auto", "int8"):
        compile_model(model, tmp_path / kv_dtype, kv_dtype=kv_dtype, verify=False, **OPTIONS)
    plain, quantized = (read_plan(tmp_path / k) for k in ("auto", "int8"))
    assert quantized == dataclasses.replace(
        plain, kv_groups=tuple(dataclasses.replace(g, dtype="int8") for g in plain.kv_groups)
    )


def test_odd_heads_have_no_int8_cache(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 18, "num_hidden_layers": 1, "num_attention_heads": 6}
    BloomConfig(**{"n_layer": 1, "n_head": 6} | sizes, architectures=["BloomForCausalLM"]).save_pretrained(
        tmp_path / "m"
    )
    with pytest.raises(UserError, match=r"has heads of 3 and 3 columns.*leave out kv_dtype"):
        compile_model(tmp_path / "m", tmp_path / "out", kv_dtype="int8", target="cpu", dummy_weights=True)


TRAINED = Path(__file__).parents[2] / "examples/models/nano-llama"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text((Path(__file__).parents[2] / "compiler/calibration.txt").read_text()[:12000])
    return path


def test_the_report_says_what_it_costs(tmp_path, text):
    report = compile_model(TRAINED, tmp_path / "out", quant="int8", calibrate=text, target="cpu", max_seq_len=128)
    found = report.quantization
    assert found["scheme"] == "int8" and found["calibration"] == "text.txt" and found["window"] == 128
    assert found["increase_percent"] == pytest.approx(
        100 * (found["perplexity_after"] / found["perplexity_before"] - 1), abs=2e-3
    )
    assert found["increase_percent"] < 1.0
    sqnr = [entry["sqnr_db"] for entry in found["linears"]]
    assert sqnr == sorted(sqnr) and sqnr[0] > 20 and len(sqnr) == 7 * report.classes[0].count
    assert read_report(tmp_path / "out").quantization == found


def test_the_worst_linears_are_kept_to_meet_the_budget(tmp_path, text, monkeypatch):
    found = iter((10.0, 10.5, 10.0, 10.2, 10.0, 10.05))
    monkeypatch.setattr("dscompile.compiler.quantize._perplexity", lambda artifact, windows: next(found))
    report = compile_model(TRAINED, tmp_path / "out", quant="int8", calibrate=text, target="cpu", max_seq_len=128)
    kept = {entry["weight"] for entry in report.quantization["kept"]}
    quantized = {entry["weight"] for entry in report.quantization["linears"]}
    assert len(kept | quantized) == 7 * sum(c.count for c in report.classes if c.layers) and not kept & quantized
    assert max(e["sqnr_db"] for e in report.quantization["kept"][:2]) <= report.quantization["linears"][0]["sqnr_db"]
    assert report.quantization["kept_because"].startswith(
        "perplexity grew by 5.00 % with none kept; perplexity grew by"
    )
    assert report.quantization["increase_percent"] == 0.5
    plan = read_plan(tmp_path / "out")
    dtypes = [plan.weights[s.weights["weight"]].dtype for s in plan.steps if isinstance(s.spec, Linear)]
    assert 1 < dtypes.count("float32") < dtypes.count("int8"), "the head, and what was kept"
    assert verify_artifact(tmp_path / "out").quantization == "int8"


def test_a_cache_that_costs_too_much_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr("dscompile.compiler.quantize._perplexity", lambda path, _: 10.0 if "unq" in path.name else 10.5)
    with pytest.raises(UserError, match=r"--kv-dtype int8 raises perplexity by 5\.00 %, more than .*leave it out"):
        compile_model(TRAINED, tmp_path / "out", kv_dtype="int8", calibrate=text, target="cpu", max_seq_len=128)
    assert list(tmp_path.iterdir()) == []


def test_what_an_int8_cache_costs(tmp_path, text):
    options = {"calibrate": text, "target": "cpu", "max_seq_len": 128, "max_perplexity_increase": 0.2}
    report = compile_model(TRAINED, tmp_path / "out", kv_dtype="int8", **options)
    assert report.quantization["linears"] == [] and 0 != report.quantization["increase_percent"] <= 0.2


def test_a_budget_that_cannot_be_met_names_linears(tmp_path, text, monkeypatch):
    monkeypatch.setattr("dscompile.compiler.quantize._perplexity", lambda path, _: 10.0 if "unq" in path.name else 10.5)
    monkeypatch.setattr("dscompile.compiler.budget.FIRST_ROUND", 4)
    message = r"by 5\.00 % with the \d+ worst linears left as they are, more than the 1 % .*_proj\.weight\S* \(\d+ dB\)"
    with pytest.raises(UserError, match=message) as caught:
        compile_model(TRAINED, tmp_path / "out", quant="int8", calibrate=text, target="cpu", max_seq_len=128)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_each_round_keeps_twice_as_many_and_what_shares_their_input():
    errors = [LinearError(f"w{i}", f"x{i // 3}", 0.0, float(i % 7)) for i in range(48)]
    missed = BudgetMissed("--quant int8", 2.0, 1.0, errors, Kept())
    first = missed.keep_more()
    assert len(first.linears) == 3 and first.names == {"w0", "w1", "w2"} and first.rounds == ((0, 2.0),)
    rest = [e for e in errors if e not in first.linears]
    second = BudgetMissed("--quant int8", 1.5, 1.0, rest, first).keep_more()
    assert len(second.linears) == 6 and first.names < second.names and second.rounds == ((0, 2.0), (3, 1.5))
    last = Kept(tuple(errors[:18]))
    with pytest.raises(BudgetMissed, match="18 worst"):
        BudgetMissed("--quant int8", 1.5, 1.0, errors[18:], last).keep_more()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"a few words", "less than one window of 512"),
        (None, "cannot be read"),
    ],
)
def test_bad_calibration_files(content, message, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_calibration(path, find_model(TRAINED), 4096)
    assert "\n" not in str(caught.value)


def test_a_file_needs_a_tokenizer(model, text):
    with pytest.raises(UserError, match="has no tokenizer"):
        read_calibration(text, find_model(model), 64)
    assert read_calibration(None, find_model(model), 64).held_out == []


def test_the_built_in_text_is_enough(tmp_path):
    text = read_calibration(None, find_model(TRAINED), 4096)
    assert "built-in" in text.name and len(text.windows) >= 8 and text.held_out
    assert not {tuple(w) for w in text.windows} & {tuple(w) for w in text.held_out}


def test_encoders_are_refused(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, architectures=["BertModel"])
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="encoders are not quantized"):
        compile_model(tmp_path / "model", tmp_path / "out", quant="int8", target="cpu", dummy_weights=True)


def test_normalised_values_take_in_no_scale():
    """A norm stands between the linear of the values and the product that reads them."""
    graph = trace_model(make_config(CONFIGS["gemma4"]), OPTIONS["max_seq_len"])
    run_pipeline(graph, [PIPELINE[0], Phase("quantize", (choose_linears(Quantization("token")),))])
    sites = {s.linears[0].args[1].meta["weight"]: s for s in find_sites(graph)}
    out = [site for weight, site in sites.items() if "o_proj" in weight]
    assert len(out) == 4
    assert all(s.producer is None and "are normalised" in s.refusal for s in out)
