"""Ahead-of-time compilation: every kernel fits its targets, cubins are reproducible, mistakes are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dscompile.codegen.aot import KernelError, check_options, compile_kernels
from dscompile.codegen.emit import KernelRequest, Param, kernel_request, render
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.codegen.select import programs_for
from dscompile.codegen.targets import shared_limit
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention, Embed, KVGroup, Linear, Moe, Norm, Quantization, Router, RowNorm, Segment

TARGETS = ("sm_80", "sm_90")
DTYPE = "float16"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def context(targets: tuple[str, ...] = TARGETS) -> KernelContext:
    groups = (KVGroup(2, 2, 64, 64, DTYPE), KVGroup(2, 2, 64, 64, "int8"))
    return KernelContext(targets, 16, max_seq_len=512, max_batch=8, max_step_tokens=256, kv_groups=groups)


def matrix(columns: int, dtype: str = DTYPE) -> Operand:
    return Operand(dtype, columns, (0, columns))


def row() -> tuple[Linear, dict[str, Operand]]:
    spec = Linear(512, 768, (Segment(0, 768, "silu", gated=True),), norm=Norm("rms", 1e-5))
    return spec, {"in.x": matrix(512), "w.weight": Operand(DTYPE, 512, (768, 512)), "out.y0": matrix(384)}


def every_kind() -> list[tuple]:
    layer = Norm("layer", 1e-5)
    linear = Linear(512, 640, (Segment(0, 512), Segment(512, 640, "xielu")), norm=layer, bias=True)
    packed = {
        "in.x": matrix(512),
        "w.weight": Operand(DTYPE, 512, (640, 512)),
        "w.bias": Operand(DTYPE, 1, (640,)),
        "w.alpha": Operand("float32", 1, (4,)),
        "w.row_sum": Operand("float32", 1, (640,)),
        "out.y0": matrix(512),
        "out.y1": matrix(128),
    }
    attention = Attention(4, 2, 64, 64, 0.125, 0, 0, rotary_dim=64)
    heads = {"in.q": matrix(256), "in.k": matrix(128), "in.v": matrix(128), "out.y": matrix(256)}
    heads |= {f"w.rope_{f}": Operand("float32", 32, (512, 32)) for f in ("cos", "sin")}
    table = {"w.table": Operand(DTYPE, 512, (999, 512)), "out.y": matrix(512)}
    norm = {"in.x": matrix(512), "out.y": matrix(512)}
    experts = {"in.x": matrix(512), "in.logits": matrix(8), "in.residual0": matrix(512), "out.y": matrix(512)}
    experts |= {"w.gate_up": Operand(DTYPE, 512, (8, 768, 512)), "w.down": Operand(DTYPE, 384, (8, 512, 384))}
    moe = Moe(512, 384, Router(8, 2, "softmax", True), "silu", residuals=1)
    return [
        row(),
        (linear, packed),
        (attention, heads),
        (replace(attention, group=1), heads),
        (Embed(), table),
        (RowNorm(Norm("rms", 1e-5)), norm),
        (moe, experts),
    ]


def test_every_template_compiles_within_the_targets_limits(tmp_path: Path) -> None:
    requests = [r for spec, operands in every_kind() for r in programs_for(spec, operands, context())[1]]
    kernels = compile_kernels(requests, TARGETS, tmp_path / "out" / "kernels")
    assert {k.template for k in kernels.values()} >= {"linear_row", "linear_tile", "attention_decode", "embed"}
    for name, kernel in kernels.items():
        for target, cubin in kernel.cubins.items():
            assert (tmp_path / "out" / cubin.file).stat().st_size > 0
            assert cubin.shared <= shared_limit((target,)), name
            assert kernel.template not in ("linear_row", "moe_up_row", "moe_down_row") or cubin.spills == 0, name
            assert cubin.pdl == (target == "sm_90")
        assert (tmp_path / "out" / kernel.source).read_text().startswith('"""')


def wide(segment: Segment, residuals: int, out: str = "bfloat16") -> tuple[Linear, dict[str, Operand]]:
    """A linear of int8 rows for many tokens, as large as the copy engine's tiles."""
    spec = Linear(4096, 8192, (segment,), bias=True, residuals=residuals, quantization=Quantization("token"))
    roles = {"in.x": "bfloat16", "w.weight_scale": "float32", "w.bias": "bfloat16", "out.y0": out}
    roles |= {f"in.residual{i}": "bfloat16" for i in range(residuals)}
    operands = {role: Operand(dtype, 8192) for role, dtype in roles.items()}
    return spec, operands | {"w.weight": Operand("int8", 4096, (8192, 4096))}


@pytest.mark.parametrize("segment,residuals", [(Segment(0, 8192), 2), (Segment(0, 8192, "silu", gated=True), 1)])
def test_kernels_of_the_copy_engine_say_what_their_descriptors_take(segment, residuals, tmp_path: Path) -> None:
    requests = programs_for(*wide(segment, residuals), context(("sm_90",)))[1]
    requests = tuple(r for r in requests if r.template == "linear_int8_bulk")
    assert [r.descriptors for r in requests] == [2]
    (kernel,) = compile_kernels(requests, ("sm_90",), tmp_path / "kernels").values()
    assert kernel.cubins["sm_90"].shared <= shared_limit(("sm_90",))
    with pytest.raises(KernelError, match="builds 256 bytes of descriptors, not 1"):
        compile_kernels([replace(requests[0], descriptors=1)], ("sm_90",), tmp_path / "other")


