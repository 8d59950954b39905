"""What is launched at which number of tokens."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from benchmarks.kernel_shapes import ATTENTIONS, LINEARS, attention_operands, linear_operands
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.codegen.prefill_kernels import SHORT_PROMPT
from dscompile.codegen.select import programs_for
from dscompile.codegen.tune import linear_candidates, row_candidates, tile_candidates
from dscompile.codegen.tuned_table import TileConfig, ring_height, ring_rule, ring_tiles, tile_config
from dscompile.runtime.errors import UserError
from dscompile.runtime.kernels import choose_case, context_bounds
from dscompile.runtime.plan import KVGroup, Linear, Moe, Program, Router, Segment

LINEAR_CASES = [(m, r) for m, (_, regions) in LINEARS.items() for r in regions]


def context(*targets: str, group: KVGroup | None = None) -> KernelContext:
    groups = (group,) if group else ()
    return KernelContext(targets, 16, max_seq_len=4096, max_batch=64, max_step_tokens=2048, kv_groups=groups)


def covered(program: Program, decode: bool) -> None:
    """Every number of tokens from one on has a case."""
    reached = 0
    for case in program.cases:
        if case.decode in (None, decode) and case.min_tokens <= reached + 1:
            reached = case.max_tokens or 1 << 30
    assert reached == 1 << 30


@pytest.mark.parametrize("model,region", LINEAR_CASES)
def test_a_linear_of_few_tokens_is_one_kernel(model: str, region: str) -> None:
    dtype, regions = LINEARS[model]
    spec = regions[region]
    program, requests = programs_for(spec, linear_operands(spec, dtype), context("sm_90"))
    covered(program, decode=True)
    for case in program.cases:
        if case.min_tokens <= 64:
            assert [launch.kind for launch in case.launches] == ["kernel"]
    launched = {launch.target for case in program.cases for launch in case.launches if launch.kind == "kernel"}
    assert launched == {r.name for r in requests}


WHOLE_PRODUCTS = {
    ("llama3-8b", "attn_out"): ["mm_add"],
    ("llama3-8b", "mlp_in"): ["row_norm", "mm", "epilogue"],
    ("gptj-6b", "attn_in"): ["row_norm", "mm_bias", "mm_bias", "mm_bias", "mm_bias_gelu_tanh"],
    ("gptj-6b", "attn_out"): ["mm_bias_add"],
    ("bloom-7b1", "mlp_in"): ["row_norm", "mm_bias_gelu_tanh"],
    ("bloom-7b1", "mlp_out"): ["mm_bias_add"],
    ("llama3-8b", "head"): ["row_norm", "mm"],
}


@pytest.mark.parametrize("model,region", WHOLE_PRODUCTS)
def test_a_library_does_the_epilogues_that_it_knows(model: str, region: str) -> None:
    dtype, regions = LINEARS[model]
    spec = regions[region]

    def launched(operands: dict[str, Operand]) -> list[str]:
        program, requests = programs_for(spec, operands, context("sm_90"))
        templates = {r.name: r.template for r in requests}
        return [templates.get(launch.target, launch.target) for launch in program.cases[-1].launches]

    operands = linear_operands(spec, dtype)
    assert launched(operands) == WHOLE_PRODUCTS[model, region]
    if region != "head":
        shifted = launched(operands | {"out.y0": replace(operands["out.y0"], aligned=False)})
        assert shifted[shifted.index("mm") :] == ["mm"] + ["epilogue"] * len(spec.segments)


def test_logits_of_few_rows_or_with_an_epilogue_are_kernels_of_our_own() -> None:
    dtype, regions = LINEARS["llama3-8b"]
    spec = regions["head"]

    def launched(rows: int, spec: Linear) -> str:
        program, _ = programs_for(spec, linear_operands(spec, dtype), context("sm_90"))
        case = choose_case(program, rows, True)
        assert case is not None
        return case.launches[-1].kind

    assert [launched(rows, spec) for rows in (1, 64, 65, 300)] == ["kernel", "kernel", "library", "library"]
    assert launched(300, replace(spec, softcap=30.0)) == launched(300, replace(spec, bias=True)) == "kernel"


@pytest.mark.parametrize("model", LINEARS)
def test_one_kernel_does_all_of_up_to_128_tokens_on_hopper(model: str) -> None:
    """But for the norm of more than 64, whose statistics would take the product's registers, and but for logits."""
    dtype, regions = LINEARS[model]
    for spec in (spec for spec in regions.values() if spec.rows == "T"):
        program, requests = programs_for(spec, linear_operands(spec, dtype), context("sm_90"))
        templates = {r.name: r.template for r in requests}
        for case in (c for c in program.cases if 1 < c.min_tokens <= 128):
            launched = [templates[launch.target] for launch in case.launches]
            assert launched[-1] == "linear_ring"
            assert launched[:-1] in ([], ["row_norm"]) and (spec.norm or not launched[:-1])


