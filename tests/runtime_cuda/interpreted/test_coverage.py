"""Architectures whose kernels differ most, held to the compiler's gate in float16 by their kernels' sources."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.coverage_gpu import compile_without_gpu
from dscompile.runtime.errors import VerificationError
from tests.runtime_cuda.simulated import SimulatedDriver


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "gptj", "roberta"])
def test_kernels_compute_what_the_model_computes(name, tmp_path):
    checks = compile_without_gpu(name, tmp_path).verification.checks
    assert checks and all(0 < check.error <= check.limit or check.name == "greedy tokens" for check in checks)


def test_a_kernel_that_is_not_launched_fails_the_gate(tmp_path, monkeypatch):
    launch, numbers = SimulatedDriver.launch, itertools.count()
    monkeypatch.setattr(SimulatedDriver, "launch", lambda *call: next(numbers) == 3 or launch(*call))
    with pytest.raises(VerificationError, match="does not compute what"):
        compile_without_gpu("roberta", tmp_path)
