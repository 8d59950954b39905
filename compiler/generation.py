"""Read the arguments of transformers' generate() as sampling parameters; refuse by name what the runtime lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.runtime.errors import UserError

# Arguments that change how transformers computes, not what it returns.
NO_EFFECT = {
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "disable_compile",
    "compile_config",
    "low_memory",
    "prefill_chunk_size",
    "synced_gpus",
    "use_model_defaults",
    "tokenizer",
    "transformers_version",
    "early_stopping",
    "length_penalty",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
    "prompt_lookup_num_tokens",
    "_from_model_config",
    "bos_token_id",
    "decoder_start_token_id",
    "continuous_batching_config",
}
DEFAULTS = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
HANDLED = {
    "do_sample",
    "num_beams",
    "num_return_sequences",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "eos_token_id",
    "pad_token_id",
}
NEW_TOKENS_BY_DEFAULT = 20
# Arguments that are off at one; all others are off at nothing: None, False, 0 or empty.
OFF_AT_ONE = {"num_beam_groups", "typical_p", "encoder_repetition_penalty", "guidance_scale"}


@dataclass(frozen=True)
class Request:
    """What one generate() call asks for. sampling: keyword arguments of SamplingParams but the seed."""

    sampling: dict[str, Any]
    sampled: bool
    copies: int
    pad_id: int


def read_arguments(config: dict[str, Any], given: dict[str, Any], prompt_length: int, max_seq_len: int) -> Request:
    """Merge the model's generation config with a call's arguments, which win.

    prompt_length: columns of input_ids, padding included: max_length and min_length count them, as in transformers.
    Raises UserError for an argument that would change the result and that the runtime does not have.
    """
    values = DEFAULTS | {k: v for k, v in config.items() if v is not None}
    values |= {k: v for k, v in given.items() if v is not None}
    _refuse_unsupported(values)
    eos = _ids(values.get("eos_token_id"))
    pad = values.get("pad_token_id", eos[0] if eos else 0)
    sampled = bool(values["do_sample"])
    sampling: dict[str, Any] = {
        "max_new_tokens": _max_new(values, prompt_length, max_seq_len),
        "min_new_tokens": values.get("min_new_tokens", max(0, values.get("min_length", 0) - prompt_length)),
        "repetition_penalty": float(values.get("repetition_penalty", 1.0)),
        "eos_token_ids": tuple(eos),
        "temperature": 0.0,
    }
    if sampled:
        if values["temperature"] <= 0:
            raise UserError(f"temperature must be above 0 with do_sample=True, got {values['temperature']}")
        sampling |= {"temperature": float(values["temperature"]), "top_k": values["top_k"]}
        sampling |= {"top_p": float(values["top_p"]), "min_p": float(values.get("min_p", 0.0))}
    copies = values.get("num_return_sequences", 1)
    if copies > 1 and not sampled:
        raise UserError("num_return_sequences > 1 needs do_sample=True: greedy continuations would be the same")
    return Request(sampling, sampled, copies, pad)


def unpad(input_ids: torch.Tensor, mask: torch.Tensor | None, pad: int | None) -> list[list[int]]:
    """Rows without their left padding. Raises UserError for a mask with holes, or padding on the right."""
    if input_ids.dim() != 2:
        raise UserError(f"input_ids must have two dimensions [batch, length], got {list(input_ids.shape)}")
    ids = input_ids.cpu()
    if mask is not None:
        keep = mask.cpu().bool()
    else:
        # Only leading pads are padding: the same id may be content further on.
        keep = (ids != pad).int().cummax(1).values.bool() if pad is not None else torch.ones_like(ids, dtype=torch.bool)
    if not bool((keep[:, 1:] >= keep[:, :-1]).all()):
        raise UserError("attention_mask must be 0 only at the left: pad prompts with padding_side='left'")
    return [row[kept].tolist() for row, kept in zip(ids, keep, strict=True)]


def join(heads: torch.Tensor, tails: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """[B, P] prompts and B lists of new tokens -> [B, P + N] int64, padded on the right."""
    width = max(len(tail) for tail in tails)
    rows = [list(tail) + [pad] * (width - len(tail)) for tail in tails]
    return torch.cat([heads, torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)], 1)


def _refuse_unsupported(values: dict[str, Any]) -> None:
    if values["num_beams"] != 1:
        raise UserError(f"num_beams={values['num_beams']}: beam search is not supported; use num_beams=1")
    for name, value in values.items():
        if name in HANDLED or name in NO_EFFECT:
            continue
        if value if name not in OFF_AT_ONE else value != 1:
            raise UserError(f"generate() argument {name}={value!r} is not supported; leave it out")


def _max_new(values: dict[str, Any], prompt_length: int, max_seq_len: int) -> int:
    """max_new_tokens wins over max_length, wherever either comes from."""
    if "max_new_tokens" in values:
        return values["max_new_tokens"]
    if "max_length" not in values:
        return min(NEW_TOKENS_BY_DEFAULT, max(1, max_seq_len - prompt_length))
    new = values["max_length"] - prompt_length
    if new < 1:
        raise UserError(f"max_length={values['max_length']} leaves no room after {prompt_length} prompt tokens")
    return new


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [int(value)]
