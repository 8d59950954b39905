"""Kernels of a mixture of experts: routing, then a pair of products that read only the experts some token chose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.operands import Arguments, KernelContext, Operands, ceil_div, next_power_of_2
from dscompile.runtime.plan import Case, Extent, Launch, Moe, Program, Scratch

# Up to here tiles hold few pairs, as most experts have few tokens; from here on a tile reads its weights for many.
FEW_TOKENS = 128
FEW_PAIRS, MANY_PAIRS = 16, 64
# Up to here the tiles are bounded by the pairs, and from here on by full tiles and one broken one an expert.
BOUNDED_BY_PAIRS = 8


@dataclass(frozen=True)
class Tile:
    """Pairs, weight rows and columns of a program's step, and how it is compiled."""

    pairs: int
    rows: int
    columns: int
    num_warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class RowTile:
    """Weight rows of a program that computes one token, weight columns of its step, and how it is compiled.

    Of nine tried on Mixtral's shapes this reads fastest on an H200 (benchmarks/results/experts.json).
    """

    rows: int = 2
    columns: int = 1024
    num_warps: int = 4
    stages: int = 4


@dataclass
class _Draft:
    """The step, and the kernels gathered so far."""

    spec: Moe
    operands: Operands
    requests: dict[str, KernelRequest] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return self.operands["in.x"].dtype

    def launch(
        self, template: str, roles: str, numbers: dict[str, Any], grid: tuple[Extent, ...], **options: Any
    ) -> Launch:
        """roles: the arguments in order; scratch memory is "scratch.NAME"."""
        arguments = Arguments(self.operands)
        types = {"chosen": "int32", "order": "int32", "starts": "int32", "factors": "float32"}
        for role in roles.split():
            if role.startswith("scratch."):
                arguments.bind_memory(role, types.get(role.removeprefix("scratch."), self.dtype))
            else:
                arguments.bind(role)
        request = kernel_request(template, numbers, arguments.params, **options)
        self.requests[request.name] = request
        return Launch("kernel", request.name, arguments.args, grid)


