"""Operators that are others under another name, or with the shape of a second tensor, become those."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

ALIASES = {
    _aten.__and__.Scalar: _aten.bitwise_and.Scalar,
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.absolute.default: _aten.abs.default,
    _aten.clip.default: _aten.clamp.default,
    _aten.concat.default: _aten.cat.default,
    _aten.concatenate.default: _aten.cat.default,
    _aten.divide.Scalar: _aten.div.Scalar,
    _aten.divide.Tensor: _aten.div.Tensor,
    _aten.greater.Scalar: _aten.gt.Scalar,
    _aten.greater.Tensor: _aten.gt.Tensor,
    _aten.greater_equal.Scalar: _aten.ge.Scalar,
    _aten.greater_equal.Tensor: _aten.ge.Tensor,
    _aten.less.Scalar: _aten.lt.Scalar,
    _aten.less.Tensor: _aten.lt.Tensor,
    _aten.less_equal.Scalar: _aten.le.Scalar,
    _aten.less_equal.Tensor: _aten.le.Tensor,
    _aten.max.other: _aten.maximum.default,
    _aten.min.other: _aten.minimum.default,
    _aten.multiply.Scalar: _aten.mul.Scalar,
    _aten.multiply.Tensor: _aten.mul.Tensor,
    _aten.negative.default: _aten.neg.default,
    _aten.special_erf.default: _aten.erf.default,
    _aten.special_expit.default: _aten.sigmoid.default,
    _aten.special_expm1.default: _aten.expm1.default,
    _aten.subtract.Scalar: _aten.sub.Scalar,
    _aten.subtract.Tensor: _aten.sub.Tensor,
    _aten.swapaxes.default: _aten.transpose.int,
    _aten.swapdims.default: _aten.transpose.int,
    _aten.true_divide.Scalar: _aten.div.Scalar,
    _aten.true_divide.Tensor: _aten.div.Tensor,
}
OF_ANOTHERS_SHAPE = {
    _aten.expand_as.default: _aten.expand.default,
    _aten.reshape_as.default: _aten.reshape.default,
    _aten.view_as.default: _aten.reshape.default,
}


def rename_aliases(graph: fx.Graph) -> None:
    """multiply(x, y) -> mul(x, y), reshape_as(x, y) -> reshape(x, y.shape), and so on.

    Where prelu has a weight for each of several channels, those are the second dimension, in which the tokens are.
    """
    for node in graph.nodes:
        if node.target in ALIASES:
            node.target = ALIASES[node.target]
        elif node.target is _aten.prelu.default and node.args[1].meta["val"].numel() == 1:
            node.target = _aten._prelu_kernel.default
        elif node.target in OF_ANOTHERS_SHAPE:
            source, other = node.args
            node.target = OF_ANOTHERS_SHAPE[node.target]
            node.args = (source, _shape(graph, node, other))


def _shape(graph: fx.Graph, node: fx.Node, other: fx.Node) -> list[int | fx.Node]:
    """The sizes of a tensor: numbers, and nodes for those that depend on the tokens."""
    value: Tensor = other.meta["val"]
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(value.shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        with graph.inserting_before(node):
            symbol = graph.call_function(_aten.sym_size.int, (other, dim))
        symbol.meta = {"val": size}
        sizes.append(symbol)
    return sizes
