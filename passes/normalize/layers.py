"""Notes on every node which decoder layer it belongs to."""

from __future__ import annotations

import re

from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log


def assign_layers(graph: ModelGraph, log: Log) -> None:
    """Set meta["layer"] to the first index on the node's module path ("...layers.3.mlp"), None outside the layers."""
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values()]
        found = re.search(r"\.(\d+)(?:\.|$)", paths[-1]) if paths else None
        node.meta["layer"] = int(found.group(1)) if found else None
