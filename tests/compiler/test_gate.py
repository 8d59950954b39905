"""The gate passes what agrees with the original, and fails artifacts that are wrong in the ways that matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from dscompile.compiler import compile as compile_module
from dscompile.compiler.compile import compile_model
from dscompile.compiler.verify import verify_against
from dscompile.passes.recipe import Scale
from dscompile.runtime.errors import VerificationError
from dscompile.runtime.plan import Attention, Embed
from tests.compiler.tiny import OPTIONS, save_model


def test_an_artifact_can_be_compared_again(tmp_path):
    save_model("llama", tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", verify=False, **OPTIONS)
    assert verify_against(tmp_path / "out", tmp_path / "model").status == "passed"
    save_model("llama", tmp_path / "other", seed=1)
    assert verify_against(tmp_path / "out", tmp_path / "other").status == "failed"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_held_to_the_error_of_eager(dtype, tmp_path):
    save_model("llama", tmp_path / "model", getattr(torch, dtype))
    report = compile_model(tmp_path / "model", tmp_path / "out", dtype=dtype, **OPTIONS)
    prefill = report.verification.checks[0]
    assert report.verification.status == "passed"
    assert 1e-5 < prefill.limit < 5e-2, "the limit is 1.5 times a rounding error"


def _change_specs(kind: type, **changes: object) -> Callable:
    """Change fields of every step of a kind in layer 0 (or outside the layers)."""

    def mutate(lowered):
        steps = tuple(
            dataclasses.replace(s, spec=dataclasses.replace(s.spec, **changes))
            if isinstance(s.spec, kind) and not s.layer
            else s
            for s in lowered.plan.steps
        )
        assert steps != lowered.plan.steps
        return dataclasses.replace(lowered, plan=dataclasses.replace(lowered.plan, steps=steps))

    return mutate


def _swap_q_and_k(lowered):
    def swapped(step):
        if not isinstance(step.spec, Attention) or step.layer:
            return step
        return dataclasses.replace(step, inputs={**step.inputs, "q": step.inputs["k"], "k": step.inputs["q"]})

    steps = tuple(map(swapped, lowered.plan.steps))
    assert steps != lowered.plan.steps
    return dataclasses.replace(lowered, plan=dataclasses.replace(lowered.plan, steps=steps))


def _drop_the_window(lowered):
    mutated = _change_specs(Attention, window=0)(lowered)
    steps = tuple(
        dataclasses.replace(s, spec=dataclasses.replace(s.spec, window=0)) if isinstance(s.spec, Attention) else s
        for s in mutated.plan.steps
    )
    groups = tuple(dataclasses.replace(group, window=0) for group in mutated.plan.kv_groups)
    return dataclasses.replace(mutated, plan=dataclasses.replace(mutated.plan, steps=steps, kv_groups=groups))


def _scale_one_layer(lowered):
    name = next(s.weights["weight"] for s in lowered.plan.steps if s.layer == 1 and "mlp_out" in s.regions)
    recipes = {**lowered.recipes, name: Scale(lowered.recipes[name], 1.05)}
    return dataclasses.replace(lowered, recipes=recipes)


MUTATIONS = {
    "drop the mask": ("gpt2", _change_specs(Attention, causal=False)),
    "drop the window": ("mistral", _drop_the_window),
    "swap q and k": ("gpt2", _swap_q_and_k),
    "shift positions by one": ("gpt2", _change_specs(Embed, position_offset=1)),
    "scale one layer": ("gpt2", _scale_one_layer),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutants_fail_the_gate(mutation, dtype, tmp_path, monkeypatch):
    name, mutate = MUTATIONS[mutation]
    save_model(name, tmp_path / "model", getattr(torch, dtype))
    lower = compile_module.lower
    monkeypatch.setattr(compile_module, "lower", lambda *args: mutate(lower(*args)))
    with pytest.raises(VerificationError, match=r"does not compute what .* computes: .*prefill"):
        compile_model(tmp_path / "model", tmp_path / "out", dtype=dtype, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "no artifact, and nothing half-written"


def test_a_decode_path_that_differs_from_prefill_fails(tmp_path, monkeypatch):
    """Only decode is wrong: the cache loses the newest key before every step of one token."""
    save_model("llama", tmp_path / "model")
    from dscompile.runtime.cpu_executor import CpuExecutor

    inputs = CpuExecutor._step_inputs

    def forgetful(self, batch):
        step = inputs(self, batch)
        if all(row.num_tokens == 1 for row in batch.rows):
            step.slots = [torch.full_like(slots, -1) for slots in step.slots]
        return step

    monkeypatch.setattr(CpuExecutor, "_step_inputs", forgetful)
    with pytest.raises(VerificationError, match="decode"):
        compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)


def test_dummy_weights_are_verified_through_a_stand_in(tmp_path):
    save_model("gpt2", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    report = compile_model(tmp_path / "model", tmp_path / "out", dummy_weights=True, **OPTIONS)
    assert report.verification.status == "passed"
    assert "stand-in" in report.verification.model and "dummies" in report.verification.model
    assert not list((tmp_path / "out").glob("stand-in*"))


def test_a_model_too_large_for_memory_is_verified_through_a_stand_in(tmp_path, monkeypatch):
    save_model("gpt2", tmp_path / "model")
    monkeypatch.setattr("dscompile.compiler.stand_in.available_bytes", lambda: 1000)
    monkeypatch.setattr("dscompile.compiler.stand_in.SMALL_VOCABULARY", 50)
    report = compile_model(tmp_path / "model", tmp_path / "out", **OPTIONS)
    assert report.verification.status == "passed"
    assert "GiB of memory" in report.verification.model


def test_a_stand_in_holds_every_layer_class():
    from dscompile.compiler.stand_in import shrink
    from tests.compiler.tiny import CONFIGS, make_config

    config = make_config(CONFIGS["gemma2"])
    config.num_hidden_layers, config.layer_types = 6, ["sliding_attention", "full_attention"] * 3
    small = shrink(config, 3)
    assert small.num_hidden_layers == 3
    assert small.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 6
