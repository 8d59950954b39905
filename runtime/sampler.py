"""How the next token is chosen: the parameters of a request, and the reference that every device agrees with.

The noise of sampling is a function of (seed, position, vocabulary id) alone, so a request's tokens do not depend on
who else is in the batch. In uint32 arithmetic, with `fmix32` the finaliser of MurmurHash3 (Appleby 2011)

    fmix32(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16
    key       = fmix32(fmix32(seed) + position)          position: that of the token being chosen (prompt included)
    bits(id)  = fmix32(fmix32(id ^ key) + key)
    u(id)     = ((bits(id) >> 9) + 0.5) * 2^-23          exact in float32, never 0 nor 1
    noise(id) = -log(-log(u(id)))                        float32

and the token is argmax(score + noise) over the ids that the filters left (Gumbel-max; ties: the lowest id). A seed of
64 bits enters as `fold_seed(seed)` = (seed ^ seed >> 32) & 0xFFFFFFFF.

Filters, in this order, on float32 logits:
    repetition_penalty  ids already in prompt or output: z * penalty if z < 0 else z / penalty     (Keskar et al. 2019)
    min_new_tokens      end-of-sequence ids are removed while position - num_prompt < min_new_tokens
    temperature         (z - max(z)) / temperature; 0 means argmax here, with no further filter
    top_k               keep z >= the k-th largest
    top_p               keep z >= the smallest z of the smallest set, by falling z, whose mass reaches top_p
    min_p               keep softmax(z) >= min_p * max(softmax(z))
Ties with a threshold are kept, so the result does not depend on a sort's order.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.runtime.errors import UserError

MASK = 0xFFFFFFFF

# Of a parameter: its kind of number, what it must be in words, and whether a number is that.
RANGES: dict[str, tuple[type[Any], str, Callable[[Any], bool]]] = {
    "temperature": (numbers.Real, "a number >= 0", lambda v: v >= 0),
    "top_p": (numbers.Real, "in (0, 1]", lambda v: 0 < v <= 1),
    "min_p": (numbers.Real, "in [0, 1]", lambda v: 0 <= v <= 1),
    "repetition_penalty": (numbers.Real, "a number > 0", lambda v: v > 0),
    "top_k": (numbers.Integral, "an integer >= 0 (0: off)", lambda v: v >= 0),
    "max_new_tokens": (numbers.Integral, "an integer >= 1", lambda v: v >= 1),
    "min_new_tokens": (numbers.Integral, "an integer >= 0", lambda v: v >= 0),
    "seed": (numbers.Integral, "an integer in [0, 2**64)", lambda v: 0 <= v < 1 << 64),
}


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Greedy unless temperature > 0.

    top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch those filters off. seed None: the engine draws one.
    eos_token_ids None: those of the artifact. ignore_eos: end-of-sequence ids do not end the request.
    logprobs: report each chosen token's log-probability under log_softmax of the raw logits.
    Raises UserError, one line, for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        if isinstance(self.eos_token_ids, int):
            object.__setattr__(self, "eos_token_ids", (self.eos_token_ids,))
        for name, (kind, wanted, holds) in RANGES.items():
            value = getattr(self, name)
            if value is getattr(SamplingParams, name):
                continue  # the default
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or not holds(value):
                raise UserError(f"{name} must be {wanted}, got {value!r}")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise UserError("stop must be one or more non-empty strings")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Argmax of the raw logits and nothing else."""
        return self.greedy and self.repetition_penalty == 1 and self.min_new_tokens == 0


def fold_seed(seed: int) -> int:
    """Fold a seed of up to 64 bits into the 32 that the noise is keyed by."""
    return (seed ^ seed >> 32) & MASK


def fmix32(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser, elementwise on int64 that hold uint32 (products wrap; their low bits are right)."""
    h = ((h ^ h >> 16) * 0x85EBCA6B) & MASK
    h = ((h ^ h >> 13) * 0xC2B2AE35) & MASK
    return h ^ h >> 16


def gumbel_noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """Noise of every vocabulary id for one choice: [V] float32. See the head of this file."""
    key = fmix32((fmix32(torch.tensor(fold_seed(seed))) + position) & MASK)
    bits = fmix32((fmix32(torch.arange(vocab_size) ^ key) + key) & MASK)
    u = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def scores(
    logits: torch.Tensor, params: SamplingParams, seen: Seq[int], num_new: int, eos_ids: Seq[int] = ()
) -> torch.Tensor:
    """Apply the filters to one row.

    logits: [V] float32; seen: token ids of prompt and output; num_new: tokens generated so far.
    returns [V] float32, -inf where an id was removed; divided by the temperature unless greedy.
    """
    z = logits.float().clone()
    if params.repetition_penalty != 1:
        ids = torch.tensor(seen).unique()
        z[ids] = torch.where(z[ids] < 0, z[ids] * params.repetition_penalty, z[ids] / params.repetition_penalty)
    if num_new < params.min_new_tokens and eos_ids:
        z[list(eos_ids)] = -math.inf
    if params.greedy:
        return z
    z = (z - z.max()) / params.temperature
    if 0 < params.top_k < z.numel():
        z[z < z.topk(params.top_k).values[-1]] = -math.inf
    if params.top_p < 1:
        falling = z.sort(descending=True).values
        mass_before = falling.softmax(-1).cumsum(-1) - falling.softmax(-1)
        z[z < falling[mass_before < params.top_p].min()] = -math.inf
    if params.min_p > 0:
        z[z < z.max() + math.log(params.min_p)] = -math.inf
    return z


def sample_row(
    logits: torch.Tensor,
    params: SamplingParams,
    seen: Seq[int],
    num_prompt: int,
    seed: int,
    eos_ids: Seq[int] = (),
) -> int:
    """Choose the token at position len(seen) from its logits [V] float32; `seen` are all tokens before it."""
    z = scores(logits, params, seen, len(seen) - num_prompt, eos_ids)
    if not params.greedy:
        z = z + gumbel_noise(seed, len(seen), z.numel())
    return int(z.argmax())
