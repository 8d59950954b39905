"""--tune: choose the configurations of a model's linears by the time of its whole decode step on the GPU at hand.

Kernels of a step overlap (the next one loads weights while the last one ends), so what is fastest alone need not be
fastest in the chain. Each linear in turn, the largest first, tries its candidates in the model's own plan.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dscompile.codegen.aot import compile_kernels
from dscompile.codegen.linear_kernels import TILE_RANGES
from dscompile.codegen.operands import KernelContext
from dscompile.codegen.tune import linear_candidates
from dscompile.compiler.progress import Progress, Silent
from dscompile.passes.graph import ModelGraph
from dscompile.passes.lower.lower import Limits, Lowered, lower
from dscompile.runtime.engine import Engine
from dscompile.runtime.plan import Linear
from dscompile.runtime.weights import ROW_SUM, make_weight

BATCHES = (1, *(high for _, high in TILE_RANGES))
CONTEXT_TOKENS = 128
STEPS = 96  # half of them are more than it takes to read 128 such prompts
WORTHWHILE = 0.997
"""A candidate must take less than this part of the best time so far; the spread of a step's time is about 0.2%."""


def tune(
    graph: ModelGraph,
    dtype: str,
    targets: Sequence[str],
    limits: Limits,
    progress: Progress | None = None,
    tokens: Iterable[int] = BATCHES,
    candidates: int = 8,
) -> tuple[dict[str, Any], ...]:
    """Return the best configuration of every linear and number of tokens up to max_batch, as in codegen/tuned.

    graph: fused; its weights are replaced by random ones. tokens: sequences of the decode steps to measure.
    """
    progress = progress or Silent()
    limits = replace(limits, max_seq_len=min(limits.max_seq_len, 2 * CONTEXT_TOKENS))
    with tempfile.TemporaryDirectory() as scratch:
        bench = StepBench(graph, dtype, tuple(targets), limits, Path(scratch))
        measured: dict[tuple, dict[str, Any]] = {}
        for count in [t for t in tokens if t <= limits.max_batch]:
            options = bench.options(count, candidates)
            best = bench.step_ms(tuple(measured.values()), count)
            stage = f"tuning batch {count}, {best:.3f} ms"
            progress.start(stage, sum(len(entries) for _, entries in options), "configurations")
            for key, entries in options:
                for entry in entries:
                    elapsed = bench.step_ms((*(e for k, e in measured.items() if k != key), entry), count)
                    progress.advance()
                    if elapsed < WORTHWHILE * best:
                        best = elapsed
                        measured[key] = entry | {"step_ms": round(elapsed, 4)}
            progress.finish()
    return tuple(measured.values())


class StepBench:
    """Engines of one model under different configurations of its linears; its random weights are made once."""

    def __init__(
        self,
        graph: ModelGraph,
        dtype: str,
        targets: tuple[str, ...],
        limits: Limits,
        directory: Path,
        device: str = "cuda",
    ) -> None:
        """graph: fused. targets: of the GPU `device`; none for the CPU."""
        self._graph, self._dtype, self._targets, self._limits = graph, dtype, targets, limits
        self._directory = directory
        self._device = torch.device(device)
        self._weights: dict[str, torch.Tensor] = {}
        plan = self._lower(()).plan
        for name in sorted(plan.weights, key=lambda n: plan.weights[n].init.startswith(ROW_SUM)):
            weight = plan.weights[name]
            weight = weight if weight.init else replace(weight, init="ones")
            self._weights[name] = make_weight(name, weight, 0, self._device, self._weights)

    def engine(self, measured: tuple[dict[str, Any], ...], max_kv_tokens: int) -> Engine:
        """An engine whose linears have these configurations, as in codegen/tuned, where they name their shapes."""
        lowered = self._lower(measured)
        gc.collect()  # captured graphs keep the last executor in a cycle
        if self._device.type == "cpu":
            from dscompile.runtime.cpu_executor import CpuExecutor

            return Engine(CpuExecutor(lowered.plan, self._weights, max_kv_tokens))
        from dscompile.runtime.cuda_executor import CudaExecutor

        plan = replace(lowered.plan, kernels=self._compile([lowered]))
        return Engine(CudaExecutor(plan, self._weights, self._directory, self._device, max_kv_tokens))

    def options(self, tokens: int, candidates: int) -> list[tuple[tuple, list[dict[str, Any]]]]:
        """(key, table entries to try) of each distinct linear, the largest first; their kernels are compiled."""
        plan = self._lower(()).plan
        limits = self._limits
        context = KernelContext(
            self._targets, plan.page_size, limits.max_seq_len, limits.max_batch, limits.max_step_tokens, plan.kv_groups
        )
        specs: dict[tuple, tuple[Linear, int]] = {}
        shapes: dict[tuple, dict[str, Any]] = {}
        for step in plan.steps:
            if isinstance(step.spec, Linear):
                spec = step.spec
                gated = any(s.gated for s in spec.segments)
                quantization = {"quantization": spec.quantization.activations} if spec.quantization else {}
                key = (spec.out_features, spec.in_features, gated, tokens, *quantization.values())
                held = specs.get(key, (spec, 0))[1]
                specs[key] = (spec, held + spec.out_features * spec.in_features)
                shapes[key] = {"shape": list(key[:2]), "gated": gated, "tokens": tokens} | quantization
        options = []
        for key, (spec, _) in sorted(specs.items(), key=lambda item: -item[1][1]):
            configs = linear_candidates(spec, self._dtype, tokens, context)[:candidates]
            options.append((key, [shapes[key] | {"config": asdict(c)} for c in configs]))
        self._compile([self._lower((entry,)) for _, entries in options for entry in entries])
        return options

    def step_ms(self, measured: tuple[dict[str, Any], ...], sequences: int) -> float:
        """Milliseconds of a decode step of so many sequences, from two generations of different lengths."""
        engine = self.engine(measured, sequences * (CONTEXT_TOKENS + 2 * STEPS + self._limits.page_size))
        plan = engine.plan
        prompts = [[(7 * i + j) % plan.vocab_size for j in range(CONTEXT_TOKENS)] for i in range(sequences)]
        self._seconds(engine, prompts, 4)
        short, long = (min(self._seconds(engine, prompts, n) for _ in range(3)) for n in (STEPS // 2, STEPS))
        return 1e3 * (long - short) / (STEPS - STEPS // 2)

    @staticmethod
    def _seconds(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        return time.perf_counter() - start

    def _lower(self, measured: tuple[dict[str, Any], ...]) -> Lowered:
        return lower(self._graph, self._dtype, self._targets, self._limits, measured=measured)

    def _compile(self, lowered: list[Lowered]) -> dict:
        requests = {r.name: r for one in lowered for r in one.requests}
        return compile_kernels(requests.values(), self._targets, self._directory / "kernels")
