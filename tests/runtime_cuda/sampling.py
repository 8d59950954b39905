"""Sampling alone: a plan without a model, its kernels on a simulated or a real GPU, and the reference's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch

from dscompile.codegen.aot import compile_kernels
from dscompile.codegen.step_kernels import FEW_ROWS, step_kernels
from dscompile.runtime.cuda_batch import Seats, stage_ragged, stage_seen
from dscompile.runtime.cuda_device import CudaDevice
from dscompile.runtime.cuda_memory import Arena, ScratchMemory
from dscompile.runtime.cuda_program import BoundPlan
from dscompile.runtime.cuda_state import DeviceState, Staging
from dscompile.runtime.executor import Batch, BatchRow
from dscompile.runtime.kernels import KernelTable, Sizes
from dscompile.runtime.plan import Buffer, Plan, Ref, Sample, Step
from dscompile.runtime.sampler import SamplingParams, sample_row
from dscompile.runtime.sequence import Sequence
from tests.runtime_cuda.simulated import SimulatedDevice, write_kernels

MAX_BATCH = FEW_ROWS + 1
TURN = 2

OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.5},
    {"min_new_tokens": 5},
    {"temperature": 1e-35},
    {"temperature": 1.5, "top_k": 3, "min_new_tokens": 5, "repetition_penalty": 0.7},
]


class Sampler:
    """A plan that is nothing but sampling from logits [MAX_BATCH, vocab], `cols` apart."""

    def __init__(self, artifact: Path, vocab: int, cols: int | None = None, target: str | None = None) -> None:
        plan = Plan(
            vocab_size=vocab,
            max_seq_len=64,
            max_batch=MAX_BATCH,
            max_step_tokens=64,
            page_size=4,
            steps=(Step("sample", Sample(), ("sample",), None, {"logits": Ref("logits", 0, vocab)}),),
            buffers={"logits": Buffer("logits", "R", cols or vocab, "float32")},
            weights={},
            kv_groups=(),
        )
        programs, requests = step_kernels(plan)
        if target is None:
            kernels = write_kernels(requests, artifact)
            self.device = SimulatedDevice(kernels, artifact)
        else:
            kernels = compile_kernels(requests, (target,), artifact / "kernels")
            self.device = CudaDevice("cuda")
        self.plan = dataclasses.replace(plan, programs=programs, kernels=kernels)
        with self.device.active():
            self._allocate(KernelTable(kernels, artifact, self.device.target(kernels), self.device.driver))
        self.seats = Seats(self.plan)

    def _allocate(self, table: KernelTable) -> None:
        self.arena = Arena(self.plan, "R", self.device.device)
        scratch = ScratchMemory(self.plan, self.device.device)
        self.arena.allocate()
        scratch.allocate()
        self.state = DeviceState(self.plan, self.device.device, self.device.driver, self.device.pinned)
        self.bound = BoundPlan(self.plan, {}, table, {"R": self.arena}, scratch, self.state, [])

    def __call__(self, logits: torch.Tensor, sequences: list[Sequence], program: str) -> tuple[list[int], list[float]]:
        """Sample every sequence's next token from its row of logits [B, V], twice: the second run must agree."""
        rows = [BatchRow(s, len(s.tokens) - 1, s.tokens[-1:]) for s in sequences]
        staging = Staging(self.state.layout, self.device.pinned)
        seats = self.seats.seat(rows)
        tokens, num_logits = stage_ragged(staging, Batch(tuple(rows)), seats, self.seats, 4, TURN)
        for row, seat in zip(rows, seats, strict=True):
            stage_seen(staging, row, int(seat))
        sizes = Sizes(tokens, len(rows), num_logits, self.state.layout.blocks)
        results = []
        for _ in range(2):
            with self.device.active():
                view = self.arena.view(Ref("logits", 0, self.plan.vocab_size), self.arena.rows)
                view[: len(sequences)] = logits.to(self.device.device)
                self.state.sampled.fill_(-7)
                self.state.told.fill_(-7)
                self.state.upload(staging, len(rows), 0, self.device.stream)
                for seat in seats:
                    self.state.upload_seen(staging, int(seat), self.device.stream)
                self.bound.eager(program).launch(sizes, True, self.device.stream)
            self.device.synchronize()
            told = self.state.told.numpy()
            np.testing.assert_equal(told[TURN, 0, seats], self.state.sampled.cpu().numpy()[seats])
            assert (np.delete(told, TURN, axis=0) == -7).all(), "only the step's own turn is written"
            results.append((told[TURN, 0, seats].tolist(), told[TURN, 1, seats].view(np.float32).tolist()))
        np.testing.assert_equal(results[0], results[1])
        return results[0]


def expected(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [
        sample_row(row, s.params, s.tokens, s.num_prompt, s.seed, sorted(s.eos_ids))
        for row, s in zip(logits, sequences, strict=True)
    ]


def sequence(index: int, prompt: list[int], new: Seq[int] = (), eos: Seq[int] = (), **params) -> Sequence:
    s = Sequence(index, list(prompt), SamplingParams(**params), seed=12345678901 * (index + 1), eos_ids=frozenset(eos))
    s.tokens += new
    return s
