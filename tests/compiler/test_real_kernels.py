"""The plans of the three small models this project is measured on, with every kernel compiled for two architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BloomConfig, GPTJConfig, LlamaConfig

from dscompile.codegen.targets import shared_limit
from dscompile.compiler import compile_model
from dscompile.runtime.artifact import open_artifact

TARGETS = ("sm_80", "sm_90")
MODELS = {
    "nano-llama": lambda: LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    "small-gptj": lambda: GPTJConfig(
        vocab_size=8192, n_embd=256, n_layer=5, n_head=4, rotary_dim=32, tie_word_embeddings=False
    ),
    "small-bloom": lambda: BloomConfig(vocab_size=8192, hidden_size=256, n_layer=7, n_head=4),
}


def build(name: str, directory: Path, **more) -> Path:
    """Compile a model's shapes, for both targets unless told otherwise; returns the artifact."""
    MODELS[name]().save_pretrained(directory / "model")
    options = {
        "dtype": "float16",
        "target": ",".join(TARGETS),
        "dummy_weights": "generated",
        "verify": False,
    } | more
    compile_model(directory / "model", directory / "artifact", **options)
    return directory / "artifact"


CASES = {name: (name, {}) for name in MODELS} | {
    "nano-llama int8": ("nano-llama", {"quant": "int8", "quant_lm_head": True}),
    "small-gptj int8": ("small-gptj", {"quant": "int8"}),
    "small-bloom int8-weight-only": ("small-bloom", {"quant": "int8-weight-only", "quant_lm_head": True}),
    "nano-llama on Hopper alone": ("nano-llama", {"target": "sm_90"}),
    "small-bloom on Hopper alone": ("small-bloom", {"target": "sm_90"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_compiles_and_fits(case, tmp_path):
    name, more = CASES[case]
    artifact = build(name, tmp_path, **more)
    manifest, plan = open_artifact(artifact)
    launched = {
        launch.target
        for program in plan.programs.values()
        for case in program.cases
        for launch in case.launches
        if launch.kind == "kernel"
    }
    assert launched <= plan.kernels.keys()
    for kernel in plan.kernels.values():
        assert set(kernel.cubins) == set(more.get("target", ",".join(TARGETS)).split(","))
        for target, cubin in kernel.cubins.items():
            assert (artifact / cubin.file).read_bytes()[:4] == b"\x7fELF"
            assert cubin.shared <= shared_limit([target])
    few = [c for s in plan.steps if s.program for c in plan.programs[s.program].cases if c.min_tokens <= 16]
    assert all(launch.kind == "kernel" for case in few for launch in case.launches), "a library launch for T <= 16"
    assert any(k.template == "linear_ring" for k in plan.kernels.values()) == ("target" in more)
    assert manifest.files.keys() >= {c.file for k in plan.kernels.values() for c in k.cubins.values()}


def test_plans_and_cubins_are_the_same_bytes_in_another_directory(tmp_path, monkeypatch):
    artifacts = []
    for place in ("a", "b/deeper"):
        directory = tmp_path / place
        directory.mkdir(parents=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        artifacts.append(build("nano-llama", directory))
    first, second = artifacts
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert any(n.suffix == ".cubin" for n in names)
    for name in names:
        if name.name == "plan.json" or name.suffix in (".cubin", ".py"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    manifests = [json.loads((a / "manifest.json").read_text())["files"] for a in artifacts]
    assert manifests[0].keys() == manifests[1].keys()
