"""Attention that a model writes out, found in its traced graph and replaced by the attention node.

An attention is a product of weights [T, T] with values, whose weights depend on activations through one other product
alone, that of queries and keys. What lies between the two is not matched but evaluated; see `read_scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dscompile.passes.evaluate import NoValue, depends_on_tokens, describe, evaluate
from dscompile.passes.graph import ModelGraph
from dscompile.passes.read_scores import Scores, UnreadableScores, read_scores
from dscompile.passes.split_products import split_products

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_SDPA = _aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class _Attention:
    """operands: q, k, v as their products take them, k transposed; output: the node to replace."""

    output: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scores: Scores


def find_attentions(graph: ModelGraph) -> int:
    """Replace every hand-written attention; returns how many there were. Raises UnreadableScores for one that is not
    understood."""
    split_products(graph.graph)
    reader = _Reader(graph)
    found = [a for n in graph.graph.nodes if (a := reader.read(n)) is not None]
    for layer, attention in enumerate(found):
        _replace(graph, attention, layer)
    graph.drop_dead()
    return len(found)


def number_tokens(graph: ModelGraph) -> None:
    """Let positions number the tokens where a model counts them itself: in a row of one sequence the two are the same,
    and in a ragged batch positions are what is meant."""
    for node in list(graph.graph.nodes):
        if node.target in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step) and _counts(graph, node):
            with graph.graph.inserting_before(node):
                row = graph.graph.call_function(_aten.select.int, (graph.positions, 0, 0))
            row.meta = {**node.meta, "val": graph.positions.meta["val"][0]}
            node.replace_all_uses_with(row)
    for node in list(graph.graph.nodes):
        if node.target is _aten.embedding.default and node.meta["val"].ndim == 2:
            _embed_batch(graph, node)
    graph.drop_dead()


def _embed_batch(graph: ModelGraph, node: fx.Node) -> None:
    """Let what adds w[i] [T, D] to activations [1, T, D] add rows [1, T, D]."""
    with graph.graph.inserting_before(node):
        index = _call(graph, _aten.unsqueeze.default, (node.args[1], 0))
        batch = graph.graph.call_function(_aten.embedding.default, (node.args[0], index))
    batch.meta = {**node.meta, "val": node.meta["val"].unsqueeze(0)}
    for user in list(node.users):
        if torch.Tag.pointwise in getattr(user.target, "tags", ()) and user.meta["val"].ndim == 3:
            user.replace_input_with(node, batch)


def _counts(graph: ModelGraph, node: fx.Node) -> bool:
    """Whether a node is 0, 1, 2 ... for as many tokens as there are."""
    if node.meta["val"].dtype != torch.int64 or isinstance(node.meta["val"].shape[0], int):
        return False
    return all(torch.equal(evaluate(graph, node, _inputs(graph, n)), torch.arange(n)) for n in (1, 7, 19))


def _inputs(graph: ModelGraph, length: int) -> dict[fx.Node, Tensor]:
    """A sequence of so many tokens."""
    return {graph.tokens: torch.zeros(1, length, dtype=torch.long), graph.positions: torch.arange(length)[None]}


class _Reader:
    """Reads the attentions of one graph; layers that compute their scores alike are evaluated once."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self._activations: dict[fx.Node, bool] = {}
        self._known: dict[object, Scores] = {}

    def read(self, node: fx.Node) -> _Attention | None:
        """The attention that ends in a node, or None if none does. Raises UnreadableScores."""
        if node.target is _SDPA:
            return self._read_torchs(node)
        if node.target not in _PRODUCTS or not _is_square(node.args[0]) or not self._is_activation(node.args[0]):
            return None
        weights, v = node.args
        product, softmax = _core(weights, self._is_activation)
        scores = self._scores(
            (product, weights),
            _function(self.graph, product, softmax.args[0]),
            _function(self.graph, product, weights),
            _num_heads(product),
        )
        return _Attention(node, product.args[0], product.args[1], v, scores)

    def _read_torchs(self, node: fx.Node) -> _Attention:
        """torch's own attention: its mask is evaluated like any other's."""
        names = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        q, k, v, mask = given["q"], given["k"], given["v"], given.get("attn_mask")
        if q.meta["val"].ndim not in (3, 4):
            raise UnreadableScores("its queries are neither [1, heads, tokens, columns] nor [heads, tokens, columns]")
        if mask is not None and self._is_activation(mask):
            raise UnreadableScores("its mask depends on the tokens")
        scale = given.get("scale")
        scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale

        def scores(products: Tensor) -> Tensor:
            length = products.shape[-1]
            total = products * scale
            if given.get("is_causal"):
                total = total.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
            if mask is None:
                return total
            value = evaluate(self.graph, mask, _inputs(self.graph, length))
            value = value.reshape(value.shape[-3:]) if value.ndim > 3 else value
            return total.masked_fill(~value, -math.inf) if value.dtype == torch.bool else total + value

        num_heads = int(q.meta["val"].shape[-3])
        read = self._scores(
            (scale, bool(given.get("is_causal")), mask), scores, lambda p: scores(p).softmax(-1), num_heads
        )
        with self.graph.graph.inserting_before(node):
            k = _call(self.graph, _aten.transpose.int, (k, -1, -2))
        return _Attention(node, q, k, v, read)

    def _scores(
        self,
        key: tuple,
        scores: Callable[[Tensor], Tensor],
        weights: Callable[[Tensor], Tensor],
        num_heads: int,
    ) -> Scores:
        """key: what scores and weights are made of; of two nodes the first goes in and the last comes out."""
        *first, last = key
        given = [*_inputs(self.graph, 1), *(n for n in first if isinstance(n, fx.Node))]
        try:
            words = describe(self.graph, last, given) if isinstance(last, fx.Node) else ""
        except NoValue as error:
            raise UnreadableScores(f"its scores have a bias that is learned: {error.args[0]}") from None
        known = (words, num_heads, *(n for n in first if not isinstance(n, fx.Node)))
        if known not in self._known:
            self._known[known] = read_scores(scores, weights, num_heads, self.graph.max_seq_len)
        return self._known[known]

    def _is_activation(self, node: fx.Node) -> bool:
        return depends_on_tokens(self.graph, self._activations, node)


