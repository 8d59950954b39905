"""What kernel selection knows about the operands of a step and about the artifact around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dscompile.codegen.emit import TRITON_TYPE, Param
from dscompile.codegen.targets import shared_limit
from dscompile.runtime.plan import KVGroup


@dataclass(frozen=True)
class Operand:
    """A tensor bound to a role of a step, rows of `stride` elements.

    aligned: its address is a multiple of 16 bytes
    """

    dtype: str
    stride: int
    shape: tuple[int, ...] = ()
    aligned: bool = True


@dataclass(frozen=True)
class KernelContext:
    """The artifact the kernels are for.

    targets:  every architecture that runs the same launches ("sm_90", ...)
    measured: configurations found by measuring this model, JSON objects as in codegen/tuned; they go before the table
    deterministic: a row's result must not depend on the other rows
    """

    targets: tuple[str, ...]
    page_size: int
    max_seq_len: int
    max_batch: int
    max_step_tokens: int
    kv_groups: tuple[KVGroup, ...]
    measured: tuple[dict, ...] = ()
    deterministic: bool = False

    @property
    def shared_budget(self) -> int:
        """Shared memory of a block in bytes; sm_80 cubins are kept small enough to serve 8.6 and 8.9 as well."""
        served = {t: ("sm_80", "sm_86") if t == "sm_80" else (t,) for t in self.targets}
        return min(shared_limit(s) for s in served.values())


# "in.x", "out.y0", "w.weight" -> operand
Operands = Mapping[str, Operand]


class Arguments:
    """The arguments of a launch and the parameters of its kernel, gathered together in one order."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._args: list[str] = []
        self._params: list[Param] = []

    def bind(self, *roles: str) -> None:
        """Add operands ("in.x", "w.weight"), sizes ("T", "blocks") or inputs of the step ("step.slots")."""
        for role in roles:
            if role in ("T", "B", "R", "blocks"):
                self._add(role, Param(role, "i32"))
            elif role.startswith("step."):
                self._add(role, Param(parameter(role), "*i32"))
            else:
                operand = self._operands[role]
                self._add(role, Param(parameter(role), "*" + TRITON_TYPE[operand.dtype], operand.aligned))

    def bind_memory(self, arg: str, dtype: str) -> None:
        """Add scratch memory or the KV pool, aligned, seen as `dtype`."""
        self._add(arg, Param(parameter(arg), "*" + TRITON_TYPE[dtype], aligned=True))

    def _add(self, arg: str, param: Param) -> None:
        self._args.append(arg)
        self._params.append(param)

    @property
    def args(self) -> tuple[str, ...]:
        return tuple(self._args)

    @property
    def params(self) -> tuple[Param, ...]:
        return tuple(self._params)


def parameter(arg: str) -> str:
    """The name of a kernel's parameter for an argument of its launch: "in.residual0" -> "residual0_ptr"."""
    return arg.rsplit(".", 1)[-1] + "_ptr"


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
