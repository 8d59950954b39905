"""What a step reads on the device: its inputs, the sampling of its rows, and the tokens chosen, at fixed addresses.

One region, `uploaded`, is written by the host in one copy whenever a batch changes; while it stays the same, the
kernel `step.advance` moves it on by one token. The rest (block tables, sampled tokens, tokens seen) stays on the
device and is addressed by row of the step or by *seat*, a sequence's place for as long as it runs. What a step chose,
its kernels also write to pinned host memory, so that nothing is copied back between two steps.
"""

from __future__ import annotations

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

# Sampling of a row: copied from the seat of its sequence.
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
        and SEAT_FIELDS, each [B].
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
        }
        fields, first = {}, 0
        for name, count in counts.items():
            fields[name] = (first, count)
            first += -(-count // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
        return fields

    @property
    def num_words(self) -> int:
        first, count = list(self.fields.values())[-1]
        return first + count


class Staging:
    """Host memory from which one step's state is copied."""

    def __init__(self, layout: StateLayout, pinned: Callable[..., torch.Tensor]) -> None:
        self._layout, self._pinned = layout, pinned
        self.words = pinned(layout.num_words)
        self.tables = pinned(layout.groups, layout.rows, layout.blocks)
        words = self.words.numpy()
        self.fields = {
            name: words[first : first + count].view(SEAT_FIELDS.get(name, np.int32))
            for name, (first, count) in layout.fields.items()
        }
        self.fields["slots"] = self.fields["slots"].reshape(layout.groups, layout.tokens)
        self.fields["new_blocks"] = self.fields["new_blocks"].reshape(layout.groups, layout.rows)
        self.fields["eos_ids"] = self.fields["eos_ids"].reshape(layout.rows, MAX_EOS_IDS)
        self.table_array = self.tables.numpy()

    @cached_property
    def seen(self) -> torch.Tensor:
        """[rows, seen_words] int32, made on first use: only requests with a repetition penalty need it."""
        return self._pinned(self._layout.rows, self._layout.seen_words)


class DeviceState:
    """The arrays on the device and the copies that fill them.

    block_tables [groups, rows, blocks]; sampled [rows]: tokens by seat;
    told [TURNS, 2, rows], in pinned host memory: by seat, the tokens that the step of a turn chose, and the bits of
    their log-probabilities in float32; what else a turn holds is of earlier steps;
    seen [rows, seen_words]: bit i of word w of a seat's row is set where token 32 * w + i was in prompt or output.
    """

    def __init__(self, plan: Plan, device: torch.device, driver: Driver, pinned: Callable[..., torch.Tensor]) -> None:
        self.layout = layout = StateLayout.of(plan)
        self._driver = driver
        self.uploaded = torch.zeros(layout.num_words, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(layout.groups, layout.rows, layout.blocks, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(layout.rows, dtype=torch.int32, device=device)
        self.told = pinned(TURNS, 2, layout.rows)
        self.seen = torch.zeros(layout.rows, layout.seen_words, dtype=torch.int32, device=device)

    def address(self, name: str, group: int = 0) -> int:
        """The device address of `step.name`; of block_table and slots, the group's part.

        Raises UserError for a name that only another version's kernels know.
        """
        if name == "block_table":
            return self.block_tables.data_ptr() + 4 * group * self.layout.rows * self.layout.blocks
        if name in ("sampled", "told", "seen"):
            return getattr(self, name).data_ptr()
        if name not in self.layout.fields:
            raise UserError(f"a kernel reads step.{name}, which this runtime lacks: compile the model again")
        first, _ = self.layout.fields[name]
        return self.uploaded.data_ptr() + 4 * (first + (group * self.layout.tokens if name == "slots" else 0))

    def upload(self, staging: Staging, num_rows: int, num_blocks: int, stream: int) -> None:
        """Copy the inputs, and the first `num_blocks` columns of the first `num_rows` rows of every block table."""
        self._driver.copy_to_device(
            self.uploaded.data_ptr(), staging.words.data_ptr(), 4 * self.layout.num_words, stream
        )
        if not num_blocks:
            return
        pitch = 4 * self.layout.blocks
        for group in range(self.layout.groups):
            source = staging.tables.data_ptr() + group * self.layout.rows * pitch
            target = self.address("block_table", group)
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
