"""The GPU architectures that kernels can be compiled for, and what a block may use on each."""

from __future__ import annotations

from dscompile.runtime.errors import UserError

# Shared memory a block may ask for, in bytes (CUDA C++ Programming Guide, table "Technical Specifications").
SHARED_LIMIT = {
    75: 65_536,
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
    121: 101_376,
}


def capability(target: str) -> int:
    """Return 90 for "sm_90"; UserError if `target` is no architecture we compile for."""
    digits = target.removeprefix("sm_")
    if target.startswith("sm_") and digits.isdecimal() and int(digits) in SHARED_LIMIT:
        return int(digits)
    known = ", ".join(f"sm_{c}" for c in SHARED_LIMIT)
    raise UserError(f"unknown target {target!r}: choose from cpu, native, {known}")


def shared_limit(targets: tuple[str, ...]) -> int:
    """Bytes of shared memory that a block may use on every one of `targets`.

    An sm_80 cubin also serves 8.6 and 8.9, but only where it fits them: the loader checks.
    """
    return min(SHARED_LIMIT[capability(t)] for t in targets)


def has_pdl(target: str) -> bool:
    """Whether the architecture can start a kernel before the previous one ends (programmatic dependent launch)."""
    return capability(target) >= 90


def are_hopper(targets: tuple[str, ...]) -> bool:
    """Whether all are 9.0, whose tensor cores multiply from shared memory and whose copy engine fills it."""
    return all(capability(t) == 90 for t in targets)


def supports(target: str, dtype: str) -> bool:
    """Whether the architecture computes in `dtype`; bfloat16 needs sm_80."""
    return dtype != "bfloat16" or capability(target) >= 80
