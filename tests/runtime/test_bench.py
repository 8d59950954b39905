"""Decode steps are timed where all sequences decode; what one must read is all weights, of experts only those hit."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from dscompile.runtime import scheduler
from dscompile.runtime.bench import bench, kernel_times
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.engine import Engine
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention, Case, Launch, Moe, Program, Ref, Router, Step, Weight
from dscompile.runtime.traffic import bytes_by_kernel, bytes_per_step, experts_hit
from tests.runtime.models import make_model

ROUTER = Router(8, 2, "softmax", True)


def test_experts_hit():
    assert experts_hit(ROUTER, 1) == 2 / 8
    assert experts_hit(ROUTER, 2) == pytest.approx((2 + 2 * 6 / 8) / 8)
    assert experts_hit(ROUTER, 500) == pytest.approx(1)


def test_bytes_of_a_step_grow_with_the_experts_hit():
    plan = make_model().plan
    spec = Moe(24, 16, ROUTER, "silu")
    moe = Step("moe", spec, ("moe",), 1, {"x": Ref("h", 0, 24)}, {}, {"gate_up": "up", "down": "down"})
    experts = {"up": Weight((8, 32, 24), "float16"), "down": Weight((8, 24, 16), "float16")}
    with_experts = dataclasses.replace(plan, steps=(*plan.steps, moe), weights=plan.weights | experts)
    one_expert = 2 * (32 * 24 + 24 * 16)
    assert bytes_per_step(with_experts, 1, 0) - bytes_per_step(plan, 1, 0) == 2 * one_expert
    assert bytes_per_step(with_experts, 2, 0) - bytes_per_step(plan, 2, 0) == 3.5 * one_expert


def test_what_the_kernels_read_is_what_the_step_reads():
    """Every linear's kernel is given its weights and every attention's the cache; the embedding reads the rest."""
    plan = make_model().plan
    programs, steps = {}, []
    for step in plan.steps:
        args = tuple(f"w.{role}" for role in step.weights) + ("kv",) * isinstance(step.spec, Attention)
        prepare, library = Launch("kernel", f"prepare {step.name}", ("in.x",)), Launch("library", "never", args)
        launches = (prepare, Launch("kernel", step.name, args), library)
        other = Launch("kernel", "never", args)
        programs[step.name] = Program((Case(4, 0, (other,)), Case(1, 0, launches, decode=True)))
        steps.append(dataclasses.replace(step, program=step.name))
    plan = dataclasses.replace(plan, steps=tuple(steps), programs=programs)
    found = bytes_by_kernel(plan, 3, 100)
    assert not any(name == "never" or name.startswith("prepare") for name in found)
    assert sum(found.values()) == bytes_per_step(plan, 3, 100)


def test_only_steps_in_which_all_decode_are_timed(monkeypatch):
    """Three prompts of 20 tokens are read in four steps of 16: the time of a step is made that of its tokens."""
    model = make_model(max_step_tokens=16, max_batch=3)
    engine, clock = Engine(CpuExecutor(model.plan, model.weights)), [0.0]
    launch = engine.executor.launch

    def counted(batch):
        clock[0] += sum(row.num_tokens for row in batch.rows)
        return launch(batch)

    monkeypatch.setattr(engine.executor, "launch", counted)
    monkeypatch.setattr("dscompile.runtime.bench.perf_counter", lambda: clock[0])
    (measured,) = bench(engine, [3], 20, 12, 1)["batches"]
    assert measured["decode_step_ms"] == 3000
    assert not engine.has_work
    with pytest.raises(UserError, match="--new-tokens 2 is too few for 3 prompts of 20 tokens"):
        bench(engine, [3], 20, 2, 1)


def test_kernels_are_timed_where_all_sequences_decode(monkeypatch):
    """Prompts of 100 tokens in all are read in more than 20 steps, beside which up to four sequences decode."""
    monkeypatch.setattr(scheduler, "MIXED_TOKENS", 5)
    model = make_model(max_seq_len=128, max_step_tokens=16, max_batch=5)
    engine = Engine(CpuExecutor(model.plan, model.weights))
    launch, counts = engine.executor.launch, Counter()

    def counted(batch):
        counts[f"a step of {sum(row.num_tokens for row in batch.rows)}"] += 1
        return launch(batch)

    def profile(engine, prompts, new_tokens):
        counts.clear()
        engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        return {name: (count, count * 10.0) for name, count in counts.items()}

    monkeypatch.setattr(engine.executor, "launch", counted)
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    monkeypatch.setattr("dscompile.runtime.bench._profile", profile)
    (row,) = kernel_times(engine, 5, 20)
    assert (row["kernel"], row["launches_per_step"], row["us_each"]) == ("a step of 5", 1, 10)