def _core(weights: fx.Node, is_activation: Callable[[fx.Node], bool]) -> tuple[fx.Node, fx.Node]:
    """The product of queries and keys that weights [.., T, T] come from, and the softmax between."""
    products: list[fx.Node] = []
    softmaxes: list[fx.Node] = []
    stack, seen = [weights], {weights}
    while stack:
        current = stack.pop()
        if current.target in _PRODUCTS and not _is_square(current.args[0]):
            products.append(current)
            continue
        if current.target in _SOFTMAX:
            softmaxes.append(current)
        if not _is_square(current) and not _is_of_rows(current):
            raise UnreadableScores(f"its weights depend on {current.name} ({current.target})")
        for i in current.all_input_nodes:
            if i not in seen and isinstance(i.meta.get("val"), Tensor) and is_activation(i):
                seen.add(i)
                stack.append(i)
    if len(products) != 1 or len(softmaxes) != 1:
        raise UnreadableScores(f"{len(products)} products and {len(softmaxes)} softmaxes make its weights")
    (product,), (softmax,) = products, softmaxes
    if softmax.args[1] not in (-1, softmax.meta["val"].ndim - 1):
        raise UnreadableScores("its softmax is not over the keys")
    return product, softmax


def _function(graph: ModelGraph, product: fx.Node, result: fx.Node) -> Callable[[Tensor], Tensor]:
    """What a node computes of products [H, n, n]."""
    rank = product.meta["val"].ndim

    def run(products: Tensor) -> Tensor:
        given = {product: products if rank == 3 else products[None], **_inputs(graph, products.shape[-1])}
        try:
            return evaluate(graph, result, given).reshape(products.shape)
        except RuntimeError as error:
            raise UnreadableScores(f"its scores cannot be evaluated: {' '.join(str(error).split())[:120]}") from None

    return run


def _replace(graph: ModelGraph, attention: _Attention, layer: int) -> None:
    """[.., H, T, D] operands become [1, H, T, D], and the result [1, T, H, D] what it was."""
    node, scores = attention.output, attention.scores
    with graph.graph.inserting_before(node):
        k = _call(graph, _aten.transpose.int, (attention.k, -1, -2))
        q, k, v = (
            x if x.meta["val"].ndim == 4 else _call(graph, _aten.unsqueeze.default, (x, 0))
            for x in (attention.q, k, attention.v)
        )
        args = (q, k, v, graph.positions, layer, scores.scale, scores.causal, scores.window, scores.chunk)
        alibi = None if scores.alibi is None else list(scores.alibi)
        y = _call(graph, torch.ops.dsc.attention.default, (*args, scores.softcap, None, alibi))
        y.meta |= {key: node.meta.get(key) for key in ("nn_module_stack", "stack_trace")}
        y = _call(graph, _aten.transpose.int, (y, 1, 2))
        if node.meta["val"].ndim == 3:
            y = _call(graph, _aten.squeeze.dim, (y, 0))
    node.replace_all_uses_with(y)
    graph.graph.erase_node(node)  # torch's own may draw random numbers, so that it does not count as dead


def _call(graph: ModelGraph, target: Callable, args: tuple) -> fx.Node:
    """Insert a call, with its value."""
    node = graph.graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta = {"val": target(*values)}
    return node


def _is_square(node: fx.Node) -> bool:
    """Whether a node's last two dimensions both number tokens."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 2:
        return False
    rows, columns = value.shape[-2:]
    return not isinstance(rows, int) and not isinstance(columns, int) and bool(rows == columns)


def _is_of_rows(node: fx.Node) -> bool:
    """Whether a node holds one number for each row of scores."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 2 and value.shape[-1] == 1


def _num_heads(product: fx.Node) -> int:
    value = product.meta["val"]
    if value.ndim not in (3, 4) or not isinstance(value.shape[-3], int) or (value.ndim == 4 and value.shape[0] != 1):
        raise UnreadableScores(f"its products have the shape {tuple(value.shape)}, not one row of heads")
    return int(value.shape[-3])
