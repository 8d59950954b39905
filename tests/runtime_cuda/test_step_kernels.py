"""The programs of a step: what they launch, and that their kernels compile for real targets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dscompile.codegen.aot import compile_kernels
from dscompile.codegen.emit import render
from dscompile.codegen.step_kernels import BIN_SHIFT, BINS, FIRST_BIN, step_kernels
from dscompile.codegen.targets import SHARED_LIMIT
from dscompile.runtime.plan import Buffer, KVGroup, Plan, Ref, Sample, Step

PLAN = Plan(
    vocab_size=50257,
    max_seq_len=100,
    max_batch=8,
    max_step_tokens=64,
    page_size=16,
    steps=(Step("sample", Sample(), ("sample",), None, {"logits": Ref("logits", 0, 50257)}),),
    buffers={"logits": Buffer("logits", "R", 50304, "float32")},
    weights={},
    kv_groups=(KVGroup(1, 1, 64, 64, "float16"), KVGroup(1, 1, 64, 64, "float16", window=32)),
)


def test_greedy_is_one_launch_and_sampling_narrows_twice():
    programs, _ = step_kernels(PLAN)
    launches = {name: [x.target for x in program.cases[0].launches] for name, program in programs.items()}
    assert {name: len(found) for name, found in launches.items()} == {
        "step.advance": 1,
        "step.gather": 1,
        "step.sample_greedy": 1,
        "step.sample": 4,
    }
    assert len(set(launches["step.sample"])) == 4


def test_the_first_parts_reach_where_no_id_is_chosen():
    """Noise is between -2.8 and 16.7: an id 20 below the best never wins, and the last part begins far beyond."""
    begins = np.array((FIRST_BIN + BINS - 1) << BIN_SHIFT, np.int32).view(np.float32)
    assert 20 < begins < 128


def test_a_model_without_logits_has_no_sampling():
    programs, requests = step_kernels(dataclasses.replace(PLAN, steps=()))
    assert set(programs) == {"step.advance", "step.gather"}
    assert len(requests) == 2


def test_sources_name_their_constants_and_wait_before_they_load():
    _, requests = step_kernels(PLAN)
    sources = {r.template: render(r) for r in requests if r.pdl}
    assert set(sources) == {"sample_greedy", "sample_start", "sample_narrow", "sample_choose"}
    for source in sources.values():
        assert "V = tl.constexpr(50257)" in source
        assert "STRIDE = tl.constexpr(50304)" in source
        body = source.rsplit("@triton.jit", 1)[1]
        assert body.index("gdc_wait()") < body.index("tl.load")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(tmp_path, target):
    _, requests = step_kernels(PLAN)
    kernels = compile_kernels(requests, (target,), tmp_path / "kernels", processes=2)
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        cubin = kernel.cubins[target]
        assert cubin.spills == 0, name
        assert cubin.shared <= SHARED_LIMIT[int(target[3:])]
        assert (tmp_path / cubin.file).read_bytes()[:4] == b"\x7fELF"
