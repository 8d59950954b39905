"""Consistency of a plan: every name resolves, every shape agrees, no file lies outside the artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dscompile.runtime.errors import UserError
from dscompile.runtime.kv_cache import dtype_of
from dscompile.runtime.manifest import Manifest
from dscompile.runtime.ops_aten import resolve
from dscompile.runtime.plan import (
    Aten,
    Attention,
    Embed,
    KeepRows,
    Launch,
    Linear,
    Moe,
    Norm,
    Plan,
    Ref,
    RowNorm,
    Sample,
    Spec,
    Step,
)

ROWS = ("T", "R")


class _Bad(Exception):
    """What is wrong, without where."""


def check_plan(plan: Plan, manifest: Manifest | None = None) -> None:
    """Raise UserError at the first step, buffer, program or kernel that contradicts the rest.

    manifest: when given, every cubin and kernel source must be one of its files.
    """
    where = "limits"
    try:
        _check_limits(plan)
        for name, buffer in plan.buffers.items():
            where = name
            _need(buffer.name == name and buffer.rows in ROWS, "has the wrong name or rows")
            _need(buffer.cols > 0 and buffer.offset >= 0 and buffer.offset % 256 == 0, "has a bad size or offset")
            _dtype(buffer.dtype)
        for name, weight in plan.weights.items():
            where = name
            _dtype(weight.dtype)
            _need(all(n >= 0 for n in weight.shape), "has a negative size")
        for step in plan.steps:
            where = step.name
            _check_step(plan, step)
        _check_cache(plan)
        for name, program in plan.programs.items():
            where = name
            scratch = {s.name for s in program.scratch}
            for case in program.cases:
                for launch in case.launches:
                    _check_launch(plan, launch, scratch)
        for name, kernel in plan.kernels.items():
            where = name
            for file in [kernel.source, *(c.file for c in kernel.cubins.values())]:
                _need(manifest is None or file in manifest.files, f"uses {file!r}, which is not in the artifact")
    except _Bad as error:
        raise UserError(f"plan.json: {where}: {error}; compile the model again") from error


def _check_limits(plan: Plan) -> None:
    for name in ("vocab_size", "max_seq_len", "max_batch", "max_step_tokens", "page_size"):
        _need(getattr(plan, name) > 0, f"{name} must be positive")
    _need(plan.max_step_tokens >= plan.max_batch, "max_step_tokens is less than max_batch")
    samples = sum(isinstance(s.spec, Sample) for s in plan.steps)
    if plan.hidden is None:
        _need(samples == 1, "there must be exactly one sample step")
    else:
        _check_encoder(plan, plan.hidden, samples)
    _check_kept(plan)
    for group in plan.kv_groups:
        _dtype(group.dtype)
        sizes = (group.num_layers, group.num_kv_heads, group.head_dim, group.v_head_dim)
        _need(min(sizes) > 0, "a KV group has no size")
        whole_words = plan.page_size % 4 == group.head_dim % 2 == group.v_head_dim % 2 == 0
        _need(
            group.dtype != "int8" or whole_words, "an int8 cache needs pages of a multiple of 4 tokens and even heads"
        )


def _check_encoder(plan: Plan, hidden: Ref, samples: int) -> None:
    buffer = plan.buffers.get(hidden.buffer)
    _need(not samples, "an encoder has no sample step")
    _need(buffer is not None and buffer.rows == "T", f"hidden is {hidden.buffer!r}, which is no buffer of rows T")
    assert buffer is not None
    _need(0 <= hidden.start < hidden.stop <= buffer.cols, "hidden has columns that its buffer lacks")
    _need(plan.max_step_tokens >= plan.max_seq_len, "max_step_tokens is less than an encoder's longest sequence")
    _need(not any(_is_causal(s.spec) for s in plan.steps), "an encoder's attention is not causal")


def _check_kept(plan: Plan) -> None:
    kept = [i for i, s in enumerate(plan.steps) if isinstance(s.spec, KeepRows)]
    _need(len(kept) == (not plan.is_encoder), "exactly one step must keep the rows of logits, in an encoder none")
    for i, step in enumerate(plan.steps):
        behind = bool(kept) and i > kept[0]
        _need(not (behind and isinstance(step.spec, Attention | Embed)), f"{step.name} needs rows that are not kept")
        head = isinstance(step.spec, Linear) and step.spec.rows == "R"
        _need(not head or behind, f"{step.name} computes logits of rows that were not kept")
    for i in kept:
        refs = plan.steps[i].inputs.values()
        names = [ref.buffer for ref in refs]
        columns = {name: (0, buffer.cols) for name, buffer in plan.buffers.items() if buffer.rows == "T"}
        whole = all((ref.start, ref.stop) == columns.get(ref.buffer) for ref in refs)
        _need(whole and len(set(names)) == len(names), f"{plan.steps[i].name} keeps rows of whole buffers, each once")
        lost = _read_from_before(plan.steps[:i], plan.steps[i + 1 :]) - set(names)
        _need(not lost, f"{plan.steps[i].name} loses the rows of {', '.join(sorted(lost))}")


def _read_from_before(before: Iterable[Step], behind: Iterable[Step]) -> set[str]:
    """Buffers that steps read as earlier ones have left them."""
    written = {ref.buffer for step in before for ref in step.outputs.values()}
    found: set[str] = set()
    for step in behind:
        found |= {ref.buffer for ref in step.inputs.values()} & written
        written -= {ref.buffer for ref in step.outputs.values()}
    return found


def _is_causal(spec: Spec) -> bool:
    return isinstance(spec, Attention) and spec.causal


def _check_step(plan: Plan, step: Step) -> None:
    for ref in [*step.inputs.values(), *step.outputs.values()]:
        buffer = plan.buffers.get(ref.buffer)
        _need(buffer is not None, f"uses buffer {ref.buffer!r}, which does not exist")
        assert buffer is not None
        _need(0 <= ref.start < ref.stop <= buffer.cols, f"uses columns {ref.start}:{ref.stop} of {ref.buffer!r}")
    for role, name in step.weights.items():
        _need(name in plan.weights, f"{role} is {name!r}, a weight that does not exist")
    _need(not step.program or step.program in plan.programs, f"uses program {step.program!r}, which does not exist")
    inputs, outputs, weights = _signature(plan, step.spec, step)
    _compare("input", {r: f.stop - f.start for r, f in step.inputs.items()}, inputs)
    _compare("output", {r: f.stop - f.start for r, f in step.outputs.items()}, outputs)
    _compare("weight", {r: plan.weights[n].shape for r, n in step.weights.items()}, weights)
    quantized = isinstance(step.spec, Linear) and step.spec.quantization is not None
    if "weight" in step.weights:
        dtype = plan.weights[step.weights["weight"]].dtype
        _need((dtype == "int8") == quantized, f"has a weight of {dtype}, which its quantization contradicts")


def _check_cache(plan: Plan) -> None:
    """What an attention reads of another layer's cache is there before it."""
    filled = set()
    for step in plan.steps:
        if isinstance(step.spec, Attention):
            place = step.spec.group, step.spec.index
            _need(
                step.spec.appends or place in filled,
                f"{step.name} reads a place in the cache that no step before fills",
            )
            filled.add(place)


