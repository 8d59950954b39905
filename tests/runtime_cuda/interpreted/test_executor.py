"""The CUDA executor on a simulated GPU, with the real kernels in Triton's interpreter, against the CPU executor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dscompile.codegen import prefill_kernels, single_kernels
from dscompile.codegen.memory import assign_offsets
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.codegen.select import programs_for
from dscompile.codegen.step_kernels import step_kernels
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.cuda_executor import RESERVED_BYTES, CudaExecutor, graph_sizes
from dscompile.runtime.cuda_state import TURNS
from dscompile.runtime.engine import Engine
from dscompile.runtime.errors import UserError
from dscompile.runtime.kernels import context_bounds
from dscompile.runtime.plan import Aten, Buffer, Plan, Ref, Sample, Step
from dscompile.runtime.plan_check import check_plan
from tests.codegen.interpreted import gluon
from tests.helpers import rms_ratio
from tests.runtime.models import Model, make_encoder, make_model
from tests.runtime_cuda.simulated import TARGET, SimulatedDevice, write_kernels

gluon.install()

PROMPTS = [[5, 7, 9, 1, 2, 30, 4], [11], [3, 3, 8, 20, 36]]


def simulated(model: Model, artifact: Path, free: int = 1 << 30) -> tuple[Engine, SimulatedDevice]:
    plan = with_kernels(model.plan, artifact)
    device = SimulatedDevice(plan.kernels, artifact, free)
    return Engine(CudaExecutor(plan, model.weights, artifact, device, max_kv_tokens=256)), device


def with_kernels(plan: Plan, artifact: Path) -> Plan:
    """The plan with a program for every step, as the compiler makes them, and the kernels' sources in `artifact`."""
    facts = (plan.page_size, plan.max_seq_len, plan.max_batch, plan.max_step_tokens, plan.kv_groups)
    context = KernelContext((TARGET,), *facts)
    programs, requests = step_kernels(plan)
    steps = []
    for step in plan.steps:
        if not isinstance(step.spec, Sample | Aten):
            programs[step.name], made = programs_for(step.spec, operands(step, plan), context)
            requests += made
            step = dataclasses.replace(step, program=step.name)
        steps.append(step)
    kernels = write_kernels(requests, artifact)
    return dataclasses.replace(plan, steps=tuple(steps), programs=programs, kernels=kernels)


def operands(step: Step, plan: Plan) -> dict[str, Operand]:
    found = {}
    for kind, refs in (("in", step.inputs), ("out", step.outputs)):
        for role, ref in refs.items():
            buffer = plan.buffers[ref.buffer]
            aligned = ref.start * getattr(torch, buffer.dtype).itemsize % 16 == 0
            found[f"{kind}.{role}"] = Operand(buffer.dtype, buffer.cols, (0, ref.stop - ref.start), aligned)
    for role, name in step.weights.items():
        weight = plan.weights[name]
        found[f"w.{role}"] = Operand(weight.dtype, weight.shape[-1], weight.shape)
    return found


@pytest.fixture
def llama() -> Model:
    return make_model(hidden=32, heads=4, kv_heads=2, head_dim=16, v_head_dim=16, rotary_dim=16, inner=32)


def test_greedy_tokens_are_those_of_the_cpu(llama, tmp_path):
    """Prompts of several lengths; page size 4, so that sequences enter new blocks inside the captured graph."""
    engine, device = simulated(llama, tmp_path)
    options = {"max_new_tokens": 10, "ignore_eos": True, "logprobs": True}
    expected = Engine(CpuExecutor(llama.plan, llama.weights, 128)).generate(PROMPTS, **options)
    actual = engine.generate(PROMPTS, **options)
    assert [r.tokens for r in actual] == [r.tokens for r in expected]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=1e-4)
    assert device.replays >= 8


def test_logits_are_those_of_the_cpu(llama, tmp_path):
    engine, _ = simulated(llama, tmp_path)
    expected = Engine(CpuExecutor(llama.plan, llama.weights, 128)).logits(PROMPTS)
    for a, b in zip(engine.logits(PROMPTS), expected, strict=True):
        assert rms_ratio(a, b) < 1e-5


