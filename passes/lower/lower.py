"""Lowering: each region of the fused graph becomes a step of the plan; layers of one class share their programs."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field

from torch import Tensor, fx

from dscompile.codegen.emit import KernelRequest
from dscompile.codegen.memory import ITEM_SIZE, assign_offsets
from dscompile.codegen.select import KernelContext, Operand, programs_for
from dscompile.codegen.step_kernels import step_kernels
from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on_tokens
from dscompile.passes.fuse.regions import entry_of, fused_embed, fused_linear
from dscompile.passes.graph import ModelGraph
from dscompile.passes.lower.fallback import fallback
from dscompile.passes.lower.keep_rows import place_keep_rows
from dscompile.passes.lower.placement import Placement
from dscompile.passes.lower.weights import WeightTable
from dscompile.passes.quantize.packed import ROUNDED
from dscompile.passes.recipe import Recipe
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import (
    Aten,
    Attention,
    KVGroup,
    Linear,
    Plan,
    Program,
    Ref,
    RowNorm,
    Sample,
    Spec,
    Step,
)

VIEWS = {operator.getitem, vocabulary.columns}


@dataclass(frozen=True)
class Limits:
    """What a step may ask for, in tokens and sequences.

    page_size: tokens of a KV block; kv_dtype: of the cache, "auto" for that of activations;
    deterministic: a row's result must not depend on the other rows of a step
    """

    max_seq_len: int
    max_batch: int
    max_step_tokens: int = 2048
    page_size: int = 16
    kv_dtype: str = "auto"
    deterministic: bool = False


@dataclass(frozen=True)
class RegionRecord:
    """A step as the fusion report shows it. took: (name, op, shape) of the nodes it covers; saved: bytes per token."""

    step: str
    layer: int | None
    names: tuple[str, ...]
    rules: tuple[str, ...]
    took: tuple[tuple[str, str, str], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: int


@dataclass
class Lowered:
    """A plan without its kernels' cubins, the recipes of its weights, and what the report needs."""

    plan: Plan
    recipes: dict[str, Recipe]
    requests: tuple[KernelRequest, ...]
    regions: list[RegionRecord]
    classes: list[tuple[int, ...]]
    """Layers with equal steps, as tuples of layer numbers in order of first appearance."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Kernel name -> lines that say which region and rules it was generated for."""


def lower(
    graph: ModelGraph,
    dtype: str,
    targets: tuple[str, ...],
    limits: Limits,
    model: str = "",
    measured: tuple[dict, ...] = (),
) -> Lowered:
    """Lower a fused graph.

    dtype: of weights and activations; targets: GPU architectures ("sm_90"), empty for the CPU;
    measured: configurations of kernels that go before those of codegen/tuned.
    Raises UserError for a graph with an operator that neither a region nor a fallback covers.
    """
    lowering = _Lowering(graph, dtype, dtype if limits.kv_dtype == "auto" else limits.kv_dtype)
    for node in graph.graph.nodes:
        lowering.visit(node)
    steps = tuple(lowering.steps)
    if not graph.is_encoder:
        steps = place_keep_rows(steps, lowering.placement.buffers)
    classes = _layer_classes(steps)
    plan = Plan(
        vocab_size=lowering.vocab_size(),
        max_seq_len=limits.max_seq_len,
        max_batch=limits.max_batch,
        max_step_tokens=limits.max_step_tokens,
        page_size=limits.page_size,
        steps=steps,
        buffers=assign_offsets(steps, lowering.placement.buffers),
        weights=lowering.weights.weights,
        kv_groups=tuple(lowering.groups),
        hidden=lowering.hidden,
    )
    lowered = Lowered(plan, lowering.weights.recipes, (), lowering.regions, classes)
    return with_kernels(lowered, targets, model, measured, limits.deterministic) if targets else lowered


