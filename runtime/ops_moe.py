"""The torch reference of `plan.Moe`: routing, then two products for each expert that some token chose.

T: rows.  K, F: columns in and hidden.  E: experts.  k: experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dscompile.runtime.executor import StepInputs
from dscompile.runtime.ops_linear import ACTIVATIONS_
from dscompile.runtime.ops_norm import compute_dtype
from dscompile.runtime.plan import Moe, Router

Tensors = dict[str, torch.Tensor]


def route(
    logits_TE: torch.Tensor, correction_E: torch.Tensor | None, router: Router
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights: [T, k] int64 and [T, k] of the logits' dtype, see `plan.Router`."""
    score = logits_TE
    if router.score == "softmax":
        score = logits_TE.softmax(-1)
    elif router.score == "sigmoid":
        score = logits_TE.sigmoid()
    choice = score if correction_E is None else score + correction_E.to(score.dtype)
    if router.num_groups > 1:
        grouped = choice.unflatten(-1, (router.num_groups, -1))
        best = grouped.topk(router.group_top, -1).values.sum(-1).topk(router.top_groups, -1).indices
        open_TG = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter_(-1, best, True)
        choice = grouped.masked_fill(~open_TG[..., None], float("-inf")).flatten(-2)
    index = choice.topk(router.top_k, -1).indices
    weights = score.gather(-1, index)
    if router.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return index, weights * router.scale


def gate(spec: Moe, product: torch.Tensor) -> torch.Tensor:
    """[g | u] [..., 2 F] -> act(min(g, limit)) * (clamp(u, -limit, limit) + shift) [..., F]; overwrites the product."""
    g, u = product.chunk(2, -1)
    if spec.limit:
        g, u = g.clamp_(max=spec.limit), u.clamp_(-spec.limit, spec.limit)
    activation = ACTIVATIONS_.get(spec.activation)
    g = g if activation is None else activation(g)
    return g.mul_(u.add_(spec.shift) if spec.shift else u)


def bind_moe(spec: Moe, inputs: Tensors, outputs: Tensors, weights: Tensors) -> Callable[[StepInputs], None]:
    """Prepare the step. Reads the weights of those experts alone that a token of the step chose."""
    x_TK, y_TK = inputs["x"], outputs["y"]
    dtype = compute_dtype(x_TK)
    residuals = [inputs[f"residual{i}"] for i in range(spec.residuals)]

    def expert(number: int, v: torch.Tensor) -> torch.Tensor:
        up, down, *biases = (
            weights[role][number].to(dtype)
            for role in ("gate_up", "down", "gate_up_bias", "down_bias")
            if role in weights
        )
        up_bias, down_bias = biases or (None, None)
        return F.linear(gate(spec, F.linear(v, up, up_bias)), down, down_bias)

    def run(step: StepInputs) -> None:
        index, factor = route(inputs["logits"].to(dtype), weights.get("correction"), spec.router)
        chosen, order = index.flatten().sort(stable=True)
        factors = factor.flatten()[order, None]
        rows = order // spec.router.top_k
        total = torch.zeros(y_TK.shape, dtype=dtype, device=y_TK.device)
        hit, counts = chosen.unique_consecutive(return_counts=True)
        start = 0
        for number, count in zip(hit.tolist(), counts.tolist(), strict=True):
            of_expert = slice(start, start + count)
            v = x_TK[rows[of_expert]].to(dtype)
            if spec.scale_input:
                y = expert(number, v * factors[of_expert])
            else:
                y = expert(number, v) * factors[of_expert]
            total.index_add_(0, rows[of_expert], y)
            start += count
        for i, residual in enumerate(residuals):
            total += residual.to(dtype) * inputs["factor"] if spec.factor and i == 0 else residual
        y_TK.copy_(total)

    return run
