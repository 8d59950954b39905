"""Where a plan drops the rows that no logits are asked of, and which buffers it compacts there."""

from dscompile.passes.lower.keep_rows import place_keep_rows
from dscompile.runtime.plan import Attention, Buffer, Embed, KeepRows, Norm, Ref, RowNorm, Step

ATTENTION = Attention(1, 1, 4, 4, 0.5, 0, 0)


def _step(name, spec, reads, writes):
    return Step(name, spec, (name,), None, {r: Ref(r, 0, 4) for r in reads}, {w: Ref(w, 2, 4) for w in writes})


def _placed(*steps):
    names = {ref.buffer for s in steps for ref in (*s.inputs.values(), *s.outputs.values())}
    placed = place_keep_rows(steps, {name: Buffer(name, "T", 10, "float32") for name in names})
    (at,) = (i for i, s in enumerate(placed) if isinstance(s.spec, KeepRows))
    assert [s for s in placed if s is not placed[at]] == list(steps)
    assert all((ref.start, ref.stop) == (0, 10) for ref in placed[at].inputs.values()), "whole buffers move"
    return placed[at - 1].name, sorted(ref.buffer for ref in placed[at].inputs.values())


NORM = RowNorm(Norm("rms", 1e-6))
EMBED = _step("embed", Embed(), "", "h")


def test_behind_the_last_attention_with_what_is_read_later():
    """A residual, and what a parallel block computed ahead of the attention; not what only earlier steps read."""
    steps = (
        EMBED,
        _step("first", ATTENTION, "h", "a"),
        _step("mlp", NORM, "h", "m"),
        _step("qkv", NORM, "a", "q"),
        _step("second", ATTENTION, "q", "b"),
        _step("out", NORM, "bmh", "o"),
        _step("head", NORM, "o", "l"),
    )
    assert _placed(*steps) == ("second", ["b", "h", "m"])


def test_behind_an_embedding_that_comes_later():
    late = _step("positions", Embed(table=False, position_offset=0), "", "p")
    steps = (EMBED, _step("attention", ATTENTION, "h", "a"), late, _step("head", NORM, "ap", "l"))
    assert _placed(*steps) == ("positions", ["a", "p"])


def test_behind_the_embedding_where_nothing_attends():
    assert _placed(EMBED, _step("head", NORM, "h", "l")) == ("embed", ["h"])
