"""manifest.json: what an artifact is, what made it, and the hash of every file in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dscompile.runtime.codec import FormatError, decode, encode
from dscompile.runtime.errors import UserError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"

# Raised when the meaning of an op changes, so that an older runtime refuses what it would get wrong.
OP_REVISIONS = {"Embed": 1, "Linear": 2, "Attention": 1, "RowNorm": 1, "KeepRows": 1, "Aten": 1, "Sample": 1}


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What an artifact is.

    tool_versions: what wrote it ("dscompile", "torch", "triton", ...).
    dtype:         of weights and activations; kv_dtype: of the cache.
    targets:       GPU architectures that it holds kernels for ("sm_90"); empty for the CPU alone.
    weights:       "stored", or "dummy": made at load from `seed`.
    eos_token_ids: tokens that end a sequence, from the model's generation_config.json, else its config.json.
    pooling:       of an encoder: how its texts' embeddings are made of hidden states unless a call says otherwise;
                   normalize: whether they are scaled to length 1; max_text_tokens: where longer texts are cut, special
                   tokens included (0: nowhere).
    files:         every file but the manifest, by its path inside the artifact.
    """

    name: str
    architecture: str
    num_params: int
    dtype: str
    max_seq_len: int
    max_batch: int
    max_step_tokens: int
    vocab_size: int
    kv_dtype: str = "auto"
    quantization: str = "none"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    num_ranks: int = 1
    targets: tuple[str, ...] = ()
    weights: Literal["stored", "dummy"] = "stored"
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    pooling: Literal["", "mean", "cls", "max"] = ""
    normalize: bool = False
    max_text_tokens: int = 0
    tool_versions: dict[str, str] = field(default_factory=dict)
    op_revisions: dict[str, int] = field(default_factory=lambda: dict(OP_REVISIONS))
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def summary(self) -> dict[str, Any]:
        """The facts a person asks for, as JSON data; no file table."""
        facts = dataclasses.asdict(self)
        del facts["files"], facts["op_revisions"]
        if self.weights == "stored":
            del facts["seed"]
        if not self.pooling:
            del facts["pooling"], facts["normalize"], facts["max_text_tokens"]
        return facts


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """JSON data in which the versions are always written out."""
    data = encode(manifest)
    del data["op"]
    data["files"] = {name: {"sha256": e.sha256, "size": e.size} for name, e in sorted(manifest.files.items())}
    return {"format_version": manifest.format_version, "op_revisions": manifest.op_revisions, **data}


def read_manifest(artifact: str | Path) -> Manifest:
    """Read and check an artifact's manifest. Raises UserError if it is absent, broken or newer than this runtime."""
    root = Path(artifact)
    path = root / FILE_NAME
    if not root.exists():
        raise UserError(f"{root}: no such artifact; compile one with: dscompile MODEL -o {root}")
    if not path.is_file():
        raise UserError(f"{root}: not an artifact of dscompile (it has no {FILE_NAME})")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); compile the model again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise UserError(f"{path}: has no format_version; compile the model again")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{root}: format_version {version} is newer than this runtime, which reads up to {FORMAT_VERSION}; "
            "upgrade dscompile"
        )
    try:
        manifest = decode(Manifest, data, "manifest")
    except FormatError as error:
        raise UserError(f"{path}: {error}; compile the model again") from error
    for op, revision in manifest.op_revisions.items():
        if revision > OP_REVISIONS.get(op, 0):
            raise UserError(
                f"{root}: needs revision {revision} of {op}, this runtime has {OP_REVISIONS.get(op, 'none')}"
            )
    return manifest
