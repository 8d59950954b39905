"""What a step reads on the device: its inputs, the sampling of its rows, and the tokens chosen, at fixed addresses.

One region, `uploaded`, is written by the host whenever a batch changes, in one copy for a few rows of one KV group;
while it stays the same, the kernel `step.advance` moves it on by one token. The rest (sampled tokens, tokens seen)
stays on the device and is addressed by *seat*, a sequence's place for as long as it runs. What a step chose, its
kernels also write to pinned host memory, so that nothing is copied back between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dscompile.runtime.driver import Driver
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import max_logit_rows
from dscompile.runtime.plan import Plan

MAX_EOS_IDS = 16
FIELD_ALIGNMENT = 64  # words
TURNS = 3  # steps whose results stay in host memory, one more than may be in flight; a constant of the kernels

# Sampling of a row: copied from the seat of its sequence. They follow each other in memory, so that one copy does.
SEAT_FIELDS: dict[str, Any] = {
    "temperature": np.float32,
    "repetition_penalty": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.uint32,
    "min_position": np.int32,
}


@dataclass(frozen=True)
class StateLayout:
    """How large the state is, as both the compiler (strides are constants of its kernels) and the runtime see it.

    rows: sequences of a step; tokens: tokens of a step; blocks: columns of a block table; groups: KV groups;
    seen_words: 32-bit words of a bitmap over the vocabulary.
    """

    rows: int
    tokens: int
    blocks: int
    groups: int
    logit_rows: int
    seen_words: int

    @classmethod
    def of(cls, plan: Plan) -> StateLayout:
        return cls(
            rows=plan.max_batch,
            tokens=max(plan.max_step_tokens, plan.max_batch),
            blocks=-(-plan.max_seq_len // plan.page_size),
            groups=len(plan.kv_groups),
            logit_rows=max_logit_rows(plan),
            seen_words=-(-plan.vocab_size // 32),
        )

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Name -> (first word, words) of every array in `uploaded`.

        tokens, positions [T]; sources [T]: the seat whose sampled token a token is, -1 where `tokens` has it;
        slots [groups, T]; seq_starts [B + 1]; context_lens [B]; logit_rows [R];
        seats [B]: where a row's sampled token goes, -1 for a row that does not sample (and for padding);
        sample_rows [B]: the row of logits it samples from; new_blocks [groups, B]: the block a row enters, or -1;
        eos_ids [B, MAX_EOS_IDS], -1 where unused; turn [1]: the part of `told` that the step writes;
        SEAT_FIELDS, each [B]; and block_table [groups, B, blocks], which is last because its length varies most.
        """
        counts = {
            "context_lens": self.rows,
            "seq_starts": self.rows + 1,
            "seats": self.rows,
            "sample_rows": self.rows,
            "eos_ids": self.rows * MAX_EOS_IDS,
            "turn": 1,
            **dict.fromkeys(SEAT_FIELDS, self.rows),
            "new_blocks": self.groups * self.rows,
            "logit_rows": self.logit_rows,
            "tokens": self.tokens,
            "sources": self.tokens,
            "positions": self.tokens,
            "slots": self.groups * self.tokens,
            "block_table": self.groups * self.rows * self.blocks,
        }
        fields, first = {}, 0
        for name, count in counts.items():
            fields[name] = (first, count)
            first += _aligned(count)
        return fields

    @property
    def num_words(self) -> int:
        first, count = list(self.fields.values())[-1]
        return first + count


