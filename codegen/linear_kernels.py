"""Kernels of a packed linear: one row, tensor-core tiles for a few tokens, and a library GEMM for many."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.library_kernels import epilogue_launch, product_launch, whole_products
from dscompile.codegen.linear_structure import (
    arguments_of,
    bind_input_scale,
    has_row_sum,
    numbers_of,
    structure_of,
)
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import Arguments, KernelContext, Operand, Operands, ceil_div, next_power_of_2
from dscompile.codegen.ring_kernels import ring_request, takes_ring
from dscompile.codegen.row_kernels import row_norm_launch
from dscompile.codegen.tuned_table import (
    COLUMNS,
    WIDEST_TILE,
    RingConfig,
    RowConfig,
    TileConfig,
    ring_config,
    row_config,
    tile_config,
)
from dscompile.runtime.plan import Case, Extent, Launch, Linear, Program, Scratch
from dscompile.runtime.products import Product

# Ranges of T with a kernel each; the last number of a range is the tokens of its tile.
TILE_RANGES = ((2, 8), (9, 16), (17, 32), (33, 64), (65, 128))
# More tokens than these are a library GEMM's where linear_ring does not serve, which holds up to WIDEST_TILE: at 128
# tokens linear_tile reads 28672 x 4096 float16 at 1.7 TB/s on an H200, the library at 3.4.
TILE_TOKENS = 64
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
    """Choose the kernels of a linear for every range of its rows."""
    draft = Draft()
    dtype = operands["in.x"].dtype
    cases = [Case(1, 1, (_row_launch(spec, operands, row_config(spec, dtype, context), draft),))]
    library = _uses_library(spec, operands)
    ranges = [r for r in TILE_RANGES if not library or r[1] <= _most_tokens(spec, operands, context)]
    for low, high in ranges:
        endless = not library and high == ranges[-1][1]
        cases.append(Case(low, 0 if endless else high, _tile_launches(spec, operands, high, context, draft, endless)))
    if library:
        cases.append(Case(ranges[-1][1] + 1, 0, _library_launches(spec, operands, draft)))
    return draft.program(cases)


def _most_tokens(spec: Linear, operands: Operands, context: KernelContext) -> int:
    """Tokens up to which a library GEMM is no faster; linear_ring needs no kernel for its epilogue, and logits none."""
    return WIDEST_TILE if takes_ring(spec, operands, context) and spec.rows == "T" else TILE_TOKENS


def _uses_library(spec: Linear, operands: Operands) -> bool:
    """A library GEMM writes the dtype it reads, or as it is to float32: logits without an epilogue."""
    read, stored = {operands[r].dtype for r in ("in.x", "w.weight")}, operands["out.y0"].dtype
    if spec.rows == "T":
        return read == {stored}
    return len(read) == 1 and stored == "float32" and whole_products(spec, operands) == [Product()]


# ---------------------------------------------------------------- one row


def _row_takes_two_passes(spec: Linear) -> bool:
    """Whether the statistics must be known before the product: not if the norm can be applied to the product."""
    norm = spec.norm
    return norm is not None and (norm.bias or (norm.kind == "layer" and not has_row_sum(spec)))


def _tile_takes_two_passes(spec: Linear) -> bool:
    """As for a row; but tensor cores read float16, which a row times the norm's weight may overflow."""
    return _row_takes_two_passes(spec) or bool(spec.norm and spec.norm.weight)


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
    return Launch("kernel", request.name, arguments.args, (Extent(programs),))


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


def prepares_rows(spec: Linear, tokens: int, ring: bool) -> bool:
    """Whether a kernel of its own applies the prologue before the tiles of `tokens` tokens.

    The statistics of many rows would take the registers that the product needs; linear_ring can only apply a norm to
    the product.
    """
    if ring and (spec.add or spec.store or spec.post_norm or _tile_takes_two_passes(spec)):
        return True
    return tokens > SEPARATE_NORM_TOKENS and without_prologue(spec) != spec and (ring or spec.rows == "T")


def without_prologue(spec: Linear) -> Linear:
    """What is left to compute where the rows come prepared."""
    return replace(spec, norm=None, post_norm=None, add=False, store=False)


