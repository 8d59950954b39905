"""Interprets the plan on the CPU: the same steps and the same buffers as on a GPU, each step by its torch reference."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dscompile.runtime import ops
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, BatchRow, StepInputs, StepResult, max_logit_rows
from dscompile.runtime.kv_cache import KVPool, dtype_of, size_pools
from dscompile.runtime.ops_linear import PackedWeights
from dscompile.runtime.plan import Buffer, KeepRows, Linear, Plan, Ref, Sample, Step
from dscompile.runtime.sampler import sample_row

PREPARED_SHAPES = 32
SMALL_STEP = 1 << 25
DEFAULT_KV_BYTES = 1 << 30


class CpuExecutor:
    """Runs steps of a plan, one at a time. See `executor.Executor`.

    plan, weights: weights by name, on the CPU, in the plan's dtypes.
    max_kv_tokens: tokens the KV pools hold; by default what max_batch sequences of max_seq_len need, up to 1 GiB.
    """

    max_in_flight = 1

    def __init__(self, plan: Plan, weights: dict[str, torch.Tensor], max_kv_tokens: int | None = None) -> None:
        self.plan = plan
        self.weights = weights
        self.device = torch.device("cpu")
        self.counters: Counter[str] = Counter()
        self.max_logit_rows = max_logit_rows(plan)
        free = available_bytes()
        self.num_blocks = size_pools(
            plan, min(free, DEFAULT_KV_BYTES) if max_kv_tokens is None else free, max_kv_tokens
        )
        groups = [] if plan.is_encoder else list(zip(plan.kv_groups, self.num_blocks, strict=True))
        self.pools = [KVPool(g, plan.page_size, n) for g, n in groups]
        self._arenas = {
            "T": torch.empty(arena_row_bytes(plan, "T") * plan.max_step_tokens, dtype=torch.uint8),
            "R": torch.empty(arena_row_bytes(plan, "R") * self.max_logit_rows, dtype=torch.uint8),
        }
        self._packed = PackedWeights()
        self._products = sum(s.spec.in_features * s.spec.out_features for s in plan.steps if isinstance(s.spec, Linear))
        self._tables: tuple[list[list[list[int]]], list[torch.Tensor], dict[Any, Any]] = [], [], {}
        self._prepared: OrderedDict[tuple[int, int], tuple[list[ops.Run], torch.Tensor]] = OrderedDict()

    def warm_up(self) -> None:
        """Nothing: the first step is like any other."""

    def launch(self, batch: Batch) -> Done:
        """Run the step to its end."""
        return Done(_results(batch, self._run(batch)))

    @torch.inference_mode()
    def _run(self, batch: Batch) -> torch.Tensor:
        """Run the plan's steps; returns logits [R, V] or hidden states [T, D], a view that the next step overwrites."""
        step = self._step_inputs(batch)
        num_tokens, num_logits = len(step.tokens), len(step.logit_rows)
        runs, logits = self._prepare(num_tokens, num_logits)
        with _threads_for(num_tokens * self._products):
            for run in runs:
                run(step)
        counters = self.counters
        counters["steps"] += 1
        counters["tokens"] += num_tokens
        counters["logit_rows"] += num_logits
        return logits

    def poison(self) -> None:
        """Fill every activation with NaN, so that a step that reads what none wrote shows."""
        for arena in self._arenas.values():
            arena.fill_(0xFF)

    # ------------------------------------------------------------ inputs

    def _step_inputs(self, batch: Batch) -> StepInputs:
        rows, page = batch.rows, self.plan.page_size
        tokens: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        starts, contexts = [0], []
        for row in rows:
            new = row.sequence.tokens[-1:] if row.tokens is None else row.tokens
            tokens.extend(new)
            end = row.start + len(new)
            positions.extend(range(row.start, end))
            starts.append(len(tokens))
            contexts.append(end)
            logit_rows.extend(range(len(tokens) - row.num_logits, len(tokens)))
        self._check_size(len(rows), len(tokens), len(logit_rows))
        slots, tables = [], []
        for group, pool in enumerate(self.pools):
            held = [row.sequence.blocks[group] for row in rows]
            _clear_new_blocks(pool, held, rows, contexts)
            slots.append(
                [
                    table[p // page] * page + p % page
                    for table, row, end in zip(held, rows, contexts, strict=True)
                    for p in range(row.start, end)
                ]
            )
            width = max(map(len, held))
            tables.append([table + [0] * (width - len(table)) for table in held])
        if tables != self._tables[0]:
            self._tables = tables, [torch.tensor(t) for t in tables], {}
        return StepInputs(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            context_lens=torch.tensor(contexts),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
            block_tables=self._tables[1],
            slots=[torch.tensor(s) for s in slots],
            starts=starts,
            contexts=contexts,
            table_cache=self._tables[2],
        )

    def _check_size(self, num_rows: int, num_tokens: int, num_logits: int) -> None:
        plan = self.plan
        assert 0 < num_rows <= plan.max_batch, f"{num_rows} sequences in a step, the plan takes {plan.max_batch}"
        assert num_tokens <= plan.max_step_tokens, (
            f"{num_tokens} tokens in a step, the plan takes {plan.max_step_tokens}"
        )
        assert num_logits <= self.max_logit_rows, f"{num_logits} rows of logits in a step, {self.max_logit_rows} fit"

    # ------------------------------------------------------------ steps

    def _prepare(self, num_tokens: int, num_logits: int) -> tuple[list[ops.Run], torch.Tensor]:
        """The plan's steps bound to the buffers of this T and R, and the view of the logits."""
        key = (num_tokens, num_logits)
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        rows = {"T": num_tokens, "R": num_logits}
        views = {name: self._buffer(b, rows[b.rows]) for name, b in self.plan.buffers.items()}
        runs, logits, kept = [], None, num_tokens
        for step in self.plan.steps:
            if isinstance(step.spec, Sample):
                logits = _view(views, step.inputs["logits"])
            elif isinstance(step.spec, KeepRows):
                kept = num_logits
                if 0 < kept < num_tokens:
                    runs.append(self._bind(step, views))
                    views = {name: view[:kept] for name, view in views.items()}
            elif kept:
                runs.append(self._bind(step, views))
        if self.plan.hidden is not None:
            logits = _view(views, self.plan.hidden)
        if logits is None:
            raise UserError("the plan has no sample step, so it has no logits; compile the model again")
        self._prepared[key] = runs, logits
        if len(self._prepared) > PREPARED_SHAPES:
            self._prepared.popitem(last=False)
        return runs, logits

    def _bind(self, step: Step, views: dict[str, torch.Tensor]) -> ops.Run:
        group = getattr(step.spec, "group", None)
        return ops.bind(
            step.spec,
            {role: _view(views, ref) for role, ref in step.inputs.items()},
            {role: _view(views, ref) for role, ref in step.outputs.items()},
            {role: self.weights[name] for role, name in step.weights.items()},
            self.pools[group] if group is not None and self.pools else None,
            self._packed,
        )

    def _buffer(self, buffer: Buffer, rows: int) -> torch.Tensor:
        dtype = dtype_of(buffer.dtype)
        start, size = rows * buffer.offset, rows * buffer.cols * dtype.itemsize
        return self._arenas[buffer.rows][start : start + size].view(dtype).view(rows, buffer.cols)


@dataclass(frozen=True)
class Done:
    """A step that has run."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


@contextlib.contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """One thread for a step of few multiply-adds.

    Its operations are so short that threads mostly wait for each other: eight rows of 7 million weights gain a tenth
    by a second core that is idle, and lose a factor of sixty where the core is not.
    """
    threads = torch.get_num_threads()
    if threads == 1 or products >= SMALL_STEP:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clear_new_blocks(pool: KVPool, tables: list[list[int]], rows: Seq[BatchRow], contexts: list[int]) -> None:
    """Zero the blocks that the step begins and does not fill: masked products never meet what was left there."""
    page = pool.page_size
    for table, row, context in zip(tables, rows, contexts, strict=True):
        last = context // page
        if context % page and last * page >= row.start:
            pool.data[table[last]].zero_()


def _view(views: dict[str, torch.Tensor], ref: Ref) -> torch.Tensor:
    return views[ref.buffer][:, ref.start : ref.stop]


def arena_row_bytes(plan: Plan, rows: str) -> int:
    """Bytes per row of the arena of row symbol `rows`."""
    mine = [b for b in plan.buffers.values() if b.rows == rows]
    return max((b.offset + b.cols * dtype_of(b.dtype).itemsize for b in mine), default=0)


def _results(batch: Batch, logits: torch.Tensor) -> StepResult:
    """Sample and hand out the step's logits [R, V]."""
    rows = batch.rows
    if all(r.num_logits == 1 and r.sample and not r.return_logits and r.sequence.params.plain for r in rows):
        tokens = logits.argmax(-1)
        if not any(r.sequence.params.logprobs for r in rows):
            return StepResult(tokens.tolist(), [math.nan] * len(rows), [None] * len(rows))
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
        return StepResult(tokens.tolist(), logprobs, [None] * len(rows))
    result = StepResult([], [], [])
    end = 0
    for row in rows:
        start, end = end, end + row.num_logits
        token, logprob = _sample(row, logits[end - 1].float()) if row.sample else (-1, math.nan)
        result.tokens.append(token)
        result.logprobs.append(logprob)
        result.logits.append(logits[start:end].float().clone() if row.return_logits else None)
    return result


def _sample(row: BatchRow, logits: torch.Tensor) -> tuple[int, float]:
    sequence = row.sequence
    token = sample_row(
        logits, sequence.params, sequence.tokens, sequence.num_prompt, sequence.seed, sorted(sequence.eos_ids)
    )
    return token, float(logits.log_softmax(-1)[token]) if sequence.params.logprobs else math.nan


def available_bytes() -> int:
    """Bytes of memory the machine can still give, or a large number where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 36
