"""The text that quantization is calibrated on and judged by."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from dscompile.compiler.source import ModelSource, write_tokenizer
from dscompile.runtime.errors import UserError
from dscompile.runtime.tokenizer import Tokenizer

WINDOW = 512
MAX_WINDOWS = 128
# Of the windows, this part at the text's end is held out, at most so many.
HELD_OUT = 4
MAX_HELD_OUT = 32
RANDOM_WINDOWS = 4


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids. held_out: what the accuracy is measured on; none where the tokens are random."""

    name: str
    windows: list[list[int]]
    held_out: list[list[int]]


def read_calibration(path: Path | None, source: ModelSource, max_seq_len: int) -> CalibrationText:
    """Tokenize the file, or our own text where there is none, and cut it into windows.

    A model without a tokenizer is calibrated on random tokens, unless a file is given.
    Raises UserError: a file that is missing, empty, not text or shorter than one window; no tokenizer for it.
    """
    window = min(WINDOW, max_seq_len)
    text = _read(path) if path else files("dscompile.compiler").joinpath("calibration.txt").read_text("utf-8")
    name = path.name if path else "a small built-in text; give --calibrate FILE for one like the model's use"
    vocab_size = source.config.get_text_config(decoder=True).vocab_size
    with tempfile.TemporaryDirectory() as scratch:
        if write_tokenizer(source, Path(scratch)):
            tokens = Tokenizer(scratch).encode(text)
        elif path:
            raise UserError(f"{source.name}: has no tokenizer to read {path} with; leave out --calibrate")
        else:
            generator = torch.Generator().manual_seed(0)
            shape = (RANDOM_WINDOWS, window)
            windows = torch.randint(vocab_size, shape, generator=generator).tolist()
            return CalibrationText("random tokens: the model has no tokenizer", windows, [])
    if tokens and max(tokens) >= vocab_size:
        raise UserError(f"{source.name}: its tokenizer makes token {max(tokens)}, its vocabulary ends at {vocab_size}")
    windows = [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)]
    if not windows:
        raise UserError(
            f"{path or name}: has {len(tokens)} tokens, less than one window of {window}; give a longer text"
        )
    held_out = min(MAX_HELD_OUT, len(windows) // HELD_OUT)
    kept = windows[: len(windows) - held_out]
    return CalibrationText(name, kept[:MAX_WINDOWS], windows[len(kept) :] or kept)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; give a text file to calibrate on") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a text file to calibrate on") from error
    if not text.strip():
        raise UserError(f"{path}: is empty; give a longer text to calibrate on")
    return text
