"""Renders a kernel template to readable Triton source."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"

# For the templates that lay out registers and shared memory themselves.
GLUON = [
    "from triton.experimental import gluon",
    "from triton.experimental.gluon import language as gl",
    "from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier",
    "from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait",
]

TRITON_TYPE = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i8",
}

DESCRIPTOR_BYTES = 128


@dataclass(frozen=True)
class Param:
    """A run-time parameter of a kernel. type: "*fp16", "i32", ...; aligned: address or value is a multiple of 16."""

    name: str
    type: str
    aligned: bool = False


@dataclass(frozen=True)
class KernelRequest:
    """One kernel to be generated: a template with its numbers and structure, and how it is compiled.

    name:       name of the function, of its source and of its cubins; ends in a hash of everything below
    template:   file in codegen/templates, without ".py.j2"
    constexprs: numbers become constants of the source (NAME = tl.constexpr(...)); all are visible to Jinja
    structure:  what only Jinja reads: switches and lists that shape the text
    params:     run-time parameters in order
    descriptors: tensor descriptors that each program builds for the copy engine, DESCRIPTOR_BYTES each
    pdl:        waits for and releases neighbours by programmatic dependent launch, on targets that can
    """

    name: str
    template: str
    constexprs: dict[str, int | float | str | bool]
    params: tuple[Param, ...]
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = True
    num_ctas: int = 1
    descriptors: int = 0
    structure: dict[str, Any] = field(default_factory=dict)


def kernel_request(template: str, constexprs: dict, params: tuple[Param, ...], **options: Any) -> KernelRequest:
    """Return a request whose name is the template's and a hash of its content, so that equal kernels share a name."""
    unnamed = KernelRequest("", template, constexprs, params, **options)
    digest = hashlib.sha256(json.dumps(_plain(unnamed), sort_keys=True).encode()).hexdigest()[:10]
    return KernelRequest(f"{template}_{digest}", template, constexprs, params, **options)


def render(request: KernelRequest, provenance: str = "") -> str:
    """Return the Triton source of a request.

    Every source has the constants PDL and INTERPRET: PDL is turned off for targets without it, INTERPRET is turned on
    by whoever runs the source in Triton's interpreter, which knows no inline assembly.
    """
    numbers = {k: v for k, v in request.constexprs.items() if not isinstance(v, str)}
    numbers |= {"PDL": request.pdl, "INTERPRET": False}
    head = [f"{request.name}: template {request.template}.py.j2"]
    head += [line for line in provenance.splitlines() if line.strip()]
    constants = [f"{k} = tl.constexpr({v!r})" for k, v in numbers.items()]
    body = (
        _environment()
        .get_template(f"{request.template}.py.j2")
        .render(
            **{**request.structure, **request.constexprs},
            name=request.name,
            params=", ".join(p.name for p in request.params),
            pdl=request.pdl,
        )
    )
    lines = ['"""' + "\n".join(head) + '\n"""', ""]
    lines += ["import triton", "import triton.language as tl"]
    lines += ["from triton.language.extra import libdevice"] * ("libdevice." in body)
    lines += ["from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait"]
    lines += GLUON * ("@gluon.jit" in body)
    return "\n".join([*lines, "", *constants, "", "", body.strip(), ""])


def _plain(request: KernelRequest) -> dict:
    params = [[p.name, p.type, p.aligned] for p in request.params]
    return {**request.__dict__, "params": params}


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
