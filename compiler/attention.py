"""The seam into transformers: while a model is traced, its attention and experts become one opaque node each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dscompile.compiler import experts
from dscompile.passes import vocabulary  # noqa: F401  (defines torch.ops.dsc)
from dscompile.runtime.errors import UserError

IMPLEMENTATION = "dscompile"

# Keywords that change nothing about a causal pass without dropout over one sequence whose positions are an input.
_HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "dropout",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
_UNDERSTOOD = _HARMLESS | {"sliding_window", "softcap", "s_aux"}


@dataclass
class _Tracing:
    positions: Tensor
    layer: int = 0


_tracing: ContextVar[_Tracing] = ContextVar("tracing")


@contextmanager
def tracing(positions: Tensor) -> Iterator[None]:
    """Give every attention inside the block its positions [1, T], and layers that know no index their number."""
    token = _tracing.set(_Tracing(positions))
    try:
        yield
    finally:
        _tracing.reset(token)


def positions() -> Tensor:
    """The positions [1, T] of the model being traced."""
    return _tracing.get().positions


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: list[float] | None = None,
) -> Tensor:
    """The attention node of one layer; what the adapters of hard-coded models call too.

    q [1, Hq, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv], already rotated -> [1, T, Hq, Dv]
    """
    if not causal and chunk:
        raise UserError(
            f"attention of {type(module).__name__} sees the whole of its chunk, which dscompile does not have"
        )
    state = _tracing.get()
    layer = getattr(module, "layer_idx", None)
    layer = state.layer if layer is None else int(layer)
    state.layer = layer + 1
    return torch.ops.dsc.attention(
        q, k, v, state.positions, layer, float(scale), causal, window, chunk, softcap, sinks, alibi
    )


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for `attn_implementation`. Raises UserError for what it cannot keep."""
    unknown = sorted(name for name, value in keywords.items() if value is not None and name not in _UNDERSTOOD)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise UserError(
            f"attention of {type(module).__name__} takes {', '.join(unknown)}, which dscompile does not understand; "
            f"write an adapter in compiler/adapters"
        )
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    y = attend(
        module,
        query,
        key,
        value,
        scaling,
        causal=bool(causal),
        window=int(keywords.get("sliding_window") or 0),
        softcap=float(keywords.get("softcap") or 0.0),
        sinks=keywords.get("s_aux"),
    )
    return y, None


# Registered with AttentionInterface but not with AttentionMaskInterface: every create_*_mask then returns None,
# and the traced graph holds no mask.
AttentionInterface.register(IMPLEMENTATION, _attention_function)


def use_opaque_attention(model: nn.Module) -> None:
    """Send every module that asks transformers' registries for its attention or its experts through the seam."""
    use_opaque_experts(model)
    _choose(model, "_attn_implementation_internal", IMPLEMENTATION)


def use_opaque_experts(model: nn.Module) -> None:
    """Send every module that asks transformers' registry for its experts through the seam."""
    experts.read_experts(model)
    _choose(model, "_experts_implementation_internal", experts.IMPLEMENTATION)


def _choose(model: nn.Module, setting: str, implementation: str) -> None:
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if hasattr(config, setting):
            setattr(config, setting, implementation)
