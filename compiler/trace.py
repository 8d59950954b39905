"""From a transformers model to one graph: ATen operators, an opaque node per attention, weights as placeholders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, is_concrete_int
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from dscompile.compiler.adapters import adapt
from dscompile.compiler.aliases import rename_aliases
from dscompile.compiler.attention import tracing, use_opaque_attention, use_opaque_experts
from dscompile.compiler.encoders import check_visibility, first_position, is_encoder
from dscompile.compiler.model import build_on_meta
from dscompile.compiler.quiet import quiet
from dscompile.compiler.rotary import freeze_rotary
from dscompile.compiler.rows import restore_batch
from dscompile.passes.check_tokens import check_tokens
from dscompile.passes.find_attention import find_attentions, number_tokens
from dscompile.passes.graph import ModelGraph
from dscompile.passes.read_scores import UnreadableScores
from dscompile.passes.recipe import Constant, Source
from dscompile.runtime.errors import UserError

# Any length will do that no other size of a model is likely to equal, should a model fix it in its graph.
_EXAMPLE_TOKENS = 13
# Of a list that a model's code makes a tensor of: one for each head, say.
_MOST_NUMBERS = 256


def trace_model(config: PretrainedConfig, max_seq_len: int) -> ModelGraph:
    """Trace the model of a configuration for ragged batches of tokens.

    The graph takes tokens and positions [1, T] int64 and returns logits [1, T, V], or, of an encoder, the last hidden
    states [1, T, D], token types all zero. Its weights carry the names of the
    model's state_dict; tied weights share one. Buffers that no checkpoint stores, and constants, keep their values.
    Raises UserError for a model whose attention is not understood, or in which another operator mixes tokens.
    """
    try:
        return _trace(config, max_seq_len, use_opaque_attention, _check_attention)
    except _UnseenAttention as reason:
        unseen = str(reason)
    try:
        return _trace(config, max_seq_len, use_opaque_experts, _find_attention)
    except UnreadableScores as error:
        raise UserError(f"{unseen}, and {error}; {_ADVICE}") from error
    except _UnseenAttention:
        raise UserError(f"{unseen}; {_ADVICE}") from None


_ADVICE = "write an adapter in compiler/adapters"


class _UnseenAttention(UserError):
    """The model's attention does not come through the seam."""


def _trace(
    config: PretrainedConfig,
    max_seq_len: int,
    prepare: Callable[[nn.Module], None],
    check: Callable[[ModelGraph, PretrainedConfig], None],
) -> ModelGraph:
    model = build_on_meta(config)
    _refuse_convolutions(model)
    _refuse_indexers(model)
    adapt(model)
    freeze_rotary(model, max_seq_len)
    prepare(model)
    values = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
    encoder = is_encoder(config)
    program = _export(model.to("meta"), _Hidden if encoder else _Logits)  # type: ignore[arg-type]
    graph = _with_named_weights(program, model, values, max_seq_len)
    graph.is_encoder = encoder
    with _refusing_branches(model):
        _simplify(graph)
        check(graph, config)
    return graph


def _refuse_convolutions(model: nn.Module) -> None:
    """Refuse what check_tokens would refuse, before tracing, which takes minutes for scans that unroll."""
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.Conv1d) and child.kernel_size != (1,):
                raise UserError(
                    f"operator aten.conv1d.default in {type(parent).__name__} mixes tokens (it slides over them); "
                    f"dscompile compiles models in which only attention does"
                )


def _refuse_indexers(model: nn.Module) -> None:
    """Refuse sparse attention in its own words; its code indexes the mask, which tracing leaves out."""
    for name, _ in model.named_modules():
        if name.endswith(".indexer"):
            raise UserError(
                f"{name} chooses the tokens that attention sees; attention over chosen tokens is not compiled"
            )


