"""Every bad input of the command lines: one line on stderr that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from dscompile.compiler.cli import main as dscompile
from dscompile.runtime.cli import main as dsrun
from tests.surfaces.conftest import MODEL


def refused(program: Callable[[list[str]], int], argv: list[object], capsys, *words: str, code: int = 2) -> None:
    """The command ends with this code and one line on stderr, apart from progress, that holds the words."""
    capsys.readouterr()
    assert program([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("dscompile: ", "dsrun: "))]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    assert out == ""
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


# ---------------------------------------------------------------- dscompile


def refuse_compile(model: object, tmp_path: Path, capsys, *words: str, options: tuple[object, ...] = ()) -> None:
    out = tmp_path / "new" / "out"
    refused(dscompile, [model, "-o", out, "--target", "cpu", *options], capsys, *words)
    assert not out.exists() and not list(tmp_path.glob("new/.*"))


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_such_model(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse_compile("./nowhere", tmp_path, capsys, "nowhere")
    refuse_compile("nobody/no-such-model", tmp_path, capsys, "nobody/no-such-model")


def test_directory_without_config(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    refuse_compile(tmp_path / "empty", tmp_path, capsys, "config.json")


def test_broken_config(model_copy, tmp_path, capsys) -> None:
    (model_copy / "config.json").write_text("{")
    refuse_compile(model_copy, tmp_path, capsys, "config.json")


def test_config_without_weights(model_copy, tmp_path, capsys) -> None:
    (model_copy / "model.safetensors").unlink()
    refuse_compile(model_copy, tmp_path, capsys, "dummy-weights")


def test_pickled_weights_only(model_copy, tmp_path, capsys) -> None:
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    refuse_compile(model_copy, tmp_path, capsys, ".bin", "convert")


@pytest.mark.parametrize("keep", [0, 7, 100, 100_000])
def test_truncated_weights(keep, model_copy, tmp_path, capsys) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse_compile(model_copy, tmp_path, capsys, "model.safetensors")


def test_corrupt_weights_header(model_copy, tmp_path, capsys) -> None:
    path = model_copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    refuse_compile(model_copy, tmp_path, capsys, "model.safetensors")


def rename_tensor(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header[new] = header.pop(old)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_missing_tensor(model_copy, tmp_path, capsys) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rename_tensor(model_copy / "model.safetensors", name, "something.else")
    refuse_compile(model_copy, tmp_path, capsys, name)


def test_wrong_shape(model_copy, tmp_path, capsys) -> None:
    edit_config(model_copy, intermediate_size=400)
    refuse_compile(model_copy, tmp_path, capsys, "model.layers.0.mlp")


def test_recurrent_architecture_names_the_operator(tmp_path, capsys) -> None:
    from transformers import MambaConfig

    config = MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, architectures=["MambaForCausalLM"]
    )
    config.save_pretrained(tmp_path / "recurrent")
    refuse_compile(tmp_path / "recurrent", tmp_path, capsys, "aten", options=("--dummy-weights",))


def test_unknown_architecture(model_copy, tmp_path, capsys) -> None:
    edit_config(model_copy, model_type="no_such_type", architectures=["NoSuchModel"])
    refuse_compile(model_copy, tmp_path, capsys, "no_such_type")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--target", "sm_12345"), "sm_12345"),
        (("--target", "gpu"), "gpu"),
        (("--target", ""), "target"),
        (("--dtype", "float8"), "float8"),
        (("--quant", "int3"), "int3"),
        (("--max-seq-len", "0"), "--max-seq-len"),
        (("--max-seq-len", "-4"), "--max-seq-len"),
        (("--max-batch", "x"), "--max-batch"),
        (("--max-seq-len", "100000000"), "max_seq_len"),
        (("--require-fusion", "teleport"), "teleport"),
        (("--require-fusion", "moe"), "moe"),
        (("--dummy-weights=wrong",), "--dummy-weights"),
        (("--calibrate", "nowhere.txt"), "calibrate"),
        (("--quant", "int8", "--calibrate", "nowhere.txt"), "nowhere.txt"),
        (("--quant", "int8", "--calibrate", "/dev/null"), "is empty"),
        (("--quant", "int8", "--calibrate", MODEL / "model.safetensors"), "not UTF-8 text"),
        (("--quant", "int8", "--calibrate", MODEL / "config.json"), "less than one window"),
        (("--quant", "int8", "--max-perplexity-increase", "-1"), "max_perplexity_increase"),
        (("--quant", "int8", "--rounding", "down"), "rounding"),
        (("--static-activations",), "--quant int8"),
        (("--quant-lm-head",), "--quant int8"),
        (("--kv-dtype", "fp8"), "fp8"),
        (("--tensor-parallel", "3"), "parallel"),
        (("--bogus",), "--bogus"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_options(options, word, tmp_path, capsys) -> None:
    refuse_compile(MODEL, tmp_path, capsys, word, options=options)


def test_missing_out(capsys) -> None:
    refused(dscompile, [MODEL], capsys, "--out")


def test_out_that_exists(tmp_path, capsys, compiled) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused(dscompile, [MODEL, "-o", mine], capsys, "mine")
    refused(dscompile, [MODEL, "-o", mine, "--force"], capsys, "mine")
    assert (mine / "thesis.txt").read_text() == "years of work"
    refused(dscompile, [MODEL, "-o", compiled], capsys, "--force")
    refused(dscompile, [MODEL, "-o", mine / "thesis.txt", "--force"], capsys, "file")


def test_out_below_a_file(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    refused(dscompile, [MODEL, "-o", tmp_path / "file" / "out"], capsys, "out")


def test_out_not_writable(tmp_path, capsys, monkeypatch) -> None:
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(dscompile, [MODEL, "-o", tmp_path / "out", "--target", "cpu"], capsys, "out", "ermission")


def test_disk_full(tmp_path, capsys, monkeypatch) -> None:
    from dscompile.compiler import compile as module

    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_weights", fill)
    refuse_compile(MODEL, tmp_path, capsys, "disk is full")


def test_failed_verification_is_exit_code_1(tmp_path, capsys, monkeypatch) -> None:
    from dscompile.compiler import verify

    monkeypatch.setattr(verify, "FLOAT32_LIMIT", 1e-12)
    out = tmp_path / "out"
    refused(dscompile, [MODEL, "-o", out, "--target", "cpu"], capsys, "does not compute", "nothing was written", code=1)
    assert not out.exists()


# ---------------------------------------------------------------- dsrun, damaged artifacts


def refuse_run(artifact: Path, capsys, *words: str) -> None:
    refused(dsrun, ["generate", artifact, "--tokens", "1,2", "--max-new-tokens", "2"], capsys, *words)
    refused(dsrun, ["verify", artifact], capsys, *words)


def rehash(artifact: Path, name: str) -> None:
    """Make the manifest agree with a changed file."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    data = (artifact / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_text(json.dumps(manifest))


