"""The tables of the pages are those of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plot import by_model, series
from benchmarks.summary import TABLES, fill

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert fill(text) == text, "run python -m benchmarks.summary README.md docs/performance.md"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_results_is_a_head(name, tmp_path):
    assert len(TABLES[name](tmp_path)) == 2


def _row(model: str, elapsed: float, **more) -> dict:
    batch = {"batch": 1, "decode_step_ms": elapsed, "bytes_per_step": 4e9}
    return {"model": model, "ours": [{"prompt_tokens": 128, "read_bandwidth": 4e12, "batches": [batch]}], **more}


def test_a_panel_has_one_model_and_its_quantization():
    run = {"models": [_row("a", 2.0), _row("a", 1.0, quant_lm_head=True), _row("b", 3.0)]}
    panels = [series(rows, {("b", 128, 1, "eager"): 9.0}) for rows in by_model([run, {"models": [_row("a", 4.0)]}])]
    assert [panel["ours"] for panel in panels] == [[(1, 2.0)], [(1, 3.0)], [(1, 4.0)]]
    assert [panel.get("int8") for panel in panels] == [[(1, 1.0)], None, None]
    assert panels[0]["floor"] == [(1, 1.0)] and panels[1]["eager"] == [(1, 9.0)]