class _Lowering:
    def __init__(self, graph: ModelGraph, dtype: str, kv_dtype: str) -> None:
        self.graph = graph
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.placement = Placement(graph, dtype)
        self.weights = WeightTable(graph, dtype)
        self.steps: list[Step] = []
        self.regions: list[RegionRecord] = []
        self.groups: list[KVGroup] = []
        self.hidden: Ref | None = None
        self._activations: dict[fx.Node, bool] = {}
        self._cached: dict[object, Attention] = {}

    def vocab_size(self) -> int:
        """Logits of a token; an encoder has none, and as many tokens as rows in its table."""
        table = next(s.weights["table"] for s in self.steps if "table" in s.weights)
        rows = self.weights.weights[table].shape[0]
        if self.hidden is not None:
            return rows
        logits = self.steps[-1].inputs["logits"]
        width = logits.stop - logits.start
        if rows != width:
            raise UserError(
                f"the model reads {rows} tokens and scores {width}: dscompile compiles models of one vocabulary"
            )
        return width

    def visit(self, node: fx.Node) -> None:
        if node.op == "output" and self.graph.is_encoder:
            self.hidden = self.placement.ref(node.args[0])
        elif node.op == "output":
            self._sample(node)
        elif node.op != "call_function" or node.target in VIEWS or not isinstance(node.meta["val"], Tensor | tuple):
            return
        elif node.target is fused_embed:
            _, _, weights, spec = node.args
            self._step(node, spec, {}, weights)
        elif node.target is fused_linear:
            self._linear(node)
        elif node.target is vocabulary.attention:
            self._attention(node)
        elif node.target is vocabulary.moe:
            self._moe(node)
        elif node.target in (vocabulary.norm, vocabulary.group_norm):
            x, weight, bias, norm, *groups = node.args
            roles = {"norm_weight": weight, "norm_bias": bias}
            spec = RowNorm(norm, groups=groups[0] if groups else 1)
            self._step(node, spec, {"x": self.placement.ref(x)}, {r: w for r, w in roles.items() if w})
        elif depends_on_tokens(self.graph, self._activations, node):
            spec, inputs, weights = fallback(node)
            self._step(node, spec, {role: self.placement.ref(x) for role, x in inputs.items()}, weights)

    def _linear(self, node: fx.Node) -> None:
        xs, residuals, weights, spec, *addend = node.args
        for i, x in enumerate(xs):
            if (node, i) in self.placement.copies:
                copy, inputs = Aten("aten.clone.default", ("in.x",)), {"x": self.placement.ref(x)}
                self._append(x, copy, inputs, {"y": self.placement.copies[node, i]}, {}, ("copy",))
        inputs = {"x": self.placement.input_of(node)}
        inputs |= {f"residual{i}": self.placement.ref(r) for i, r in enumerate(residuals)}
        if addend:
            inputs["add"] = self.placement.ref(*addend)
        self._step(node, spec, inputs, weights)

    def _attention(self, node: fx.Node) -> None:
        q, k, v, _, weights, spec, *gate = node.args
        roles = (("q", q), ("k", k), ("v", v), *(("gate", x) for x in gate))
        inputs = {role: self.placement.ref(x) for role, x in roles}
        keys = _keys_of(node)
        if (first := self._cached.get(keys)) is not None:
            place = {"group": first.group, "index": first.index}
            spec = dataclasses.replace(spec, **place, appends=False, k_norm=None, v_norm=None)
            weights = {role: w for role, w in weights.items() if role[:2] not in ("k_", "v_")}
            self._step(node, spec, {role: x for role, x in inputs.items() if role not in ("k", "v")}, weights)
            return
        shape = (spec.num_kv_heads, spec.head_dim, spec.v_head_dim, self.kv_dtype, spec.window, spec.chunk)
        if self.kv_dtype == "int8" and (spec.head_dim % 2 or spec.v_head_dim % 2):
            odd = f"{spec.head_dim} and {spec.v_head_dim} columns"
            raise UserError(f"{node.name} has heads of {odd}: an int8 cache takes even numbers; leave out kv_dtype")
        same = [i for i, g in enumerate(self.groups) if KVGroup(g.num_layers, *shape) == g]
        number = same[0] if same else len(self.groups)
        if not same:
            self.groups.append(KVGroup(0, *shape))
        group = self.groups[number]
        # Layers that see only their own step's keys write them over those of the layer before.
        index = group.num_layers if spec.causal else 0
        spec = dataclasses.replace(spec, group=number, index=index)
        self.groups[number] = dataclasses.replace(group, num_layers=index + 1)
        if spec.causal:
            self._cached[keys] = spec
        self._step(node, spec, inputs, weights)

    def _moe(self, node: fx.Node) -> None:
        x, logits, residuals, weights, spec, *factor = node.args
        inputs = {"x": self.placement.ref(x), "logits": self.placement.ref(logits)}
        inputs |= {f"residual{i}": self.placement.ref(r) for i, r in enumerate(residuals)}
        if factor:
            inputs["factor"] = self.placement.ref(*factor)
        self._step(node, spec, inputs, weights)

    def _sample(self, node: fx.Node) -> None:
        (logits,) = node.args
        if logits.target is not fused_linear or logits.args[3].rows != "R":
            raise UserError(f"the model ends in {logits.name}, not in a linear over the vocabulary: it cannot generate")
        self.steps.append(Step("sample", Sample(), ("sample",), inputs={"logits": self.placement.ref(logits)}))
        self.regions.append(
            RegionRecord("sample", None, ("sample",), ("argmax or sample(logits)",), (), (logits.name,), ("tokens",), 0)
        )

    def _step(self, node: fx.Node, spec: Spec, inputs: dict[str, Ref], weights: dict[str, fx.Node]) -> None:
        regions = node.meta.get("regions") or ("fallback",)
        if isinstance(node.meta["val"], tuple):
            roles = [f"y{i}" for i in range(len(spec.segments))] + ["sum"]
            outputs = {roles[u.args[1]]: self.placement.ref(u) for u in node.users}
        else:
            outputs = {"y0" if isinstance(spec, Linear) else "y": self.placement.ref(node)}
        self._append(node, spec, inputs, outputs, weights, regions)

    def _append(
        self,
        node: fx.Node,
        spec: Spec,
        inputs: dict[str, Ref],
        outputs: dict[str, Ref],
        weights: dict[str, fx.Node],
        regions: tuple[str, ...],
    ) -> None:
        layer = node.meta.get("layer")
        written = {ref.buffer for step in self.steps for ref in step.outputs.values()}
        if missing := sorted({ref.buffer for ref in inputs.values()} - written):
            raise UserError(f"{node.name} reads {missing[0]}, which no region computes; report the architecture")
        prefix = "" if layer is None else f"layers.{layer}."
        name, taken = prefix + "+".join(regions), {s.name for s in self.steps}
        name = next(n for n in (name, *(f"{name}.{i}" for i in range(1, len(taken) + 2))) if n not in taken)
        quantized = isinstance(spec, Linear) and spec.quantization is not None
        own = ("weight", ROUNDED) if quantized else ()
        bound = {r: self.weights.add(name, r, w) for r, w in weights.items() if r not in own}
        if quantized:
            bound |= self.weights.add_int8(name, weights["weight"], weights.get(ROUNDED))
        elif isinstance(spec, Linear) and spec.norm and spec.norm.kind == "layer" and not spec.norm.weight:
            bound["row_sum"] = self.weights.add_row_sum(name, bound["weight"])
        self.steps.append(Step(name, spec, regions, layer, inputs, outputs, bound))
        self.regions.append(
            RegionRecord(
                name,
                layer,
                regions,
                tuple(node.meta.get("rules", ())),
                tuple(node.meta.get("took") or [entry_of(node)]),
                tuple(dict.fromkeys(r.buffer for r in inputs.values())),
                tuple(dict.fromkeys(r.buffer for r in outputs.values())),
                2 * ITEM_SIZE[self.dtype] * node.meta.get("saved", 0),
            )
        )


