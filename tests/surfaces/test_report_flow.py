"""Edges between kernels: adjacent, passing by, entering, leaving; rails that overlap are apart."""

from __future__ import annotations

from dscompile.runtime.report_flow import ENTRY, Kernel, flow


def test_residual_passes_by() -> None:
    drawn = flow([Kernel(("h",), ("q",)), Kernel(("q",), ("a",)), Kernel(("a", "h"), ("h1",))])
    assert drawn.entering == ("h",) and drawn.leaving == ("h1",)
    assert drawn.adjacent == (("h",), ("q",), ("a",))
    assert [(e.name, e.start, e.end) for e in drawn.skips] == [("h", ENTRY, 2)]


def test_overlapping_rails_have_different_lanes() -> None:
    drawn = flow(
        [Kernel(("h",), ("q", "u")), Kernel(("q",), ("a",)), Kernel(("a",), ("b",)), Kernel(("b", "u", "h"), ())]
    )
    lanes = {e.name: e.lane for e in drawn.skips}
    assert lanes == {"u": 0, "h": 1}


def test_rails_that_follow_each_other_share_a_lane() -> None:
    kernels = [
        Kernel(("h",), ("a",)),
        Kernel(("a", "h"), ("h1",)),
        Kernel(("h1",), ("b",)),
        Kernel(("b", "h1"), ("h2",)),
    ]
    drawn = flow(kernels)
    assert [(e.name, e.lane) for e in drawn.skips] == [("h", 0), ("h1", 0)]


def test_a_name_written_again_comes_from_the_latest_writer() -> None:
    drawn = flow([Kernel(("h",), ("h",)), Kernel(("h",), ("h",)), Kernel(("h",), ())])
    assert drawn.adjacent == (("h",), ("h",), ("h",)) and drawn.skips == () and drawn.leaving == ()