@pytest.mark.parametrize("model", ATTENTIONS)
def test_attention_is_one_kernel_in_decoding_and_two_otherwise(model: str) -> None:
    dtype, spec = ATTENTIONS[model]
    group = KVGroup(32, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, dtype)
    operands = attention_operands(spec, dtype, 4096)
    program, _ = programs_for(spec, operands, context("sm_90", group=group))
    covered(program, decode=True)
    covered(program, decode=False)
    for case in program.cases:
        assert len(case.launches) == (1 if case.decode else 2)
    assert sum(s.bytes for s in program.scratch) < 16 << 20


@pytest.mark.parametrize("model", ATTENTIONS)
def test_attention_of_many_tokens_takes_tensor_cores_on_hopper_alone(model: str) -> None:
    dtype, spec = ATTENTIONS[model]
    operands = attention_operands(spec, dtype, 4096)

    def template(longest: int, *targets: str, kv_dtype: str = dtype) -> str:
        group = KVGroup(32, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, kv_dtype)
        program, requests = programs_for(spec, operands, context(*targets, group=group))
        names = {r.name: r.template for r in requests}
        case = choose_case(program, 2000, False, longest)
        assert case is not None
        return names[case.launches[-1].target]

    assert template(1024, "sm_90") == "attention_ring"
    assert template(1025, "sm_90") == ("attention_long" if spec.head_dim <= 128 else "attention_ring")
    assert template(2000, "sm_80", "sm_90") == template(2000, "sm_90", kv_dtype="int8") == "attention_prefill"


@pytest.mark.parametrize("model", ATTENTIONS)
def test_bounds_of_prompts_add_no_graphs_of_decode_steps(model: str) -> None:
    dtype, spec = ATTENTIONS[model]
    group = KVGroup(32, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, dtype)
    program, _ = programs_for(spec, attention_operands(spec, dtype, 4096), context("sm_90", group=group))
    assert SHORT_PROMPT not in context_bounds([program], 128)


def test_few_tokens_with_wide_heads_take_smaller_programs() -> None:
    dtype, spec = ATTENTIONS["gptj-6b"]
    here = context("sm_90", group=KVGroup(28, 16, 256, 256, dtype))
    program, requests = programs_for(spec, attention_operands(spec, dtype, 4096), here)
    covered(program, decode=False)
    rows = {r.name: r.constexprs["BM"] for r in requests if r.template == "attention_ring"}
    ragged = [case for case in program.cases if case.decode is None]
    assert [rows[case.launches[-1].target] for case in ragged] == [64, 128]


def test_experts_are_two_products_at_any_number_of_tokens() -> None:
    spec = Moe(512, 384, Router(8, 2, "softmax", True), "silu")
    operands = {role: Operand("float16", n, (0, n)) for role, n in (("in.x", 512), ("in.logits", 8), ("out.y", 512))}
    operands |= {"w.gate_up": Operand("float16", 512, (8, 768, 512)), "w.down": Operand("float16", 384, (8, 512, 384))}
    program, requests = programs_for(spec, operands, context("sm_80", "sm_90"))
    covered(program, decode=True)
    kinds = {r.name: r.template for r in requests}
    for case in program.cases:
        products = [kinds[launch.target] for launch in case.launches if "w." in " ".join(launch.args)]
        tile = "tile" if case.min_tokens > 1 else "row"
        assert products == [f"moe_up_{tile}", f"moe_down_{tile}"]
        reserved = {s.name for s in program.scratch}
        used = {a.removeprefix("scratch.") for launch in case.launches for a in launch.args if a.startswith("scratch.")}
        assert used <= reserved


def test_every_target_of_an_artifact_launches_the_same() -> None:
    dtype, regions = LINEARS["llama3-8b"]
    spec = regions["mlp_in"]
    program, requests = programs_for(spec, linear_operands(spec, dtype), context("sm_80", "sm_90"))
    assert len({r.name for r in requests}) == len(requests)
    assert all(launch.target for case in program.cases for launch in case.launches)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
def test_unmeasured_shapes_stay_within_shared_memory(target: str, tokens: int) -> None:
    spec = LINEARS["llama3-8b"][1]["mlp_out"]
    for dtype, size in (("float16", 2), ("float32", 4)):
        config = tile_config(spec, dtype, tokens, context(target))
        used = config.stages * size * config.block_k * (config.block_n + config.block_t)
        assert used <= context(target).shared_budget


