"""The rule for shapes in no table, on the shapes of the table of the GPU at hand."""

from __future__ import annotations

import pytest

from dscompile.codegen.tuned_table import TUNED

pytestmark = pytest.mark.gpu


def test_the_rule_is_within_a_tenth_of_what_was_measured(target, summary):
    """The rule knows nothing of the table, so that each of its shapes is left out."""
    from benchmarks.rule import measure_rule

    table = TUNED / f"{target}.json"
    if not table.exists():
        pytest.skip(f"no table for {target}")
    rows = measure_rule(table, processes=8)
    worst = max(rows, key=lambda row: row["ratio"])
    summary(
        f"rule over table, {len(rows)} shapes: at most {worst['ratio']:.3f}, at {worst['shape']} x {worst['tokens']}"
    )
    assert worst["ratio"] <= 1.1
