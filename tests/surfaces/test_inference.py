"""init_inference against transformers' own generate()."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dscompile.compiler import inference
from dscompile.compiler.inference import InferenceModel, init_inference
from dscompile.runtime.errors import UserError
from dscompile.runtime.report import read_report
from tests.surfaces.conftest import MODEL


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(original, cache) -> InferenceModel:
    return init_inference(
        original, tensor_parallel={"tp_size": 1}, replace_with_kernel_inject=True, target="cpu", cache_dir=cache
    )


def batch(*texts: str) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(list(texts), return_tensors="pt", padding=True)
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


PROMPTS = batch("The function returns", "def main():", "ROMEO: what is it that you would have me do here and")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_new_tokens": 12},
        {"max_length": 30},
        {"max_new_tokens": 8, "repetition_penalty": 1.3},
        {"max_new_tokens": 16, "eos_token_id": [11, 199, 223, 14]},
        {"max_new_tokens": 16, "eos_token_id": 199, "pad_token_id": 3},
        {"max_new_tokens": 16, "eos_token_id": [11, 199, 223, 14], "min_new_tokens": 6},
        {"max_new_tokens": 16, "eos_token_id": [11, 199, 223, 14], "min_length": 22},
    ],
    ids=str,
)
def test_greedy_equals_transformers(arguments, original, compiled) -> None:
    with torch.no_grad():
        expected = original.generate(**PROMPTS, do_sample=False, num_beams=1, **arguments)
    actual = compiled.generate(**PROMPTS, do_sample=False, num_beams=1, **arguments)
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected.tolist()


def test_sampling_is_repeatable_and_every_row_its_own(compiled) -> None:
    one = batch("The function returns")
    arguments = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 12, "temperature": 1.2}
    torch.manual_seed(7)
    first = compiled.generate(**one, **arguments)
    again = compiled.generate(**one, **arguments)
    torch.manual_seed(7)
    assert first.tolist() == compiled.generate(**one, **arguments).tolist()
    assert first.tolist() != again.tolist()
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_the_second_call_loads_what_the_first_compiled(original, compiled, cache, monkeypatch) -> None:
    monkeypatch.setattr(inference, "compile_model", lambda *a, **k: pytest.fail("compiled again"))
    again = init_inference(original, dtype=torch.float32, target="cpu", cache_dir=cache)
    assert again.artifact == compiled.artifact
    assert sorted(path.name for path in cache.iterdir()) == [compiled.artifact.name]


def test_a_changed_weight_compiles_anew(original, compiled, cache, monkeypatch) -> None:
    class Compiled(Exception):
        pass

    def stop(*args, **kwargs):
        raise Compiled

    monkeypatch.setattr(inference, "compile_model", stop)
    weight = original.model.norm.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] += 1
        with pytest.raises(Compiled):
            init_inference(original, dtype=torch.float32, target="cpu", cache_dir=cache)
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert sorted(path.name for path in cache.iterdir()) == [compiled.artifact.name]


def test_quantization_is_that_of_the_compiler(original, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "compiler/calibration.txt").read_text())
    options = {"quant": "int8", "kv_dtype": "int8", "quant_lm_head": True, "calibrate": text, "max_out_tokens": 64}
    options["max_perplexity_increase"] = 100  # that none is kept
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = init_inference(original, tokenizer=tokenizer, target="cpu", cache_dir=tmp_path / "cache", **options)
    found = read_report(model.artifact).quantization
    assert (found["scheme"], found["kv_dtype"], found["calibration"]) == ("int8", "int8", "text.txt")
    assert len(found["linears"]) == 7 * original.config.num_hidden_layers + 1 and "increase_percent" in found
    assert model.generate(PROMPTS["input_ids"][:1], max_new_tokens=4).shape[1] == PROMPTS["input_ids"].shape[1] + 4


def test_another_text_compiles_anew(original, tmp_path, monkeypatch) -> None:
    asked = []

    def stop(checkpoint, artifact, **options):
        asked.append((artifact.name, options["calibrate"].read_text(), (Path(checkpoint) / "tokenizer.json").exists()))
        raise UserError("enough")

    monkeypatch.setattr(inference, "compile_model", stop)
    text = tmp_path / "text.txt"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for content in ("one", "one", "two"):
        text.write_text(content)
        with pytest.raises(UserError):
            init_inference(
                original, tokenizer=tokenizer, calibrate=text, quant="int8", target="cpu", cache_dir=tmp_path
            )
    (first, *_), (again, *_), (other, *_) = asked
    assert first == again != other and asked[2][1:] == ("two", True)


def test_refusals(original, compiled, cache) -> None:
    with pytest.raises(UserError, match="beam search"):
        compiled.generate(**PROMPTS, num_beams=2)
    with pytest.raises(UserError, match="padding_side='left'"):
        compiled.generate(PROMPTS["input_ids"], attention_mask=PROMPTS["attention_mask"].flip(1))
    with pytest.raises(UserError, match="'moe_experts'"):
        init_inference(original, moe_experts=4, cache_dir=cache)
    with pytest.raises(UserError, match="parallel"):
        init_inference(original, tensor_parallel={"tp_size": 2}, cache_dir=cache)


def test_a_pipeline_takes_it_as_its_model(compiled) -> None:
    from transformers import pipeline

    generator = pipeline("text-generation", model=str(MODEL), device=-1)
    generator.model = compiled
    outputs = generator("The function returns", do_sample=True, num_return_sequences=4, max_new_tokens=5)
    assert len(outputs) == 4
    assert all(output["generated_text"].startswith("The function returns") for output in outputs)
