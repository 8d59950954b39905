"""The model to compile: a local directory, or one of the hub's, with its configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from dscompile.compiler.progress import Progress, Silent
from dscompile.compiler.quiet import quiet
from dscompile.runtime.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
_DOWNLOADED = ("*.json", "*.jinja", "*.model", "*.txt")
# Second copies of the weights in other layouts.
_NOT_DOWNLOADED = ("*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*")


@dataclass(frozen=True)
class ModelSource:
    """A model on disk. name: as the user gave it; directory: where its files are."""

    name: str
    directory: Path
    config: PretrainedConfig

    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: generation_config.json's, else config.json's."""
        path = self.directory / GENERATION_CONFIG
        given = read_json(path).get("eos_token_id") if path.is_file() else None
        if given is None:
            given = getattr(self.config.get_text_config(decoder=True), "eos_token_id", None)
        return () if given is None else tuple(given) if isinstance(given, list) else (int(given),)

    def max_seq_len(self) -> int | None:
        """Longest sequence the model was made for; None where its configuration sets no limit, as with alibi."""
        config = self.config.get_text_config(decoder=True)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    def dtype(self) -> str | None:
        """The dtype that config.json says the model is stored in."""
        dtype = self.config.dtype
        return None if dtype is None else str(dtype).removeprefix("torch.")

    def architecture(self) -> str:
        return (self.config.architectures or [self.config.model_type])[0]


def find_model(model: str | Path, weights: bool = True, progress: Progress | None = None) -> ModelSource:
    """Find a model's files, downloading them if `model` is a hub id that is not cached.

    weights: whether its weights are needed; without, config.json is enough.
    Raises UserError: no such model, no config.json, a configuration that transformers cannot read, no weights.
    """
    name = str(model)
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"{name}: is a file; give the directory of the model, or a hub id")
    if name and path.is_dir():
        directory = path
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise UserError(f"{name or 'MODEL'}: no such directory")
    else:
        progress = progress or Silent()
        progress.start("download")
        directory = _download(name, weights)
        progress.finish()
    if not (directory / CONFIG).is_file():
        raise UserError(f"{name}: there is no {CONFIG} in this directory; give a Hugging Face model's directory or id")
    source = ModelSource(name, directory, _read_config(name, directory))
    if weights:
        check_has_weights(source)
    return source


def check_has_weights(source: ModelSource) -> None:
    """Raise UserError where a model's directory holds no safetensors."""
    if any(source.directory.glob("*.safetensors")):
        return
    if any(source.directory.glob("*.bin")) or any(source.directory.glob("*.pt")):
        raise UserError(
            f"{source.name}: its weights are pickled (.bin), which dscompile does not load; convert them: load the "
            f"model with transformers and save_pretrained() it"
        )
    raise UserError(f"{source.name}: has no weights (*.safetensors); give --dummy-weights to compile random ones")


def write_tokenizer(source: ModelSource, out: Path) -> bool:
    """Copy the tokenizer and generation config into an artifact, converting a slow one. False where there is none."""
    for name in TOKENIZER_FILES:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, out / name)
    if (out / "tokenizer.json").is_file():
        return True
    if not any((source.directory / name).is_file() for name in _SLOW_TOKENIZERS):
        return False
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.directory, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError):
        return False
    return True


def _read_config(name: str, directory: Path) -> PretrainedConfig:
    read_json(directory / CONFIG)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Configuration classes validate in their own ways; whatever they raise, the file is what is wrong.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: transformers cannot read its {CONFIG}: {reason}") from error
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else type(quantized).__name__
        raise UserError(f"{name}: its checkpoint is quantized already ({method}); give the original model")
    return config


def read_json(path: Path, kind: type = dict) -> Any:
    """A file's data. Raises UserError naming it, if it is not JSON or not of that kind."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, kind):
        raise UserError(f"{path}: is not a JSON {'object' if kind is dict else 'array'}")
    return data


def _download(name: str, weights: bool) -> Path:
    """The directory of a hub model in the cache. huggingface_hub falls back to the cache when there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = [*_DOWNLOADED, "*.safetensors"] if weights else [*_DOWNLOADED]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=[*_NOT_DOWNLOADED]))
    except GatedRepoError as error:
        raise UserError(
            f"{name}: access to this model is restricted; accept its licence and log in to the hub"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name}: no such directory, and no such model on the hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"{name}: no such directory, not in the hub's cache, and the hub cannot be reached") from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name}: no such directory, and the hub did not answer ({reason})") from error