def moe_program(
    spec: Moe, operands: Operands, context: KernelContext, row: RowTile = RowTile()
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """Choose the kernels for one token, few and many. row: the tile of one token's products."""
    draft = _Draft(spec, operands)
    route = _route(draft)
    few, many = Tile(FEW_PAIRS, 32, 128), Tile(MANY_PAIRS, 64, 64)
    if draft.dtype == "float32":
        few, many = Tile(16, 32, 32, stages=2), Tile(32, 32, 32, stages=2)
    few, many = (_fit(tile, draft.dtype, context) for tile in (few, many))
    top_k, experts = spec.router.top_k, spec.router.num_experts
    bound = Extent(top_k, "T")
    cases = (
        Case(1, 1, (route, _up_row(draft, row), _down_row(draft, row))),
        Case(2, BOUNDED_BY_PAIRS, (route, *_tiles(draft, few, bound))),
        Case(BOUNDED_BY_PAIRS + 1, FEW_TOKENS, (route, *_tiles(draft, few, _tile_bound(few, top_k, experts)))),
        Case(FEW_TOKENS + 1, 0, (route, *_tiles(draft, many, _tile_bound(many, top_k, experts)))),
    )
    size = 4 if draft.dtype == "float32" else 2
    scratch = (
        Scratch("chosen", "T", 4 * top_k),
        Scratch("factors", "T", 4 * top_k),
        Scratch("order", "T", 4 * top_k),
        Scratch("starts", "1", 4 * (experts + 1)),
        Scratch("hidden", "T", size * top_k * spec.hidden_features),
        Scratch("parts", "T", size * top_k * spec.in_features),
    )
    return Program(cases, scratch), tuple(draft.requests.values())


def _fit(tile: Tile, dtype: str, context: KernelContext) -> Tile:
    """The tile with as many stages as fit shared memory: each holds pairs, gate rows and up rows."""
    stage = (4 if dtype == "float32" else 2) * tile.columns * (tile.pairs + 2 * tile.rows)
    return replace(tile, stages=max(1, min(tile.stages, context.shared_budget // stage - 1)))


def _tile_bound(tile: Tile, top_k: int, experts: int) -> Extent:
    """Tiles that T * top_k pairs of so many experts fill at most."""
    return Extent(1, "T", max(1, tile.pairs // top_k), constant=experts)


def _route(draft: _Draft) -> Launch:
    router = draft.spec.router
    numbers = {
        "E": router.num_experts,
        "BLOCK": next_power_of_2(router.num_experts),
        "TOP_K": router.top_k,
        "SLOTS": next_power_of_2(router.top_k),
        "SCALE": router.scale,
        "LOGITS_STRIDE": draft.operands["in.logits"].stride,
        "GROUPS": router.num_groups,
    }
    if router.num_groups > 1:
        numbers |= {"SIZE": router.num_experts // router.num_groups}
        numbers |= {"TOP_GROUPS": router.top_groups, "GROUP_TOP": router.group_top}
    structure = {"score": router.score, "normalize": router.normalize, "correction": router.correction}
    roles = "in.logits w.correction" if router.correction else "in.logits"
    return draft.launch(
        "moe_route",
        f"{roles} scratch.chosen scratch.factors",
        numbers,
        (Extent(1, "T"),),
        structure=structure,
        num_warps=1 if router.num_experts <= 32 else 4,
        num_stages=1,
    )


def _numbers(spec: Moe) -> dict[str, Any]:
    return {"K": spec.in_features, "F": spec.hidden_features, "TOP_K": spec.router.top_k}


def _gate(spec: Moe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and structure of the first product's epilogue."""
    numbers = {"LIMIT": spec.limit, "SHIFT": spec.shift}
    return numbers, {"activation": spec.activation, "bias": spec.bias, "scale_input": spec.scale_input}


def _up_row(draft: _Draft, tile: RowTile) -> Launch:
    spec = draft.spec
    gate_numbers, structure = _gate(spec)
    roles = "in.x w.gate_up" + " w.gate_up_bias" * spec.bias + " scratch.factors" * spec.scale_input
    grid = (Extent(ceil_div(spec.hidden_features, tile.rows)), Extent(spec.router.top_k))
    return draft.launch(
        "moe_up_row",
        f"{roles} scratch.chosen scratch.hidden",
        _numbers(spec) | gate_numbers | _row_numbers(tile, "BK", spec.in_features),
        grid,
        structure=structure,
        num_warps=tile.num_warps,
        num_stages=tile.stages,
    )


def _down_row(draft: _Draft, tile: RowTile) -> Launch:
    spec = draft.spec
    structure = {"bias": spec.bias, "scale_input": spec.scale_input, "residuals": spec.residuals}
    structure |= {"factor": True} if spec.factor else {}
    roles = "w.down" + " w.down_bias" * spec.bias + "".join(f" in.residual{i}" for i in range(spec.residuals))
    roles += " in.factor" * spec.factor
    roles += " scratch.chosen" + " scratch.factors" * (not spec.scale_input) + " scratch.hidden out.y"
    return draft.launch(
        "moe_down_row",
        roles,
        _numbers(spec) | _row_numbers(tile, "BF", spec.hidden_features),
        (Extent(ceil_div(spec.in_features, tile.rows)),),
        structure=structure,
        num_warps=tile.num_warps,
        num_stages=tile.stages,
    )


def _row_numbers(tile: RowTile, columns: str, width: int) -> dict[str, Any]:
    return {"BN": tile.rows, columns: min(tile.columns, next_power_of_2(width)), "STAGES": tile.stages}


def _tiles(draft: _Draft, tile: Tile, tiles: Extent) -> tuple[Launch, ...]:
    """Sort the pairs by expert, multiply twice, add up."""
    spec, operands = draft.spec, draft.operands
    experts = spec.router.num_experts
    gate_numbers, gate_structure = _gate(spec)
    common = _numbers(spec) | {"E": experts, "BLOCK_E": next_power_of_2(experts), "STAGES": tile.stages}
    common |= {"BT": tile.pairs, "BN": tile.rows}
    options = {"num_warps": tile.num_warps, "num_stages": tile.stages}
    ieee = {"ieee": draft.dtype == "float32"}
    sort = draft.launch(
        "moe_sort",
        "scratch.chosen scratch.order scratch.starts T",
        {"E": experts, "TOP_K": spec.router.top_k, "BLOCK": 1024},
        (Extent(experts),),
        num_stages=1,
    )
    up = draft.launch(
        "moe_up_tile",
        "in.x w.gate_up"
        + " w.gate_up_bias" * spec.bias
        + " scratch.factors" * spec.scale_input
        + " scratch.order scratch.starts scratch.hidden",
        common | gate_numbers | {"BK": tile.columns, "X_STRIDE": operands["in.x"].stride},
        (tiles, Extent(ceil_div(spec.hidden_features, tile.rows))),
        structure=gate_structure | ieee,
        **options,
    )
    down = draft.launch(
        "moe_down_tile",
        "w.down"
        + " w.down_bias" * spec.bias
        + " scratch.factors" * (not spec.scale_input)
        + " scratch.order scratch.starts scratch.hidden scratch.parts",
        common | {"BF": tile.columns},
        (tiles, Extent(ceil_div(spec.in_features, tile.rows))),
        structure={"bias": spec.bias, "scale_input": spec.scale_input} | ieee,
        **options,
    )
    residuals = [f"in.residual{i}" for i in range(spec.residuals)]
    factor = {"factor_stride": operands["in.factor"].stride} if spec.factor else {}
    block = min(1024, next_power_of_2(spec.in_features))
    combine = draft.launch(
        "moe_combine",
        " ".join(["scratch.parts", *residuals, *["in.factor"] * spec.factor, "out.y"]),
        {"K": spec.in_features, "TOP_K": spec.router.top_k, "BLOCK": block, "Y_STRIDE": operands["out.y"].stride},
        (Extent(1, "T"), Extent(ceil_div(spec.in_features, block))),
        structure={"residual_strides": [operands[r].stride for r in residuals]} | factor,
        num_stages=1,
    )
    return sort, up, down, combine
