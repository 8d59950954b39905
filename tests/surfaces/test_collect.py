"""What a compilation's report says about the example model, and --require-fusion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dscompile.compiler.report import kernels_by_range, require_fusion
from dscompile.runtime.cli import main as dsrun
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Case, Launch, Program
from dscompile.runtime.report import read_report
from dscompile.runtime.report_html import render_html
from tests.surfaces.sample import full_report


def test_the_layer_of_the_example(compiled: Path) -> None:
    report = read_report(compiled)
    (layers, outside) = report.classes
    assert layers.layers == (0, 1, 2, 3) and layers.count == 4
    flow = {r.name: (r.inputs, r.outputs) for r in layers.regions}
    assert flow == {
        "attn_in": (("hidden",), ("q", "k", "v")),
        "attention": (("q", "k", "v"), ("context",)),
        "attn_out": (("context", "hidden"), ("hidden 1",)),
        "mlp_in": (("hidden 1",), ("act",)),
        "mlp_out": (("act", "hidden 1"), ("hidden 2",)),
    }
    ops = {r.name: [node.op for node in r.nodes] for r in layers.regions}
    assert ops["attn_in"] == ["norm", "linear", "linear", "linear"]
    assert ops["attention"] == ["rope", "rope", "append", "attention"]
    assert [r.name for r in outside.regions] == ["embed", "head", "sample"]
    assert report.fallbacks == ()
    assert report.verification.status == "passed" and report.verification.kernels == "not executed"


def test_bytes_saved_are_rows_written_and_read_again(compiled: Path) -> None:
    """attn_in keeps the normalised row of 128 float32 to itself and more; rotation keeps q (128) and k (64)."""
    saved = {r.name: r.bytes_saved for r in read_report(compiled).classes[0].regions}
    assert saved["attention"] == 2 * 4 * (128 + 64)
    assert saved["attn_out"] == saved["mlp_out"] == 2 * 4 * 128
    assert saved["mlp_in"] >= 2 * 4 * (128 + 2 * 384)


def test_report_commands(compiled: Path, tmp_path: Path, capsys) -> None:
    assert dsrun(["report", str(compiled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((compiled / "report.json").read_text())
    page = tmp_path / "page.html"
    assert dsrun(["report", str(compiled), "--html", str(page)]) == 0
    assert page.read_text() == (compiled / "report.html").read_text() == render_html(read_report(compiled))
    assert dsrun(["report", str(compiled)]) == 0
    assert "attn_in" in capsys.readouterr().out


def test_other_commands_print_json_and_nothing_else(compiled: Path, capsys) -> None:
    assert dsrun(["info", str(compiled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "LlamaForCausalLM"
    assert dsrun(["verify", str(compiled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "passed"
    assert dsrun(["generate", str(compiled), "-p", "def", "--tokens", "5"]) == 2
    capsys.readouterr()
    assert dsrun(["generate", str(compiled), "-p", "def", "-p", "class", "--max-new-tokens", "4", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["prompt"] for r in results] == ["def", "class"] and all(len(r["tokens"]) == 4 for r in results)
    arguments = ["bench", str(compiled), "--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1", "--json"]
    assert dsrun([*arguments, "--batch", "1,3"]) == 0
    batches = json.loads(capsys.readouterr().out)["batches"]
    assert [b["batch"] for b in batches] == [1, 3] and all(b["decode_step_ms"] > 0 for b in batches)


def test_streaming_prints_what_generating_prints(compiled: Path, capsys) -> None:
    arguments = ["generate", str(compiled), "-p", "The function", "--max-new-tokens", "12"]
    assert dsrun(arguments) == 0
    whole = capsys.readouterr().out
    assert dsrun([*arguments, "--stream"]) == 0
    assert capsys.readouterr().out == whole


def test_required_regions() -> None:
    report = full_report()
    require_fusion(report, ("attention", "mlp_in", "embed", "head"))
    with pytest.raises(
        UserError, match=r"--require-fusion moe: layer 0 has no such region; residual_into_norm at add:"
    ):
        require_fusion(report, ("moe",))
    first, second, outside = report.classes
    regions = tuple(r for r in second.regions if r.name != "mlp_out")
    lacking = dataclasses.replace(report, classes=(first, dataclasses.replace(second, regions=regions), outside))
    with pytest.raises(UserError, match="--require-fusion mlp_out: layer 28 has no such region"):
        require_fusion(lacking, ("mlp_out",))


def test_ranges_of_tokens() -> None:
    def case(low: int, high: int, *targets: str, decode: bool | None = None) -> Case:
        return Case(low, high, tuple(Launch("kernel", t, ()) for t in targets), decode)

    plain = Program((case(1, 1, "row"), case(2, 16, "tile"), case(17, 0, "norm", "mm")))
    assert kernels_by_range(plain) == {"1": ("row",), "2-16": ("tile",), "17+": ("norm", "mm")}
    mixed = Program((case(1, 4, "small", decode=True), case(5, 0, "large", decode=True), case(1, 0, "append", "flash")))
    assert kernels_by_range(mixed) == {"1-4": ("small",), "5+": ("large",), "prefill": ("append", "flash")}
    launch = {name: (Launch("kernel", name, ()),) for name in ("brief", "long")}
    by_context = Program((Case(1, 1, launch["brief"], True, max_context=257), Case(1, 1, launch["long"], True)))
    assert kernels_by_range(by_context) == {"1, context to 257": ("brief",), "1": ("long",)}