def test_logits_over_an_int8_cache_are_those_of_the_cpu(tmp_path):
    """Two groups, so that a layer's part of a block, and its scales, begin at every kind of place."""
    sizes = {"hidden": 32, "heads": 4, "kv_heads": 1, "head_dim": 20, "v_head_dim": 12, "rotary_dim": 8, "layers": 3}
    model = make_model(**sizes, inner=32, windows=(0, 5, 0), kv_dtype="int8")
    engine, _ = simulated(model, tmp_path)
    expected = Engine(CpuExecutor(model.plan, model.weights, 128)).logits(PROMPTS)
    for a, b in zip(engine.logits(PROMPTS), expected, strict=True):
        assert rms_ratio(a, b) < 1e-4
    options = {"max_new_tokens": 6, "ignore_eos": True}
    expected = Engine(CpuExecutor(model.plan, model.weights, 128)).generate(PROMPTS, **options)
    assert [r.tokens for r in engine.generate(PROMPTS, **options)] == [r.tokens for r in expected]


def test_warming_up_captures_every_size_and_disturbs_nobody(llama, tmp_path):
    engine, _ = simulated(llama, tmp_path)
    cpu = Engine(CpuExecutor(llama.plan, llama.weights, 128))
    expected = cpu.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
    requests = [engine.add_request(prompt, max_new_tokens=8, ignore_eos=True) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    engine.warm_up()
    captured = engine.counters["graphs"]
    assert captured == 2 * len(graph_sizes(llama.plan.max_batch))
    while engine.has_work:
        engine.step()
    assert engine.counters["graphs"] == captured
    assert [request.result().tokens for request in requests] == [result.tokens for result in expected]


def test_a_sequence_that_outgrows_a_kernel_goes_on_with_the_next(tmp_path, monkeypatch):
    """Attention of one part of the keys, of two, and of any number; a second request meets graphs that exist."""
    monkeypatch.setattr(single_kernels, "KEYS", 16)
    sizes = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "rotary_dim": 16, "inner": 32}
    model = make_model(**sizes, dtype="float16", max_seq_len=64)
    engine, _ = simulated(model, tmp_path)
    bounds = context_bounds(engine.executor.plan.programs.values(), 1)
    assert bounds == [17, 33]
    options = {"max_new_tokens": 8, "ignore_eos": True, "logprobs": True}
    for length, graphs in ((11, 2), (28, 3), (13, 3)):
        prompt = torch.randint(model.plan.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        (expected,) = Engine(CpuExecutor(model.plan, model.weights, 256)).generate([prompt], **options)
        (actual,) = engine.generate([prompt], **options)
        assert actual.tokens == expected.tokens
        assert rms_ratio(torch.tensor(actual.logprobs), torch.tensor(expected.logprobs)) < 2e-3
        assert engine.counters["graphs"] == graphs


@pytest.mark.parametrize(("lengths", "kernel"), [((20, 7), "attention_ring"), ((7, 21, 3), "attention_long")])
def test_the_longest_sequence_of_a_step_chooses_how_prompts_attend(tmp_path, monkeypatch, lengths, kernel):
    monkeypatch.setattr(prefill_kernels, "SHORT_PROMPT", 20)
    sizes = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 64, "v_head_dim": 64, "rotary_dim": 64, "inner": 32}
    model = make_model(**sizes, dtype="float16", max_seq_len=64)
    engine, device = simulated(model, tmp_path)
    kernels, launch, used = list(engine.executor.plan.kernels.values()), device.driver.launch, set()

    def watch(config, function, parameters):
        used.add(kernels[function.value - 1].template)
        launch(config, function, parameters)

    device.driver.launch = watch
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.plan.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    expected = Engine(CpuExecutor(model.plan, model.weights, 256)).logits(prompts)
    for actual, wanted in zip(engine.logits(prompts), expected, strict=True):
        assert rms_ratio(actual, wanted) < 2e-3
    assert used & {"attention_ring", "attention_long", "attention_prefill"} == {kernel}


