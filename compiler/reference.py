"""The original model, run by transformers."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from dscompile.compiler.adapters import reference_attention
from dscompile.compiler.encoders import auto_class
from dscompile.compiler.quiet import quiet
from dscompile.compiler.rotary import freeze_rotary
from dscompile.compiler.source import ModelSource
from dscompile.runtime.errors import UserError


def reference_logits(
    source: ModelSource, texts: list[list[int]], dtype: str, max_seq_len: int, device: torch.device
) -> list[Tensor]:
    """Logits of every position of each text, alone in its batch: [len, V] float32 on the CPU.

    See `reference_outputs`.
    """
    return reference_outputs(source, texts, dtype, max_seq_len, device, {"use_cache": False}, "logits")


def reference_hidden(
    source: ModelSource, texts: list[list[int]], dtype: str, max_seq_len: int, device: torch.device
) -> list[Tensor]:
    """An encoder's last hidden state of every position of each text, [len, D]. See `reference_outputs`."""
    return reference_outputs(source, texts, dtype, max_seq_len, device, {}, "last_hidden_state")


@torch.no_grad()
def reference_outputs(
    source: ModelSource,
    texts: list[list[int]],
    dtype: str,
    max_seq_len: int,
    device: torch.device,
    options: dict[str, Any],
    output: str,
) -> list[Tensor]:
    """One output of the model for each text, alone in its batch, in float32 on the CPU.

    max_seq_len: the artifact's, which decides the rotary table that transformers would choose by length.
    device:      where the artifact ran; the model goes there if it fits, and is gone from it afterwards.
    """
    model = _load(source, dtype)
    freeze_rotary(model, max_seq_len)
    device = device if _fits(model, device) else torch.device("cpu")
    model = model.to(device)
    try:
        rows = [model(torch.tensor([t], device=device), **options)[output][0].float().cpu() for t in texts]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.name}: transformers cannot run it for the comparison: {reason}") from error
    del model
    gc.collect()
    return rows


def _load(source: ModelSource, dtype: str) -> nn.Module:
    try:
        with quiet():
            model = auto_class(source.config).from_pretrained(
                source.directory,
                dtype=getattr(torch, dtype),
                attn_implementation=reference_attention(source.config),
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.name}: transformers cannot load it for the comparison: {reason}") from error
    return model.eval()


def _fits(model: nn.Module, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.empty_cache()
    return 1.2 * size < torch.cuda.mem_get_info(device)[0]
