"""The plan's weights: one entry per distinct recipe, rounded to the dtype its role asks for."""

from __future__ import annotations

from torch import fx

from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Cast, Constant, Quantize, Recipe, RowSum, shape_of
from dscompile.runtime.plan import Weight

FLOAT32_ROLES = {"rope_cos", "rope_sin", "alibi_slopes", "sinks", "correction", "input_scale", "alpha"}
# How dummy weights are made by role; a norm's weight is ones and its bias zeros.
INITIAL = dict.fromkeys(("weight", "table", "positions_table", "bias", "gate_up", "down"), "normal:0.02") | {
    "correction": "zeros"
}
# Integers of -127..127 have a deviation of 73.3: times this it is that of other weights.
INITIAL_SCALE = f"fill:{0.02 / 73.3:.3g}"


class WeightTable:
    """Names and recipes of the plan's weights; equal recipes share one weight (tied embeddings, rotary tables)."""

    def __init__(self, graph: ModelGraph, dtype: str) -> None:
        self.recipes: dict[str, Recipe] = {}
        self.weights: dict[str, Weight] = {}
        self._graph = graph
        self._dtype = dtype
        self._names: dict[Recipe, str] = {}

    def add(self, step: str, role: str, node: fx.Node) -> str:
        """Return the name of the weight that a step's role reads."""
        dtype = "float32" if role in FLOAT32_ROLES else self._dtype
        source = self._graph.recipe(node)
        recipe = Cast(source, dtype)
        initial = "" if isinstance(source, Constant) else INITIAL.get(role, "zeros" if "bias" in role else "ones")
        return self._add(f"{step}.{role}", recipe, dtype, initial)

    def add_int8(self, step: str, node: fx.Node, rounded: fx.Node | None) -> dict[str, str]:
        """The names of the two weights that hold a quantized linear's: by role, weight and weight_scale.

        rounded: its integers, if they are not to be the nearest
        """
        source = self._graph.recipe(node)
        q = Quantize(source, "q", self._graph.recipe(rounded) if rounded else None)
        return {
            "weight": self._add(f"{step}.weight", q, "int8", "int8"),
            "weight_scale": self._add(f"{step}.weight_scale", Quantize(source, "scale"), "float32", INITIAL_SCALE),
        }

    def add_row_sum(self, step: str, weight: str) -> str:
        """Return the name of the float32 row sums of a weight as stored."""
        return self._add(f"{step}.row_sum", RowSum(self.recipes[weight]), "float32", f"row_sum:{weight}")

    def _add(self, name: str, recipe: Recipe, dtype: str, initial: str) -> str:
        if recipe not in self._names:
            self._names[recipe] = name
            self.recipes[name] = recipe
            self.weights[name] = Weight(shape_of(recipe), dtype, initial)
        return self._names[recipe]
