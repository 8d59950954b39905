"""Functions of one value with numbers that a layer learned, recognised by their values where those are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.assemble import constant
from dscompile.passes.recipe import Concat, Recipe, Reshape
from dscompile.runtime.ops_linear import xielu

TOLERANCE = 1e-6
Evaluation = Callable[[dict[fx.Node, Tensor]], Tensor]


def recognise_learned(
    graph: ModelGraph, learned: Sequence[fx.Node], grid: Tensor, values_of: Evaluation
) -> tuple | None:
    """(vocabulary.activation, ("xielu", its weight alpha)) if the values on `grid` are those of xielu.

    learned: weights; values_of: the values from theirs
    """
    if any(w.meta["val"].numel() != 1 for w in learned):
        return None
    # xielu's eps shows only where it is negative.
    chosen = torch.linspace(-0.8, -0.3, len(learned), dtype=torch.float64)
    first, second = (_numbers(learned, c, grid, values_of) for c in (chosen, -(chosen.flip(0) ** 2)))
    if first is None or first != second:
        return None
    names = [n.meta["weight"] if isinstance(n, fx.Node) else str(n) for n in first]
    parts = tuple(_recipe(graph, n) for n in first)
    return vocabulary.activation, ("xielu", graph.add_weight("|".join(names), Concat(parts)))


def _numbers(
    learned: Sequence[fx.Node], chosen: Tensor, grid: Tensor, values_of: Evaluation
) -> list[fx.Node | float] | None:
    """What alpha consists of, if values that weights of the chosen values give are xielu's: weights and numbers."""
    values = values_of({w: c.view(w.meta["val"].shape) for w, c in zip(learned, chosen, strict=True)})
    if values.shape != grid.shape or not values.is_floating_point() or not torch.isfinite(values).all():
        return None
    alpha = _fitted(grid, values)
    expected = xielu(grid, alpha)
    if not bool(((values - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1.0)).all()):
        return None
    distance = (chosen - alpha[:, None]).abs()
    places = [int(d.argmin()) if d.min() < TOLERANCE else None for d in distance]
    # Nine decimals tell -1e-6 from rounding errors; + 0.0 makes -0.0 a 0.
    numbers = [round(a, 9) + 0.0 if p is None else learned[p] for a, p in zip(alpha.tolist(), places, strict=True)]
    return None if 0.0 in numbers[:2] else numbers


def _fitted(grid: Tensor, values: Tensor) -> Tensor:
    """The alpha of which values are xielu's, if they are: two points above 0 decide alpha_p and beta, one below
    alpha_n, 0 eps."""
    high, low, middle, zero = (int((grid - at).abs().argmin()) for at in (1e9, -1e9, 2.0, 0.0))
    above = grid[[high, middle]]
    alpha_p, beta = torch.linalg.solve(torch.stack([above**2, above], 1), values[[high, middle]])
    alpha_n = (values[low] - beta * grid[low]) / (torch.expm1(grid[low]) - grid[low])
    eps = torch.log1p((values[zero] - beta * grid[zero]) / alpha_n)
    return torch.stack([alpha_p, alpha_n, beta, eps])


def _recipe(graph: ModelGraph, number: fx.Node | float) -> Recipe:
    if isinstance(number, fx.Node):
        return Reshape(graph.recipe(number), (1,))
    return graph.recipe(constant(graph, "numbers", torch.tensor([number])))
