"""What the engine asks of an executor: one step over a ragged batch, launched now and read later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dscompile.runtime.plan import Plan
from dscompile.runtime.sequence import Sequence

LOGIT_BYTES = 256 << 20


@dataclass(frozen=True)
class BatchRow:
    """One sequence's part in a step: tokens at positions [start, start + num_tokens).

    tokens: the new token ids, or None: one token, the one sampled for this sequence by the step launched just before,
            which only the device may know yet.
    num_logits: the last so many of its tokens get a row of logits. An encoder's rows are hidden states instead, and
                every token gets one.
    sample: choose the token at position start + num_tokens from the last row of logits (num_logits >= 1).
    return_logits: hand the rows back as well.
    """

    sequence: Sequence
    start: int
    tokens: Seq[int] | None
    num_logits: int = 1
    sample: bool = True
    return_logits: bool = False

    @property
    def num_tokens(self) -> int:
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """One step. Its rows' `sequence.blocks` already cover every position the step writes; they may change after the
    launch (blocks freed or a block appended), which must not reach a step in flight."""

    rows: tuple[BatchRow, ...]


@dataclass
class StepInputs:
    """The inputs of a step as the plan's ops see them, on one device.

    tokens [T], positions [T], context_lens [B] (this step's tokens included), logit_rows [R] (rows of T); per KV group
    block_tables[g] [B, blocks] and slots[g] [T] (block * page_size + offset in the block; -1: not written). All int64
    on the CPU.
    starts, contexts: on the host, the first token of each sequence, then T, and context_lens.
    cache: what ops share within the step. table_cache: what they derive from the block tables alone.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    context_lens: torch.Tensor
    logit_rows: torch.Tensor
    block_tables: list[torch.Tensor]
    slots: list[torch.Tensor]
    starts: list[int]
    contexts: list[int]
    cache: dict[Any, Any] = field(default_factory=dict)
    table_cache: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What a step produced, per row of its batch.

    tokens:   the sampled token, -1 where the row does not sample.
    logprobs: its log-probability in the model's own distribution (log_softmax of the raw logits), NaN where not asked.
    logits:   [num_logits, V] float32 on the CPU where asked, else None; an encoder's hidden states [num_tokens, D].
    """

    tokens: list[int]
    logprobs: list[float]
    logits: list[torch.Tensor | None]


class Pending(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Block until the step is done and return its result."""
        ...


class Executor(Protocol):
    """Runs steps of one plan, in the order they are launched.

    max_in_flight:   steps that may be launched and not read (CPU 1, CUDA 2).
    num_blocks:      per KV group, blocks of its pool; block 0 is the null block: zeros, never allocated nor written.
    max_logit_rows:  the largest R of a step.
    counters:        at least "steps", "tokens" (rows of T computed) and "logit_rows".
    """

    plan: Plan
    device: torch.device
    max_in_flight: int
    max_logit_rows: int
    counters: Counter[str]

    @property
    def num_blocks(self) -> list[int]: ...

    def warm_up(self) -> None:
        """Prepare whatever the first steps would have to wait for."""
        ...

    def launch(self, batch: Batch) -> Pending:
        """Start a step and return without waiting for it, where the device allows."""
        ...


def max_logit_rows(plan: Plan) -> int:
    """Rows of logits a step may ask for: every sequence's, and as many as fit LOGIT_BYTES of float32.

    An encoder's hidden states are there for every token.
    """
    if plan.is_encoder:
        return plan.max_step_tokens
    return max(plan.max_batch, min(plan.max_step_tokens, LOGIT_BYTES // (4 * plan.vocab_size)))
