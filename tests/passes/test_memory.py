"""Arena planning: living buffers never overlap, dead ones are reused."""

from dscompile.codegen.memory import assign_offsets, row_bytes
from dscompile.runtime.plan import Buffer, Norm, Ref, RowNorm, Step


def _step(name, reads, writes):
    spec = RowNorm(Norm("rms", 1e-6))
    return Step(name, spec, ("norm",), None, {r: Ref(r, 0, 4) for r in reads}, {w: Ref(w, 0, 4) for w in writes})


def test_living_buffers_do_not_overlap_and_dead_ones_are_reused():
    buffers = {n: Buffer(n, "T", cols, "float32") for n, cols in (("a", 100), ("b", 3), ("c", 64), ("d", 100))}
    steps = (_step("1", "", "a"), _step("2", "a", "b"), _step("3", "b", "c"), _step("4", "bc", "d"))
    placed = assign_offsets(steps, buffers)
    alive = [("a", "b"), ("b", "c"), ("b", "d"), ("c", "d")]
    for x, y in alive:
        first, second = sorted((placed[x], placed[y]), key=lambda b: b.offset)
        assert first.offset + row_bytes(first) <= second.offset
    assert placed["c"].offset == placed["a"].offset == 0, "a is dead when c is written"
    assert all(b.offset % 256 == 0 for b in placed.values())
