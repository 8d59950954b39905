"""Perplexity against a direct computation, and its refusal."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.perplexity import perplexity


class TableEngine:
    """Logits that depend on the token alone: row `token` of a random table."""

    def __init__(self, vocab: int) -> None:
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0))

    def logits(self, prompts):
        return [self.table[torch.tensor(p)] for p in prompts]


def test_windows_start_anew_and_the_rest_is_left_out() -> None:
    engine, window = TableEngine(11), 7
    tokens = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    log_p = engine.table.double().log_softmax(-1)
    used = [tokens[i : i + window] for i in range(0, 35, window)]
    for count in (5, 3):
        expected = [-log_p[a, b].item() for w in used[:count] for a, b in pairwise(w)]
        result = perplexity(engine, tokens, window, max_windows=count, batch=2)
        assert result["windows"] == count and result["tokens"] == count * 6
        assert math.isclose(result["perplexity"], math.exp(sum(expected) / len(expected)), rel_tol=1e-5)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match="6 tokens, less than one window of 7"):
        perplexity(TableEngine(11), [1] * 6, 7)