class _NumbersAsOperators(TorchFunctionMode):
    """Traces torch.tensor of a number, or of a short list, as operators: a constant made while tracing on the meta
    device has no value."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        known = {name: kwargs[name] for name in ("dtype", "device") if name in kwargs}
        if func is torch.tensor and args and isinstance(args[0], bool | int | float):
            return torch.full((), args[0], **known)
        if func is torch.tensor and args and isinstance(args[0], list | tuple) and 0 < len(args[0]) <= _MOST_NUMBERS:
            kind = next((k for k in (float, int, bool) if any(type(n) is k for n in args[0])), None)
            if kind and all(isinstance(n, bool | int | float) for n in args[0]):
                return torch.stack([torch.full((), kind(n), **known) for n in args[0]])
        return func(*args, **kwargs)


@contextmanager
def _refusing_branches(model: nn.Module) -> Iterator[None]:
    """Refuse code that asks for a value while it is traced. torch.export would print the whole graph."""
    try:
        yield
    except GuardOnDataDependentSymNode as error:
        reason = " ".join(str(error).split())[:120]
        raise _UnseenAttention(
            f"{type(model).__name__} cannot be traced, its code branches on data: {reason}"
        ) from None


class _Logits(nn.Module):
    """The model as a function of tokens and positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        flags = {"use_cache": False, "return_dict": True}
        self.options = {name: value for name, value in flags.items() if _accepts(parameters, name)}
        self.takes_positions = _accepts(parameters, "position_ids")
        self.first = first_position(model)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        torch._check(tokens.shape[1] == positions.shape[1])
        rows = positions + self.first if self.first else positions
        given = {"position_ids": rows} if self.takes_positions else {}
        with tracing(positions), _NumbersAsOperators(), _refusing_branches(self.model):
            return self.model(input_ids=tokens, **given, **self.options).logits


