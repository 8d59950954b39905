"""Perplexity of an engine on a text: non-overlapping windows, each predicted from its own beginning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dscompile.runtime.errors import UserError


class LogitsEngine(Protocol):
    def logits(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]: ...


def perplexity(
    engine: LogitsEngine,
    tokens: Sequence[int],
    window: int = 512,
    max_windows: int = 256,
    batch: int = 1,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, float | int]:
    """exp of the mean negative log-likelihood (nats) of tokens 2..window of each window.

    Takes the first `max_windows` full windows; what is left over at the end of the text is not used.
    returns: perplexity, nll (mean, nats), windows, tokens (predicted ones), window
    raises UserError if the text is shorter than one window.
    """
    windows = [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)][:max_windows]
    if not windows:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {window}; give a longer one")
    total = 0.0
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        for ids, logits_LV in zip(group, engine.logits(group), strict=True):
            total += _nll(logits_LV, ids)
        progress(min(start + batch, len(windows)), len(windows))
    predicted = len(windows) * (window - 1)
    mean = total / predicted
    value = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": value, "nll": mean, "windows": len(windows), "tokens": predicted, "window": window}


def _nll(logits_LV: torch.Tensor, ids: Sequence[int]) -> float:
    """Sum of -log p(ids[i] | ids[:i]) for i >= 1. logits_LV: [len(ids), vocab] float32."""
    targets = torch.tensor(ids[1:], device=logits_LV.device)
    return torch.nn.functional.cross_entropy(logits_LV[:-1].float(), targets, reduction="sum").item()
