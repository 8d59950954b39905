"""ATen operators outside the vocabulary, run by torch: an explicit list of those that treat every row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import StepInputs
from dscompile.runtime.plan import Aten

ELEMENTWISE = (
    "abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or ceil celu clamp "
    "clamp_max clamp_min clone cos cosh div elu eq erf erfc erfinv exp exp2 expm1 floor fmax fmin fmod frac ge gelu gt "
    "hardsigmoid hardswish hardtanh heaviside isinf isnan le leaky_relu lerp log log10 log1p log2 log_sigmoid "
    "logaddexp logical_and logical_not logical_or logical_xor lt masked_fill maximum minimum mish mul nan_to_num ne "
    "neg pow reciprocal relu remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus sqrt square "
    "sub tan tanh threshold trunc where xlogy _prelu_kernel _to_copy"
)
VIEW = (
    "_unsafe_view alias cat chunk constant_pad_nd expand flatten permute repeat repeat_interleave reshape select slice "
    "split split_with_sizes squeeze stack t transpose unbind unflatten unsqueeze view"
)
PER_ROW = (
    "_log_softmax _softmax addmm amax amin argmax bmm embedding full_like gather index_select linear log_softmax "
    "matmul max mean mm native_layer_norm layer_norm ones_like rms_norm scatter softmax sort sum topk var zeros_like"
)
ALLOWED = frozenset((ELEMENTWISE + " " + VIEW + " " + PER_ROW).split())


def is_allowed(target: str) -> bool:
    """Whether a plan may call the operator "aten.name.overload"."""
    return target.removeprefix("aten.").partition(".")[0] in ALLOWED


def resolve(target: str) -> Callable[..., Any]:
    """The operator "name.overload" of torch.ops.aten ("aten." in front allowed). UserError if it is not on the list."""
    name, _, overload = target.removeprefix("aten.").removeprefix("aten::").partition(".")
    packet = getattr(torch.ops.aten, name, None) if name in ALLOWED else None
    op = getattr(packet, overload or "default", None)
    if op is None:
        raise UserError(f"the plan calls aten operator {target!r}, which this runtime does not allow")
    return op


def bind_aten(
    spec: Aten, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> Callable[[StepInputs], None]:
    """Prepare the call; a result of several tensors gives its first. The output is reshaped to the rows of y."""
    op = resolve(spec.target)
    roles = {f"in.{k}": v for k, v in inputs.items()} | {f"w.{k}": v for k, v in weights.items()}
    args = [_substitute(a, roles) for a in spec.args]
    kwargs = {k: _substitute(v, roles) for k, v in spec.kwargs.items()}
    y = outputs["y"]

    def run(step: StepInputs) -> None:
        result = op(*args, **kwargs)
        y.copy_((result if isinstance(result, torch.Tensor) else result[0]).reshape(y.shape))

    return run


def _substitute(value: Any, roles: dict[str, torch.Tensor]) -> Any:
    """Replace role names by tensors and "torch.X" by the dtype, inside lists too."""
    if isinstance(value, list | tuple):
        return [_substitute(v, roles) for v in value]
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return roles.get(value, value) if isinstance(value, str) else value