def test_missing_file(artifact, capsys) -> None:
    (artifact / "plan.json").unlink()
    refuse_run(artifact, capsys, "plan.json", "missing")


def test_changed_file(artifact, capsys) -> None:
    text = (artifact / "plan.json").read_text()
    (artifact / "plan.json").write_text(text.replace("1", "2", 1))
    refuse_run(artifact, capsys, "plan.json", "changed")


def test_extra_file(artifact, capsys) -> None:
    (artifact / "kernels").mkdir(exist_ok=True)
    (artifact / "kernels" / "evil.py").write_text("print('no')")
    refuse_run(artifact, capsys, "evil.py")


def test_truncated_artifact_weights(artifact, capsys) -> None:
    (path,) = (artifact / "weights").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refuse_run(artifact, capsys, path.name, "truncated")


def test_changed_weights_are_found_by_verify(artifact, capsys) -> None:
    (path,) = (artifact / "weights").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(dsrun, ["verify", artifact], capsys, path.name, "changed")


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "weights/../../outside.json"])
def test_path_outside(name, artifact, capsys) -> None:
    (artifact.parent / "outside.json").write_text("{}")
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "size": 2}
    path.write_text(json.dumps(manifest))
    refuse_run(artifact, capsys, "outside")


def test_link_outside(artifact, capsys) -> None:
    target = artifact.parent / "elsewhere.json"
    (artifact / "plan.json").rename(target)
    (artifact / "plan.json").symlink_to(target)
    refuse_run(artifact, capsys, "plan.json")


