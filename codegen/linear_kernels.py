"""Kernels of a packed linear: one row, tensor-core tiles for a few tokens, and a library GEMM for many."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import Arguments, KernelContext, Operands, ceil_div, next_power_of_2
from dscompile.codegen.row_kernels import row_norm_launch
from dscompile.codegen.tuned_table import COLUMNS, RowConfig, TileConfig, row_config, tile_config
from dscompile.runtime.plan import Case, Extent, Launch, Linear, Norm, Program, Scratch, Segment

# Ranges of T with a kernel each; the last number of a range is the tokens of its tile.
TILE_RANGES = ((2, 8), (9, 16), (17, 32), (33, 64), (65, 128))
# From here on a library GEMM is faster: at 128 tokens our tiles read 28672 x 4096 float16 at 1.7 TB/s on an H200.
LIBRARY_TOKENS = 65
SEPARATE_NORM_TOKENS = 64


@dataclass
class Draft:
    """What the cases of a program have gathered: kernels, and scratch by name as (symbol, bytes, zeroed)."""

    requests: list[KernelRequest] = field(default_factory=list)
    scratch: dict[str, Scratch] = field(default_factory=dict)

    def reserve(self, name: str, symbol: str, size: int, zeroed: bool = False) -> None:
        held = self.scratch[name].bytes if name in self.scratch else 0
        self.scratch[name] = Scratch(name, symbol, max(size, held), zeroed)  # type: ignore[arg-type]

    def program(self, cases: list[Case]) -> tuple[Program, tuple[KernelRequest, ...]]:
        """The program of these cases and the kernels it launches, each once."""
        unique = {r.name: r for r in self.requests}
        return Program(tuple(cases), tuple(self.scratch.values())), tuple(unique.values())


def linear_program(
    spec: Linear, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """Choose the kernels of a linear for every range of its rows (T, or R where spec.rows == "R")."""
    draft = Draft()
    dtype = operands["in.x"].dtype
    cases = [Case(1, 1, (_row_launch(spec, operands, row_config(spec, dtype, context), draft),))]
    library = _uses_library(spec, operands)
    for low, high in TILE_RANGES:
        if library and low >= LIBRARY_TOKENS:
            break
        last = high == TILE_RANGES[-1][1]
        launches = _tile_launches(spec, operands, high, context, draft)
        cases.append(Case(low, 0 if last else high, launches))
    if library:
        cases.append(Case(LIBRARY_TOKENS, 0, _library_launches(spec, operands, draft)))
    return draft.program(cases)


def _uses_library(spec: Linear, operands: Operands) -> bool:
    """A library GEMM writes the dtype it reads; logits are float32 from float16 rows."""
    return spec.rows == "T" and len({operands[r].dtype for r in ("in.x", "w.weight", "out.y0")}) == 1


# ---------------------------------------------------------------- text that both templates share


def segment_tiles(segments: tuple[Segment, ...], block: int) -> list[dict]:
    """Where each segment's programs begin and end, `block` rows of the packed weight a program."""
    tiles, first = [], 0
    for i, s in enumerate(segments):
        count = ceil_div(s.width, block // 2) if s.gated else ceil_div(s.width, block)
        tiles.append(
            {"index": i, "start": s.start, "width": s.width, "gated": s.gated, "activation": s.activation}
            | {"first": first, "end": first + count}
        )
        first += count
    return tiles


def structure_of(spec: Linear, operands: Operands, block: int, two_pass: bool) -> dict:
    segments = segment_tiles(spec.segments, block)
    for s in segments:
        s["stride"] = operands[f"out.y{s['index']}"].stride
    gated = sum(s.gated for s in spec.segments)
    norm, post = spec.norm, spec.post_norm
    helpers = {s.activation for s in spec.segments} | ({"softcap"} if spec.softcap else set())
    return {
        "segments": segments,
        "gating": "none" if not gated else "all" if gated == len(spec.segments) else "some",
        "uniform": not gated and all(s["start"] == s["first"] * block for s in segments),
        "full_n": all(s.width % (block // 2 if s.gated else block) == 0 for s in spec.segments),
        "helpers": sorted(helpers),
        "bias": spec.bias,
        "add": spec.add,
        "store": spec.store,
        "rows": spec.rows,
        "residual_strides": [operands[f"in.residual{i}"].stride for i in range(spec.residuals)],
        "two_pass": two_pass,
        **_norm_structure(norm, ""),
        **_norm_structure(post, "post_"),
        **({"quantized": spec.quantization.activations} if spec.quantization else {}),
    }


def _norm_structure(norm: Norm | None, prefix: str) -> dict:
    return {
        f"{prefix}norm": norm.kind if norm else "",
        f"{prefix}norm_weight": bool(norm and norm.weight),
        f"{prefix}norm_bias": bool(norm and norm.bias),
    }


def _row_takes_two_passes(spec: Linear) -> bool:
    """Whether the statistics must be known before the product: not if the norm can be applied to the product."""
    norm = spec.norm
    return norm is not None and (norm.bias or (norm.kind == "layer" and not has_row_sum(spec)))


def _tile_takes_two_passes(spec: Linear) -> bool:
    """As for a row; but tensor cores read float16, which a row times the norm's weight may overflow."""
    return _row_takes_two_passes(spec) or bool(spec.norm and spec.norm.weight)


def has_row_sum(spec: Linear) -> bool:
    """Whether the plan holds the weight's row sums, with which a layer norm can be applied to the product."""
    norm = spec.norm
    return norm is not None and norm.kind == "layer" and not norm.weight and spec.quantization is None


def numbers_of(spec: Linear, operands: Operands) -> dict:
    numbers = {
        "N": spec.out_features,
        "K": spec.in_features,
        "X_STRIDE": operands["in.x"].stride,
        "W_STRIDE": operands["w.weight"].stride,
        "SCALE": spec.scale,
        "SOFTCAP": spec.softcap,
    }
    if spec.norm:
        numbers["EPS"] = spec.norm.eps
    if spec.post_norm:
        numbers["POST_EPS"] = spec.post_norm.eps
    return numbers


def arguments_of(spec: Linear, operands: Operands, folded_norm: bool) -> Arguments:
    arguments = Arguments(operands)
    arguments.bind("in.x", "w.weight")
    if spec.quantization:
        arguments.bind("w.weight_scale")
    for present, role in (
        (spec.add, "in.add"),
        (spec.bias, "w.bias"),
        (spec.norm and spec.norm.weight, "w.norm_weight"),
        (spec.norm and spec.norm.bias, "w.norm_bias"),
        (spec.post_norm and spec.post_norm.weight, "w.post_norm_weight"),
        (spec.post_norm and spec.post_norm.bias, "w.post_norm_bias"),
        (spec.norm and spec.norm.kind == "layer" and folded_norm, "w.row_sum"),
        (spec.rows == "R" and operands["in.x"].dtype != "int8", "step.logit_rows"),
        (spec.store, "out.sum"),
    ):
        if present:
            arguments.bind(role)
    arguments.bind(*(f"in.residual{i}" for i in range(spec.residuals)))
    arguments.bind(*(f"out.y{i}" for i in range(len(spec.segments))))
    return arguments


def bind_input_scale(spec: Linear, arguments: Arguments) -> None:
    """Add what one step of the rounded rows is worth: a stored number, or one of each row."""
    if spec.quantization and spec.quantization.activations == "tensor":
        arguments.bind("w.input_scale")
    else:
        arguments.bind_memory("scratch.scales", "float32")


# ---------------------------------------------------------------- one row


def row_request(spec: Linear, operands: Operands, config: RowConfig) -> tuple[KernelRequest, Arguments, int]:
    """The kernel for one row of x, its arguments and its number of programs."""
    block_k = min(config.block_k, next_power_of_2(spec.in_features))
    blocks = ceil_div(spec.in_features, block_k)
    two_pass = _row_takes_two_passes(spec)
    structure = structure_of(spec, operands, config.block_n, two_pass)
    prefetch = min(config.prefetch, blocks)
    structure |= {
        "tail_k": spec.in_features % block_k != 0,
        "prefetch": prefetch,
        "loop_blocks": blocks > prefetch,
    }
    numbers = numbers_of(spec, operands) | {"BN": config.block_n, "BK": block_k, "STAGES": config.stages}
    if spec.add and spec.rows == "R":
        numbers["ADD_STRIDE"] = operands["in.add"].stride
    if two_pass or spec.post_norm:
        numbers["BS"] = min(4096, next_power_of_2(spec.in_features))
    arguments = arguments_of(spec, operands, not two_pass)
    request = kernel_request(
        "linear_row",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=max(1, config.stages),
    )
    return request, arguments, structure["segments"][-1]["end"]


def _row_launch(spec: Linear, operands: Operands, config: RowConfig, draft: Draft) -> Launch:
    request, arguments, programs = row_request(spec, operands, config)
    draft.requests.append(request)
    grid = (Extent(programs),) + ((Extent(1, "R"),) if spec.rows == "R" else ())
    return Launch("kernel", request.name, arguments.args, grid)


# ---------------------------------------------------------------- tiles of tokens


def tile_request(spec: Linear, operands: Operands, config: TileConfig) -> tuple[KernelRequest, Arguments, int]:
    """The kernel for tiles of tokens, its arguments and its tiles of weight rows."""
    weight = operands["w.weight"]
    block_k = min(config.block_k, max(COLUMNS[operands["in.x"].dtype][-1], next_power_of_2(spec.in_features)))
    splits = min(config.splits, ceil_div(spec.in_features, block_k))
    k_split = ceil_div(ceil_div(spec.in_features, splits), block_k) * block_k
    splits = ceil_div(spec.in_features, k_split)
    two_pass = _tile_takes_two_passes(spec)
    structure = structure_of(spec, operands, config.block_n, two_pass)
    tiles = structure["segments"][-1]["end"]
    itemsize = ITEM_SIZE[weight.dtype]
    integers = operands["in.x"].dtype == "int8"
    pieces = max(1, 32 * config.num_warps // config.block_n)
    prefetch = min(config.prefetch, k_split, spec.in_features) // pieces * pieces
    piece = prefetch // pieces
    aligned = weight.aligned and weight.stride * itemsize % 16 == 0 and piece * itemsize % 16 == 0
    last_split = spec.in_features - (splits - 1) * k_split
    structure |= {
        "tail_k": spec.in_features % block_k != 0,
        "computed": bool(spec.add or spec.store or spec.post_norm or two_pass),
        "prefetch": 0 < prefetch <= last_split and aligned,
        "piece_bytes": piece * itemsize,
        "evict_first": config.evict_first,
        "ieee": operands["in.x"].dtype == "float32",
    }
    if spec.quantization:
        structure["bf16"] = operands["in.x"].dtype == "bfloat16"
    numbers = numbers_of(spec, operands)
    numbers |= {"BN": config.block_n, "BT": config.block_t, "BK": block_k, "STAGES": config.stages, "SPLITS": splits}
    if spec.add:
        numbers["ADD_STRIDE"] = operands["in.add"].stride
    if spec.store:
        numbers["SUM_STRIDE"] = operands["out.sum"].stride
    if splits > 1:
        numbers |= {"TILES": tiles, "K_SPLIT": k_split}
    if structure["prefetch"]:
        numbers |= {"PIECES": pieces, "PIECE": piece}
    arguments = arguments_of(spec, operands, not two_pass)
    if integers:
        bind_input_scale(spec, arguments)
    if splits > 1:
        arguments.bind_memory("scratch.parts", "int32" if integers else "float32")
        if spec.norm and not two_pass:
            arguments.bind_memory("scratch.moments", "float32")
        arguments.bind_memory("scratch.arrivals", "int32")
    arguments.bind(spec.rows)
    request = kernel_request(
        "linear_tile",
        numbers,
        arguments.params,
        structure=structure,
        num_warps=config.num_warps,
        num_stages=config.stages,
    )
    return request, arguments, tiles


def tile_spec(spec: Linear, tokens: int) -> Linear:
    """What the tile kernel computes at `tokens`: past SEPARATE_NORM_TOKENS its rows come normalised.

    The statistics of so many rows would take the registers that the product needs.
    """
    if tokens <= SEPARATE_NORM_TOKENS or spec.rows == "R":
        return spec
    return replace(spec, norm=None, post_norm=None, add=False, store=False)


def _tile_launches(
    spec: Linear, operands: Operands, tokens: int, context: KernelContext, draft: Draft
) -> tuple[Launch, ...]:
    inner = tile_spec(spec, tokens)
    config = tile_config(inner, operands["in.x"].dtype, tokens, context)
    if inner == spec:
        return (tile_launch(spec, operands, config, draft),)
    prepare = prepare_rows(spec, operands, draft)
    rows = replace(operands["in.x"], stride=spec.in_features, aligned=True)
    launch = tile_launch(inner, {**operands, "in.x": rows}, config, draft)
    args = tuple("scratch.rows" if a == "in.x" else a for a in launch.args)
    return (prepare, replace(launch, args=args))


def prepare_rows(spec: Linear, operands: Operands, draft: Draft) -> Launch:
    """Launch a linear's prologue on its own, into scratch.rows."""
    request, launch = row_norm_launch(spec, operands, spec.in_features)
    draft.requests.append(request)
    draft.reserve("rows", "T", ITEM_SIZE[operands["in.x"].dtype] * spec.in_features)
    return launch


def tile_launch(spec: Linear, operands: Operands, config: TileConfig, draft: Draft) -> Launch:
    request, arguments, tiles = tile_request(spec, operands, config)
    draft.requests.append(request)
    splits = int(request.constexprs["SPLITS"])
    if splits > 1:
        draft.reserve("parts", "1", 4 * splits * tiles * config.block_n * config.block_t)
        draft.reserve("moments", "1", 4 * splits * tiles * 2 * config.block_t)
        draft.reserve("arrivals", "1", 4 * tiles, zeroed=True)
    grid = (Extent(1, spec.rows, config.block_t), Extent(tiles), Extent(splits))
    return Launch("kernel", request.name, arguments.args, grid)


# ---------------------------------------------------------------- library GEMM and what surrounds it


def _library_launches(spec: Linear, operands: Operands, draft: Draft) -> tuple[Launch, ...]:
    launches, x = [], "in.x"
    if tile_spec(spec, LIBRARY_TOKENS) != spec:
        launches.append(prepare_rows(spec, operands, draft))
        x = "scratch.rows"
    only = spec.segments[0]
    plain = len(spec.segments) == 1 and only.activation == "none" and not only.gated
    if plain and not (spec.bias or spec.residuals or spec.softcap or spec.scale != 1.0):
        return (*launches, Launch("library", "mm", (x, "w.weight", "out.y0", "T")))
    draft.reserve("product", "T", ITEM_SIZE[operands["in.x"].dtype] * spec.out_features)
    launches.append(Launch("library", "mm", (x, "w.weight", "scratch.product", "T")))
    for i, segment in enumerate(spec.segments):
        request, launch = _epilogue_launch(spec, segment, i, operands)
        draft.requests.append(request)
        launches.append(launch)
    return tuple(launches)


def _epilogue_launch(spec: Linear, segment: Segment, index: int, operands: Operands) -> tuple[KernelRequest, Launch]:
    block = min(2048, next_power_of_2(segment.width))
    residuals = spec.residuals if index == 0 else 0
    arguments = Arguments(operands)
    arguments.bind_memory("scratch.product", operands["in.x"].dtype)
    if spec.bias:
        arguments.bind("w.bias")
    arguments.bind(*(f"in.residual{i}" for i in range(residuals)), f"out.y{index}")
    params = tuple(replace(p, name="y_ptr") if p.name == f"y{index}_ptr" else p for p in arguments.params)
    numbers: dict[str, float] = {"N": spec.out_features, "START": segment.start, "WIDTH": segment.width, "BLOCK": block}
    numbers |= {"Y_STRIDE": operands[f"out.y{index}"].stride, "SCALE": spec.scale, "SOFTCAP": spec.softcap}
    structure = {
        "helpers": sorted({segment.activation} | ({"softcap"} if spec.softcap else set())),
        "bias": spec.bias,
        "gated": segment.gated,
        "activation": segment.activation,
        "residual_strides": [operands[f"in.residual{i}"].stride for i in range(residuals)],
    }
    request = kernel_request("epilogue", numbers, params, structure=structure, num_warps=4, num_stages=1)
    grid = (Extent(1, "T"), Extent(ceil_div(segment.width, block)))
    return request, Launch("kernel", request.name, arguments.args, grid)
