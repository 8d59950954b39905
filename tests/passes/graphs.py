"""Small modules traced to graphs, for tests of passes that need no transformers model."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Constant, Source


def trace(module: nn.Module, max_seq_len: int = 32) -> ModelGraph:
    """The graph of forward(tokens, positions) as the compiler's tracing makes it: weights as named placeholders."""
    example = torch.zeros(1, 13, dtype=torch.long)
    length = {1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(module, (example, example.clone()), dynamic_shapes=(length, length), strict=False)
        program = program.run_decompositions({})
    graph = ModelGraph(program.graph_module, {}, {}, max_seq_len)
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    first = placeholders[0]
    for node in placeholders:
        spec = specs[node.name]
        if spec.target is None:
            first.prepend(node) if node is not first else None
            continue
        name, shape = str(spec.target), tuple(node.meta["val"].shape)
        node.meta["weight"] = name
        if name in dict(module.named_parameters(remove_duplicate=False)):
            graph.recipes[name] = Source(name, shape)
        else:
            graph.recipes[name] = Constant(name, shape)
            graph.constants[name] = dict(module.named_buffers())[name]
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder" and "weight" not in n.meta]
    for node in reversed(inputs):
        next(iter(graph.graph.nodes)).prepend(node)
    for node in list(graph.graph.nodes):
        if node.op == "output":
            node.args = (node.args[0][0],)
        elif node.op == "call_function" and "_assert" in str(node.target):
            graph.graph.erase_node(node)
    graph.drop_dead()
    return graph


def run(graph: ModelGraph, module: nn.Module, tokens: Tensor) -> Tensor:
    """Execute a graph with a module's weights."""
    state = module.state_dict()
    return graph.run(tokens, torch.arange(tokens.shape[1])[None], lambda name: state[name])


def nodes(graph: ModelGraph, target: object) -> list[fx.Node]:
    """The nodes that call a function."""
    return [n for n in graph.graph.nodes if n.target is target]
