"""The tables of the pages are those of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

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