def test_a_steady_decode_step_copies_nothing_but_new_blocks(llama, tmp_path):
    engine, device = simulated(llama, tmp_path)
    for prompt in PROMPTS:
        engine.add_request(prompt, max_new_tokens=12, ignore_eos=True)
    for _ in range(4):
        engine.step()
    device.driver.copies.clear()
    replays = device.replays
    for _ in range(4):
        engine.step()
    new_blocks = 4 * llama.plan.max_batch * len(llama.plan.kv_groups)
    assert device.replays == replays + 4
    assert set(device.driver.copies) <= {new_blocks}


def test_a_step_writes_its_own_turn_alone(tmp_path):
    """A prompt in pieces, decode steps whose state is uploaded and replays that go on by themselves, with graphs
    captured in between: each leaves the results of the step before alone; rows that do not sample write nothing."""
    model = make_model(hidden=32, heads=2, kv_heads=1, head_dim=16, v_head_dim=16, inner=32, max_step_tokens=8)
    engine, device = simulated(model, tmp_path)
    told, launch = engine.executor._state.told, engine.executor.launch
    kinds = []

    def watched(batch):
        turn, replays, copies = len(kinds) % TURNS, device.replays, len(device.driver.copies)
        told[turn] = -7
        before = told.clone()
        pending = launch(batch)
        seats = [seat for seat, row in zip(pending.seats, batch.rows, strict=True) if row.sample]
        assert sorted((told != before).nonzero().tolist()) == sorted([turn, i, s] for i in (0, 1) for s in seats)
        kinds.append((device.replays > replays, len(device.driver.copies) > copies, bool(seats)))
        return pending

    engine.executor.launch = watched
    prompts = [list(range(1, 21)), *PROMPTS]
    requests = [engine.add_request(prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts[:3]]
    for _ in range(8):
        engine.step()
    engine.warm_up()
    requests.append(engine.add_request(prompts[3], max_new_tokens=12, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert set(kinds) >= {(True, False, True), (True, True, True), (False, True, True), (False, True, False)}
    expected = Engine(CpuExecutor(model.plan, model.weights, 128)).generate(prompts, max_new_tokens=12, ignore_eos=True)
    assert [request.result().tokens for request in requests] == [result.tokens for result in expected]


def test_requests_that_join_do_not_change_the_others(llama, tmp_path):
    """Sampled requests with every filter join one after another; each has the tokens that it has alone."""
    options = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.4, "min_new_tokens": 3},
    ]
    cpu = Engine(CpuExecutor(llama.plan, llama.weights, 128), eos_ids=(2,))
    expected = [cpu.generate([p], max_new_tokens=5, **o)[0].tokens for p, o in zip(PROMPTS, options, strict=True)]
    engine, _ = simulated(llama, tmp_path)
    engine.eos_ids = frozenset((2,))
    requests = []
    for prompt, option in zip(PROMPTS, options, strict=True):
        requests.append(engine.add_request(prompt, max_new_tokens=5, **option))
        engine.step()
        engine.step()
    while not all(r.done for r in requests):
        engine.step()
    assert [r.result().tokens for r in requests] == expected


def test_a_full_pool_preempts_and_loses_nothing(llama, tmp_path):
    options = {"max_new_tokens": 7, "temperature": 1.0, "repetition_penalty": 1.1, "seed": 1, "ignore_eos": True}
    expected = Engine(CpuExecutor(llama.plan, llama.weights, 128)).generate(PROMPTS, **options)
    engine, _ = simulated(llama, tmp_path)
    small = Engine(engine.executor)
    for allocator in small.scheduler.tables.allocators:
        allocator._free = allocator._free[-7:]
    actual = small.generate(PROMPTS, **options)
    assert small.counters["preemptions"] > 0
    assert [r.tokens for r in actual] == [r.tokens for r in expected]


def test_windows_and_groups(tmp_path):
    """Two KV groups with block tables of their own; the windowed one gives blocks back as it goes."""
    model = make_model(
        hidden=32, heads=2, kv_heads=1, head_dim=16, v_head_dim=16, rotary_dim=8, inner=32, windows=(0, 6)
    )
    engine, _ = simulated(model, tmp_path)
    options = {"max_new_tokens": 14, "ignore_eos": True}
    expected = Engine(CpuExecutor(model.plan, model.weights, 128)).generate(PROMPTS, **options)
    assert [r.tokens for r in engine.generate(PROMPTS, **options)] == [r.tokens for r in expected]


def test_a_step_outside_the_vocabulary_is_executed_by_torch(llama, tmp_path):
    """h = 2 * tanh(h) between the layers: bound to fewer rows for a decode step than for a prompt."""
    h = Ref("h", 0, llama.shape.hidden)
    tanh = Step("tanh", Aten("aten.tanh.default", ("in.x",)), ("fallback",), None, {"x": h}, {"y": h})
    double = Step("double", Aten("aten.mul.Tensor", ("in.x", 2.0)), ("fallback",), None, {"x": h}, {"y": h})
    steps = list(llama.plan.steps)
    steps[6:6] = [tanh, double]
    model = dataclasses.replace(llama, plan=dataclasses.replace(llama.plan, steps=tuple(steps)))
    options = {"max_new_tokens": 5, "ignore_eos": True}
    plain = Engine(CpuExecutor(llama.plan, llama.weights, 128)).generate(PROMPTS, **options)
    expected = Engine(CpuExecutor(model.plan, model.weights, 128)).generate(PROMPTS, **options)
    engine, _ = simulated(model, tmp_path)
    actual = engine.generate(PROMPTS, **options)
    assert [r.tokens for r in actual] == [r.tokens for r in expected] != [r.tokens for r in plain]


def test_truths_of_steps_outside_the_vocabulary_have_a_buffer(llama, tmp_path):
    """h = where(h > 0, h, h / 2), in three steps."""
    h, half = (Ref(name, 0, llama.shape.hidden) for name in ("h", "half"))
    truths = Ref("truths", 0, llama.shape.hidden)
    buffers = [Buffer("half", "T", llama.shape.hidden, "float32"), Buffer("truths", "T", llama.shape.hidden, "bool")]
    compared = Aten("aten.gt.Scalar", ("in.x", 0.0))
    chosen = Aten("aten.where.self", ("in.truths", "in.x", "in.half"))
    steps = list(llama.plan.steps)
    steps[6:6] = [
        Step("compared", compared, ("fallback",), None, {"x": h}, {"y": truths}),
        Step("halved", Aten("aten.mul.Tensor", ("in.x", 0.5)), ("fallback",), None, {"x": h}, {"y": half}),
        Step("chosen", chosen, ("fallback",), None, {"x": h, "half": half, "truths": truths}, {"y": h}),
    ]
    placed = assign_offsets(tuple(steps), llama.plan.buffers | {b.name: b for b in buffers})
    model = dataclasses.replace(llama, plan=dataclasses.replace(llama.plan, steps=tuple(steps), buffers=placed))
    check_plan(model.plan)
    options = {"max_new_tokens": 5, "ignore_eos": True}
    plain = Engine(CpuExecutor(llama.plan, llama.weights, 128)).generate(PROMPTS, **options)
    expected = Engine(CpuExecutor(model.plan, model.weights, 128)).generate(PROMPTS, **options)
    engine, _ = simulated(model, tmp_path)
    actual = engine.generate(PROMPTS, **options)
    assert [r.tokens for r in actual] == [r.tokens for r in expected] != [r.tokens for r in plain]


def test_hidden_states_are_those_of_the_cpu(tmp_path):
    """An encoder, its layers sharing one place in the cache; one token alone takes the kernel for decoding."""
    shape = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "rotary_dim": 16, "inner": 32}
    model = make_encoder(**shape)
    engine, _ = simulated(model, tmp_path)
    for texts in (PROMPTS, [[11], [12]]):
        expected = Engine(CpuExecutor(model.plan, model.weights)).hidden_states(texts)
        for a, b in zip(engine.hidden_states(texts), expected, strict=True):
            assert rms_ratio(a, b) < 1e-5
    assert [a.num_used for a in engine.scheduler.tables.allocators] == [0]


def test_a_gpu_without_memory_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match=r"not enough GPU memory.*needed.*free"):
        simulated(llama, tmp_path, free=RESERVED_BYTES)
