"""The kernels that belong to a step and not to a model: advancing the state, and choosing tokens."""

from __future__ import annotations

from dscompile.codegen.emit import KernelRequest, Param, kernel_request
from dscompile.runtime.cuda_state import MAX_EOS_IDS, TURNS, StateLayout
from dscompile.runtime.plan import Case, Extent, Launch, Plan, Program, Sample, Scratch, Symbol

BLOCK = 2048  # vocabulary ids of a program, at most
MANY_IDS = 8192  # the same of a greedy choice for more than FEW_ROWS, whose programs would mostly begin and end
FEW_ROWS = 8
NUM_WARPS = 8
BINS = 1024  # parts into which one launch divides the interval of a threshold
COPIES = 8  # of what the parts weigh
BIN_SHIFT = 17  # the first launch's parts: 64 between a distance and its double,
FIRST_BIN = (127 - 9) << (23 - BIN_SHIFT)  # from 2^-9 up, and so to 2^7, from where no id is ever chosen
LIST = 4096  # ids of the last part that the last launch searches without reading the row again
CHUNK = 1024  # of them at a time
FEW = 64  # so few are compared with each other, all at once
STATE_BLOCK = 128
INFINITY_BITS = 0x7F800000

TYPES = {
    "logits": "*fp32",
    "sampled": "*i32",
    "temperature": "*fp32",
    "repetition_penalty": "*fp32",
    "top_p": "*fp32",
    "min_p": "*fp32",
    "best": "*fp32",
    "raw_best": "*fp32",
    "mass": "*fp32",
    "row_floats": "*fp32",
    "row_mass": "*i64",
    "histogram": "*i64",
    "list": "*i64",
}
ZEROED = ("arrived", "histogram", "listed")
ROW_STATE = "step.seats step.sample_rows"
RESULTS = "step.sampled step.told step.turn"
PENALTIES = "step.context_lens step.repetition_penalty step.min_position step.eos_ids step.seen"


def step_kernels(plan: Plan) -> tuple[dict[str, Program], tuple[KernelRequest, ...]]:
    """Return the programs "step.advance", "step.gather" and, where the plan samples, "step.sample_greedy" and
    "step.sample", with the kernels that they launch.

    plan: its limits, KV groups, buffers and Sample step are read; its programs and kernels may still be empty.
    """
    built = [_state_program(plan, advance=True), _state_program(plan, advance=False)]
    logits = next((s.inputs["logits"] for s in plan.steps if isinstance(s.spec, Sample)), None)
    if logits is not None:
        sampling = _Sampling(plan, plan.buffers[logits.buffer].cols)
        built += [sampling.greedy(), sampling.full()]
    names = ("step.advance", "step.gather", "step.sample_greedy", "step.sample")
    programs = {name: program for name, (program, _) in zip(names, built, strict=False)}
    return programs, tuple(request for _, requests in built for request in requests)


def _state_program(plan: Plan, advance: bool) -> tuple[Program, list[KernelRequest]]:
    layout = StateLayout.of(plan)
    args = "step.tokens step.sources step.sampled"
    constants = {"BLOCK": STATE_BLOCK}
    if advance:
        args += " step.seats step.positions step.context_lens step.block_table step.slots step.new_blocks step.turn"
        constants |= {
            "ROWS": layout.rows,
            "TOKENS": layout.tokens,
            "BLOCKS": layout.blocks,
            "PAGE": plan.page_size,
            "GROUPS": layout.groups,
            "TURNS": TURNS,
        }
    size: Symbol = "B" if advance else "T"
    request = _request("advance_state", f"{args} {size}", constants, pdl=False, structure={"advance": advance})
    launch = Launch("kernel", request.name, tuple([*args.split(), size]), (Extent(1, size, STATE_BLOCK),))
    return Program((Case(1, 0, (launch,)),)), [request]


