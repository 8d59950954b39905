"""What can be settled only once linears are packed, as it belongs to whole rows: static scales and GPTQ's rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, fx

from dscompile.passes.fuse.regions import fused_linear
from dscompile.passes.graph import ModelGraph
from dscompile.passes.quantize.gptq import gptq_rows
from dscompile.passes.quantize.walk import Values, leaves
from dscompile.passes.recipe import Constant, evaluate
from dscompile.passes.rule import Log
from dscompile.runtime.int8 import row_scales

INPUT_SCALE, ROUNDED = "input_scale", "rounded"
"""Roles of a region's weights: plan.Linear's input_scale [1], and the int8 values [N, K] of its weight."""
# Where there is no text to run the graph on.
ASSUMED_INPUT = torch.tensor([-4.0, 4.0])
Regions = dict[fx.Node, tuple[fx.Node, ...]]
Walk = Callable[[ModelGraph, Regions], Iterable[tuple[fx.Node, Values]]]


def scale_inputs(walk: Walk) -> Callable[[ModelGraph, Log], None]:
    """Return the pass that gives every region its input's static scale.

    walk: yields regions with the values of their inputs, window by window
    """

    def scale(graph: ModelGraph, log: Log) -> None:
        regions = _regions(graph)
        largest = {n: max(x.abs().max().item() for xs in values for x in xs) for n, values in walk(graph, regions)}
        for node, value in largest.items():
            _add(graph, node, INPUT_SCALE, row_scales(torch.tensor([[value]])))

    scale.__name__ = "scale_inputs"
    return scale


def round_weights(walk: Walk, read: Callable[[str], Tensor], directory: Path) -> Callable[[ModelGraph, Log], None]:
    """Return the pass that rounds every region's weight by GPTQ.

    read: returns checkpoint tensors by name; directory: where the integers are kept, so that memory holds one region's
    """

    def round_(graph: ModelGraph, log: Log) -> None:
        rounded = {}
        for node, values in walk(graph, _regions(graph)):
            weight = evaluate(graph.recipe(node.args[2]["weight"]), leaves(graph, read)).float()
            rounded[node] = on_disk(gptq_rows(weight, _hessian(values)), directory)
        for node, value in rounded.items():
            _add(graph, node, ROUNDED, value)

    round_.__name__ = "round_weights"
    return round_


def assume_inputs(graph: ModelGraph, regions: Regions) -> Iterable[tuple[fx.Node, Values]]:
    """A walk without a text."""
    return [(node, [(ASSUMED_INPUT,)]) for node in regions]


def _regions(graph: ModelGraph) -> Regions:
    nodes = [n for n in graph.graph.nodes if n.target is fused_linear and n.args[3].quantization is not None]
    return {n: n.args[0] for n in nodes}


def _hessian(values: Values) -> Tensor:
    """Sum of x^T x over the rows of all windows, in float64, as float32; a region's inputs lie side by side."""
    total: Tensor | float = 0.0
    for xs in values:
        x = torch.cat(xs, -1)[0].double()
        total = x.t() @ x + total
    assert isinstance(total, Tensor)
    return total.float()


def _add(graph: ModelGraph, node: fx.Node, role: str, value: Tensor) -> None:
    xs, residuals, weights, *rest = node.args
    assert isinstance(weights, dict)
    name = f"{weights['weight'].meta['weight']}:{role}"
    graph.constants[name] = value
    placeholder = graph.add_weight(name, Constant(name, tuple(value.shape)))
    node.args = (xs, residuals, weights | {role: placeholder}, *rest)


def on_disk(x: Tensor, directory: Path) -> Tensor:
    """The same tensor, mapped from a file that goes away with it."""
    path = directory / "rounded.bin"
    path.write_bytes(x.contiguous().numpy().data)
    mapped = torch.from_file(str(path), shared=False, size=x.numel(), dtype=x.dtype).view(x.shape)
    path.unlink()
    return mapped
