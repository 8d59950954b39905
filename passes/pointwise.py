"""Which ATen operators compute each element from the elements in its place alone."""

from __future__ import annotations

import torch

aten = torch.ops.aten
# Pointwise as well, though not tagged so.
_UNTAGGED = {
    aten._prelu_kernel.default,
    aten._to_copy.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.rsub.Tensor,
    aten.to.dtype,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}


def is_pointwise(target: object) -> bool:
    """Whether a node's target is such an operator, its operands broadcast, without randomness or effects."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target in _UNTAGGED
