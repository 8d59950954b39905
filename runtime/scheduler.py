"""Which tokens the next step computes: continuous batching with chunked prefill and preemption of the newest."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Seq

from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.kv_cache import BlockTables, blocks_for
from dscompile.runtime.plan import KVGroup, Plan
from dscompile.runtime.sequence import Sequence

# Most tokens of a step in which sequences decode: each of them waits for as many between two tokens of its own, and a
# queue of prompts is read beside them, not before them. More sequences than half of this leave prompts as many tokens
# as they take.
MIXED_TOKENS = 512


class Scheduler:
    """Sequences join and leave between steps; each keeps its blocks until it ends or is preempted.

    counters: "preemptions".
    """

    def __init__(self, plan: Plan, num_blocks: Seq[int], max_logit_rows: int) -> None:
        self.plan = plan
        self.tables = BlockTables(plan, num_blocks)
        self.max_logit_rows = max_logit_rows
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.counters: Counter[str] = Counter()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises UserError if the pools could not hold it even alone."""
        longest = sequence.num_prompt - 1 + (0 if sequence.wants_logits else sequence.params.max_new_tokens)
        longest = min(max(longest, sequence.num_prompt), self.plan.max_seq_len)
        for group, allocator in zip(self.plan.kv_groups, self.tables.allocators, strict=True):
            needed, held = self._most_blocks(group, longest), allocator.num_blocks - 1
            if needed > held:
                page = self.plan.page_size
                raise UserError(
                    f"the request needs {needed * page} tokens of KV cache, {held * page} are there; "
                    "raise max_kv_tokens or lower max_new_tokens"
                )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.tables.free(sequence.blocks)

    def schedule(self) -> Batch | None:
        """Choose the next step's rows, oldest sequence first, and give them their blocks; None if nothing can run.

        Sequences that decode have their token reserved, so that prompts take only what they leave of the step.
        """
        rows: list[BatchRow] = []
        decoding = [self._is_decoding(s) for s in self.running]
        reserved = sum(decoding)
        tokens, logits = self._most_tokens(reserved) - reserved, self.max_logit_rows - reserved
        # By index, because the newest may be preempted and leave the end of the list while the older ones are served.
        for index, decodes in enumerate(decoding):
            if index >= len(self.running):
                break
            sequence = self.running[index]
            if decodes:
                row = self._row(sequence, 1, 1)
            else:
                row = self._row(sequence, tokens, logits)
                tokens, logits = _left(row, tokens, logits)
            if row is not None:
                rows.append(row)
        while self.waiting and len(self.running) < self.plan.max_batch and self._fits(self.waiting[0]):
            row = self._row(self.waiting[0], tokens, logits, may_preempt=False)
            if row is None:
                break
            self.running.append(self.waiting.popleft())
            rows.append(row)
            tokens, logits = _left(row, tokens, logits)
        return self._launch(rows) if rows else None

    # ------------------------------------------------------------ one row

    def _row(self, sequence: Sequence, max_tokens: int, max_logits: int, may_preempt: bool = True) -> BatchRow | None:
        """The sequence's part in the step, with blocks for it; None if it has to wait."""
        start, known = sequence.num_launched, len(sequence.tokens)
        if start >= self.plan.max_seq_len or max_tokens < 1:
            return None
        self.tables.free_behind(sequence.blocks, start)
        if start == known:
            if not sequence.num_in_flight or self._is_last(sequence):
                return None
            return BatchRow(sequence, start, None) if self._reserve(sequence, start + 1, may_preempt) else None
        if sequence.num_in_flight or start > known:
            return None  # its last token must be read first
        count = min(known - start, max_tokens, max_logits if sequence.wants_logits else max_tokens)
        if self.plan.is_encoder and count < known:
            return None  # its tokens see each other, so all of them are in one step
        first = known if self.plan.is_encoder else start + 1
        if max_logits < 1 or not self._reserve(sequence, first, may_preempt):
            return None
        count = min(count, self.tables.room(sequence.blocks) - start)
        self.tables.allocate(sequence.blocks, start + count)
        new = sequence.tokens[start : start + count]
        if sequence.wants_logits:
            return BatchRow(sequence, start, new, count, sample=False, return_logits=True)
        ends = start + count == known
        return BatchRow(sequence, start, new, int(ends), sample=ends)

    def _launch(self, rows: list[BatchRow]) -> Batch:
        for row in rows:
            sequence = row.sequence
            sequence.num_launched = row.start + row.num_tokens
            sequence.num_in_flight += row.sample
        return Batch(tuple(rows))

    def _most_tokens(self, num_decoding: int) -> int:
        """Tokens that a step may have in which so many sequences decode."""
        most = max(MIXED_TOKENS, 2 * num_decoding) if num_decoding else self.plan.max_step_tokens
        return min(most, self.plan.max_step_tokens)

    def _is_decoding(self, sequence: Sequence) -> bool:
        """Whether its prompt is launched and another token may be generated."""
        launched = sequence.num_launched >= sequence.length - 1 and sequence.length > sequence.num_prompt
        return launched and not self._is_last(sequence)

    def _is_last(self, sequence: Sequence) -> bool:
        """Whether the token in flight is the last that may be generated."""
        return sequence.length - sequence.num_prompt >= sequence.params.max_new_tokens

    # ------------------------------------------------------------ blocks

    def _reserve(self, sequence: Sequence, num_tokens: int, may_preempt: bool) -> bool:
        """Blocks for num_tokens of the sequence, if need be by preempting sequences newer than it, or itself."""
        if self.tables.holds(sequence.blocks, num_tokens):
            return True
        while not self.tables.allocate(sequence.blocks, num_tokens):
            if not may_preempt:
                return False
            if self._preempt_newest() is sequence:
                return False
        return True

    def _preempt_newest(self) -> Sequence:
        sequence = self.running.pop()
        self.tables.free(sequence.blocks)
        sequence.num_launched = 0
        self.waiting.appendleft(sequence)
        self.counters["preemptions"] += 1
        return sequence

    def _fits(self, sequence: Sequence) -> bool:
        """Whether all it holds so far fits in the free blocks, so that it is not preempted half way."""
        if not self.running:
            return True
        pools = zip(self.plan.kv_groups, self.tables.allocators, strict=True)
        return all(self._most_blocks(g, sequence.length) < a.num_free for g, a in pools)

    def _most_blocks(self, group: KVGroup, num_tokens: int) -> int:
        blocks = blocks_for(self.plan, num_tokens)
        span = group.window or group.chunk
        return min(blocks, blocks_for(self.plan, span) + 2) if span else blocks


def _left(row: BatchRow | None, tokens: int, logits: int) -> tuple[int, int]:
    return (tokens, logits) if row is None else (tokens - row.num_tokens, logits - row.num_logits)
