"""Recipes: how a weight of the artifact is computed from the checkpoint, evaluated only as the checkpoint streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dscompile.runtime.errors import UserError
from dscompile.runtime.int8 import round_rows, row_scales
from dscompile.runtime.ops_aten import resolve


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor the compiler computed (rope tables, alibi slopes), by its name in `ModelGraph.constants`."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Concat:
    """The parts one after another along the first dimension."""

    parts: tuple[Recipe, ...]


@dataclass(frozen=True)
class ConcatColumns:
    """The parts side by side along the last dimension."""

    parts: tuple[Recipe, ...]


@dataclass(frozen=True)
class Transpose:
    """x with two of its dimensions exchanged, the last two unless `dims` says otherwise."""

    x: Recipe
    dims: tuple[int, int] = (-2, -1)


@dataclass(frozen=True)
class Reshape:
    """The same elements in another shape."""

    x: Recipe
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Gather:
    """Rows `index` of x, in that order."""

    x: Recipe
    index: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of x."""

    x: Recipe
    start: int
    stop: int


@dataclass(frozen=True)
class Scale:
    """x times a number, or times a vector along its last dimension."""

    x: Recipe
    by: float | Recipe


@dataclass(frozen=True)
class Add:
    """x plus a number, or a tensor of its shape or one that is broadcast to it."""

    x: Recipe
    by: float | Recipe


@dataclass(frozen=True)
class Pointwise:
    """An ATen operator ("aten.softplus.default") that works element by element, in float32 or better.

    args: recipes and numbers; shape: of the result
    """

    target: str
    args: tuple[Recipe | float | int | bool | None, ...]
    shape: tuple[int, ...]
    kwargs: tuple[tuple[str, float | int | bool | str], ...] = ()


@dataclass(frozen=True)
class MatVec:
    """The matrix w [N, K] times the vector v [K], in float64 internally."""

    w: Recipe
    v: Recipe


@dataclass(frozen=True)
class Cast:
    """x rounded to a dtype named as in torch ("float16")."""

    x: Recipe
    dtype: str


@dataclass(frozen=True)
class RowSum:
    """Sums over the last dimension of x as stored, float32. [N, K] -> [N]."""

    x: Recipe


@dataclass(frozen=True)
class ScaleRows:
    """x with row i, of whatever shape, times by[i]."""

    x: Recipe
    by: Recipe


@dataclass(frozen=True)
class Quantize:
    """The rows of x [N, K] in int8: "q" [N, K], or "scale" [N] float32, the value of one step (see runtime.int8).

    rounded: the q, where it is not to be the nearest integers
    """

    x: Recipe
    output: Literal["q", "scale"]
    rounded: Recipe | None = None


@dataclass(frozen=True)
class Zeros:
    """Zeros, where one of several packed biases is absent."""

    shape: tuple[int, ...]


Recipe = (
    Source
    | Constant
    | Concat
    | ConcatColumns
    | Transpose
    | Reshape
    | Gather
    | Slice
    | Scale
    | Add
    | Pointwise
    | MatVec
    | Cast
    | RowSum
    | ScaleRows
    | Quantize
    | Zeros
)


