"""Where activations live: which columns of which buffer hold each node of the fused graph."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear
from dscompile.passes.graph import ModelGraph
from dscompile.runtime.plan import Buffer, Ref


class Placement:
    """Buffers of a fused graph, and the columns that hold each node.

    The inputs of a linear that lie side by side along K get adjacent columns of one buffer, and the producers write
    there; the outputs of a packed linear get a buffer each. Where the first input is the end of another node's columns,
    the others go behind it.
    """

    def __init__(self, graph: ModelGraph, dtype: str) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.copies: dict[tuple[fx.Node, int], Ref] = {}
        self._dtype = dtype
        self._refs: dict[fx.Node, Ref] = {}
        for node in graph.graph.nodes:
            if node.target is fused_linear and len(node.args[0]) > 1:
                self._concatenate(node)

    def ref(self, node: fx.Node) -> Ref:
        """The columns that hold a node, placed on first use."""
        if node not in self._refs:
            if node.target is vocabulary.columns:
                source, start, stop = node.args
                parent = self.ref(source)
                self._refs[node] = Ref(parent.buffer, parent.start + start, parent.start + stop)
            else:
                rows, dtype = ("R", "float32") if _is_logits(node) else ("T", self._dtype)
                dtype = "bool" if node.meta["val"].dtype == torch.bool else dtype
                width = _width(node)
                self._refs[node] = Ref(self._buffer(node.name, rows, width, dtype), 0, width)
        return self._refs[node]

    def input_of(self, node: fx.Node) -> Ref:
        """The columns a linear reads: its one input, or all its inputs side by side."""
        xs = node.args[0]
        refs = [self.copies.get((node, i)) or self.ref(x) for i, x in enumerate(xs)]
        return Ref(refs[0].buffer, refs[0].start, refs[-1].stop)

    def _concatenate(self, node: fx.Node) -> None:
        if self._follow(*node.args[0]):
            return
        widths = [_width(x) for x in node.args[0]]
        buffer = self._buffer(f"{node.name}_in", "T", sum(widths), self._dtype)
        start = 0
        for i, (x, width) in enumerate(zip(node.args[0], widths, strict=True)):
            ref = Ref(buffer, start, start + width)
            if x in self._refs or not _writes_anywhere(x):
                self.copies[node, i] = ref
            else:
                self._refs[x] = ref
            start += width

    def _follow(self, first: fx.Node, *others: fx.Node) -> bool:
        """Place inputs behind the node whose last columns the first one is; False where that cannot be."""
        source = first.args[0] if first.target is vocabulary.columns else None
        if source is None or first.args[2] != _width(source) or source.target is not fused_linear:
            return False
        if any(x in self._refs or not _writes_anywhere(x) for x in (source, *others)):
            return False
        start = _width(source)
        buffer = self._buffer(source.name, "T", start + sum(map(_width, others)), self._dtype)
        self._refs[source] = Ref(buffer, 0, start)
        for x in others:
            self._refs[x] = Ref(buffer, start, start + _width(x))
            start += _width(x)
        return True

    def _buffer(self, name: str, rows: str, cols: int, dtype: str) -> str:
        assert name not in self.buffers, name
        self.buffers[name] = Buffer(name, rows, cols, dtype)  # type: ignore[arg-type]
        return name


def _width(node: fx.Node) -> int:
    return node.meta["val"].shape[-1]


def _writes_anywhere(node: fx.Node) -> bool:
    """Whether a node's producer can write it to columns of our choice."""
    return node.target in (fused_linear, vocabulary.attention, vocabulary.norm, operator.getitem)


def _is_logits(node: fx.Node) -> bool:
    return node.target is fused_linear and node.args[3].rows == "R"
