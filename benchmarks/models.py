"""Configurations of real shapes, so that they can be measured with dummy weights and no download."""

from __future__ import annotations

from collections.abc import Callable

from transformers import BloomConfig, GPTJConfig, LlamaConfig, MixtralConfig, PretrainedConfig


def _llama3_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=128001,
        architectures=["LlamaForCausalLM"],
    )


def _llama3_70b() -> LlamaConfig:
    config = _llama3_8b()
    config.update({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64})
    return config


def _gptj_6b() -> GPTJConfig:
    return GPTJConfig(tie_word_embeddings=False, architectures=["GPTJForCausalLM"])


def _bloom_7b1() -> BloomConfig:
    return BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32, architectures=["BloomForCausalLM"])


def _mixtral_8x7b() -> MixtralConfig:
    return MixtralConfig(tie_word_embeddings=False, architectures=["MixtralForCausalLM"])


# One GPU holds each of these.
ONE_GPU = ("gptj-6b", "bloom-7b1", "llama3-8b")
# name -> (configuration, dtype its checkpoint is published in)
MODELS: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "gptj-6b": (_gptj_6b, "float16"),
    "bloom-7b1": (_bloom_7b1, "float16"),
    "llama3-8b": (_llama3_8b, "bfloat16"),
    "mixtral-8x7b": (_mixtral_8x7b, "float16"),
    "llama3-70b": (_llama3_70b, "bfloat16"),
}
