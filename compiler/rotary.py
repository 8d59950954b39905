"""Rotary tables that depend on the length of the sequence, frozen to one table at compile time."""

from __future__ import annotations

import types

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def freeze_rotary(model: nn.Module, max_seq_len: int) -> None:
    """Give every length-dependent rotary embedding of `model` the table of a sequence of max_seq_len tokens.

    longrope takes its long factors exactly if max_seq_len exceeds the length the model was pre-trained with; dynamic
    NTK takes the base of that length. transformers switches tables inside one sequence, so a comparison with it must
    freeze its model the same way.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and rope_type in _LENGTH_DEPENDENT:
            _freeze(module, rope_type, max_seq_len, None)
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                if kind in _LENGTH_DEPENDENT:
                    _freeze(module, kind, max_seq_len, layer_type)


def _freeze(module: nn.Module, rope_type: str, max_seq_len: int, layer_type: str | None) -> None:
    device = torch.device("cpu")
    extra = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](module.config, device, seq_len=max_seq_len, **extra)
    prefix = "" if layer_type is None else f"{layer_type}_"
    module.register_buffer(f"{prefix}inv_freq", inv_freq.float(), persistent=False)
    forward = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    module.forward = types.MethodType(torch.no_grad()(forward), module)
