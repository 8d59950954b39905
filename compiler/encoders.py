"""Encoders: which models are, and how they count positions."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from dscompile.runtime.errors import UserError


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model whose tokens see their whole sequence: it is trained to fill in masks."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    causal = {name for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(value)}
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal & set(config.architectures or ())


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that builds what is compiled: an encoder without its head, or a language model."""
    return AutoModel if is_encoder(config) else AutoModelForCausalLM


def counts_from_padding(config: PretrainedConfig) -> bool:
    """Whether models of a configuration may begin behind the row of the padding token: encoders, and decoders made of
    them."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def first_position(model: nn.Module) -> int:
    """The row of the position table that a model gives its first token.

    Models that derive positions from token ids begin behind the row of the padding token.
    """
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def check_visibility(causal: list[bool], encoder: bool) -> None:
    """Raise UserError where a traced model's attentions are not all causal, or, in an encoder, not all unmasked."""
    if any(causal) and encoder:
        raise UserError("the model is an encoder, but some of its attention is causal; dscompile does not mix the two")
    if not all(causal) and not encoder:
        raise UserError(
            "the model generates text, but some of its attention sees later tokens; set is_decoder in its config.json "
            "if it is not set, or give the encoder without its language-model head"
        )


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