@pytest.mark.parametrize("tokens", [2, 16, 32, 64, 128])
@pytest.mark.parametrize("model", LINEARS)
def test_rings_leave_half_of_the_shared_memory_to_the_next_kernel(model: str, tokens: int) -> None:
    """But for tiles that are no more than multiprocessors: there each program has one, and all of it."""
    budget = context("sm_90").shared_budget
    for spec in LINEARS[model][1].values():
        config = ring_rule(spec, tokens, context("sm_90"))
        stage = 2 * config.block_k * (ring_height(config.block_n) + config.block_t)
        assert config.block_t >= tokens
        assert config.stages >= 3
        tiles = ring_tiles(spec, config.block_n)
        if tiles <= 132:
            assert tiles * config.splits <= 132
            assert (config.stages + 1) * stage > budget - 8192 or config.stages == 12
            assert config.stages * stage <= budget - 8192
        else:
            assert config.stages * stage <= budget // 2


@pytest.mark.parametrize("tokens", [2, 32, 64])
@pytest.mark.parametrize("model", LINEARS)
def test_nearly_every_multiprocessor_has_a_tile_of_a_wide_linear(model: str, tokens: int) -> None:
    """And no other size of tile, 16 rows more or less, would come closer to one for each."""
    wide = [s for s in LINEARS[model][1].values() if 64 * 132 < s.out_features <= 256 * 132]
    assert wide
    for spec in wide:
        rows = ring_rule(spec, tokens, context("sm_90")).block_n
        assert 128 <= ring_tiles(spec, rows) <= 132 < ring_tiles(spec, rows - 16)


@pytest.mark.parametrize(
    ("model", "region", "rows", "splits"),
    [
        ("llama3-8b", "mlp_in", 256, 1),
        ("llama3-8b", "attn_in", 64, 1),
        ("llama3-8b", "mlp_out", 64, 2),
        ("bloom-7b1", "mlp_in", 128, 1),
        ("gptj-6b", "attn_out", 128, 4),
        ("gptj-6b", "head", 128, 1),
    ],
)
def test_tiles_of_128_tokens_are_as_tall_as_leaves_most_multiprocessors_one(
    model: str, region: str, rows: int, splits: int
) -> None:
    """And only long rows are shared by programs of tall tiles."""
    config = ring_rule(LINEARS[model][1][region], 128, context("sm_90"))
    assert (config.block_n, config.splits) == (rows, splits)


def test_tuning_tries_the_rule_first_and_the_kernel_that_will_run() -> None:
    dtype, regions = LINEARS["llama3-8b"]
    for spec in regions.values():
        here = context("sm_90")
        assert linear_candidates(spec, dtype, 32, here)[0] == ring_rule(spec, 32, here)
        assert isinstance(linear_candidates(spec, dtype, 32, context("sm_80"))[0], TileConfig)


def test_splits_meet_in_memory_of_their_own() -> None:
    """A case of any number of tokens runs several tiles of tokens at once, which must not share that memory."""
    dtype, regions = LINEARS["llama3-8b"]
    spec = replace(regions["mlp_out"], out_features=1024, segments=(Segment(0, 1024),), rows="R", residuals=0)
    spec = replace(spec, scale=0.5)  # which no library does
    for target in ("sm_80", "sm_90"):
        program, requests = programs_for(spec, linear_operands(spec, dtype), context(target))
        splits = {r.name: r.constexprs.get("SPLITS", 1) for r in requests}
        endless = [case for case in program.cases if case.max_tokens == 0]
        assert endless
        assert all(splits[launch.target] == 1 for case in endless for launch in case.launches)
        assert any(splits[launch.target] > 1 for case in program.cases for launch in case.launches)


def test_candidates_hold_every_size_of_tile_before_any_twice() -> None:
    spec = LINEARS["llama3-8b"][1]["attn_out"]
    first = tile_candidates(spec, 16, context("sm_90"))[:10]
    assert len({(c.block_n, c.block_k, c.splits > 1) for c in first}) == 10
    gated = LINEARS["llama3-8b"][1]["mlp_in"]
    assert min(c.block_n for c in row_candidates(gated)) >= 2


def test_a_target_without_the_dtype_is_refused() -> None:
    dtype, regions = LINEARS["llama3-8b"]
    spec = regions["attn_out"]
    with pytest.raises(UserError, match="sm_75 does not compute in bfloat16"):
        programs_for(spec, linear_operands(spec, dtype), context("sm_75"))


def test_a_measured_configuration_is_used_only_where_it_fits() -> None:
    dtype, regions = LINEARS["llama3-8b"]
    spec = regions["attn_out"]
    config = asdict(TileConfig(64, 32, 128, stages=8, splits=2, prefetch=512))
    entry = {"shape": [4096, 4096], "gated": False, "tokens": 32, "config": config}
    here = replace(context("sm_90"), measured=(entry,))
    assert vars(tile_config(spec, dtype, 32, here)) | config == vars(tile_config(spec, dtype, 32, here))
    added = replace(spec, add=True)
    assert tile_config(added, dtype, 32, here).stages < 8
