"""Sums of products and products named by letters become plain products of matrices, which attention is found in."""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten


def split_products(graph: fx.Graph) -> None:
    """baddbmm(c, a, b) -> beta c + alpha a b;  einsum("..ik,..jk->..ij", a, b) in any order of letters -> a b"""
    for node in list(graph.nodes):
        if node.target is _aten.baddbmm.default:
            _split_sum(graph, node)
        elif node.target is _aten.einsum.default and len(node.args[1]) == 2:
            _split_einsum(graph, node)


def _split_sum(graph: fx.Graph, node: fx.Node) -> None:
    addend, left, right = node.args
    with graph.inserting_before(node):
        product = graph.call_function(_aten.bmm.default, (left, right))
        scaled = graph.call_function(_aten.mul.Tensor, (product, node.kwargs.get("alpha", 1)))
        bias = graph.call_function(_aten.mul.Tensor, (addend, node.kwargs.get("beta", 1)))
        total = graph.call_function(_aten.add.Tensor, (scaled, bias))
    for new in (product, scaled, total):
        new.meta = dict(node.meta)
    bias.meta = dict(addend.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _split_einsum(graph: fx.Graph, node: fx.Node) -> None:
    """Each of rows, columns and summed must be one letter; the others are in both operands and the result."""
    equation, (left, right) = node.args
    inputs, _, result = equation.replace(" ", "").partition("->")
    of_left, _, of_right = inputs.partition(",")
    if not result or "." in equation or any(len(set(x)) < len(x) for x in (of_left, of_right, result)):
        return
    shared = [x for x in result if x in of_left and x in of_right]
    rows, columns = ([x for x in of if x not in shared and x in result] for of in (of_left, of_right))
    summed = [x for x in of_left if x in of_right and x not in result]
    if not len(rows) == len(columns) == len(summed) == 1 or not len(of_left) == len(of_right) == len(shared) + 2:
        return
    with graph.inserting_before(node):
        a = _permuted(graph, left, of_left, [*shared, *rows, *summed])
        b = _permuted(graph, right, of_right, [*shared, *summed, *columns])
        product = graph.call_function(_aten.matmul.default, (a, b))
        product.meta = {**node.meta, "val": a.meta["val"] @ b.meta["val"]}
        total = _permuted(graph, product, "".join([*shared, *rows, *columns]), list(result))
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _permuted(graph: fx.Graph, node: fx.Node, letters: str, wanted: list[str]) -> fx.Node:
    order = [letters.index(x) for x in wanted]
    if order == list(range(len(letters))):
        return node
    new = graph.call_function(_aten.permute.default, (node, order))
    new.meta = {**node.meta, "val": node.meta["val"].permute(order)}
    return new
