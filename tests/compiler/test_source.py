"""Finding models: local directories, the hub's cache, and one line for everything that is wrong."""

from __future__ import annotations

import json

import pytest
import transformers

from dscompile.compiler.source import find_model, write_tokenizer
from dscompile.runtime.errors import UserError
from tests.compiler.tiny import CONFIGS, make_config, save_model


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def _config_only(directory, **changes):
    make_config(CONFIGS["llama"]).save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_a_local_model(tmp_path):
    save_model("llama", tmp_path / "model")
    source = find_model(tmp_path / "model")
    assert source.max_seq_len() == 64
    assert source.eos_token_ids() == (2,)
    assert source.dtype() == "float32"
    assert source.architecture() == "LlamaForCausalLM"


def test_generation_config_decides_what_ends_a_sequence(tmp_path):
    save_model("llama", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert find_model(tmp_path / "model").eos_token_ids() == (5, 7)
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    assert find_model(tmp_path / "model").eos_token_ids() == (2,)


def test_alibi_models_know_no_limit(tmp_path):
    save_model("bloom", tmp_path / "model")
    assert find_model(tmp_path / "model").max_seq_len() is None


def test_config_alone_is_enough_for_dummy_weights(tmp_path):
    directory = _config_only(tmp_path / "model")
    assert find_model(directory, weights=False).directory == directory
    with pytest.raises(UserError, match="--dummy-weights"):
        find_model(directory)


def test_pickled_weights_are_not_loaded(tmp_path):
    directory = _config_only(tmp_path / "model")
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="convert"):
        find_model(directory)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("a/b/c", "no such directory"),
        ("", "no such directory"),
        ("someone/never-cached", "no such directory, not in the hub's cache"),
        ("not a valid id!", "no such"),
    ],
)
def test_models_that_do_not_exist(model, message):
    with pytest.raises(UserError, match=message):
        find_model(model)


def test_a_file_and_an_empty_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        find_model(tmp_path / "file")
    with pytest.raises(UserError, match=r"no config\.json"):
        find_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_broken_configurations(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        find_model(tmp_path, weights=False)


def test_quantized_checkpoints_are_refused(tmp_path):
    directory = _config_only(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantized already \(gptq\)"):
        find_model(directory, weights=False)


def test_a_cached_hub_model_is_found_offline(tmp_path):
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / "abc"
    save_model("llama", snapshot)
    refs = tmp_path / "cache" / "models--someone--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    assert find_model("someone/tiny").directory == snapshot


def test_slow_tokenizers_are_converted(tmp_path):
    directory = _config_only(tmp_path / "model")
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\na b\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}')
    out = tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(find_model(directory, weights=False), out)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    assert fast("ab")["input_ids"] == [3]


def test_a_model_without_tokenizer(tmp_path):
    directory = _config_only(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    assert not write_tokenizer(find_model(directory, weights=False), out)
    assert not (out / "tokenizer.json").exists()