def _accepts(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class _Hidden(nn.Module):
    """An encoder as a function of tokens and positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.first = first_position(model)
        self.has_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        torch._check(tokens.shape[1] == positions.shape[1])
        types = {"token_type_ids": torch.zeros_like(tokens)} if self.has_types else {}
        rows = positions + self.first if self.first else positions
        with tracing(positions), _NumbersAsOperators(), _refusing_branches(self.model):
            return self.model(input_ids=tokens, position_ids=rows, return_dict=True, **types).last_hidden_state


def _export(model: nn.Module, function: type[nn.Module]) -> torch.export.ExportedProgram:
    tokens = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64, device="meta")
    positions = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64, device="meta")
    length = {1: torch.export.Dim.AUTO}
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                function(model), (tokens, positions), dynamic_shapes=(length, length), strict=False
            )
            return program.run_decompositions({}) if _has_composites(program) else program
    except UserError:
        raise
    except Exception as error:
        # torch.export lets whatever the model's own code raises through, so no narrower class covers its failures.
        reason = " ".join(str(error).split())[:240]
        raise _UnseenAttention(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {reason}") from error


def _has_composites(program: torch.export.ExportedProgram) -> bool:
    """Whether a graph holds what passes do not know and decomposing, which traces again, removes: operators that write
    in place, and those that stand for several."""
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    overloads = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    return any(t._schema.is_mutable or t in _COMPOSITES for t in overloads)


def _with_named_weights(
    program: torch.export.ExportedProgram, model: nn.Module, values: dict[str, Tensor], max_seq_len: int
) -> ModelGraph:
    """Name every lifted tensor of an exported program: checkpoint weights as sources, the rest as constants."""
    module = program.graph_module
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    first: dict[str, fx.Node] = {}
    graph = ModelGraph(module, {}, {}, max_seq_len)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        target = str(spec.target).removeprefix("model.")
        name = tied.get(target, target)
        if name in first:
            node.replace_all_uses_with(first[name])
            module.graph.erase_node(node)
            continue
        first[name] = node
        node.meta["weight"] = name
        shape = tuple(node.meta["val"].shape)
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            graph.recipes[name] = Source(name, shape)
            if name in values:
                graph.buffers[name] = values[name]
        else:
            graph.recipes[name] = Constant(name, shape)
            graph.constants[name] = _constant(name, values, program)
    _put_weights_last(module.graph)
    return graph


def _constant(name: str, values: dict[str, Tensor], program: torch.export.ExportedProgram) -> Tensor:
    value = values.get(name)
    if value is None:
        value = program.constants.get(name, program.constants.get(f"model.{name}"))
    if value is None or value.device.type == "meta":
        path = f" in {name.rpartition('.')[0]}" if "." in name else ""
        raise UserError(
            f"the model's code{path} makes a tensor from numbers while it runs, which tracing cannot see; {_ADVICE}"
        )
    return value


def _put_weights_last(graph: fx.Graph) -> None:
    """Order the placeholders tokens, positions, weights."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    inputs = [n for n in placeholders if "weight" not in n.meta]
    for node, name in zip(inputs, ("tokens", "positions"), strict=True):
        node.name = node.target = name
    for node in reversed(inputs):
        next(iter(graph.nodes)).prepend(node)


_ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")
_aten = torch.ops.aten
_COMPOSITES = (_aten.einsum.default, _aten.mT.default)


def _simplify(graph: ModelGraph) -> None:
    """Drop assertions, and operators that return their input unchanged; call the others by their usual names."""
    _record_users(graph.graph)
    rename_aliases(graph.graph)
    for node in list(graph.graph.nodes):
        if node.op == "call_module" or (node.op == "call_function" and any(a in str(node.target) for a in _ASSERTIONS)):
            graph.graph.erase_node(node)
        elif node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in (_aten.view.default, _aten._unsafe_view.default):
            # Passes drop copies, and unlike a view a reshape does not ask how its input lies in memory.
            node.target = _aten.reshape.default
        else:
            _leave_meta(node)
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    result = output.args[0]
    output.args = (result[0] if isinstance(result, tuple | list) else result,)
    restore_batch(graph.graph)
    graph.drop_dead()
    graph.constants = {name: value for name, value in graph.constants.items() if name in graph.recipes}
    graph.graph.lint()


def _record_users(graph: fx.Graph) -> None:
    """Note the users that torch.export forgets of nodes whose results nothing needs."""
    for node in graph.nodes:
        for source in node.all_input_nodes:
            source.users.setdefault(node)


def _leave_meta(node: fx.Node) -> None:
    """Let what the model computes of constants be computed on the CPU."""
    cpu = torch.device("cpu")
    if any(isinstance(a, torch.device) for a in node.args):
        node.args = tuple(cpu if isinstance(a, torch.device) else a for a in node.args)
    if "device" in node.kwargs:
        node.update_kwarg("device", cpu)


def _is_identity(node: fx.Node) -> bool:
    """Whether a node returns its first argument: a cast to the same dtype, dropout, a full slice, an alias."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return False
    value, before = node.meta["val"], source.meta["val"]
    match node.target:
        case _aten.alias.default | _aten.detach.default | _aten.detach_.default | _aten.lift_fresh_copy.default:
            return True
        case _aten.dropout.default | _aten.lift_fresh.default | _aten.clone.default | _aten.contiguous.default:
            return True
        case _aten.to.dtype | _aten.to.dtype_layout | _aten.to.device | _aten._to_copy.default | _aten.type_as.default:
            return value.dtype == before.dtype
        case _aten.slice.Tensor | _aten.expand.default | _aten.view.default | _aten.reshape.default:
            return len(value.shape) == len(before.shape) and all(
                bool(a == b) for a, b in zip(value.shape, before.shape, strict=True)
            )
    return False


def _check_attention(graph: ModelGraph, config: PretrainedConfig) -> None:
    """Refuse a graph in which anything but one attention node per layer mixes tokens."""
    hard_coded = any(
        "scaled_dot_product" in str(n.target)
        or ("softmax" in str(n.target) and not is_concrete_int(n.meta["val"].shape[-1]))
        for n in graph.graph.nodes
    )
    layers = config.get_text_config(decoder=True).num_hidden_layers
    attentions = _attentions(graph)
    complete = sorted(cast(int, n.args[4]) for n in attentions) == list(range(layers))
    if complete or not hard_coded:
        number_tokens(graph)
        check_tokens(graph.module)
    if not complete:
        raise _UnseenAttention(
            f"found {len(attentions)} attention operators in {layers} layers: this model's attention is written in its "
            f"own code"
        )
    check_visibility([bool((*n.args, True)[6]) for n in attentions], graph.is_encoder)


def _find_attention(graph: ModelGraph, config: PretrainedConfig) -> None:
    """Find the attention that a model writes out. Raises UnreadableScores where one is not understood, and UserError
    where anything else mixes tokens."""
    if not find_attentions(graph):
        raise _UnseenAttention("no attention was found")
    number_tokens(graph)
    check_tokens(graph.module)
    check_visibility([bool(n.args[6]) for n in _attentions(graph)], graph.is_encoder)


def _attentions(graph: ModelGraph) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target is torch.ops.dsc.attention.default]
