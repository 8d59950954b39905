"""Prints a graph as Python with shapes: `h = linear(x, w)  # [1, T, 4096]`."""

from __future__ import annotations

from torch import Tensor, fx

from dscompile.passes.graph import ModelGraph


def show(graph: ModelGraph) -> str:
    """The graph's statements in order, one a line, weights by their names."""
    lines = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {', '.join(arguments)}")
        else:
            lines.append(f"{node.name} = {_target(node)}({', '.join(arguments)})  # {shape(node)}")
    return "\n".join(lines) + "\n"


def shape(node: fx.Node) -> str:
    """A node's shape with T for the number of tokens."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return ", ".join(
        "[" + ", ".join(str(s) if isinstance(s, int) else "T" for s in v.shape) + "]" if isinstance(v, Tensor) else "T"
        for v in values
    )


def _target(node: fx.Node) -> str:
    target = node.target
    return str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))


def _text(value: object) -> str:
    if isinstance(value, fx.Node):
        return f'w["{value.meta["weight"]}"]' if "weight" in value.meta else value.name
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return str(value) if not isinstance(value, str) else repr(value)
