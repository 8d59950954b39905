"""The report: its JSON, its text, its page."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dscompile.runtime.errors import UserError
from dscompile.runtime.report import Region, Report, read_report
from dscompile.runtime.report_html import render_html
from dscompile.runtime.report_text import (
    accuracy_lines,
    format_bytes,
    launches_by_range,
    layer_ranges,
    print_report,
    summary_lines,
)
from tests.surfaces.sample import full_report, least_report


def text_of(report: Report) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_report(report, console)
    return console.file.getvalue()


@pytest.mark.parametrize("report", [full_report(), least_report()], ids=["full", "least"])
def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_short_contexts_are_named_where_they_take_another_number_of_launches() -> None:
    kernels = {"1, context to 257": ("short",), "1": ("long",), "2+": ("long",)}
    assert launches_by_range(Region("attention", "", kernels=kernels)) == [("1+", 1)]
    kernels["1, context to 257"] = ("short", "more")
    assert launches_by_range(Region("attention", "", kernels=kernels)) == [("1, context to 257", 2), ("1+", 1)]


def test_json_has_the_promised_keys() -> None:
    data = full_report().to_json()
    assert {"classes", "fallbacks", "verification", "quantization"} <= data.keys()
    for layer_class in data["classes"]:
        assert {"count", "layers", "regions", "near_misses"} <= layer_class.keys()
        for region in layer_class["regions"]:
            assert {"name", "rule", "nodes", "kernels", "bytes_saved", "time_us"} <= region.keys()
        for miss in layer_class["near_misses"]:
            assert miss.keys() == {"rule", "node", "reason"}
    assert data["fallbacks"][0].keys() == {"node", "op", "reason"}


def test_text_holds_every_region_miss_fallback_and_figure() -> None:
    report = full_report()
    text = " ".join(text_of(report).split())
    for layer_class in report.classes:
        for names, region in layer_class.steps():
            assert " + ".join(names) in text
            assert format_bytes(region.bytes_saved) in text or not region.bytes_saved
        for miss in layer_class.near_misses:
            assert miss.node in text and miss.reason in text
    assert "aten.clamp.default" in text
    assert "1: 1 2+: 2" in text
    assert "6.10e-04" in text and "9.20e-04" in text


def test_a_packed_region_is_counted_once() -> None:
    report = full_report()
    packed = report.classes[1]
    assert [names for names, _ in packed.steps()] == [("attn_in", "mlp_in"), ("attention",), ("attn_out", "mlp_out")]
    llama = 28 * (49152 + 20480 + 16384 + 180224 + 16384)
    assert report.bytes_saved() == llama + 4 * (98304 + 32768 + 49152) + 16384


def test_summary_counts() -> None:
    assert summary_lines(full_report()) == [
        "32 layers in 2 classes, 5 regions per layer",
        "2 near misses, 1 fallback, 8.2 MiB of activation traffic saved per token",
    ]


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({}, None),
        ({"scheme": "int8", "kv_dtype": "int8"}, "Accuracy of int8 and an int8 cache not measured: there is no text"),
        (
            {
                "scheme": "none",
                "kv_dtype": "int8",
                "perplexity_before": 10.5023,
                "perplexity_after": 10.5233,
                "increase_percent": 0.2,
                "max_increase_percent": 1.0,
            },
            "Perplexity 10.50 -> 10.52 with an int8 cache: +0.20 % (limit 1 %)",
        ),
    ],
)
def test_what_quantization_costs_is_one_sentence(facts: dict, line: str | None) -> None:
    report = dataclasses.replace(full_report(), quantization=facts)
    assert accuracy_lines(report) == ([line] if line else [])


def test_layer_ranges() -> None:
    assert layer_ranges((3, 0, 1, 2, 5, 8, 9)) == "0-3, 5, 8-9"


class Page(HTMLParser):
    """Collects text and every address the page would load."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("report", [full_report(), least_report()], ids=["full", "least"])
def test_page_is_self_contained_and_well_formed(report: Report) -> None:
    html = render_html(report)
    page = Page(html)
    assert page.loads == []
    assert page.open == []
    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)


def test_page_holds_every_region_node_miss_and_figure() -> None:
    report = full_report()
    words = " ".join(" ".join(Page(render_html(report)).words).split())
    for layer_class in report.classes:
        for region in layer_class.regions:
            assert region.name in words and region.rule in words
            assert all(node.name in words for node in region.nodes)
            assert all(kernel in words for kernels in region.kernels.values() for kernel in kernels)
        assert all(miss.reason in words for miss in layer_class.near_misses)
    assert report.fallbacks[0].reason in words
    assert all(check.name in words for check in report.verification.checks)


QUANTIZATION = {
    "scheme": "int8",
    "increase_percent": 0.12,
    "kv_dtype": "int8",
    "linears": [{"weight": "layers.0.<b>", "sqnr_db": 31.25, "exponent": 0.5}],
    "kept": [{"weight": "layers.1.<i>", "sqnr_db": 12.75, "exponent": 0.0}],
    "kept_because": "perplexity grew by 1.90 % with none kept",
}


def test_quantization_is_shown() -> None:
    report = dataclasses.replace(full_report(), quantization=QUANTIZATION)
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120))
    page = Page(render_html(report))
    for words in (" ".join(stream.getvalue().split()), " ".join(" ".join(page.words).split())):
        assert "increase percent 0.12" in words and "kv dtype int8" in words
        assert "kept as" in words and "layers.1.<i>" in words and "12.8 dB" in words and "by 1.90 %" in words
        assert "layers.0.<b>" in words and "31.2 dB" in words
    assert page.open == []


def test_page_escapes_names() -> None:
    data = full_report().to_json()
    data["model"]["name"] = "<script>alert(1)</script>"
    data["classes"][0]["regions"][0]["nodes"][0]["name"] = '"><img src=x>'
    html = render_html(Report.from_json(data))
    assert "<script" not in html and "<img" not in html


def test_reading_a_report_refuses_in_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no report\.json"):
        read_report(tmp_path)
    for broken in ("{", "[]", '{"classes": 3}', '{"classes": [{}], "fallbacks": []}'):
        (tmp_path / "report.json").write_text(broken)
        with pytest.raises(UserError, match="not a report"):
            read_report(tmp_path)
