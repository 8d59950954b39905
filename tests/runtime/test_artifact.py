"""An artifact is written whole or not at all, and one that is damaged is refused in one line."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dscompile.runtime import load
from dscompile.runtime.artifact import atomic_directory, read_plan, verify_artifact, write_manifest, write_plan
from dscompile.runtime.errors import UserError
from dscompile.runtime.manifest import FORMAT_VERSION, read_manifest
from dscompile.runtime.plan import KeepRows, Ref, Weight
from tests.helpers import rms_ratio
from tests.runtime.artifacts import write_artifact
from tests.runtime.models import Model, make_model, oracle


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def out(tmp_path, model):
    return write_artifact(tmp_path / "out", model)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sign_again(out) -> None:
    """Hash what is there now, as someone would who hides a change."""
    write_manifest(out, dataclasses.replace(read_manifest(out), files={}))


def edit(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip(out, model):
    assert read_plan(out) == model.plan
    manifest = verify_artifact(out)
    assert manifest.name == "tiny" and len(manifest.files) == 3
    (logits,) = load(out, device="cpu").logits([[3, 1, 4, 1, 5]])
    assert rms_ratio(logits, oracle(model, [3, 1, 4, 1, 5])) < 3e-6


def test_written_bytes_are_the_same_every_time(tmp_path, model):
    first, second = (write_artifact(tmp_path / n, model) for n in ("a", "b"))
    for name in ("plan.json", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_not_an_artifact(tmp_path):
    assert "no such artifact" in refusal(load, tmp_path / "none")
    assert "not an artifact" in refusal(load, tmp_path)


def test_missing_file(out):
    (out / "weights" / "rank0-00001.safetensors").unlink()
    assert "weights/rank0-00001.safetensors is missing" in refusal(load, out)


def test_truncated_file(out):
    path = out / "weights" / "rank0-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "truncated" in refusal(load, out)


def test_changed_small_file(out):
    path = out / "plan.json"
    path.write_text(path.read_text().replace('"vocab_size": 37', '"vocab_size": 36'))
    assert "plan.json has changed" in refusal(load, out)


def test_changed_weights_show_when_verified_in_full(out):
    path = out / "weights" / "rank0-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load(out, device="cpu")
    assert "has changed" in refusal(load, out, verify="full")
    assert "has changed" in refusal(verify_artifact, out)


def test_extra_file(out):
    (out / "kernels").mkdir()
    (out / "kernels" / "evil.py").write_text("")
    assert "kernels/evil.py is not part of the artifact" in refusal(load, out)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\x"])
def test_path_outside(out, name):
    edit(out / "manifest.json", lambda m: m["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    assert "outside the artifact" in refusal(load, out)


def test_link_that_leads_outside(out, tmp_path):
    path = out / "plan.json"
    path.rename(tmp_path / "plan.json")
    path.symlink_to(tmp_path / "plan.json")
    assert "outside the artifact" in refusal(load, out)


def test_newer_format(out):
    edit(out / "manifest.json", lambda m: m.update(format_version=FORMAT_VERSION + 1, surprise=1))
    message = refusal(load, out)
    assert f"format_version {FORMAT_VERSION + 1}" in message and f"up to {FORMAT_VERSION}" in message


def test_newer_op(out):
    edit(out / "manifest.json", lambda m: m["op_revisions"].update(Linear=3))
    assert "revision 3 of Linear" in refusal(load, out)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": "1"}', '{"format_version": 1}'])
def test_broken_manifest(out, text):
    (out / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(load, out)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"op": "Plan", "steps": [{"op": "Step", "spec": {"op": "Warp"}}]}'])
def test_broken_plan(out, text):
    (out / "plan.json").write_text(text)
    sign_again(out)
    assert "broken plan" in refusal(load, out)


def test_plan_of_another_model(tmp_path, out):
    write_plan(out, make_model(vocab=41).plan)
    assert "plan.json" in refusal(load, out)
    sign_again(out)
    assert "another model" in refusal(load, out)
    write_plan(out, make_model(inner=22).plan)
    sign_again(out)
    assert "the plan says" in refusal(load, out)


def mutated(model: Model, change) -> Model:
    return Model(model.shape, change(model.plan), model.weights)


def with_step(plan, index, **fields):
    steps = list(plan.steps)
    steps[index] = dataclasses.replace(steps[index], **fields)
    return dataclasses.replace(plan, steps=tuple(steps))


def with_int8_cache(plan, **fields):
    return dataclasses.replace(
        plan, kv_groups=tuple(dataclasses.replace(g, dtype="int8", **fields) for g in plan.kv_groups)
    )


def with_kept_rows_at(plan, index):
    (kept,) = (s for s in plan.steps if isinstance(s.spec, KeepRows))
    others = [s for s in plan.steps if s is not kept]
    return dataclasses.replace(plan, steps=(*others[:index], kept, *others[index:]))


def with_kept(plan, **refs):
    (i,) = (i for i, s in enumerate(plan.steps) if isinstance(s.spec, KeepRows))
    inputs = {role: ref for role, ref in (plan.steps[i].inputs | refs).items() if ref is not None}
    return with_step(plan, i, inputs=inputs)


INCONSISTENT = {
    "buffer": (lambda p: with_step(p, 1, inputs={"x": Ref("nowhere", 0, 24)}), "buffer 'nowhere'"),
    "columns": (lambda p: with_step(p, 1, inputs={"x": Ref("h", 1, 25)}), "columns 1:25"),
    "width": (lambda p: with_step(p, 1, inputs={"x": Ref("h", 0, 23)}), "'x' is 23"),
    "role": (lambda p: with_step(p, 1, inputs={}), "input 'x' is missing"),
    "weight": (lambda p: with_step(p, 0, weights={"table": "gone"}), "'gone', a weight that does not exist"),
    "shape": (lambda p: with_step(p, 0, weights={"table": "final.weight"}), "'table' is"),
    "program": (lambda p: with_step(p, 0, program="gone"), "program 'gone'"),
    "group": (lambda p: dataclasses.replace(p, kv_groups=()), "KV group 0"),
    "int8 cache": (lambda p: dataclasses.replace(with_int8_cache(p), page_size=2), "multiple of 4"),
    "sample": (lambda p: dataclasses.replace(p, steps=p.steps[:-1]), "sample step"),
    "kept twice": (lambda p: with_step(p, 0, spec=KeepRows()), "exactly one step must keep"),
    "kept too early": (lambda p: with_kept_rows_at(p, 1), "layers.0.attention needs rows that are not kept"),
    "kept too late": (lambda p: with_kept_rows_at(p, len(p.steps)), "computes logits of rows that were not kept"),
    "kept in part": (lambda p: with_kept(p, x1=Ref("h", 0, 8)), "keeps rows of whole buffers"),
    "kept again": (lambda p: with_kept(p, x2=Ref("h", 0, 24)), "each once"),
    "lost": (lambda p: with_kept(p, x1=None), "keep_rows loses the rows of h"),
    "limits": (lambda p: dataclasses.replace(p, page_size=0), "page_size"),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_inconsistent_plan(tmp_path, model, name):
    change, message = INCONSISTENT[name]
    out = write_artifact(tmp_path / "out", mutated(model, change))
    assert message in refusal(verify_artifact, out)


def test_missing_weight(tmp_path, model):
    weights = {n: w for n, w in model.weights.items() if n != "layers.1.up.weight"}
    out = write_artifact(tmp_path / "out", Model(model.shape, model.plan, weights))
    assert "'layers.1.up.weight'" in refusal(load, out)


def test_corrupt_shard_header(tmp_path, out):
    path = out / "weights" / "rank0-00001.safetensors"
    path.write_bytes(b"\xff" * 64)
    sign_again(out)
    assert "not a whole safetensors file" in refusal(load, out)


def test_no_gpu_here(out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in refusal(load, out, device="cuda")
    assert "unknown device" in refusal(load, out, device="tpu")
    assert load(out).device.type == "cpu"


def test_not_enough_memory(out, monkeypatch):
    monkeypatch.setattr("dscompile.runtime.loader.available_bytes", lambda: 1000)
    message = refusal(load, out, device="cpu")
    assert "not enough memory" in message and "need" in message and "free" in message


def dummy(model: Model) -> Model:
    def init(name: str, weight: Weight) -> Weight:
        return dataclasses.replace(weight, init="ones" if "norm" in name or "final" in name else "normal:0.2")

    weights = {n: init(n, w) for n, w in model.plan.weights.items()}
    weights["sums"] = Weight((24,), "float32", "row_sum:layers.0.out.weight")
    return mutated(model, lambda p: dataclasses.replace(p, weights=weights))


def test_dummy_weights_come_from_the_seed(tmp_path, model):
    paths = [
        write_artifact(tmp_path / n, dummy(model), stored=False, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (load(p, device="cpu").executor.weights for p in paths)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["embed"], c["embed"])
    assert 0.15 < a["embed"].std() < 0.25 and a["final.weight"].eq(1).all()
    assert rms_ratio(a["sums"], a["layers.0.out.weight"].sum(1)) < 1e-6


def test_stored_artifacts_do_not_make_weights_up(tmp_path, model):
    weights = {n: w for n, w in model.weights.items() if n != "embed"}
    out = write_artifact(tmp_path / "out", Model(model.shape, dummy(model).plan, weights))
    assert "'embed'" in refusal(load, out)


# ---------------------------------------------------------------- the directory


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as directory:
        (directory / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path, model):
    out = tmp_path / "out"
    out.write_text("a file")
    assert "is a file" in refusal(atomic_directory(out).__enter__)
    out.unlink()
    out.mkdir()
    assert "not an artifact" in refusal(atomic_directory(out, force=True).__enter__)
    out.rmdir()
    write_artifact(out, model)
    assert "--force" in refusal(atomic_directory(out).__enter__)
    with atomic_directory(out, force=True) as directory:
        (directory / "new").write_text("")
    assert [p.name for p in out.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_forced_failure_keeps_the_old(tmp_path, model):
    out = write_artifact(tmp_path / "out", model)
    with pytest.raises(RuntimeError), atomic_directory(out, force=True):
        raise RuntimeError
    verify_artifact(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_not_writable():
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        root = os.geteuid() == 0
        if root:  # which may write anywhere
            os.seteuid(65534)
        try:
            assert "cannot be written" in refusal(atomic_directory(Path(directory) / "out").__enter__)
        finally:
            if root:
                os.seteuid(0)


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(atomic_directory(tmp_path / "file" / "out").__enter__)


def test_full_disk(tmp_path):
    def fill():
        with atomic_directory(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    assert "disk is full" in refusal(fill)
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_out_absent_and_the_next_cleans_up(tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal\nfrom dscompile.runtime.artifact import atomic_directory\n"
        f"with atomic_directory({str(out)!r}) as d:\n"
        "    (d / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with atomic_directory(out) as directory:
        (directory / "new").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
