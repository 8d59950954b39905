"""Times of kernels become times of regions."""

from __future__ import annotations

from dscompile.compiler.measure import with_times
from dscompile.runtime.bench import added_times
from tests.surfaces.sample import full_report


def test_a_region_has_the_sum_of_its_launches_or_nothing() -> None:
    report = full_report()
    regions = report.classes[0].regions
    (first,) = regions[0].kernels["1"]
    timed = with_times(report, {first: 7.125}).classes[0].regions
    assert timed[0].time_us == {"1": 7.12}
    assert [r.time_us for r in timed[1:]] == [r.time_us for r in regions[1:]]


def test_kernels_that_overlap_share_the_time_line() -> None:
    spans = [("a", 0.0, 10.0), ("b", 4.0, 13.0), ("c", 5.0, 6.0), ("a", 12.0, 20.0)]
    assert added_times(spans) == {"a": (2, 17.0), "b": (1, 3.0), "c": (1, 0.0)}
