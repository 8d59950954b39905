"""Recipes: shapes agree with values, arithmetic is exact where it only moves elements."""

import pytest
import torch

from dscompile.passes import recipe as r
from dscompile.runtime.int8 import quantize_rows

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
V = torch.randn(4, generator=torch.Generator().manual_seed(1))
w, v = r.Source("w", (6, 4)), r.Source("v", (4,))


@pytest.mark.parametrize(
    "recipe, expected",
    [
        (r.Concat((w, w)), torch.cat([W, W])),
        (r.ConcatColumns((w, w)), torch.cat([W, W], 1)),
        (r.Transpose(w), W.T),
        (r.Reshape(w, (4, 6)), W.reshape(4, 6)),
        (r.Gather(w, (5, 0)), W[[5, 0]]),
        (r.Slice(w, 1, 3), W[1:3]),
        (r.Scale(w, 2.0), W * 2),
        (r.Scale(w, v), W * V),
        (r.Add(v, 1.0), V + 1),
        (r.Add(v, v), V + V),
        (r.MatVec(w, v), (W.double() @ V.double()).float()),
        (r.Cast(w, "float16"), W.half()),
        (r.RowSum(r.Cast(w, "float16")), W.half().double().sum(1).float()),
        (r.ScaleRows(w, r.Slice(r.Concat((v, v)), 0, 6)), W * torch.cat([V, V])[:6, None]),
        (r.Quantize(w, "q"), quantize_rows(W)[0]),
        (r.Quantize(w, "scale"), W.abs().amax(1) / 127),
        (r.Zeros((3,)), torch.zeros(3)),
    ],
)
def test_values_and_shapes(recipe, expected):
    actual = r.evaluate(recipe, lambda leaf: {"w": W, "v": V}[leaf.name])
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype
    assert r.shape_of(recipe) == tuple(expected.shape)


def test_sources_are_found_at_any_depth():
    assert r.sources(r.Cast(r.Add(r.MatVec(w, v), r.Constant("c", (6,))), "float16")) == {"w", "v"}