def operands(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipes a recipe is computed from."""
    if isinstance(recipe, Concat | ConcatColumns):
        return recipe.parts
    if isinstance(recipe, Source | Constant | Zeros):
        return ()
    if isinstance(recipe, MatVec):
        return (recipe.w, recipe.v)
    if isinstance(recipe, Pointwise):
        return tuple(a for a in recipe.args if isinstance(a, Recipe))
    by = getattr(recipe, "by", None)
    return (recipe.x,) if by is None or isinstance(by, float) else (recipe.x, by)


def sources(recipe: Recipe) -> set[str]:
    """Names of the checkpoint tensors a recipe reads."""
    if isinstance(recipe, Source):
        return {recipe.name}
    return set().union(*map(sources, operands(recipe)))


def shape_of(recipe: Recipe) -> tuple[int, ...]:
    """The shape of the tensor a recipe makes."""
    match recipe:
        case Source() | Constant() | Zeros() | Reshape() | Pointwise():
            return recipe.shape
        case Concat():
            first, *_ = shapes = [shape_of(p) for p in recipe.parts]
            return (sum(s[0] for s in shapes), *first[1:])
        case ConcatColumns():
            first, *_ = shapes = [shape_of(p) for p in recipe.parts]
            return (*first[:-1], sum(s[-1] for s in shapes))
        case Transpose():
            shape = list(shape_of(recipe.x))
            a, b = recipe.dims
            shape[a], shape[b] = shape[b], shape[a]
            return tuple(shape)
        case Gather():
            return (len(recipe.index), *shape_of(recipe.x)[1:])
        case Slice():
            return (recipe.stop - recipe.start, *shape_of(recipe.x)[1:])
        case MatVec():
            return shape_of(recipe.w)[:1]
        case RowSum() | Quantize(output="scale"):
            return shape_of(recipe.x)[:-1]
        case ScaleRows() | Quantize() | Scale() | Add() | Cast():
            return shape_of(recipe.x)
    raise TypeError(f"not a recipe: {recipe!r}")


def evaluate(recipe: Recipe, lookup: Callable[[Source | Constant], Tensor]) -> Tensor:
    """Compute a recipe's tensor. `lookup` returns the tensors of its leaves.

    Arithmetic (Scale, Add, Pointwise, MatVec) runs in float32 or better whatever the leaves' dtype; only `Cast` rounds,
    so a recipe that moves elements about is exact.
    """
    match recipe:
        case Source() | Constant():
            return lookup(recipe)
        case Zeros():
            return torch.zeros(recipe.shape)
        case Concat():
            return _join([evaluate(p, lookup) for p in recipe.parts], 0)
        case ConcatColumns():
            return _join([evaluate(p, lookup) for p in recipe.parts], -1)
        case Transpose():
            return evaluate(recipe.x, lookup).transpose(*recipe.dims).contiguous()
        case Reshape():
            return evaluate(recipe.x, lookup).reshape(recipe.shape)
        case Gather():
            return evaluate(recipe.x, lookup)[torch.tensor(recipe.index)]
        case Slice():
            return evaluate(recipe.x, lookup)[recipe.start : recipe.stop]
        case Scale():
            by = recipe.by if isinstance(recipe.by, float) else evaluate(recipe.by, lookup).float()
            return evaluate(recipe.x, lookup).float() * by
        case Add():
            by = recipe.by if isinstance(recipe.by, float) else evaluate(recipe.by, lookup).float()
            return evaluate(recipe.x, lookup).float() + by
        case Pointwise():
            args = [evaluate(a, lookup).float() if isinstance(a, Recipe) else a for a in recipe.args]
            return resolve(recipe.target)(*args, **dict(recipe.kwargs))
        case MatVec():
            w, v = evaluate(recipe.w, lookup), evaluate(recipe.v, lookup).double()
            return torch.cat([(rows.double() @ v).float() for rows in w.split(4096)])
        case Cast():
            return _rounded(recipe, lookup)
        case RowSum():
            w = evaluate(recipe.x, lookup)
            return torch.cat([rows.double().sum(-1).float() for rows in w.split(4096)])
        case ScaleRows():
            x, by = evaluate(recipe.x, lookup).float(), evaluate(recipe.by, lookup).float()
            return x * by.view(-1, *[1] * (x.ndim - 1))
        case Quantize():
            return _quantized(recipe, lookup)
    raise TypeError(f"not a recipe: {recipe!r}")


def _rounded(recipe: Cast, lookup: Callable[[Source | Constant], Tensor]) -> Tensor:
    """Round a tensor; one that is scaled first is never whole in float32, which for a head would be gigabytes."""
    dtype = getattr(torch, recipe.dtype)
    if not isinstance(recipe.x, Scale):
        return evaluate(recipe.x, lookup).to(dtype)
    x, by = evaluate(recipe.x.x, lookup), recipe.x.by
    by = by if isinstance(by, float) else evaluate(by, lookup).float()
    y = torch.empty(x.shape, dtype=dtype)
    for source, target in zip(x.split(4096), y.split(4096), strict=True) if x.ndim > 1 else [(x, y)]:
        target.copy_(source.float() * by)
    return y


def _quantized(recipe: Quantize, lookup: Callable[[Source | Constant], Tensor]) -> Tensor:
    if recipe.rounded is not None:
        return evaluate(recipe.rounded, lookup)
    x = evaluate(recipe.x, lookup).float()
    scale = row_scales(x)
    if scale.isnan().any():
        names = ", ".join(sorted(sources(recipe)))
        raise UserError(f"{names}: holds NaN or infinity, which int8 cannot express; repair the checkpoint")
    return round_rows(x, scale) if recipe.output == "q" else scale


def _join(parts: list[Tensor], dim: int) -> Tensor:
    if len({p.dtype for p in parts}) > 1:
        parts = [p.float() for p in parts]
    return torch.cat(parts, dim)
