"""Prove that no operator but attention lets one token see another, so that a ragged batch may run as one row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from dscompile.passes.pointwise import is_pointwise
from dscompile.runtime.errors import UserError

_aten = torch.ops.aten


def check_tokens(module: fx.GraphModule) -> None:
    """Follow the token dimension through a traced graph. Raises UserError that names the operator that mixes tokens.

    Each tensor has at most one dimension that holds the T tokens, alone or merged with others in a fixed order. An
    operator that is not known to work on tokens one by one is refused.
    """
    tokens = next(n for n in module.graph.nodes if n.op == "placeholder" and "weight" not in n.meta)
    length = tokens.meta["val"].shape[1]
    follow = _Follower(int(length) if is_concrete_int(length) else length)
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            follow.check(node)
        except _Mixes as reason:
            raise UserError(
                f"operator {node.target} in {_module_of(node)} mixes tokens ({reason}); dscompile compiles models in "
                f"which only attention does"
            ) from None
    if isinstance(follow.length, int):
        raise UserError("the model fixes the number of tokens in its graph, so it cannot serve other lengths")


class _Mixes(Exception):
    """Why an operator mixes tokens."""


@dataclass(frozen=True)
class _Axis:
    """A dimension that holds tokens: outer x T x inner elements, outer and inner constants."""

    dim: int
    factor: int
    inner: int


@dataclass
class _Follower:
    """Checks nodes in order. length is T: symbolic, or the example's number where the model fixed it."""

    length: int | torch.SymInt

    def __post_init__(self) -> None:
        self.inner: dict[fx.Node, int] = {}

    def check(self, node: fx.Node) -> None:
        """Raise _Mixes if the node mixes tokens."""
        packet = _packet(node)
        if packet.startswith("conv"):
            raise _Mixes("it slides over them")
        outputs = [self._axis(value, node) for value in _tensors(node.meta.get("val"))]
        inputs = {
            n: axis for n in node.all_input_nodes for v in _tensors(n.meta.get("val")) if (axis := self._axis(v, n))
        }
        if packet == "arange" and outputs and outputs[0]:
            raise _Mixes("it numbers the tokens of the step; take positions from position_ids")
        if not inputs or not outputs or packet == "getitem" or str(node.target).startswith("dsc."):
            return
        if packet in _VIEWS:
            self._check_view(node)
            return
        self._check_operator(node, packet, inputs)
        if not any(outputs):
            raise _Mixes("it reduces over them")
        for axis in outputs:
            if axis and axis.factor > 1:
                self.inner[node] = next((a.inner for a in inputs.values() if a.factor == axis.factor), 1)

    def _check_operator(self, node: fx.Node, packet: str, inputs: dict[fx.Node, _Axis]) -> None:
        first = node.args[0] if node.args else None
        axis = inputs.get(first) if isinstance(first, fx.Node) else None
        rank = _rank(first)
        if packet in _FREE:
            return
        if packet in _POINTWISE or is_pointwise(node.target):
            _check_aligned(inputs)
        elif packet in _ALONG:
            _check_along(node, packet, axis, rank)
        elif packet in ("cat", "stack"):
            dim = node.args[1] if len(node.args) > 1 else 0
            if packet == "cat" and any(a.dim == dim % _rank(n) for n, a in inputs.items()):
                raise _Mixes("it joins rows of tokens")
        elif packet == "repeat":
            if axis and node.args[1][axis.dim - rank] != 1:
                raise _Mixes("it repeats rows of them")
        elif packet in _PRODUCTS:
            _check_product(node, packet, inputs)
        elif packet in ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"):
            if axis and axis.dim >= rank - len(node.args[1]):
                raise _Mixes("it normalises over them")
        elif packet == "embedding":
            if axis:
                raise _Mixes("it looks tokens up in each other")
        elif packet == "index":
            indices = node.args[1]
            touched = axis and (axis.dim >= len(indices) or indices[axis.dim] is not None)
            if axis and (touched or any(isinstance(i, fx.Node) and i in inputs for i in indices)):
                raise _Mixes("it picks among them")
        else:
            raise _Mixes("it is not known to treat them one by one")

    def _check_view(self, node: fx.Node) -> None:
        """A view keeps the flat order of elements, so the T tokens must stand at the same stride before and after."""
        source = node.args[0]
        before, after = self._axis(source.meta["val"], source), self._axis(node.meta["val"], node)
        if before is None or after is None:
            raise _Mixes("it reshapes them away")
        stride = math.prod(map(int, source.meta["val"].shape[before.dim + 1 :])) * before.inner
        suffix = math.prod(map(int, node.meta["val"].shape[after.dim + 1 :]))
        if stride % suffix or after.factor % (stride // suffix):
            raise _Mixes("it reshapes across them")
        self.inner[node] = stride // suffix

    def _axis(self, value: Tensor, node: fx.Node) -> _Axis | None:
        """The dimension of a tensor that holds tokens."""
        found = [(dim, factor) for dim, size in enumerate(value.shape) if (factor := self._factor(size))]
        if len(found) > 1:
            raise _Mixes("it pairs each token with every other")
        return _Axis(*found[0], self.inner.get(node, 1)) if found else None

    def _factor(self, size: int | torch.SymInt) -> int:
        """How many elements per token a dimension of this size holds: 0 if its size does not depend on T."""
        if isinstance(self.length, int):
            return int(size == self.length)
        if isinstance(size, int):
            return 0
        ratio = size.node.expr / self.length.node.expr
        if not ratio.is_Integer:
            raise _Mixes("it changes their number")
        return int(ratio)


def _check_aligned(inputs: dict[fx.Node, _Axis]) -> None:
    if len({_rank(n) - a.dim for n, a in inputs.items()}) > 1:
        raise _Mixes("it pairs each token with every other")
    if len({a.inner for a in inputs.values()}) > 1:
        raise _Mixes("it pairs tokens in different orders")


def _check_along(node: fx.Node, packet: str, axis: _Axis | None, rank: int) -> None:
    """Operators that work along the dimensions their argument number _ALONG[packet] names."""
    position = _ALONG[packet]
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim", _DEFAULT_DIM.get(packet))
    dims = [dims] if isinstance(dims, int) else dims
    unchanged = packet == "slice" and node.meta["val"].shape == node.args[0].meta["val"].shape
    if axis and not unchanged and (not dims or axis.dim in [d % rank for d in dims]):
        raise _Mixes("it works along them")


def _check_product(node: fx.Node, packet: str, inputs: dict[fx.Node, _Axis]) -> None:
    left, right = node.args[1:3] if packet in ("addmm", "baddbmm") else node.args[:2]
    contracted_right = 1 if packet == "linear" else max(_rank(right) - 2, 0)
    if (left in inputs and inputs[left].dim == _rank(left) - 1) or (
        right in inputs and inputs[right].dim == contracted_right
    ):
        raise _Mixes("it sums over them")


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _rank(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def _packet(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet)).rstrip("_")


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    name = list(stack.values())[-1][1] if stack else "the model"
    return (name if isinstance(name, str) else name.__name__).rsplit(".", 1)[-1]


_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}