def _keys_of(node: fx.Node) -> object:
    """What decides an attention's keys and values and how long they are kept: of equal ones, one append serves all."""
    _, k, v, _, weights, spec, *_ = node.args
    roles = ("rope_cos", "rope_sin", "k_norm_weight", "k_norm_bias", "v_norm_weight", "v_norm_bias")
    own = dataclasses.replace(
        spec, num_heads=0, scale=1.0, index=0, softcap=0.0, q_norm=None, alibi=False, sinks=False, gate="none"
    )
    return k, v, own, tuple(weights.get(role) for role in roles)


def _class_key(step: Step) -> object:
    """What steps of one class have in common: everything but the layer's number."""
    spec = dataclasses.replace(step.spec, index=0) if isinstance(step.spec, Attention) else step.spec
    widths = tuple((role, r.start, r.stop) for role, r in (*step.inputs.items(), *step.outputs.items()))
    return repr(spec), step.regions, widths, tuple(step.weights)


def _layer_classes(steps: tuple[Step, ...]) -> list[tuple[int, ...]]:
    layers: dict[int, list[object]] = {}
    for step in steps:
        if step.layer is not None:
            layers.setdefault(step.layer, []).append(_class_key(step))
    classes: dict[tuple, list[int]] = {}
    for layer, keys in layers.items():
        classes.setdefault(tuple(keys), []).append(layer)
    return [tuple(members) for members in classes.values()]


