"""Checkpoints are read tensor by tensor under the model's names; damage is named; shards are written whole."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from dscompile.compiler import compile_model
from dscompile.compiler.checkpoint import Checkpoint
from dscompile.compiler.model import build_on_meta
from dscompile.compiler.shards import write_shards
from dscompile.compiler.source import find_model
from dscompile.passes.recipe import Cast, Scale, Source, evaluate
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Weight
from tests.compiler.tiny import OPTIONS, save_model


@pytest.fixture
def saved(tmp_path):
    model = save_model("llama", tmp_path / "model")
    return tmp_path / "model", model


def _open(directory):
    return Checkpoint(directory, build_on_meta(find_model(directory).config))


def test_tensors_are_read_by_name(saved):
    directory, model = saved
    checkpoint = _open(directory)
    assert checkpoint.dtype == "float32"
    for name, expected in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), expected), name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_stored_one_by_one_are_joined(name, tmp_path):
    model = save_model(name, tmp_path)
    checkpoint = _open(tmp_path)
    for key, expected in model.state_dict().items():
        assert torch.equal(checkpoint.read(key), expected), key


def test_experts_are_joined_in_the_order_of_their_numbers(tmp_path):
    model = save_model("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [n for n in tensors if "layers.0" in n and "experts.3.w2" in n]
    for number in range(4, 12):
        tensors[name.replace(".3.", f".{number}.")] = torch.full_like(tensors[name], number)
    save_file(tensors, file)
    joined = _open(tmp_path).read("model.layers.0.mlp.experts.down_proj")
    assert joined.shape[0] == 12
    assert torch.equal(joined[:4], model.state_dict()["model.layers.0.mlp.experts.down_proj"])
    assert joined[4:, 0, 0].tolist() == list(range(4, 12))


def test_shards_are_found_through_the_index(tmp_path):
    model = save_model("llama", tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    checkpoint = _open(tmp_path / "model")
    assert torch.equal(checkpoint.read("lm_head.weight"), model.lm_head.weight)


def test_the_base_models_prefix_may_be_missing(tmp_path):
    model = save_model("gpt2", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    bare = {name.removeprefix("transformer."): t.clone() for name, t in load_file(file).items()}
    save_file(bare, file, {"format": "pt"})
    checkpoint = _open(tmp_path / "model")
    assert torch.equal(checkpoint.read("transformer.h.0.ln_1.weight"), model.transformer.h[0].ln_1.weight)


def test_a_checkpoint_may_mix_dtypes(tmp_path):
    save_model("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    mixed = {name: t.to(dtypes[i % 3]) for i, (name, t) in enumerate(sorted(load_file(file).items()))}
    assert {t.dtype for t in mixed.values()} == set(dtypes)
    save_file(mixed, file, {"format": "pt"})
    report = compile_model(tmp_path / "model", tmp_path / "out", dtype="float32", **OPTIONS)
    assert report.verification.status == "passed"


def test_tied_weights_are_found_under_either_name(tmp_path):
    model = save_model("llama_tied", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(_open(tmp_path / "model").read("model.embed_tokens.weight"), model.lm_head.weight)


@pytest.mark.parametrize("size", [0, 4, 100, -1, -4096])
def test_truncated_files_are_named(saved, size):
    directory, _ = saved
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated or corrupt"):
        _open(directory)


def test_a_corrupt_header_is_named(saved):
    directory, _ = saved
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:30] = b"\xff" * 10
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated or corrupt"):
        _open(directory)


def test_a_missing_shard_is_named(tmp_path):
    save_model("llama", tmp_path / "model", max_shard_size="60KB")
    victim = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        _open(tmp_path / "model")


def test_a_broken_index_is_named(tmp_path):
    save_model("llama", tmp_path / "model", max_shard_size="60KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    for text in ("{", "[]", json.dumps({"weight_map": 3})):
        index.write_text(text)
        with pytest.raises(UserError, match="index"):
            _open(tmp_path / "model")


def test_missing_and_misshapen_tensors_are_named(saved):
    directory, _ = saved
    checkpoint = _open(directory)
    with pytest.raises(UserError, match=r"lacks the tensor 'model\.nothing'"):
        checkpoint.require([Source("model.nothing", (1,))])
    with pytest.raises(UserError, match=r"'lm_head.weight' is \[128, 64\]"):
        checkpoint.require([Source("lm_head.weight", (64, 128))])


def test_weights_are_rounded_and_split_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("dscompile.compiler.shards.SHARD_BYTES", 1000)
    tensors = {f"w{i}": torch.randn(3, 37) for i in range(5)} | {"scalar": torch.randn(())}
    weights = {name: Weight(tuple(t.shape), "float16") for name, t in tensors.items()}
    written = []
    write_shards(tmp_path, weights, tensors.__getitem__, written.append)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["rank0-00001.safetensors", "rank0-00002.safetensors"]
    assert sum(written) == 2 * (5 * 111 + 1)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor.half())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    weights = {f"w{i}": Weight((1 << 16,), "float32") for i in range(16)}
    made, freed = [], []

    def make(name):
        tensor = torch.ones(1 << 16)
        weakref.finalize(tensor, freed.append, name)
        made.append(name)
        assert len(made) - len(freed) <= 2
        return tensor

    write_shards(tmp_path, weights, make)
    assert len(made) == 16


def test_scaled_weights_are_rounded_as_if_whole():
    x, by = torch.randn(9001, 3).half(), torch.randn(3).half()
    leaves = {"x": x, "by": by}
    recipe = Cast(Scale(Source("x", (9001, 3)), Source("by", (3,))), "float16")
    assert torch.equal(evaluate(recipe, lambda leaf: leaves[leaf.name]), (x.float() * by.float()).half())
    vector = Cast(Scale(Source("by", (3,)), 0.3), "bfloat16")
    assert torch.equal(evaluate(vector, lambda leaf: leaves[leaf.name]), (by.float() * 0.3).bfloat16())
