"""Text to token ids and back, with the artifact's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dscompile.runtime.errors import UserError

REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer and what goes with it: special tokens and the chat template.

    path: a directory that holds tokenizer.json, and perhaps tokenizer_config.json and chat_template.jinja.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file}: not a tokenizer ({error}); compile the model again") from error
        self._fast.no_truncation()
        self._fast.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int = 0) -> list[int]:
        """Token ids of a text, with the special tokens the model expects around it; at most max_tokens, if not 0."""
        if max_tokens:
            self._fast.enable_truncation(max_tokens)
        try:
            return self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        finally:
            self._fast.no_truncation()

    def decode(self, tokens: Seq[int], skip_special_tokens: bool = True) -> str:
        return self._fast.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, or nothing."""
        file = self.path / "tokenizer_config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON ({error}); compile the model again") from error


def load_tokenizer(artifact: str | Path) -> Tokenizer | None:
    """The artifact's tokenizer, or None if it holds none."""
    return Tokenizer(artifact) if (Path(artifact) / "tokenizer.json").is_file() else None


class Detokenizer:
    """Text of a growing list of new tokens, read in the context of the prompt and never ending inside a character.

    A token's text depends on its neighbours (a leading blank, a character in several bytes), so each piece is the
    difference of two decodings that start a few tokens earlier.
    """

    CONTEXT = 6

    def __init__(self, tokenizer: Tokenizer, prompt: Seq[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-self.CONTEXT :])
        self._start = 0
        self._read = len(self._tokens)

    def push(self, tokens: Seq[int]) -> str:
        """The text that these tokens complete; a character that is not whole yet waits."""
        self._tokens.extend(tokens)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left, incomplete bytes as the replacement character."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self._read == len(self._tokens):
            return ""
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        text = self._tokenizer.decode(self._tokens[self._start :])
        if text.endswith(REPLACEMENT) and not final:
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]
