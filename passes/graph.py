"""ModelGraph: an fx graph whose weights are placeholders with recipes, at every level from traced to fused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from dscompile.passes.recipe import Constant, Recipe, Source, evaluate, shape_of


@dataclass
class ModelGraph:
    """A model as a graph.

    module: placeholders `tokens` and `positions` [1, T] int64, then one placeholder per weight; node.meta["weight"] is
        the weight's name, a key of `recipes`. Every node has meta["val"] on the meta device, T symbolic.
    recipes: how each weight is made. constants: the values of `Constant` leaves.
    is_encoder: its output is the last hidden state of every token, not logits.
    buffers: what the model's code puts into buffers that a checkpoint holds too. assumed: those whose values some pass
        relied on; a checkpoint that holds others is not this model's.
    max_seq_len: positions run from 0 to max_seq_len - 1 (tables over positions have this many rows).
    """

    module: fx.GraphModule
    recipes: dict[str, Recipe]
    constants: dict[str, Tensor] = field(default_factory=dict)
    max_seq_len: int = 0
    is_encoder: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def tokens(self) -> fx.Node:
        return self._input(0)

    @property
    def positions(self) -> fx.Node:
        return self._input(1)

    def _input(self, index: int) -> fx.Node:
        return [n for n in self.graph.nodes if n.op == "placeholder"][index]

    def add_weight(self, name: str, recipe: Recipe) -> fx.Node:
        """Return the placeholder of a weight, made from `recipe` if the graph has none of that name yet."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.meta.get("weight") == name:
                assert self.recipes[name] == recipe, f"two recipes for {name}"
                return node
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("w_" + re.sub(r"\W+", "_", name)[:80])
        node.target = node.name
        node.meta = {"weight": name, "val": torch.empty(shape_of(recipe), device="meta")}
        self.recipes[name] = recipe
        return node

    def recipe(self, node: fx.Node) -> Recipe:
        """The recipe of a weight's placeholder."""
        return self.recipes[node.meta["weight"]]

    def drop_dead(self) -> None:
        """Remove nodes without users, then weights without nodes."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and "weight" in node.meta and not node.users:
                self.graph.erase_node(node)
        alive = {n.meta["weight"] for n in self.graph.nodes if "weight" in n.meta}
        self.recipes = {name: r for name, r in self.recipes.items() if name in alive}
        self.module.recompile()

    def run(self, tokens: Tensor, positions: Tensor, read: Callable[[str], Tensor]) -> object:
        """Execute the graph as it stands; `read` returns checkpoint tensors by name."""

        def lookup(leaf: Source | Constant) -> Tensor:
            return self.constants[leaf.name] if isinstance(leaf, Constant) else read(leaf.name)

        inputs = [
            evaluate(self.recipe(n), lookup) for n in self.graph.nodes if n.op == "placeholder" and "weight" in n.meta
        ]
        with torch.no_grad():
            return fx.Interpreter(self.module).run(tokens, positions, *inputs)


def is_weight(node: object) -> bool:
    """Whether a node is a weight's placeholder."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and "weight" in node.meta