@pytest.mark.parametrize("targets,out", [(("sm_80", "sm_90"), "bfloat16"), (("sm_90",), "float32")])
def test_the_copy_engine_is_left_out_where_it_is_missing_or_its_tiles_too_large(targets, out) -> None:
    requests = programs_for(*wide(Segment(0, 8192), 0, out), context(targets))[1]
    assert "linear_int8_bulk" not in {r.template for r in requests}


def test_cubins_are_the_same_bytes_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = programs_for(*row(), context())[1][:2]
    for place in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{place}"))
        compile_kernels(requests, TARGETS, tmp_path / place / "kernels")
    first = {p.name: p.read_bytes() for p in (tmp_path / "one" / "kernels").iterdir()}
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "two" / "kernels").iterdir()}
    assert len(first) == 2 * (1 + len(TARGETS))


def test_a_second_compilation_takes_cubins_from_the_cache(tmp_path: Path) -> None:
    from dscompile.codegen import aot

    request = programs_for(*row(), context(("sm_90",)))[1][:1]
    first = compile_kernels(request, ("sm_90",), tmp_path / "one" / "kernels")
    before = aot._Workers.run
    aot._Workers.run = lambda *_, **__: {"error": "compiled again"}  # type: ignore[method-assign]
    try:
        assert compile_kernels(request, ("sm_90",), tmp_path / "two" / "kernels") == first
    finally:
        aot._Workers.run = before  # type: ignore[method-assign]


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(KernelError, match="no compile option 'num_warp'"):
        check_options({"num_warp": 4})


def test_too_much_shared_memory_is_refused(tmp_path: Path) -> None:
    spec, operands = row()
    from dscompile.codegen.linear_kernels import tile_request
    from dscompile.codegen.tuned_table import TileConfig

    request = tile_request(spec, operands, TileConfig(block_n=128, block_t=64, block_k=128, stages=4))[0]
    with pytest.raises(KernelError, match="bytes of shared memory, sm_86 has 101376"):
        compile_kernels([request], ("sm_86",), tmp_path / "kernels")


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    good = programs_for(*row(), context(("sm_90",)))[1][0]
    bad = KernelRequest("bad", good.template, good.constexprs, good.params[:-1], structure=good.structure)
    with pytest.raises(KernelError, match="bad does not compile for sm_90"):
        compile_kernels([bad], ("sm_90",), tmp_path / "kernels")


def test_equal_kernels_share_a_name_and_different_ones_do_not() -> None:
    spec, operands = row()
    first, again = (programs_for(spec, operands, context())[1] for _ in range(2))
    assert [r.name for r in first] == [r.name for r in again]
    unaligned = {**operands, "in.x": Operand(DTYPE, 512, (0, 512), aligned=False)}
    assert programs_for(spec, unaligned, context())[1][0].name != first[0].name


def test_a_source_tells_where_it_comes_from() -> None:
    request = kernel_request(
        "embed",
        {"D": 8, "BLOCK": 8, "Y_STRIDE": 8, "SCALE": 1.0},
        (Param("tokens_ptr", "*i32"), Param("table_ptr", "*fp16"), Param("y_ptr", "*fp16")),
        structure={"positions": False, "norm": "", "norm_weight": False, "norm_bias": False},
    )
    text = render(request, "model: tiny\nregion: embed")
    assert text.startswith(f'"""{request.name}: template embed.py.j2\nmodel: tiny\nregion: embed\n"""')
    assert "D = tl.constexpr(8)" in text
    compile(text, "kernel.py", "exec")


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UserError, match="unknown target 'sm_91'"):
        shared_limit(("sm_91",))


@pytest.mark.parametrize("columns", [64, 128, 192, 320])
def test_rings_of_few_blocks_compile(columns: int, tmp_path: Path) -> None:
    spec = Linear(columns, 200, (Segment(0, 200, "silu", gated=True),), norm=Norm("layer", 1e-5))
    operands = {"in.x": matrix(columns), "w.weight": Operand(DTYPE, columns, (200, columns)), "out.y0": matrix(100)}
    operands["w.row_sum"] = Operand("float32", 1, (200,))
    _, requests = programs_for(spec, operands, context(("sm_90",)))
    tiles = [r for r in requests if r.template in ("linear_ring", "linear_tile")]
    assert {r.template for r in tiles} == {"linear_ring" if columns > 64 else "linear_tile"}
    compile_kernels(tiles[:2], ("sm_90",), tmp_path / "kernels")


@pytest.mark.parametrize(("columns", "group"), [(64, 71), (128, 4), (256, 1)])
def test_rings_of_attention_fit_the_registers(columns: int, group: int, tmp_path: Path) -> None:
    spec = Attention(2 * group, 2, columns, columns, columns**-0.5, 0, 0, rotary_dim=columns)
    width = {"in.q": 2 * group, "in.k": 2, "in.v": 2, "out.y": 2 * group}
    operands = {role: matrix(heads * columns) for role, heads in width.items()}
    operands |= {f"w.rope_{f}": Operand("float32", columns // 2, (512, columns // 2)) for f in ("cos", "sin")}
    groups = (KVGroup(2, 2, columns, columns, DTYPE),)
    _, requests = programs_for(spec, operands, replace(context(("sm_90",)), kv_groups=groups, max_seq_len=4096))
    rings = [r for r in requests if r.template in ("attention_ring", "attention_long")]
    kernels = compile_kernels(rings, ("sm_90",), tmp_path / "kernels")
    assert kernels and all(kernel.cubins["sm_90"].spills == 0 for kernel in kernels.values())
    # Two halves of the rows and the copies, each with warps of its own.
    long = [kernel for kernel in kernels.values() if kernel.template == "attention_long"]
    assert [kernel.cubins["sm_90"].num_warps for kernel in long] == [12] * (columns <= 128 and group <= 64)
