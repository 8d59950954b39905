"""A request as its user sees it: text as it grows, stop strings, the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dscompile.runtime.sequence import Sequence
from dscompile.runtime.tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Result:
    """The outcome of a request.

    text:   of the new tokens, cut before a stop string; "" if the artifact has no tokenizer.
    tokens: new tokens only, an end-of-sequence token included.
    finish_reason: "stop" (end-of-sequence token or stop string) or "length" (max_new_tokens or max_seq_len).
    logprobs: log-probability of each new token, if asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    num_prompt_tokens: int = 0


class Request:
    """A sequence with its text. Made by `Engine.add_request`; `done` turns true in the engine's `step`."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None, streaming: bool = False) -> None:
        self.sequence = sequence
        self.logits: torch.Tensor | None = None
        self._stops = sequence.params.stop
        self._detokenizer = Detokenizer(tokenizer, sequence.tokens) if tokenizer else None
        self._eager = streaming or bool(self._stops)
        self._num_read = 0
        self._stopped = False
        self._text = ""
        self._given = 0

    @property
    def done(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def new_tokens(self) -> list[int]:
        return self.sequence.new_tokens

    def read_tokens(self) -> bool:
        """Turn tokens that have arrived into text; true if a stop string is complete."""
        return self._eager and self._read()

    def finish(self) -> None:
        """Turn all that is left into text."""
        if self._detokenizer and not self._stopped and not self._read():
            self._text += self._detokenizer.flush()

    def new_text(self) -> str:
        """Text not handed out before, less what may turn out to begin a stop string."""
        end = len(self._text) if self.done else len(self._text) - self._held()
        piece, self._given = self._text[self._given : end], max(end, self._given)
        return piece

    def result(self) -> Result:
        """The outcome; only once `done`."""
        sequence = self.sequence
        reason: FinishReason = "stop" if sequence.finish_reason == "stop" else "length"
        logprobs = list(sequence.logprobs) if sequence.params.logprobs else None
        return Result(self._text, sequence.new_tokens, reason, logprobs, sequence.num_prompt)

    def _read(self) -> bool:
        if self._detokenizer is None:
            return False
        tokens = self.sequence.tokens[self.sequence.num_prompt + self._num_read :]
        self._num_read += len(tokens)
        known = len(self._text)
        self._text += self._detokenizer.push(tokens)
        return self._cut(known)

    def _cut(self, known: int) -> bool:
        """Cut the text before the first stop string that ends after `known` characters."""
        starts = [self._text.find(s, max(0, known - len(s) + 1)) for s in self._stops]
        starts = [start for start in starts if start >= 0]
        if starts:
            self._text = self._text[: min(starts)]
            self._stopped = True
        return self._stopped

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
