"""From an encoder's hidden states to one vector per text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dscompile.runtime.errors import UserError

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.amax(0),
}


def find_pooling(name: str) -> Callable[[Tensor], Tensor]:
    """The function hidden states [T, D] -> [D] of a name. Raises UserError for an unknown one."""
    if name not in POOLINGS:
        raise UserError(f"unknown pooling {name!r}: choose from {', '.join(POOLINGS)}")
    return POOLINGS[name]


def normalized(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros stays."""
    return torch.nn.functional.normalize(vectors, dim=-1)
