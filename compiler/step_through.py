"""Decodes given tokens one at a time, to see the logits of decode steps whose tokens are not sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from dscompile.runtime.engine import Engine
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.kv_cache import BlockTables
from dscompile.runtime.sampler import SamplingParams
from dscompile.runtime.sequence import Sequence

DECODED = 8


def decode_logits(engine: Engine, texts: list[list[int]]) -> list[Tensor]:
    """Logits of the last positions of each text, one token a step, the texts batched. Per text [up to DECODED, V].

    The engine must be idle: its cache is overwritten.
    """
    tables = BlockTables(engine.plan, engine.executor.num_blocks)
    sequences = [Sequence(-1 - i, list(text), SamplingParams()) for i, text in enumerate(texts)]
    starts = [max(0, len(text) - DECODED) for text in texts]
    # Last first: other blocks than the engine gives these texts, so that neither run can live on the other's keys.
    for sequence, start in reversed(list(zip(sequences, starts, strict=True))):
        assert tables.allocate(sequence.blocks, len(sequence.tokens)), "the pool was sized for these texts"
        _prefill(engine, sequence, start)
    rows: list[list[Tensor]] = [[] for _ in texts]
    for step in range(DECODED):
        live = [i for i, text in enumerate(texts) if starts[i] + step < len(text)]
        for first in range(0, len(live), engine.plan.max_batch):
            chosen = live[first : first + engine.plan.max_batch]
            batch = Batch(tuple(_row(sequences[i], starts[i] + step, 1, True) for i in chosen))
            for i, logits in zip(chosen, engine.executor.launch(batch).wait().logits, strict=True):
                assert logits is not None, "the row asked for logits"
                rows[i] += logits
    return [torch.stack(r) for r in rows]


def _prefill(engine: Engine, sequence: Sequence, stop: int) -> None:
    chunk = engine.plan.max_step_tokens
    for start in range(0, stop, chunk):
        engine.executor.launch(Batch((_row(sequence, start, min(chunk, stop - start), False),))).wait()


def _row(sequence: Sequence, start: int, count: int, wanted: bool) -> BatchRow:
    tokens = sequence.tokens[start : start + count]
    return BatchRow(sequence, start, tokens, num_logits=1, sample=False, return_logits=wanted)