# These move or copy whole dimensions; the sizes of their result say where the tokens went.
_FREE = {
    "permute", "transpose", "t", "numpy_T", "unsqueeze", "squeeze", "expand", "expand_as", "zeros_like", "ones_like",
    "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "sym_size", "sym_numel", "item",
}  # fmt: skip
_POINTWISE = {
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "type_as", "view_as_real", "view_as_complex",
    "lift_fresh_copy", "masked_fill", "where", "copy", "polar", "complex", "one_hot", "softplus", "hardswish", "glu",
}  # fmt: skip
_ALONG = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "prod": 1, "var": 1, "std": 1, "var_mean": 1,
    "any": 1, "all": 1, "argmax": 1, "argmin": 1, "logsumexp": 1, "linalg_vector_norm": 2, "norm": 2,
    "softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1,
    "cumsum": 1, "cumprod": 1, "sort": 1, "argsort": 1, "flip": 1, "roll": 2, "topk": 2,
    "slice": 1, "select": 1, "index_select": 1, "gather": 1, "scatter": 1, "narrow": 1,
    "slice_scatter": 2, "select_scatter": 2,
    "split": 2, "split_with_sizes": 2, "chunk": 2, "unbind": 1, "repeat_interleave": 2,
}  # fmt: skip
_DEFAULT_DIM = {
    "sort": -1, "argsort": -1, "topk": -1, "slice": 0, "slice_scatter": 0, "split": 0,
    "split_with_sizes": 0, "chunk": 0, "unbind": 0,
}  # fmt: skip
_PRODUCTS = {"mm", "bmm", "matmul", "linear", "addmm", "baddbmm"}
