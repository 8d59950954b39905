"""The artifact as a directory: written whole or not at all, and trusted only after it has been checked."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dscompile.runtime.codec import FormatError, decode, encode
from dscompile.runtime.errors import UserError
from dscompile.runtime.manifest import FILE_NAME, FileEntry, Manifest, manifest_to_json, read_manifest
from dscompile.runtime.plan import Plan

__all__ = [
    "atomic_directory",
    "hash_files",
    "read_manifest",
    "read_plan",
    "verify_artifact",
    "write_json",
    "write_manifest",
    "write_plan",
]

PLAN_NAME = "plan.json"
WEIGHTS_DIR = "weights"


# ---------------------------------------------------------------- write


def write_json(path: Path, data: Any) -> None:
    """Write JSON that is the same for the same data, whatever the machine."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_plan(directory: Path, plan: Plan) -> None:
    """Write plan.json: one step, program and kernel a line, small enough to read."""
    data = encode(plan)
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            body = ",\n  ".join(f"{json.dumps(k)}: {_compact(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n  {body}\n }}")
        elif isinstance(value, list):
            lines.append(f"{json.dumps(key)}: [\n  " + ",\n  ".join(map(_compact, value)) + "\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {_compact(value)}")
    (directory / PLAN_NAME).write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def hash_files(directory: Path, known: dict[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Hash every file under the directory but the manifest: path inside it, with forward slashes -> entry.

    known: entries of files that have not changed since they were hashed.
    """
    known = known or {}
    names = sorted(name for name in _files(directory) if name != FILE_NAME)
    return {
        name: known.get(name) or FileEntry(_sha256(directory / name), (directory / name).stat().st_size)
        for name in names
    }


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with the hashes of all files present: the last file of an artifact. Returns it.

    Files that the given manifest holds already are not hashed again.
    """
    manifest = dataclasses.replace(manifest, files=hash_files(directory, manifest.files))
    write_json(directory / FILE_NAME, manifest_to_json(manifest))
    return manifest


@contextlib.contextmanager
def atomic_directory(out: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `out` that becomes `out` if the block ends well and vanishes otherwise.

    force: replace `out` if it is an artifact. Left-overs of processes that were killed are removed.
    Raises UserError where `out` exists, cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    check_output(out, force)
    _remove_stale(out)
    temporary, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); choose another -o") from error
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{out}: the disk is full; free space or choose another -o") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def check_output(out: str | Path, force: bool = False) -> None:
    """Refuse an `out` that must not be replaced. Raises UserError."""
    out = Path(out)
    if out.is_file() or (out.is_symlink() and not out.is_dir()):
        raise UserError(f"{out}: is a file; -o names a directory to be made")
    if not out.exists():
        return
    if not (out / FILE_NAME).is_file():
        raise UserError(f"{out}: exists and is not an artifact of dscompile; choose another -o")
    if not force:
        raise UserError(f"{out}: exists; give --force to replace it, or choose another -o")


def _remove_stale(out: Path) -> None:
    for path in out.parent.glob(f".{out.name}.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# ---------------------------------------------------------------- read


def verify_artifact(artifact: str | Path, full: bool = True) -> Manifest:
    """Check an artifact's integrity and consistency; needs no GPU.

    full: hash the weight shards too; otherwise only their sizes and headers are read.
    Raises UserError naming the first file or plan entry that is wrong.
    """
    manifest, _ = open_artifact(artifact, full)
    return manifest


def open_artifact(artifact: str | Path, full: bool = False) -> tuple[Manifest, Plan]:
    """Check an artifact and return its manifest and plan. See `verify_artifact`."""
    from dscompile.runtime.plan_check import check_plan
    from dscompile.runtime.weights import check_shards

    root = Path(artifact)
    manifest = read_manifest(root)
    check_files(root, manifest, full)
    plan = read_plan(root)
    for name in ("vocab_size", "max_seq_len", "max_batch", "max_step_tokens"):
        if getattr(plan, name) != getattr(manifest, name):
            raise UserError(f"{root}: {PLAN_NAME} is of another model ({name} differs from the manifest's)")
    check_plan(plan, manifest)
    check_shards(root, manifest, plan)
    return manifest, plan


def check_files(root: Path, manifest: Manifest, full: bool) -> None:
    """Check that the directory holds exactly the manifest's files, as they were written."""
    resolved = root.resolve()
    for name in manifest.files:
        path = root / name
        if not _is_inside(name) or not path.resolve().is_relative_to(resolved):
            raise UserError(f"{root}: the manifest names {name!r}, which is outside the artifact")
        if not path.is_file():
            raise UserError(f"{root}: {name} is missing; copy the artifact again")
    extra = sorted(_files(root) - manifest.files.keys() - {FILE_NAME})
    if extra:
        raise UserError(f"{root}: {extra[0]} is not part of the artifact; remove it")
    for name, entry in manifest.files.items():
        path = root / name
        size = path.stat().st_size
        if size != entry.size:
            kind = "truncated" if size < entry.size else "longer than written"
            raise UserError(f"{root}: {name} is {kind} ({size} bytes, {entry.size} expected); copy the artifact again")
        if (full or not name.startswith(f"{WEIGHTS_DIR}/")) and _sha256(path) != entry.sha256:
            raise UserError(f"{root}: {name} has changed since it was compiled; copy the artifact again")


def read_plan(artifact: str | Path) -> Plan:
    """Read plan.json. Raises UserError if it is broken."""
    path = Path(artifact) / PLAN_NAME
    if not path.is_file():
        raise UserError(f"{artifact}: {PLAN_NAME} is missing; copy the artifact again")
    try:
        return decode(Plan, json.loads(path.read_bytes()), "plan")
    except (FormatError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken plan ({error}); compile the model again") from error


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and bool(path.parts)


def _files(root: Path) -> set[str]:
    found = set()
    for directory, directories, names in os.walk(root):
        links = [d for d in directories if os.path.islink(os.path.join(directory, d))]
        found |= {os.path.relpath(os.path.join(directory, n), root).replace(os.sep, "/") for n in [*names, *links]}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
