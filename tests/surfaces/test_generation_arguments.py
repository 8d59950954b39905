"""generate() arguments of transformers, as sampling parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from dscompile.compiler.generation import join, read_arguments, unpad
from dscompile.runtime.errors import UserError


def read(prompt: int = 5, limit: int = 100, config: dict | None = None, **given):
    return read_arguments(config or {}, given, prompt, limit)


def test_greedy_by_default_with_twenty_new_tokens() -> None:
    request = read()
    assert request.sampling["temperature"] == 0 and request.sampling["max_new_tokens"] == 20
    assert not request.sampled and request.copies == 1


def test_lengths_count_the_prompt_unless_they_say_new() -> None:
    assert read(max_length=12).sampling["max_new_tokens"] == 7
    assert read(max_length=12, max_new_tokens=3).sampling["max_new_tokens"] == 3
    assert read(min_length=9).sampling["min_new_tokens"] == 4
    assert read(min_length=2).sampling["min_new_tokens"] == 0
    assert read(min_length=9, min_new_tokens=2).sampling["min_new_tokens"] == 2
    assert read(prompt=95).sampling["max_new_tokens"] == 5
    with pytest.raises(UserError, match="max_length=5 leaves no room"):
        read(max_length=5)


def test_sampling_takes_transformers_defaults_and_the_models_config() -> None:
    assert read(do_sample=True).sampling["top_k"] == 50
    request = read(config={"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [3, 4]}, top_k=7)
    assert request.sampling["temperature"] == 0.7 and request.sampling["top_p"] == 0.9
    assert request.sampling["top_k"] == 7 and request.sampling["eos_token_ids"] == (3, 4)
    assert request.pad_id == 3


def test_a_prepared_generation_config_is_accepted() -> None:
    config = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert read(config=config.to_dict(), max_new_tokens=4).sampling["max_new_tokens"] == 4


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"num_beams": 4}, "beam search is not supported"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"logits_processor": [object()]}, "logits_processor"),
        ({"output_scores": True}, "output_scores=True"),
        ({"num_return_sequences": 2}, "needs do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(argument: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(**argument)


def test_padding_is_taken_off_the_left_only() -> None:
    ids = torch.tensor([[0, 0, 5, 0], [1, 2, 3, 4]])
    assert unpad(ids, None, pad=0) == [[5, 0], [1, 2, 3, 4]]
    assert unpad(ids, None, pad=None) == [[0, 0, 5, 0], [1, 2, 3, 4]]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert unpad(ids, mask, pad=None) == [[0, 5, 0], [1, 2, 3, 4]]
    with pytest.raises(UserError, match="padding_side='left'"):
        unpad(ids, mask.flip(1), pad=None)


def test_results_are_padded_on_the_right() -> None:
    joined = join(torch.tensor([[9, 8], [7, 6]]), [[1], [2, 3, 4]], pad=0)
    assert joined.tolist() == [[9, 8, 1, 0, 0], [7, 6, 2, 3, 4]]
    assert joined.dtype == torch.int64
