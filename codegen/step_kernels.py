"""The kernels that belong to a step and not to a model: advancing the state, and choosing tokens."""

from __future__ import annotations

from dscompile.codegen.emit import KernelRequest, Param, kernel_request
from dscompile.runtime.cuda_state import MAX_EOS_IDS, StateLayout
from dscompile.runtime.plan import Case, Extent, Launch, Plan, Program, Sample, Scratch, Symbol

BLOCK = 2048  # vocabulary ids of a program, at most
CHUNK = 256  # ids that are compared with all thresholds at a time
WAYS = 16  # parts into which one launch divides the interval of a threshold
PASSES = 8  # launches until an interval of 2^31 is down to one: ceil(... ceil(2^31 / 16) ... / 16) = 1
STATE_BLOCK = 128
INFINITY_BITS = 0x7F800000

TYPES = {
    "logits": "*fp32",
    "sampled": "*i32",
    "logprobs": "*fp32",
    "temperature": "*fp32",
    "repetition_penalty": "*fp32",
    "top_p": "*fp32",
    "min_p": "*fp32",
    "best": "*fp32",
    "raw_best": "*fp32",
    "raw": "*fp32",
    "mass": "*fp32",
    "row_floats": "*fp32",
}
ROW_STATE = "step.seats step.sample_rows"
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
        args += " step.seats step.positions step.context_lens step.block_table step.slots step.new_blocks"
        constants |= {
            "ROWS": layout.rows,
            "TOKENS": layout.tokens,
            "BLOCKS": layout.blocks,
            "PAGE": plan.page_size,
            "GROUPS": layout.groups,
        }
    size: Symbol = "B" if advance else "T"
    request = _request("advance_state", f"{args} {size}", constants, pdl=False, structure={"advance": advance})
    launch = Launch("kernel", request.name, tuple([*args.split(), size]), (Extent(1, size, STATE_BLOCK),))
    return Program((Case(1, 0, (launch,)),)), [request]


class _Sampling:
    """The programs that choose tokens from logits [R, V] whose rows are `stride` elements apart."""

    def __init__(self, plan: Plan, stride: int) -> None:
        block = min(BLOCK, max(CHUNK, 1 << (plan.vocab_size - 1).bit_length()))
        self._splits = -(-plan.vocab_size // block)
        self._seen_words = StateLayout.of(plan).seen_words
        self._constants = {
            "V": plan.vocab_size,
            "STRIDE": stride,
            "BLOCK": block,
            "SPLITS": self._splits,
            "SPLITS_POW2": 1 << (self._splits - 1).bit_length(),
        }

    def greedy(self) -> tuple[Program, list[KernelRequest]]:
        args = f"in.logits {ROW_STATE} step.sampled step.logprobs scratch.best scratch.token scratch.mass"
        kernel = self._kernel("sample_greedy", args, {})
        return self._program([kernel], "best token mass"), [kernel[0]]

    def full(self) -> tuple[Program, list[KernelRequest]]:
        """Open the search, narrow it twice as often as one filter needs, choose."""
        penalties = {"MAX_EOS_IDS": MAX_EOS_IDS, "SEEN_WORDS": self._seen_words}
        rows = "scratch.row_floats scratch.row_ints"
        head = f"in.logits {ROW_STATE} {PENALTIES} {rows} step.temperature"
        start = self._kernel(
            "sample_start",
            f"{head} step.top_k step.top_p scratch.best scratch.raw_best scratch.mass",
            penalties | {"INFINITY_BITS": INFINITY_BITS},
            num_warps=8,
        )
        narrow = self._kernel(
            "sample_narrow",
            f"{head} step.top_k step.top_p scratch.mass",
            penalties | {"WAYS": WAYS, "CHUNK": CHUNK},
        )
        choose = self._kernel(
            "sample_choose",
            f"{head} step.min_p step.seed step.sampled step.logprobs scratch.best scratch.token scratch.raw",
            penalties,
            num_warps=8,
        )
        launches = [start, *[narrow] * (2 * PASSES), choose]
        program = self._program(launches, "best raw_best token raw mass row_floats row_ints")
        return program, [start[0], narrow[0], choose[0]]

    def _kernel(self, template: str, args: str, constants: dict, num_warps: int = 4) -> tuple[KernelRequest, Launch]:
        args += " scratch.arrived"
        request = _request(template, args, self._constants | constants, num_warps=num_warps)
        grid = (Extent(self._splits), Extent(1, "B"))
        return request, Launch("kernel", request.name, tuple(args.split()), grid)

    def _program(self, kernels: list[tuple[KernelRequest, Launch]], scratch: str) -> Program:
        sizes = {"row_floats": 16, "row_ints": 16, "mass": 4 * self._splits * WAYS}
        return Program(
            (Case(1, 0, tuple(launch for _, launch in kernels)),),
            (
                *(Scratch(name, "B", sizes.get(name, 4 * self._splits)) for name in scratch.split()),
                Scratch("arrived", "B", 4, zeroed=True),
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
