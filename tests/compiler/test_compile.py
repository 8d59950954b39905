"""compile_model writes a whole artifact or nothing, streams weights, and says in one line what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dscompile.compiler import compile_model
from dscompile.runtime import load
from dscompile.runtime.artifact import read_plan, verify_artifact
from dscompile.runtime.errors import UserError
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.report import read_report
from tests.compiler.tiny import CONFIGS, RECURRENT, make_config, save_model

OPTIONS = {"target": "cpu", "max_batch": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama"
    save_model("llama", directory)
    return directory


def _compile(model, out, **options):
    return compile_model(model, out, **OPTIONS | {"verify": False} | options)


def test_the_artifact_is_whole(model, tmp_path):
    report = compile_model(model, tmp_path / "out", **OPTIONS)
    manifest = verify_artifact(tmp_path / "out")
    assert manifest.weights == "stored" and manifest.targets == () and manifest.dtype == "float32"
    assert manifest.eos_token_ids == (2,)
    assert manifest.num_params == sum(p.numel() for p in _parameters(model))
    assert {"plan.json", "report.json", "report.html", "generation_config.json"} <= manifest.files.keys()
    assert read_report(tmp_path / "out") == report
    assert report.verification.status == "passed"
    assert len(load(tmp_path / "out").generate([[5, 7]], max_new_tokens=3)[0].tokens) <= 3


def _parameters(model):
    return load_file(model / "model.safetensors").values()


def test_stages_are_reported_in_order(model, tmp_path):
    stages, amounts = [], {}

    class Watch:
        def start(self, stage, total=None, unit=""):
            stages.append(stage)
            amounts[stage] = [total, 0]

        def advance(self, amount=1):
            amounts[stages[-1]][1] += amount

        def finish(self):
            total, done = amounts[stages[-1]]
            assert total is None or total == done, stages[-1]

    compile_model(model, tmp_path / "out", progress=Watch(), **OPTIONS)
    assert stages == ["tracing", "passes", "weights", "verification"]


def test_two_compilations_are_equal(model, tmp_path):
    first, second = tmp_path / "a" / "out", tmp_path / "b" / "elsewhere"
    for out in (first, second):
        _compile(model, out)
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_existing_outputs_are_kept(model, tmp_path):
    out = tmp_path / "out"
    _compile(model, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="--force"):
        _compile(model, out, max_seq_len=20)
    assert (out / "manifest.json").read_bytes() == before
    _compile(model, out, max_seq_len=20, force=True)
    assert read_manifest(out).max_seq_len == 20


def test_force_replaces_only_an_artifact(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("x")
    with pytest.raises(UserError, match="not an artifact"):
        _compile(model, tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        _compile(model, tmp_path / "file", force=True)


def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("dscompile.compiler.weights.evaluate", _raise_disk_full)
    with pytest.raises(UserError, match="disk is full"):
        _compile(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _raise_disk_full(*_):
    raise OSError(28, "No space left on device")


def test_too_small_a_disk_is_known_beforehand(model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("dscompile.compiler.weights.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"disk is full: \d+ bytes are needed, 10 are free"):
        _compile(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_compilation_leaves_no_output_and_is_cleaned_up_after(model, tmp_path):
    program = (
        "import sys, time, dscompile.compiler.weights as w\n"
        "w.write_shards = lambda *a, **k: (print('writing', flush=True), time.sleep(60))\n"
        "from dscompile.compiler import compile_model\n"
        f"compile_model({str(model)!r}, {str(tmp_path / 'out')!r}, target='cpu')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    _compile(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_generated_weights_are_not_stored(model, tmp_path):
    config_only = tmp_path / "config"
    make_config(CONFIGS["llama"]).save_pretrained(config_only)
    _compile(config_only, tmp_path / "out", dummy_weights=True)
    manifest, plan = read_manifest(tmp_path / "out"), read_plan(tmp_path / "out")
    assert manifest.weights == "dummy"
    stored = {n for f in (tmp_path / "out" / "weights").iterdir() for n in load_file(f)}
    assert stored == {name for name, w in plan.weights.items() if not w.init}
    assert all("rope" in name for name in stored)
    logits = load(tmp_path / "out").logits([[1, 2, 3]])[0]
    assert torch.isfinite(logits).all() and logits.std() > 1e-3


def test_stored_dummies_equal_generated_ones(tmp_path):
    config_only = tmp_path / "config"
    make_config(CONFIGS["bloom"]).save_pretrained(config_only)
    _compile(config_only, tmp_path / "made", dummy_weights="generated")
    _compile(config_only, tmp_path / "kept", dummy_weights="stored")
    assert read_manifest(tmp_path / "kept").weights == "stored"
    made, kept = (load(tmp_path / name).logits([[1, 2, 3]])[0] for name in ("made", "kept"))
    assert torch.equal(made, kept)


def test_required_fusions(model, tmp_path):
    _compile(model, tmp_path / "out", require_fusion="attention,mlp_in")
    with pytest.raises(UserError, match="--require-fusion moe"):
        _compile(model, tmp_path / "other", require_fusion=("moe",))


def test_the_graph_is_dumped(model, tmp_path):
    _compile(model, tmp_path / "out", dump_ir=tmp_path / "ir")
    names = {p.name for p in (tmp_path / "ir").iterdir()}
    assert "00_traced.py" in names and "passes.txt" in names


def test_missing_tensors_are_named(model, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    save_model("llama", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        _compile(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_architectures(tmp_path):
    make_config(RECURRENT["mamba"]).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="conv1d"):
        _compile(tmp_path / "mamba", tmp_path / "out", dummy_weights=True)


def test_a_configuration_that_no_model_can_have(tmp_path):
    make_config(CONFIGS["llama"]).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "no-such-function"}))
    with pytest.raises(UserError, match="cannot build") as caught:
        _compile(tmp_path / "model", tmp_path / "out", dummy_weights=True)
    assert "\n" not in str(caught.value)
