"""The original model, run by transformers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
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
    with _running(source, dtype, max_seq_len, device) as model:
        return _outputs(source, model, texts, options, output)


def perturbed_logits(
    source: ModelSource, texts: list[list[int]], amplitude: float, count: int, max_seq_len: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """`reference_logits` in float32, `count` times with each number of the embeddings times 1 +- up to amplitude."""
    with _running(source, "float32", max_seq_len, device) as model:
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)

            def perturb(module: nn.Module, args: Any, found: Tensor, generator: torch.Generator = generator) -> Tensor:
                noise = 2 * torch.rand(found.shape, generator=generator) - 1
                return found * (1 + amplitude * noise.to(found))

            hook = model.get_input_embeddings().register_forward_hook(perturb)
            try:
                yield _outputs(source, model, texts, {"use_cache": False}, "logits")
            finally:
                hook.remove()


@contextlib.contextmanager
def _running(source: ModelSource, dtype: str, max_seq_len: int, device: torch.device) -> Iterator[Any]:
    model = _load(source, dtype)
    freeze_rotary(model, max_seq_len)
    try:
        yield model.to(device if _fits(model, device) else torch.device("cpu"))
    finally:
        model.to("meta")  # whoever still holds it, its memory is free
        gc.collect()


@torch.no_grad()
def _outputs(
    source: ModelSource, model: Any, texts: list[list[int]], options: dict[str, Any], output: str
) -> list[Tensor]:
    try:
        return [model(torch.tensor([t], device=model.device), **options)[output][0].float().cpu() for t in texts]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.name}: transformers cannot run it for the comparison: {reason}") from error


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
