"""Remove what computes nothing: no-op nodes, repeated nodes, weight arithmetic that a recipe can carry."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dscompile.passes.evaluate import evaluate, is_number
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.pointwise import is_pointwise
from dscompile.passes.recipe import Add, Constant, Pointwise, Recipe, Reshape, Scale, Slice, Transpose
from dscompile.passes.rule import Log
from dscompile.runtime.ops_aten import is_allowed

aten = torch.ops.aten

IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
}
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
SCALAR_OPERANDS = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}
ROW_WISE = {
    aten.linear.default,
    aten.layer_norm.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    *SCALAR_OPERANDS,
}
NORMS = {aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default, *SCALAR_OPERANDS}
PLAIN = (fx.Node, bool, int, float, str, type(None))
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}


def drop_noops(graph: ModelGraph, log: Log) -> None:
    """Replace nodes whose value is their input's: copies, full slices, casts to the same dtype, reshapes and back."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and (source := _same_value(node)) is not None:
            node.replace_all_uses_with(source)
            log.matched("y = x")
    graph.drop_dead()


def _same_value(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or "val" not in source.meta:
        return None
    value, before = node.meta.get("val"), source.meta["val"]
    if node.target in IDENTITIES:
        return source
    if node.target in CASTS:
        return source if value.dtype == before.dtype else None
    if node.target is aten.slice.Tensor:
        start, stop, step = (*node.args[2:], *(None, None, None)[len(node.args) - 2 :])
        full = not start and (stop is None or (isinstance(stop, int) and stop >= 2**62)) and step in (None, 1)
        return source if full or value.shape == before.shape else None
    if node.target in RESHAPES:
        return reshaped_back(node, source)
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] == 1 and not isinstance(node.args[1], bool):
        return source
    return None