def test_newer_format(artifact, capsys) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    refuse_run(artifact, capsys, "format_version 99", "upgrade")


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1}', "\x00", '{"format_version": "1"}'])
def test_broken_manifest(text, artifact, capsys) -> None:
    (artifact / "manifest.json").write_text(text)
    refuse_run(artifact, capsys, "manifest")


@pytest.mark.parametrize("change", ["{", "[]", "no_steps", "bad_step", "unknown_op"])
def test_broken_plan(change, artifact, capsys) -> None:
    path = artifact / "plan.json"
    plan = json.loads(path.read_text())
    if change == "no_steps":
        del plan["steps"]
    elif change == "bad_step":
        plan["steps"][1]["inputs"] = {"x": {"buffer": "nowhere", "start": 0, "stop": 128}}
    elif change == "unknown_op":
        plan["steps"][1]["spec"]["op"] = "Teleport"
    path.write_text(change if change in "{[]" else json.dumps(plan))
    rehash(artifact, "plan.json")
    refuse_run(artifact, capsys, "plan")


def test_plan_of_another_model(artifact, capsys) -> None:
    path = artifact / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 77}))
    rehash(artifact, "plan.json")
    refuse_run(artifact, capsys, "plan.json is of another model")


def test_not_an_artifact(tmp_path, capsys) -> None:
    refuse_run(tmp_path, capsys, "not an artifact")
    (tmp_path / "file").write_text("")
    refuse_run(tmp_path / "file", capsys, "file")


# ---------------------------------------------------------------- dsrun, bad requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", ""), "empty"),
        (("--tokens", "99999"), "99999"),
        (("--tokens=-1",), "-1"),
        (("-p", "x", "--temperature=-1"), "temperature"),
        (("-p", "x", "--temperature=nan"), "temperature"),
        (("-p", "x", "--top-k=-1"), "top_k"),
        (("-p", "x", "--top-p", "1.5"), "top_p"),
        (("-p", "x", "--top-p", "nan"), "top_p"),
        (("-p", "x", "--min-p=-0.1"), "min_p"),
        (("-p", "x", "--repetition-penalty", "0"), "repetition_penalty"),
        (("-p", "x", "--max-new-tokens", "0"), "max_new_tokens"),
        (("-p", "x", "--min-new-tokens=-1"), "min_new_tokens"),
        (("-p", "x", "--seed=-1"), "seed"),
        (("-p", "x", "--stop", ""), "stop"),
        (("-p", "word " * 3000), "--max-seq-len"),
        (("-p", "x", "--chat"), "chat template"),
        (("--tokens", "1", "--chat"), "--chat"),
        (("-p", "x", "--device", "cuda:7"), "cuda:7"),
        (("-p", "x", "--device", "abacus"), "abacus"),
        (("-p", "x", "--max-kv-tokens", "0"), "--max-kv-tokens"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_requests(options, words, compiled, capsys) -> None:
    refused(dsrun, ["generate", compiled, *options], capsys, words)


def test_text_without_a_tokenizer(model_copy, tmp_path, capsys) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_copy / name).unlink()
    out = tmp_path / "out"
    assert dscompile([str(model_copy), "-o", str(out), "--target", "cpu", "--no-verify"]) == 0
    refused(dsrun, ["generate", out, "-p", "text"], capsys, "no tokenizer")
    assert dsrun(["generate", str(out), "--tokens", "5,7", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("5,7 -> ")


def test_bad_measurements(compiled, tmp_path, capsys) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    refused(dsrun, ["perplexity", compiled, tmp_path / "short.txt"], capsys, "less than one window")
    refused(dsrun, ["perplexity", compiled, tmp_path / "binary"], capsys, "UTF-8")
    refused(dsrun, ["perplexity", compiled, tmp_path / "nowhere.txt"], capsys, "nowhere.txt")
    refused(dsrun, ["perplexity", compiled, tmp_path / "short.txt", "--window", "4096"], capsys, "max_seq_len")
    refused(dsrun, ["bench", compiled, "--batch", "900"], capsys, "900")
    refused(dsrun, ["bench", compiled, "--prompt-tokens", "5000"], capsys, "max_seq_len")
    refused(dsrun, ["bench", compiled, "--new-tokens", "1"], capsys, "--new-tokens")
    refused(dsrun, ["report", compiled, "--html", tmp_path / "no" / "such" / "page.html"], capsys, "page.html")
