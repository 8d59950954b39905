"""Artifacts of the tiny models, written as the compiler writes them, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from dscompile.runtime.artifact import atomic_directory, write_manifest, write_plan
from dscompile.runtime.manifest import Manifest
from tests.runtime.models import Model

EOS = 256


def write_tokenizer(directory: Path) -> None:
    """One token per byte, and <end> = 256."""
    vocab = {symbol: i for i, symbol in enumerate(_byte_alphabet())}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    config = {"eos_token": {"content": "<end>"}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def write_artifact(out: Path, model: Model, tokenizer: bool = False, stored: bool = True, **facts) -> Path:
    """Write a whole artifact. stored False: dummy weights, made at load."""
    with atomic_directory(out) as directory:
        write_plan(directory, model.plan)
        if stored:
            (directory / "weights").mkdir()
            names = sorted(model.weights)
            for i, part in enumerate((names[::2], names[1::2]), 1):
                tensors = {n: model.weights[n].contiguous() for n in part}
                save_file(tensors, directory / "weights" / f"rank0-{i:05}.safetensors")
        if tokenizer:
            write_tokenizer(directory)
        plan = model.plan
        known = {
            "name": "tiny",
            "architecture": "Tiny",
            "num_params": sum(w.numel() for w in model.weights.values()),
            "dtype": model.shape.dtype,
            "weights": "stored" if stored else "dummy",
            "eos_token_ids": (EOS,) if tokenizer else (),
        }
        limits = {n: getattr(plan, n) for n in ("max_seq_len", "max_batch", "max_step_tokens", "vocab_size")}
        write_manifest(directory, Manifest(**{**known, **limits, **facts}))
    return out
