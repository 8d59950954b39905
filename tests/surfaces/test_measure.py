"""Times of kernels become times of regions."""

from __future__ import annotations

from dscompile.compiler.measure import with_times
from tests.surfaces.sample import full_report


def test_a_region_has_the_sum_of_its_launches_or_nothing() -> None:
    report = full_report()
    regions = report.classes[0].regions
    (first,) = regions[0].kernels["1"]
    timed = with_times(report, {first: 7.125}).classes[0].regions
    assert timed[0].time_us == {"1": 7.12}
    assert [r.time_us for r in timed[1:]] == [r.time_us for r in regions[1:]]
