"""Kernels of experts on a GPU: they read the experts that some token chose, and no others."""

from __future__ import annotations

import statistics

import pytest
import torch

from dscompile.codegen.operands import KernelContext, Operand
from dscompile.runtime.plan import Moe, Router
from tests.helpers import rms_ratio

pytestmark = pytest.mark.gpu

K, F, EXPERTS, TOP_K = 2048, 1024, 64, 2
SPEC = Moe(K, F, Router(EXPERTS, TOP_K, "softmax", True), "silu", residuals=1)
EXPERT_BYTES = 3 * K * F * 2
TOKENS = 32


class Layer:
    """One mixture of experts on the GPU, through Triton's own launcher."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        half = {"device": "cuda", "dtype": torch.float16}
        self.tensors = {
            "in.x": torch.randn(TOKENS, K, **half),
            "in.logits": torch.randn(TOKENS, EXPERTS, **half),
            "in.residual0": torch.randn(TOKENS, K, **half),
            "w.gate_up": torch.randn(EXPERTS, 2 * F, K, **half) / K**0.5,
            "w.down": torch.randn(EXPERTS, K, F, **half) / F**0.5,
            "out.y": torch.empty(TOKENS, K, **half),
        }

    def choose(self, experts: list[int]) -> None:
        """Let the tokens choose among these experts, evenly."""
        logits = self.tensors["in.logits"]
        logits.fill_(-10.0)
        for t in range(TOKENS):
            for slot in range(TOP_K):
                logits[t, experts[(TOP_K * t + slot) % len(experts)]] = 2.0 - slot

    def run(self) -> tuple[torch.Tensor, int, float]:
        """The output, the experts that the kernels counted, and the microseconds they took."""
        from dscompile.codegen.jit import JitRunner
        from dscompile.codegen.moe_kernels import moe_program

        operands = {
            role: Operand(str(t.dtype).removeprefix("torch."), t.stride(0), tuple(t.shape))
            for role, t in self.tensors.items()
        }
        program, requests = moe_program(SPEC, operands, KernelContext(("sm_90",), 16, 512, 64, 2048, ()))
        case = next(c for c in program.cases if c.min_tokens <= TOKENS <= c.max_tokens)
        runner, sizes = JitRunner(requests, "cuda"), {"T": TOKENS, "B": TOKENS, "R": TOKENS}
        scratch = runner.scratch(program, sizes)

        def bind(arg: str) -> torch.Tensor | int:
            return (
                scratch[arg.removeprefix("scratch.")] if arg.startswith("scratch.") else {**self.tensors, **sizes}[arg]
            )

        times = []
        for _ in range(12):
            self.tensors["out.y"].fill_(float("nan"))
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(2_000_000)  # the host launches everything before the first kernel starts
            begin.record()
            runner.run(case, bind, sizes)
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        starts = scratch["starts"].view(torch.int32)
        hit = int((starts[1:] > starts[:-1]).sum())
        return self.tensors["out.y"].clone(), hit, statistics.median(times[2:])


def test_bytes_read_grow_with_the_experts_that_are_hit(target, summary):
    """The kernels count the experts they read; poison in the others shows that they read no more; the time follows."""
    layer = Layer()
    times = {}
    for count in (2, 8, 32, 64):
        experts = list(range(0, EXPERTS, EXPERTS // count))
        layer.choose(experts)
        expected, hit, times[count] = layer.run()
        assert hit == count
        summary(f"experts hit: {hit} of {EXPERTS}, {hit * EXPERT_BYTES / 2**20:.0f} MiB, {times[count]:.0f} us")
        held = {role: layer.tensors[role].clone() for role in ("w.gate_up", "w.down")}
        for role in held:
            layer.tensors[role][[e for e in range(EXPERTS) if e not in experts]] = float("nan")
        assert rms_ratio(layer.run()[0], expected) == 0.0
        layer.tensors |= held
    assert times[8] < 0.6 * times[64]
    assert times[8] < times[32] < times[64]