def with_kernels(
    lowered: Lowered,
    targets: tuple[str, ...],
    model: str = "",
    measured: tuple[dict, ...] = (),
    deterministic: bool = False,
) -> Lowered:
    """Choose programs; steps whose specs and operands are equal share one."""
    plan = lowered.plan
    facts = (plan.page_size, plan.max_seq_len, plan.max_batch, plan.max_step_tokens, plan.kv_groups)
    context = KernelContext(targets, *facts, measured, deterministic)
    programs: dict[str, Program] = {}
    requests: dict[str, KernelRequest] = {}
    names: dict[object, str] = {}
    steps = []
    rules = {r.step: " ; ".join(r.rules) for r in lowered.regions}
    for step in plan.steps:
        if isinstance(step.spec, Sample | Aten):
            steps.append(step)
            continue
        operands = _operands(step, plan)
        key = (_class_key(step), repr(sorted(operands.items())))
        if key not in names:
            names[key] = f"{'+'.join(step.regions)}.{len(names)}"
            programs[names[key]], made = programs_for(step.spec, operands, context)
            for request in made:
                requests.setdefault(request.name, request)
                line = f"{model}: region {'+'.join(step.regions)}, rules: {rules.get(step.name, '')}"
                lowered.provenance.setdefault(request.name, line)
        steps.append(dataclasses.replace(step, program=names[key]))
    plan = dataclasses.replace(plan, steps=tuple(steps))
    shared, step_requests = step_kernels(plan)
    requests |= {r.name: r for r in step_requests}
    plan = dataclasses.replace(plan, programs=programs | shared)
    return dataclasses.replace(lowered, plan=plan, requests=tuple(requests.values()))


def _operands(step: Step, plan: Plan) -> dict[str, Operand]:
    operands = {}
    for kind, refs in (("in", step.inputs), ("out", step.outputs)):
        for role, ref in refs.items():
            buffer = plan.buffers[ref.buffer]
            aligned = ref.start * ITEM_SIZE[buffer.dtype] % 16 == 0
            operands[f"{kind}.{role}"] = Operand(buffer.dtype, buffer.cols, (0, ref.stop - ref.start), aligned)
    for role, name in step.weights.items():
        weight = plan.weights[name]
        operands[f"w.{role}"] = Operand(weight.dtype, weight.shape[-1], weight.shape)
    return operands