def reshaped_back(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """The ancestor of equal shape through reshapes alone (sizes of 1 and splits come and go in order)."""
    shape = node.meta["val"].shape
    while source.meta["val"].shape != shape:
        if source.target not in RESHAPES or source.meta["val"].numel() != node.meta["val"].numel():
            return None
        source = source.args[0]
    return source


def merge_repeated(graph: ModelGraph, log: Log) -> None:
    """Common subexpressions: one node for equal targets and arguments, one constant for equal values."""
    first: dict[str, str] = {}
    for name, value in graph.constants.items():
        twin = next((o for o in first.values() if _equal(graph.constants[o], value)), name)
        first[name] = twin
    seen: dict[object, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "placeholder":
            recipe = graph.recipes.get(node.meta.get("weight", ""))
            key: object = ("constant", first[recipe.name]) if isinstance(recipe, Constant) else node
        elif node.op == "call_function":
            key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        else:
            continue
        twin_node = seen.setdefault(key, node)
        if twin_node is not node:
            node.replace_all_uses_with(twin_node)
            log.matched("x, x -> x")
    graph.drop_dead()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _hashable(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    return (type(value), str(value)) if isinstance(value, torch.SymInt | float) else value


def inline_scalars(graph: ModelGraph, log: Log) -> None:
    """Replace constants of one element by their numbers (an embedding's multiplier kept as a buffer, cast or not)."""
    for node in list(graph.graph.nodes):
        by = node.args[1] if node.target in SCALAR_OPERANDS else None
        if isinstance(by, fx.Node) and is_number(graph, by):
            node.args = (node.args[0], evaluate(graph, by, {}).item())
            log.matched("constant -> number")
    graph.drop_dead()


def keep_batch_dimension(graph: ModelGraph, log: Log) -> None:
    """Undo reshapes of [1, T, D] to [T, D]: what works on rows works on them with the leading 1 too."""
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in RESHAPES and _drops_batch(node, source):
            readers = _row_wise_readers(node)
            if readers is None and any(u.target is aten.pow.Tensor_Scalar for u in node.users):
                readers = _normalised_rows(graph, node)
            if readers is not None:
                node.replace_all_uses_with(source)
                for reader in readers:
                    reader.meta["val"] = reader.meta["val"].unsqueeze(0)
                log.matched("[T, D] -> [1, T, D]")
    graph.drop_dead()


def _drops_batch(node: fx.Node, source: object) -> bool:
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    before, after = source.meta["val"].shape, node.meta["val"].shape
    flattens = len(before) == 3 and len(after) == 2 and before[0] == 1
    return flattens and isinstance(before[2], int) and before[2] == after[1]


def _row_wise_readers(node: fx.Node) -> list[fx.Node] | None:
    """The [T, D] nodes computed from a node row by row, up to reshapes back; None if another operator is among them."""
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.target in RESHAPES and user.meta["val"].ndim == 3:
                continue
            if user.target not in ROW_WISE or user.meta["val"].ndim != 2:
                return None
            if user not in found:
                found.append(user)
                stack.append(user)
    return found


def _normalised_rows(graph: ModelGraph, node: fx.Node) -> list[fx.Node]:
    """The [T, D] nodes of norms of a node's rows, and of products with them; what reads them gets them as [T, D]."""
    found = [node]
    for user in list(graph.graph.nodes):
        known = all(i in found or is_weight(i) for i in user.all_input_nodes)
        along_rows = user.target is not aten.mean.dim or list(user.args[1]) in ([-1], [1])
        if user.target in NORMS and known and along_rows and any(i in found for i in user.all_input_nodes):
            found.append(user)
    for inner in found:
        outside = [u for u in inner.users if u not in found]
        if not outside:
            continue
        with graph.graph.inserting_after(inner):
            rows = graph.graph.call_function(aten.squeeze.dim, (inner, 0))
        rows.meta = dict(inner.meta)
        for user in outside:
            user.replace_input_with(inner, rows)
    for mean in (n for n in found if n.target is aten.mean.dim):
        mean.args = (mean.args[0], [-1], *mean.args[2:])
    return found[1:]


def fold_weight_arithmetic(graph: ModelGraph, log: Log) -> None:
    """Turn nodes that only rearrange weights, or compute elements from their elements, into recipes of a new weight."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        recipe = _weight_recipe(graph, node)
        if recipe is not None:
            source = next(i for i in node.all_input_nodes if is_weight(i))
            node.replace_all_uses_with(graph.add_weight(f"{source.meta['weight']}:{node.name}", recipe))
            log.matched("f(w) -> w'")
    graph.drop_dead()


def _weight_recipe(graph: ModelGraph, node: fx.Node) -> Recipe | None:
    inputs = node.all_input_nodes
    if not inputs or not all(map(is_weight, inputs)):
        return None
    if all(isinstance(graph.recipe(i), Constant) for i in inputs):
        return None
    return _rearranged(graph, node, *inputs) if len(inputs) == 1 else _pointwise(graph, node)


def _rearranged(graph: ModelGraph, node: fx.Node, source: fx.Node) -> Recipe | None:
    recipe, before = graph.recipe(source), source.meta["val"]
    if node.target in TRANSPOSES and before.ndim == 2 and node.meta["val"].shape != before.shape:
        return Transpose(recipe)
    if node.target in TRANSPOSES and before.ndim == 2 and _swaps(node):
        return Transpose(recipe)
    if node.target is aten.select.int and node.args[1] == 0:
        row = node.args[2] % before.shape[0]
        return Reshape(Slice(recipe, row, row + 1), tuple(node.meta["val"].shape))
    if node.target in RESHAPES - {aten.expand.default}:
        return Reshape(recipe, tuple(int(s) for s in node.meta["val"].shape))
    number = next((float(a) for a in node.args if isinstance(a, int | float)), None)
    if number is not None and node.target is aten.add.Tensor:
        return Add(recipe, number)
    if number is not None and node.target is aten.mul.Tensor:
        return Scale(recipe, number)
    return _pointwise(graph, node)


def _pointwise(graph: ModelGraph, node: fx.Node) -> Recipe | None:
    """The recipe of an operator that the runtime knows; none changes what is an integer or a truth."""
    values = [node.meta["val"], *(i.meta["val"] for i in node.all_input_nodes)]
    if not is_pointwise(node.target) or not is_allowed(str(node.target)) or node.target in CASTS:
        return None
    plain = (*node.args, *node.kwargs.values())
    if not all(v.is_floating_point() for v in values) or not all(isinstance(a, PLAIN) for a in plain):
        return None
    args = tuple(graph.recipe(a) if isinstance(a, fx.Node) else a for a in node.args)
    return Pointwise(str(node.target), args, tuple(node.meta["val"].shape), tuple(node.kwargs.items()))


def _swaps(node: fx.Node) -> bool:
    """Whether a transposing node of a square matrix exchanges its dimensions."""
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]
    if node.target is aten.transpose.int:
        return (node.args[1] - node.args[2]) % 2 == 1
    return True


def split_outputs(node: fx.Node) -> dict[int, fx.Node]:
    """The getitem users of a node with several outputs, by index."""
    return {u.args[1]: u for u in node.users if u.target is operator.getitem}
