"""The state of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from dscompile.runtime.sampler import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A request: its tokens, its sampling, its blocks.

    tokens:       prompt and generated tokens that the host knows.
    seed, eos_ids: what sampling uses, `params` resolved by the engine. eos_ids is empty where they are ignored.
    wants_logits: it ends with its prompt, and asks for the logits of every token.
    num_launched: how many tokens have their keys and values in the cache, or in a step that is in flight.
    num_in_flight: sampled tokens that are launched and not read yet.
    blocks:       per KV group, the physical block of every logical block so far; 0 (the null block) where a window
                  has moved past it.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    seed: int = 0
    eos_ids: frozenset[int] = frozenset()
    wants_logits: bool = False
    num_prompt: int = 0
    num_launched: int = 0
    num_in_flight: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def length(self) -> int:
        """Tokens of the sequence, those included that only the device knows."""
        return len(self.tokens) + self.num_in_flight
