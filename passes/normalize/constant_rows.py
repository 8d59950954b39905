"""A look-up of the same row for every token moves into the table of another look-up that it is added to.

x[tokens] + c[0] + p[positions]  =  x[tokens] + (p + c[0])[positions]
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import NoValue, evaluate
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Add, Slice
from dscompile.passes.rule import Log, Rule, apply_rule

aten = torch.ops.aten
LOOK_UPS = (vocabulary.position_embedding, vocabulary.embedding)


def _pattern(graph: ModelGraph, node: fx.Node) -> tuple[fx.Node, int] | None:
    """(look-up, row): an embedding, added to something, whose index is the same number whatever the tokens."""
    if node.target is not aten.embedding.default or not is_weight(node.args[0]):
        return None
    probes = [(torch.arange(7)[None], torch.arange(7)[None]), (torch.ones(1, 7).long(), torch.arange(9, 16)[None])]
    try:
        found = [evaluate(graph, node.args[1], {graph.tokens: t, graph.positions: p}) for t, p in probes]
    except NoValue:
        return None
    rows = torch.cat([f.flatten() for f in found])
    return (node, int(rows[0])) if bool((rows == rows[0]).all()) else None


def _check(graph: ModelGraph, match: tuple[fx.Node, int]) -> str | None:
    node, _ = match
    if len(node.users) != 1 or next(iter(node.users)).target is not aten.add.Tensor:
        return f"{node.name} is not one term of a sum"
    look_up = _look_up_beside(node)
    if look_up is None:
        return f"{node.name} is added to no look-up of tokens or positions"
    return f"{look_up.name} is also read elsewhere" if len(look_up.users) > 1 else None


def _look_up_beside(node: fx.Node) -> fx.Node | None:
    """Another term of the node's sum that is a look-up, one by position if there is one."""
    terms, current = [], node
    while len(current.users) == 1 and next(iter(current.users)).target is aten.add.Tensor:
        total = next(iter(current.users))
        terms += [a for a in total.args[:2] if a is not current]
        current = total
    return next((t for target in LOOK_UPS for t in terms if isinstance(t, fx.Node) and t.target is target), None)


def _rewrite(graph: ModelGraph, match: tuple[fx.Node, int]) -> None:
    node, row = match
    look_up, (total,) = _look_up_beside(node), node.users
    index, table, *offset = look_up.args
    constant = node.args[0]
    recipe = Add(graph.recipe(table), Slice(graph.recipe(constant), row, row + 1))
    weight = graph.add_weight(f"{table.meta['weight']}+{constant.meta['weight']}[{row}]", recipe)
    look_up.args = (index, weight, *offset)
    total.replace_all_uses_with(next(a for a in total.args[:2] if a is not node))


RULE = Rule("w[i] + t[.] -> (t + w[i])[.]", _pattern, _rewrite, _check)


def fold_constant_rows(graph: ModelGraph, log: Log) -> None:
    """Fold token types, of which an artifact knows only the first, into the position table."""
    apply_rule(RULE, graph, log)