def _compare(kind: str, found: dict, wanted: dict) -> None:
    for role in wanted.keys() - found.keys():
        raise _Bad(f"{kind} {role!r} is missing")
    for role, value in found.items():
        _need(role in wanted, f"{kind} {role!r} is not one of its roles")
        _need(wanted[role] is None or value == wanted[role], f"{kind} {role!r} is {value}, {wanted[role]} expected")


def _signature(plan: Plan, spec: Spec, step: Step) -> tuple[dict, dict, dict]:
    """Roles a step must bind: inputs -> columns, outputs -> columns, weights -> shape; None is any."""
    match spec:
        case Linear():
            return _linear(spec)
        case Attention():
            return _attention(plan, spec)
        case Moe():
            return _moe(spec)
        case Embed():
            y = step.outputs["y"].stop - step.outputs["y"].start if "y" in step.outputs else 0
            _need(spec.table or spec.position_offset is not None, "looks nothing up")
            weights: dict = {"table": (plan.vocab_size, y)} if spec.table else {}
            weights |= {"positions_table": None} if spec.position_offset is not None else {}
            return {}, {"y": y}, weights | _norm(spec.norm, "norm", y)
        case RowNorm():
            width = step.outputs["y"].stop - step.outputs["y"].start if "y" in step.outputs else 0
            inputs = {"x": width} | ({"add": width} if spec.add else {})
            _need(spec.groups > 0 and width % spec.groups == 0, "has groups of unequal widths")
            return inputs, {"y": width}, _norm(spec.norm, "norm", width // spec.groups)
        case KeepRows():
            return dict.fromkeys(step.inputs), {}, {}
        case Sample():
            return {"logits": plan.vocab_size}, {}, {}
        case Aten():
            _aten(spec, step)
            return dict.fromkeys(step.inputs), {"y": None}, dict.fromkeys(step.weights)
    raise _Bad(f"has an unknown operation {type(spec).__name__}")


def _linear(spec: Linear) -> tuple[dict, dict, dict]:
    k, n = spec.in_features, spec.out_features
    position = 0
    for segment in spec.segments:
        _need(segment.start == position < segment.stop, "its segments do not tile its rows")
        _need(not segment.gated or (segment.stop - segment.start) % 2 == 0, "a gated segment has an odd width")
        position = segment.stop
    _need(position == n, "its segments do not tile its rows")
    _need(not spec.residuals or (len(spec.segments) == 1 and spec.rows == "T"), "residuals need one segment of rows T")
    _need(not (spec.store and spec.rows == "R"), "rows R cannot be stored")
    inputs = {"x": k} | ({"add": k} if spec.add else {})
    inputs |= {f"residual{i}": spec.segments[0].width for i in range(spec.residuals)}
    outputs = {f"y{i}": s.width for i, s in enumerate(spec.segments)} | ({"sum": k} if spec.store else {})
    weights = {"weight": (n, k)} | ({"bias": (n,)} if spec.bias else {})
    weights |= {"alpha": (4,)} if spec.has_alpha else {}
    weights |= _norm(spec.norm, "norm", k) | _norm(spec.post_norm, "post_norm", k)
    if spec.quantization is not None:
        weights["weight_scale"] = (n,)
        weights |= {"input_scale": (1,)} if spec.quantization.activations == "tensor" else {}
    elif spec.norm is not None and spec.norm.kind == "layer" and not spec.norm.weight:
        weights["row_sum"] = (n,)
    return inputs, outputs, weights


def _attention(plan: Plan, spec: Attention) -> tuple[dict, dict, dict]:
    _need(0 <= spec.group < len(plan.kv_groups), f"uses KV group {spec.group}, which does not exist")
    group = plan.kv_groups[spec.group]
    _need(0 <= spec.index < group.num_layers, f"is layer {spec.index} of a KV group of {group.num_layers}")
    shape = (spec.num_kv_heads, spec.head_dim, spec.v_head_dim)
    _need(shape == (group.num_kv_heads, group.head_dim, group.v_head_dim), "has another shape than its KV group")
    _need((spec.window, spec.chunk) == (group.window, group.chunk), "has another window than its KV group")
    _need(spec.num_heads % spec.num_kv_heads == 0, "has heads that no KV head serves")
    _need(
        spec.appends or (spec.causal and not spec.k_norm and not spec.v_norm), "has keys of its own, and appends none"
    )
    _need(spec.rotary_dim % 2 == 0 and spec.rotary_dim <= spec.head_dim, "has a bad rotary_dim")
    q, k = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    heads_differ = spec.norm_across_heads or spec.norm_by_head
    weights = _norm(spec.q_norm, "q_norm", q if heads_differ else spec.head_dim)
    weights |= _norm(spec.k_norm, "k_norm", k if heads_differ else spec.head_dim)
    weights |= _norm(spec.v_norm, "v_norm", spec.v_head_dim)
    plain = all(n is None or (n.kind == "rms" and not n.bias) for n in (spec.q_norm, spec.k_norm))
    _need(plain or not spec.weigh_rotated, "weighs after the rotation what is not an rms norm without bias")
    if spec.rotary_dim:
        weights |= dict.fromkeys(("rope_cos", "rope_sin"), (plan.max_seq_len, spec.rotary_dim // 2))
    weights |= {"alibi_slopes": (spec.num_heads,)} if spec.alibi else {}
    weights |= {"sinks": (spec.num_heads,)} if spec.sinks else {}
    outputs = {"y": spec.num_heads * spec.v_head_dim}
    inputs = {"q": q} | ({"k": k, "v": spec.num_kv_heads * spec.v_head_dim} if spec.appends else {})
    if spec.gate != "none":
        inputs["gate"] = spec.num_heads * (spec.v_head_dim if spec.gate == "column" else 1)
    return inputs, outputs, weights


def _moe(spec: Moe) -> tuple[dict, dict, dict]:
    router, k, f = spec.router, spec.in_features, spec.hidden_features
    experts = router.num_experts
    _need(spec.activation != "xielu", "has experts whose activation is learned")
    _need(0 < router.top_k <= experts, "chooses more experts than there are")
    _need(router.num_groups > 0 and experts % router.num_groups == 0, "has groups of unequal sizes")
    _need(router.top_k <= experts // router.num_groups * router.top_groups, "chooses more experts than groups hold")
    _need(router.group_top <= experts // router.num_groups, "judges groups by more experts than they hold")
    inputs = {"x": k, "logits": experts} | {f"residual{i}": k for i in range(spec.residuals)}
    inputs |= {"factor": 1} if spec.factor else {}
    _need(spec.residuals > 0 or not spec.factor, "has a factor of no residual")
    weights: dict = {"gate_up": (experts, 2 * f, k), "down": (experts, k, f)}
    weights |= {"gate_up_bias": (experts, 2 * f), "down_bias": (experts, k)} if spec.bias else {}
    weights |= {"correction": (experts,)} if router.correction else {}
    return inputs, {"y": k}, weights


def _aten(spec: Aten, step: Step) -> None:
    try:
        resolve(spec.target)
    except UserError as error:
        raise _Bad(str(error)) from error
    for name in _strings([spec.args, spec.kwargs]):
        if name.startswith("in."):
            _need(name.removeprefix("in.") in step.inputs, f"reads {name!r}, which is not bound")
        if name.startswith("w."):
            _need(name.removeprefix("w.") in step.weights, f"reads {name!r}, which is not bound")


def _norm(norm: Norm | None, role: str, width: int) -> dict:
    if norm is None:
        return {}
    return {f"{role}_{part}": (width,) for part in ("weight", "bias") if getattr(norm, part)}


def _check_launch(plan: Plan, launch: Launch, scratch: set[str]) -> None:
    if launch.kind == "kernel":
        _need(launch.target in plan.kernels, f"launches {launch.target!r}, which does not exist")
    for arg in (*launch.args, launch.descriptors):
        if arg.startswith("scratch."):
            _need(arg.removeprefix("scratch.") in scratch, f"uses {arg!r}, which it does not reserve")


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _dtype(name: str) -> None:
    try:
        _need(bool(dtype_of(name).itemsize), f"has dtype {name!r}")
    except AttributeError as error:
        raise _Bad(f"has dtype {name!r}, which does not exist") from error


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise _Bad(message)
