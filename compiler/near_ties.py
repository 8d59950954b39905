"""Positions at which a model's choice of experts hangs on a rounding error, so that both choices are right."""

from __future__ import annotations

import torch
from torch import Tensor

from dscompile.compiler.reference import perturbed_logits
from dscompile.compiler.source import ModelSource

PROBES = 8
# Relative change of the embeddings, in units of the dtype's epsilon: about twice the error that all of a model's
# roundings add up to.
AMPLITUDE = 2.0
# How much further than the median position one must move to have changed its experts. Rounding alone moves positions
# within a factor of three of each other, another expert a hundred times as far.
JUMP = 8.0
LEAST_DECIDED = 0.25


def decided_positions(
    source: ModelSource, texts: list[list[int]], exact: list[Tensor], dtype: str, max_seq_len: int, device: torch.device
) -> list[Tensor]:
    """Which positions of each text the original decides itself: [len] bool each.

    Where two experts score within a rounding error of each other, both choices are right, and the logits of the two
    differ. The original runs in float32 with its embeddings changed by about what `dtype` rounds away; a position that
    jumps is undecided, and so is every later one of its text, which attends to it. True for all where less than
    LEAST_DECIDED would be left.

    exact: the original's logits, [len, V] float32 each
    """
    decided = [torch.ones(len(text), dtype=torch.bool) for text in texts]
    amplitude = AMPLITUDE * torch.finfo(getattr(torch, dtype)).eps
    for moved in perturbed_logits(source, texts, amplitude, PROBES, max_seq_len, device):
        errors = [(a - b).square().mean(1).sqrt() for a, b in zip(moved, exact, strict=True)]
        limit = JUMP * torch.cat(errors).median()
        for kept, error in zip(decided, errors, strict=True):
            kept &= (error > limit).cumsum(0) == 0
    if torch.cat(decided).double().mean() < LEAST_DECIDED:
        return [torch.ones_like(kept) for kept in decided]
    return decided
