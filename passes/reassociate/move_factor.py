"""Move a factor behind the linears that read it: (c x) W = c (x W), which their epilogues take."""

from __future__ import annotations

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule


def _pattern(graph: ModelGraph, node: fx.Node) -> fx.Node | None:
    read_by_linears = any(u.target is vocabulary.linear for u in node.users)
    return node if node.target is vocabulary.scale and read_by_linears else None


def _check(graph: ModelGraph, node: fx.Node) -> str | None:
    if others := [u.name for u in node.users if u.target is not vocabulary.linear]:
        return f"{node.name} is also read by {', '.join(others)}"
    biased = [u.name for u in node.users if len(u.args) > 2 and u.args[2] is not None]
    return f"{biased[0]} has a bias" if biased else None


def _rewrite(graph: ModelGraph, node: fx.Node) -> None:
    x, by = node.args
    for linear in list(node.users):
        linear.replace_input_with(node, x)
        with graph.graph.inserting_after(linear):
            scaled = graph.graph.call_function(vocabulary.scale, (linear, by))
        scaled.meta = dict(linear.meta)
        linear.replace_all_uses_with(scaled, delete_user_cb=lambda user, new=scaled: user is not new)


RULE = Rule("(c x) W -> c (x W)", _pattern, _rewrite, _check)


def move_factor(graph: ModelGraph, log: Log) -> None:
    """Move every factor that allows it."""
    apply_rule(RULE, graph, log)