class Staging:
    """Host memory from which one step's state is copied.

    fields: the arrays of `StateLayout.fields`; sampling [len(SEAT_FIELDS), >= B] int32: all SEAT_FIELDS as one.
    """

    def __init__(self, layout: StateLayout, pinned: Callable[..., torch.Tensor]) -> None:
        self._layout, self._pinned = layout, pinned
        self.words = pinned(layout.num_words)
        words = self.words.numpy()
        self.fields = {
            name: words[first : first + count].view(SEAT_FIELDS.get(name, np.int32))
            for name, (first, count) in layout.fields.items()
        }
        shapes = {
            "slots": (layout.groups, layout.tokens),
            "new_blocks": (layout.groups, layout.rows),
            "eos_ids": (layout.rows, MAX_EOS_IDS),
            "block_table": (layout.groups, layout.rows, layout.blocks),
        }
        self.fields |= {name: self.fields[name].reshape(shape) for name, shape in shapes.items()}
        first, _ = layout.fields[next(iter(SEAT_FIELDS))]
        rows = (len(SEAT_FIELDS), _aligned(layout.rows))
        self.sampling = words[first : first + math.prod(rows)].reshape(rows)

    @cached_property
    def seen(self) -> torch.Tensor:
        """[rows, seen_words] int32, made on first use: only requests with a repetition penalty need it."""
        return self._pinned(self._layout.rows, self._layout.seen_words)


def _aligned(count: int) -> int:
    return -(-count // FIELD_ALIGNMENT) * FIELD_ALIGNMENT


class DeviceState:
    """The arrays on the device and the copies that fill them.

    uploaded [num_words]: the inputs of a step, as `StateLayout.fields` lays them out;
    sampled [rows]: tokens by seat;
    told [TURNS, 2, rows], in pinned host memory: by seat, the tokens that the step of a turn chose, and the bits of
    their log-probabilities in float32; what else a turn holds is of earlier steps;
    seen [rows, seen_words]: bit i of word w of a seat's row is set where token 32 * w + i was in prompt or output.
    """

    def __init__(self, plan: Plan, device: torch.device, driver: Driver, pinned: Callable[..., torch.Tensor]) -> None:
        self.layout = layout = StateLayout.of(plan)
        self._driver = driver
        self.uploaded = torch.zeros(layout.num_words, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(layout.rows, dtype=torch.int32, device=device)
        self.told = pinned(TURNS, 2, layout.rows)
        self.seen = torch.zeros(layout.rows, layout.seen_words, dtype=torch.int32, device=device)

    def address(self, name: str, group: int = 0) -> int:
        """The device address of `step.name`; of block_table and slots, the group's part.

        Raises UserError for a name that only another version's kernels know.
        """
        if name in ("sampled", "told", "seen"):
            return getattr(self, name).data_ptr()
        if name not in self.layout.fields:
            raise UserError(f"a kernel reads step.{name}, which this runtime lacks: compile the model again")
        first, count = self.layout.fields[name]
        skipped = group * count // self.layout.groups if name in ("block_table", "slots") and group else 0
        return self.uploaded.data_ptr() + 4 * (first + skipped)

    def upload(self, staging: Staging, num_rows: int, num_blocks: int, stream: int) -> None:
        """Copy the inputs, and the first `num_blocks` columns of the first `num_rows` rows of every block table.

        The rows of the first table go along whole, in the same copy, where they are no longer than the inputs.
        """
        words, _ = self.layout.fields["block_table"]
        rows = num_rows * self.layout.blocks
        groups = range(self.layout.groups if num_blocks else 0)
        if groups and rows <= words:
            words, groups = words + rows, groups[1:]
        self._driver.copy_to_device(self.uploaded.data_ptr(), staging.words.data_ptr(), 4 * words, stream)
        pitch = 4 * self.layout.blocks
        for group in groups:
            target = self.address("block_table", group)
            source = staging.words.data_ptr() + target - self.uploaded.data_ptr()
            self._driver.copy_rows_to_device(target, source, pitch, 4 * num_blocks, num_rows, stream)

    def upload_field(self, staging: Staging, name: str, stream: int) -> None:
        """Copy one array of the inputs."""
        first, count = self.layout.fields[name]
        source = staging.words.data_ptr() + 4 * first
        self._driver.copy_to_device(self.uploaded.data_ptr() + 4 * first, source, 4 * count, stream)

    def upload_seen(self, staging: Staging, seat: int, stream: int) -> None:
        """Copy the bitmap of one seat."""
        offset, row = 4 * seat * self.layout.seen_words, 4 * self.layout.seen_words
        self._driver.copy_to_device(self.seen.data_ptr() + offset, staging.seen.data_ptr() + offset, row, stream)