def _tile_launches(
    spec: Linear, operands: Operands, tokens: int, context: KernelContext, draft: Draft, endless: bool
) -> tuple[Launch, ...]:
    """endless: any number of tiles of tokens may run at once."""
    if not prepares_rows(spec, tokens, takes_ring(spec, operands, context)):
        return (tile_launch(spec, operands, _config(spec, operands, tokens, context, endless), draft),)
    prepare = prepare_rows(spec, operands, draft)
    inner, rows = without_prologue(spec), {**operands, "in.x": prepared(spec, operands["in.x"].dtype)}
    launch = tile_launch(inner, rows, _config(inner, rows, tokens, context, endless), draft)
    return (prepare, reading_scratch(launch))


def prepared(spec: Linear, dtype: str) -> Operand:
    """The rows that `prepare_rows` leaves in scratch.rows."""
    return Operand(dtype, spec.in_features)


def reading_scratch(launch: Launch) -> Launch:
    """The launch with prepared rows for x."""
    return replace(launch, args=tuple("scratch.rows" if a == "in.x" else a for a in launch.args))


def prepare_rows(spec: Linear, operands: Operands, draft: Draft) -> Launch:
    """Launch the prologue on its own, into scratch.rows."""
    request, launch = row_norm_launch(spec, operands, spec.in_features)
    draft.requests.append(request)
    draft.reserve("rows", spec.rows, ITEM_SIZE[operands["in.x"].dtype] * spec.in_features)
    return launch


def _config(
    spec: Linear, operands: Operands, tokens: int, context: KernelContext, endless: bool
) -> TileConfig | RingConfig:
    config = choose_config(spec, operands, tokens, context)
    # Tiles of tokens that run at once would share the memory in which splits meet.
    return replace(config, splits=1) if endless else config


def choose_config(spec: Linear, operands: Operands, tokens: int, context: KernelContext) -> TileConfig | RingConfig:
    """The configuration for tiles of `tokens` tokens; its type says which kernel runs."""
    dtype = operands["in.x"].dtype
    if tokens <= WIDEST_TILE and takes_ring(spec, operands, context):
        return ring_config(spec, dtype, tokens, context)
    return tile_config(spec, dtype, tokens, context)


def tile_launch(spec: Linear, operands: Operands, config: TileConfig | RingConfig, draft: Draft) -> Launch:
    """Launch linear_ring or linear_tile."""
    if isinstance(config, RingConfig):
        request, arguments, tiles = ring_request(spec, operands, config)
    else:
        request, arguments, tiles = tile_request(spec, operands, config)
    draft.requests.append(request)
    splits = int(request.constexprs["SPLITS"])
    if splits > 1:
        height = int(request.constexprs["BN"])
        draft.reserve("parts", "1", 4 * splits * tiles * height * config.block_t)
        draft.reserve("moments", "1", 4 * splits * tiles * 2 * config.block_t)
        draft.reserve("arrivals", "1", 4 * tiles, zeroed=True)
    # Programs that share a tile start together: most tiles are done before the last program begins.
    grid = (Extent(1, spec.rows, config.block_t), Extent(splits), Extent(tiles))
    return Launch("kernel", request.name, arguments.args, grid)


# ---------------------------------------------------------------- library GEMM and what surrounds it


def _library_launches(spec: Linear, operands: Operands, draft: Draft) -> tuple[Launch, ...]:
    launches, x = [], "in.x"
    if without_prologue(spec) != spec:
        launches.append(prepare_rows(spec, operands, draft))
        x = "scratch.rows"
    products = whole_products(spec, operands)
    if products:
        return (*launches, *(product_launch(spec, i, p, x) for i, p in enumerate(products)))
    draft.reserve("product", "T", ITEM_SIZE[operands["in.x"].dtype] * spec.out_features)
    launches.append(Launch("library", "mm", (x, "w.weight", "scratch.product", "T")))
    for i, segment in enumerate(spec.segments):
        request, launch = epilogue_launch(spec, segment, i, operands)
        draft.requests.append(request)
        launches.append(launch)
    return tuple(launches)