class _Sampling:
    """The programs that choose tokens from logits [R, V] whose rows are `stride` elements apart."""

    def __init__(self, plan: Plan, stride: int) -> None:
        layout = StateLayout.of(plan)
        self._vocab = plan.vocab_size
        self._seen_words = layout.seen_words
        self._constants = {"V": plan.vocab_size, "ROWS": layout.rows, "STRIDE": stride}

    def greedy(self) -> tuple[Program, list[KernelRequest]]:
        args = f"in.logits {ROW_STATE} {RESULTS} scratch.best scratch.token scratch.mass"
        few, many = (self._kernel("sample_greedy", args, {}, block=block) for block in (BLOCK, MANY_IDS))
        cases = (Case(1, FEW_ROWS, (few[1],)), Case(FEW_ROWS + 1, 0, (many[1],)))
        return self._program(cases, "best token mass"), list({k.name: k for k, _ in (few, many)}.values())

    def full(self) -> tuple[Program, list[KernelRequest]]:
        """Open the search, narrow it twice, end it and choose."""
        constants = {"MAX_EOS_IDS": MAX_EOS_IDS, "SEEN_WORDS": self._seen_words, "INFINITY_BITS": INFINITY_BITS}
        bins = constants | {"BINS": BINS, "COPIES": COPIES, "BIN_SHIFT": BIN_SHIFT, "FIRST_BIN": FIRST_BIN}
        rows = "scratch.row_floats scratch.row_ints scratch.row_mass"
        head = f"in.logits {ROW_STATE} {PENALTIES} {rows} step.temperature step.top_p"
        start = self._kernel("sample_start", f"{head} step.top_k scratch.best scratch.raw_best scratch.mass", constants)
        narrow = [
            self._kernel("sample_narrow", f"{head} scratch.histogram", bins, {"first": first})
            for first in (True, False)
        ]
        lists = "scratch.listed scratch.list"
        choose = self._kernel(
            "sample_choose",
            f"{head} step.min_p step.seed {RESULTS} scratch.best scratch.token {lists}",
            constants | {"LIST": LIST, "CHUNK": CHUNK, "FEW": FEW},
            num_warps=2 * NUM_WARPS,
        )
        kernels = [start, *narrow, choose]
        names = "best raw_best token mass row_floats row_ints row_mass histogram listed list"
        cases = (Case(1, 0, tuple(launch for _, launch in kernels)),)
        return self._program(cases, names), [request for request, _ in kernels]

    def _kernel(
        self,
        template: str,
        args: str,
        constants: dict,
        structure: dict | None = None,
        num_warps: int = NUM_WARPS,
        block: int = BLOCK,
    ) -> tuple[KernelRequest, Launch]:
        args += " scratch.arrived"
        block = min(block, max(256, 1 << (self._vocab - 1).bit_length()))
        splits = self._splits(block)
        constants = constants | {"BLOCK": block, "SPLITS": splits, "SPLITS_POW2": 1 << (splits - 1).bit_length()}
        request = _request(template, args, self._constants | constants, num_warps=num_warps, structure=structure or {})
        grid = (Extent(splits), Extent(1, "B"))
        return request, Launch("kernel", request.name, tuple(args.split()), grid)

    def _splits(self, block: int) -> int:
        """Programs of a row."""
        return -(-self._vocab // block)

    def _program(self, cases: tuple[Case, ...], scratch: str) -> Program:
        sizes = {"row_floats": 8, "row_ints": 16, "row_mass": 16, "histogram": 8 * BINS * COPIES}
        sizes |= {"listed": 4, "list": 8 * LIST, "arrived": 4}
        return Program(
            cases,
            tuple(
                Scratch(name, "B", sizes.get(name, 4 * self._splits(BLOCK)), zeroed=name in ZEROED)
                for name in [*scratch.split(), "arrived"]
            ),
        )


def _request(template: str, args: str, constants: dict, **options) -> KernelRequest:
    """A kernel whose parameters are named after the arguments: in.logits -> logits_ptr, B -> B."""
    params = tuple(_param(arg) for arg in args.split())
    return kernel_request(template, constants, params, **options)


def _param(arg: str) -> Param:
    kind, _, name = arg.partition(".")
    if not name:
        return Param(kind, "i32")
    name_ptr = {"block_table": "block_tables"}.get(name, name) + "_ptr"
    return Param(name_ptr, TYPES.get(name, "*i32"), aligned=True)
