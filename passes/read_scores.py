"""What the scores of a hand-written attention are, read by evaluating them: scale, soft cap, visibility, alibi.

Masks and biases have dozens of spellings (added, filled in, chosen by `where`; from tables, comparisons, cumulative
sums). Whatever the spelling, scores are a function of the products q_i . k_j and of i and j. Products of zero yield the
mask and the bias at every pair of positions up to the longest sequence; equal products yield the function of one; and
random products show that nothing else goes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A score so far below the largest of its row takes no part in float32's softmax, whatever the products are.
HIDDEN = 9e3
# Elements of the scores that are looked at, all heads together: half a GiB of float32.
MOST_ELEMENTS = 1 << 27
PROBES = 48
_TOLERANCE = 1e-5


class UnreadableScores(Exception):
    """The scores are not those of a `plan.Attention`; the message says why."""


@dataclass(frozen=True)
class Scores:
    """As in `plan.Attention`: softcap(scale * q_i . k_j) + alibi[head] * (j - i), where visible."""

    scale: float
    softcap: float
    causal: bool
    window: int
    chunk: int
    alibi: tuple[float, ...] | None


def read_scores(
    scores: Callable[[Tensor], Tensor], weights: Callable[[Tensor], Tensor], num_heads: int, max_seq_len: int
) -> Scores:
    """Read the scores of one attention.

    scores, weights: products [H, n, n] -> what goes into the softmax, and what multiplies the values, [H, n, n] each
    Raises UnreadableScores where they are not understood, at any pair of positions below max_seq_len.
    """
    longest = math.isqrt(MOST_ELEMENTS // num_heads)
    if max_seq_len > longest:
        raise UnreadableScores(
            f"its mask can be checked for sequences of up to {longest} tokens; compile with --max-seq-len {longest}"
        )
    blank = scores(torch.zeros(1).expand(num_heads, max_seq_len, max_seq_len))
    rule = _rule(blank >= blank.amax(-1, keepdim=True) - HIDDEN)
    alibi = _alibi(blank, visible(max_seq_len, *rule))
    del blank
    scale, softcap = _function(scores, num_heads)
    found = Scores(scale, softcap, *rule, alibi)
    _check(weights, found, num_heads, min(max_seq_len, PROBES))
    return found


def visible(length: int, causal: bool, window: int, chunk: int) -> Tensor:
    """Which keys j a query i sees, [n, n]."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = j <= i if causal else torch.ones(length, length, dtype=torch.bool)
    if window:
        seen &= (j > i - window) & (j < i + window)
    return seen & (j // chunk == i // chunk) if chunk else seen


def _rule(seen: Tensor) -> tuple[bool, int, int]:
    """causal, window and chunk of what is seen [H, n, n]."""
    if bool((seen != seen[:1]).any()):
        raise UnreadableScores("its heads see different keys")
    length, most = seen.shape[-1], int(seen[0].sum(-1).max())
    for rule in ((True, 0, 0), (False, 0, 0), (True, most, 0), (True, 0, most), (False, (most + 1) // 2, 0)):
        if torch.equal(seen[0], visible(length, *rule)):
            return rule
    raise UnreadableScores("its mask is neither causal nor a sliding window nor chunks")


def _alibi(blank: Tensor, seen: Tensor) -> tuple[float, ...] | None:
    """The slope of each head's bias, or None where products of zero all score alike in their row."""
    length = len(seen)
    bias = blank - blank.diagonal(dim1=1, dim2=2)[..., None]
    largest = float(bias.masked_fill(~seen, 0.0).abs().max())
    if largest == 0.0:
        return None
    row = length - 1
    first = int(seen[row].nonzero()[0])
    slopes = -bias[:, row, first].double() / (row - first)
    distance = (torch.arange(length)[None] - torch.arange(length)[:, None]).double()
    for head, slope in zip(bias, slopes, strict=True):
        rest = (head.double() - slope * distance).masked_fill(~seen, 0.0)
        if float(rest.abs().max()) > _TOLERANCE * largest:
            raise UnreadableScores("its scores have a bias that is not proportional to the distance")
    return tuple(slopes.tolist())


def _function(scores: Callable[[Tensor], Tensor], num_heads: int) -> tuple[float, float]:
    """scale and soft cap: the score of a product, against that of zero."""

    def of(product: float) -> float:
        # Of two keys only the first has a product: what is subtracted from a whole row does not count.
        products = torch.zeros(num_heads, 2, 2)
        blank = scores(products)[:, 1].double()
        products[:, :, 0] = product
        gained = scores(products)[:, 1].double() - blank
        gained = gained[:, 0] - gained[:, 1]
        value = gained[0].item()
        if not torch.allclose(gained, torch.tensor(value, dtype=torch.float64), rtol=_TOLERANCE, atol=_TOLERANCE):
            raise UnreadableScores("its scores are scaled by head or position")
        return value

    scale = of(1.0)
    if scale == 0.0:
        raise UnreadableScores("its scores do not depend on the products of queries and keys")
    if math.isclose(of(64.0), 64 * scale, rel_tol=1e-4) and math.isclose(of(-64.0), -64 * scale, rel_tol=1e-4):
        return scale, 0.0
    cap = of(1e7)
    if abs(scale) >= abs(cap):
        raise UnreadableScores("its scores are another function of the products than a soft cap")
    return cap * math.atanh(scale / cap), abs(cap)


def _check(weights: Callable[[Tensor], Tensor], found: Scores, num_heads: int, length: int) -> None:
    """Compare the weights of random products with those of the formula."""
    products = 3 * torch.randn(num_heads, length, length, generator=torch.Generator().manual_seed(0)) / found.scale
    actual = weights(products).double()
    expected = products.double() * found.scale
    if found.softcap:
        expected = found.softcap * torch.tanh(expected / found.softcap)
    if found.alibi is not None:
        distance = (torch.arange(length)[None] - torch.arange(length)[:, None]).double()
        expected = expected + torch.tensor(found.alibi, dtype=torch.float64)[:, None, None] * distance
    seen = visible(length, found.causal, found.window, found.chunk)
    expected = expected.masked_fill(~seen, -math.inf).softmax(-1)
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    if not error < _TOLERANCE:
        raise UnreadableScores("its weights are not the softmax of its scores")
