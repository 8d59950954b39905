"""Products of matrices that a library computes: what a plan may ask of it, and its reference in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from dscompile.runtime.ops_linear import ACTIVATIONS_

ACTIVATIONS = ("none", "relu", "gelu_tanh")


@dataclass(frozen=True)
class Product:
    """out[rows, N] = activation(x[rows, K] @ weight[N, K].T + bias[N]) + residual[rows, N], summed in float32 and
    rounded once; all of one dtype, but that a product alone may be stored in float32. An activation and a residual
    exclude each other.

    A launch passes x, weight, out and T or R, then bias and residual where there are.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False

    @property
    def name(self) -> str:
        """As the plan names it: "mm", "mm_bias", "mm_bias_gelu_tanh", "mm_bias_add" ..."""
        activation = [] if self.activation == "none" else [self.activation]
        return "_".join(["mm", *["bias"] * self.bias, *activation, *["add"] * self.residual])

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """The reference: the product in float32, [rows, N]."""
        p = x.float() @ weight.float().t()
        if bias is not None:
            p += bias
        if self.activation != "none":
            p = ACTIVATIONS_[self.activation](p)
        return p if residual is None else p + residual


PRODUCTS = {
    p.name: p
    for p in (Product(*options) for options in product((False, True), ACTIVATIONS, (False, True)))
    if not (p.residual and p.activation != "none")
}


@dataclass(frozen=True)
class Matrices:
    """The operands of a product over all rows there may be: x [T, K], weight [N, K], out [T, N], bias [N],
    residual [T, N]; columns are contiguous, rows may not be."""

    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Library(Protocol):
    """Whatever computes products."""

    def bind(self, product: Product, matrices: Matrices) -> Callable[[int, int], None]:
        """Prepare a product; what is returned launches it for the first `rows` rows, on a stream."""
        ...
