"""The commands of benchmarks/ run: tiny shapes, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from importlib import import_module
from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks.figures import JOBS, Job, chosen, run
from benchmarks.models import MODELS
from dscompile.codegen import aot


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        architectures=["LlamaForCausalLM"],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.parametrize(
    ("module", "words", "keys"),
    [
        ("decode", "--models tiny --batch 1,3 --prompt 5,9 --new 4 --repeat 1", {"ours", "peers"}),
        ("prefill", "--cases tiny:7 --repeat 1", {"prefill_ms"}),
        ("latency", "--models tiny --prompt 5 --new 4 --repeat 1", {"engine_ms", "generate_ms"}),
        (
            "cold_start",
            "--models tiny --repeat 1",
            {"process_to_first_token_s", "import_s", "load_s", "bytecode", "runs"},
        ),
        ("throughput", "--models tiny --requests 4 --repeat 1", {"output_tokens_per_second", "runs"}),
    ],
)
def test_command(module, words, keys, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", (tiny, "float32"))
    common = ["--device", "cpu", "--artifacts", str(folder), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [module, *words.split(), *common])
    import_module(f"benchmarks.{module}").main()
    result = json.loads((tmp_path / f"{module}.json").read_text())
    assert result["command"].startswith(f"python -m benchmarks.{module} --")
    assert "tiny" in result["command"] and "cpu" not in result["command"]
    (row,) = result.get("models") or result["rows"]
    assert keys <= row.keys()


def test_decode_measures_quantizations_beside_each_other(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "tiny", (tiny, "float32"))
    words = "--models tiny --batch 1 --prompt 5 --new 4 --repeat 1 --quant none,int8+head,int8+static --device cpu"
    monkeypatch.setattr(sys, "argv", ["decode", *words.split(), "--artifacts", str(folder), "--out", str(tmp_path)])
    import_module("benchmarks.decode").main()
    rows = json.loads((tmp_path / "decode.json").read_text())["models"]
    found = [(row.get("quant"), row.get("quant_lm_head"), row.get("static_activations")) for row in rows]
    assert found == [(None, None, None), ("int8", True, None), ("int8", None, True)]
    assert all(0.25 <= row["quantized_of_16_bit"] <= 0.6 for row in rows[1:])
    assert "tiny float32 int8, static activations, 5 tokens" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["decode", "--quant", "int7"])
    with pytest.raises(SystemExit):
        import_module("benchmarks.decode").main()
    assert "'int7' is none of none, int8" in capsys.readouterr().err


def test_cold_start_finds_bytecode(tmp_path, monkeypatch):
    """The first process compiles what it imports, the next one does not; the cache is gone at the end."""
    child = """
import importlib.util, json, pathlib, sys
compiled = pathlib.Path(importlib.util.cache_from_source(importlib.util.find_spec("this").origin))
with open(sys.argv[1], "a") as file:
    print(compiled.exists(), compiled, file=file)
import this
print(json.dumps([0.0] * 6))
"""
    seen = tmp_path / "seen"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr("benchmarks.cold_start.CHILD", child)
    row = import_module("benchmarks.cold_start").measure(seen, "cpu", 1)
    found, paths = zip(*(line.split() for line in seen.read_text().splitlines()), strict=True)
    assert found == ("False", "True") and len(set(paths)) == 1
    assert not Path(paths[0]).exists()
    assert row["bytecode"] == "cached" and len(row["runs"]) == 1


def test_compilations_are_timed_with_an_empty_kernel_cache(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", (tiny, "float32"))
    caches = []

    def run(command, env, **_):
        with monkeypatch.context() as here:
            here.setenv("XDG_CACHE_HOME", env["XDG_CACHE_HOME"])
            caches.append(aot._cache_dir())
        assert not caches[-1].exists()
        caches[-1].mkdir(parents=True)

    module = import_module("benchmarks.compile_time")
    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.measure("tiny", "sm_80")["seconds"] > 0
    assert len(caches) == len(set(caches)) == 2


def test_figures_survive_one_that_fails_and_end_in_time(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "tiny", (tiny, "float32"))
    monkeypatch.setattr(sys, "argv", ["figures"])
    good = "decode --models tiny --batch 1 --prompt 5 --new 4 --repeat 1 --name good"
    jobs = [Job("decode --models unheard-of", ()), Job(good, ("tiny",))]
    assert run(jobs, folder, tmp_path, "cpu", time.monotonic() + 300) == [jobs[0].command]
    assert (tmp_path / "good.json").exists()
    (tmp_path / "good.json").unlink()
    assert run(jobs, folder, tmp_path, "cpu", time.monotonic()) == []
    assert not (tmp_path / "good.json").exists()
    assert capsys.readouterr().out.count("no time left") == 2


def test_steps_are_measured_under_each_table_and_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "tiny", (tiny, "float32"))
    table = tmp_path / "taller.json"
    table.write_text('{"linear": [{"shape": [96, 32], "gated": true, "tokens": 8, "config": {}}]}')
    options = "--model tiny --layers 1 --batch 1,2 --prompt 5 --new 12 --repeat 1 --device cpu"
    command = ["steps", *options.split(), "--tables", str(table), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    import_module("benchmarks.steps").main()
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["table"] for row in rows] == ["as it is", "taller", "as it is"]
    assert all(b["decode_step_ms"] > 0 for row in rows for b in row["batches"])
    assert capsys.readouterr().out.count("batch 2") == 3


def test_figures_are_chosen_by_the_names_of_their_results():
    assert [job.command.split()[0] for job in chosen("compile_time,prefill")] == ["compile_time", "prefill"]
    assert chosen("decode-llama3-8b") != chosen("decode-llama3-8b-384")
    assert len({job.name for job in JOBS}) == len(JOBS)
    with pytest.raises(ArgumentTypeError, match="'speed' is none of decode-llama3-8b"):
        chosen("prefill,speed")


def test_figures_compile_only_what_is_not_there(tmp_path):
    command = [sys.executable, "-m", "benchmarks.figures", "--artifacts", str(tmp_path), "--jobs", "latency"]
    (tmp_path / "gptj-6b").mkdir()
    done = subprocess.run([*command, "--compile-only"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["gptj-6b"]


def test_every_figure_names_a_command_and_its_models():
    for job in JOBS:
        module, *words = job.command.split()
        assert callable(import_module(f"benchmarks.{module}").main)
        named = {part.split(":")[0] for word in words for part in word.split(",")} & set(MODELS)
        assert named <= set(job.models) or not job.models
        asked = words[words.index("--quant") + 1] if "--quant" in words else "none"
        assert asked.split(",") == list(job.quantizations) or not job.models
