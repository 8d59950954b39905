"""The engine: requests in, tokens out, everything through one `step()`."""

from __future__ import annotations

import numbers
import operator
import secrets
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import Batch, BatchRow, Executor, Pending
from dscompile.runtime.generate import Request, Result
from dscompile.runtime.manifest import Manifest
from dscompile.runtime.plan import Plan
from dscompile.runtime.pooling import find_pooling, normalized
from dscompile.runtime.sampler import SamplingParams
from dscompile.runtime.scheduler import Scheduler
from dscompile.runtime.sequence import Sequence
from dscompile.runtime.tokenizer import Tokenizer

Prompt = str | Seq[int]


class Engine:
    """Runs requests against one artifact. Not thread-safe. Made by `load`.

    Prompts are strings or sequences of token ids. Sampling is given as keywords of `SamplingParams`, or as `params`.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        eos_ids: Seq[int] = (),
        manifest: Manifest | None = None,
    ) -> None:
        self.executor = executor
        self.plan: Plan = executor.plan
        self.device: torch.device = executor.device
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.eos_ids = frozenset(eos_ids)
        self.scheduler = Scheduler(self.plan, executor.num_blocks, executor.max_logit_rows)
        self._requests: dict[int, Request] = {}
        self._in_flight: deque[tuple[Batch, Pending]] = deque()
        self._next_id = 0

    # ------------------------------------------------------------ whole requests

    def generate(
        self, prompts: Prompt | Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None, **sampling: Any
    ) -> list[Result]:
        """Continue every prompt; results in the prompts' order. `params` may be one for all or one for each.

        Prompts that may get the most new tokens are queued first, so that few rows are left for few steps at the end.
        """
        self._refuse_encoder("generate")
        prompts = _as_list(prompts)
        one_for_all = params is None or isinstance(params, SamplingParams)
        each: list[Any] = [params] * len(prompts) if one_for_all else list(params)  # type: ignore[arg-type]
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} sets of sampling parameters for {len(prompts)} prompts; give one for each")
        sequences = [self._sequence(prompt, one, sampling) for prompt, one in zip(prompts, each, strict=True)]
        requests: dict[int, Request] = {}
        try:
            for sequence in sorted(sequences, key=lambda s: s.params.max_new_tokens, reverse=True):
                requests[sequence.id] = self._add(sequence)
            self._run(requests)
        finally:
            self._cancel(requests.values())
        return [requests[sequence.id].result() for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Iterator[str]:
        """Continue one prompt, text as it comes: whole characters, never a part of a stop string."""
        self._refuse_encoder("stream")
        if self.tokenizer is None:
            raise UserError("this artifact has no tokenizer, so there is no text to stream; use generate()")
        request = self.add_request(prompt, params, streaming=True, **sampling)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        try:
            while not request.done:
                self.step()
                if piece := request.new_text():
                    yield piece
        finally:
            self._cancel([request])

    def chat(self, messages: Seq[Mapping[str, Any]], params: SamplingParams | None = None, **sampling: Any) -> Result:
        """Answer messages [{"role": "user", "content": ...}, ...] through the model's chat template (needs jinja2)."""
        from dscompile.runtime.chat import render_chat

        self._refuse_encoder("chat")
        if self.tokenizer is None:
            raise UserError("this artifact has no tokenizer, so it cannot chat; give generate() token ids")
        tokens = self.tokenizer.encode(render_chat(self.tokenizer, messages), add_special_tokens=False)
        return self.generate([tokens], params, **sampling)[0]

    def logits(self, prompts: Seq[Prompt]) -> list[torch.Tensor]:
        """Logits after every token of every prompt: [len, vocab] float32 on the CPU each."""
        self._refuse_encoder("logits")
        return self._outputs(prompts, lambda logits: logits)

    def hidden_states(self, prompts: Seq[Prompt]) -> list[torch.Tensor]:
        """Of an encoder: the last hidden state of every token of every prompt, [len, D] float32 on the CPU each."""
        self._require_encoder("hidden_states")
        return self._outputs(prompts, lambda hidden: hidden)

    def embed(
        self, texts: Prompt | Seq[Prompt], pooling: str | None = None, normalize: bool | None = None
    ) -> torch.Tensor:
        """Of an encoder: one vector per text, [n, D] float32 on the CPU. Texts are batched without padding.

        A string of more tokens than the model's max_seq_length (sentence_bert_config.json) is cut, as
        sentence-transformers does; token ids are taken as they are.

        pooling:   "mean", "cls" (the first token's) or "max" over a text's tokens; None: the model's own
        normalize: whether to scale each vector to length 1; None: as the model's own
        """
        self._require_encoder("embed")
        own = self.manifest
        pool = find_pooling(pooling or (own.pooling if own else "") or "mean")
        vectors = self._outputs([self._cut(text) for text in _as_list(texts)], pool)
        found = torch.stack(vectors) if vectors else torch.empty(0, self.plan.output_width)
        scale = normalize if normalize is not None else bool(own and own.normalize)
        return normalized(found) if scale else found

    def _cut(self, text: Prompt) -> Prompt:
        """A string that is too long for the model as the token ids of its beginning."""
        longest = self.manifest.max_text_tokens if self.manifest else 0
        if not longest or not isinstance(text, str) or self.tokenizer is None:
            return text
        return self.tokenizer.encode(text, max_tokens=min(longest, self.plan.max_seq_len))

    def _outputs(self, prompts: Any, read: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """What `read` makes of every prompt's rows of output, in order; of a prompt that is done no more is kept."""
        requests: list[Request] = []
        found: dict[int, torch.Tensor] = {}
        try:
            for prompt in _as_list(prompts):
                sequence = Sequence(self._id(), self._tokens(prompt), SamplingParams(), wants_logits=True)
                requests.append(self._add(sequence))
            mine = {r.sequence.id for r in requests}
            while len(found) < len(requests):
                for request in self.step():
                    if request.sequence.id in mine and request.logits is not None:
                        found[request.sequence.id] = read(request.logits)
                        request.logits = None
        finally:
            self._cancel(requests)
        return [found[request.sequence.id] for request in requests]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included. Raises UserError if the artifact has no tokenizer."""
        if self.tokenizer is None:
            raise UserError("this artifact has no tokenizer; give token ids instead of text")
        return self.tokenizer.encode(text)

    def warm_up(self) -> None:
        """Prepare steps of every batch size, so that no request waits for the first step of its kind."""
        self._refuse_encoder("warm_up")
        self.executor.warm_up()

    # ------------------------------------------------------------ requests that join and leave

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, streaming: bool = False, **sampling: Any
    ) -> Request:
        """Queue a request; it joins at a following `step`. streaming: keep `Request.new_text` up to date."""
        self._refuse_encoder("add_request")
        return self._add(self._sequence(prompt, params, sampling), streaming)

    def cancel(self, request: Request) -> None:
        """Drop a request that is not done; its blocks are free at once."""
        self._cancel([request])

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def counters(self) -> Counter[str]:
        """steps, tokens (computed, recomputed ones included), logit_rows, preemptions."""
        return self.executor.counters + self.scheduler.counters

    def step(self) -> list[Request]:
        """Keep the executor busy, read its oldest step; returns the requests that this finished."""
        while len(self._in_flight) < self.executor.max_in_flight:
            batch = self.scheduler.schedule()
            if batch is None:
                break
            self._in_flight.append((batch, self.executor.launch(batch)))
        if not self._in_flight:
            assert not self._requests, "requests are waiting and none can run"
            return []
        batch, pending = self._in_flight.popleft()
        result = pending.wait()
        finished = []
        for row, token, logprob, logits in zip(batch.rows, result.tokens, result.logprobs, result.logits, strict=True):
            row.sequence.num_in_flight -= row.sample
            request = self._requests.get(row.sequence.id)
            if request is None:
                continue  # it ended while this step was in flight
            if logits is not None:
                self._collect(request, row, logits)
            if row.sample:
                self._append(request, token, logprob)
            if request.done:
                self._remove(request)
                finished.append(request)
        return finished

    # ------------------------------------------------------------ one row of a step

    def _append(self, request: Request, token: int, logprob: float) -> None:
        """Add a sampled token and end the request if it is over."""
        sequence = request.sequence
        sequence.tokens.append(token)
        if sequence.params.logprobs:
            sequence.logprobs.append(logprob)
        num_new = len(sequence.tokens) - sequence.num_prompt
        if token in sequence.eos_ids or request.read_tokens():
            sequence.finish_reason = "stop"
        elif num_new >= sequence.params.max_new_tokens or len(sequence.tokens) > self.plan.max_seq_len:
            sequence.finish_reason = "length"
        if request.done:
            request.finish()

    def _collect(self, request: Request, row: BatchRow, logits: torch.Tensor) -> None:
        """Put a piece's logits in their place; a piece recomputed after preemption lands where it was."""
        sequence = row.sequence
        if request.logits is None:
            request.logits = torch.empty(sequence.num_prompt, self.plan.output_width)
        end = row.start + row.num_tokens
        request.logits[row.start : end] = logits
        if end == sequence.num_prompt:
            sequence.finish_reason = "length"

    # ------------------------------------------------------------ book-keeping

    def _run(self, requests: Collection[int]) -> None:
        """Step until the requests of these ids are done."""
        left = len(requests)
        while left:
            left -= sum(r.sequence.id in requests for r in self.step())

    def _refuse_encoder(self, method: str) -> None:
        if self.plan.is_encoder:
            raise UserError(f"this artifact is an encoder, which has no {method}(); use embed()")

    def _require_encoder(self, method: str) -> None:
        if not self.plan.is_encoder:
            raise UserError(f"this artifact generates text and is no encoder, so it has no {method}(); use generate()")

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _sequence(self, prompt: Prompt, params: SamplingParams | None, sampling: Mapping[str, Any]) -> Sequence:
        """A request to generate, checked and not queued."""
        params = _sampling(params, sampling)
        tokens = self._tokens(prompt)
        if params.stop and self.tokenizer is None:
            raise UserError("this artifact has no tokenizer, so stop strings cannot be found; leave stop out")
        eos = self.eos_ids if params.eos_token_ids is None else frozenset(params.eos_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        eos = frozenset() if params.ignore_eos else frozenset(t for t in eos if 0 <= t < self.plan.vocab_size)
        return Sequence(self._id(), tokens, params, seed, eos)

    def _add(self, sequence: Sequence, streaming: bool = False) -> Request:
        self.scheduler.add(sequence)
        request = Request(sequence, self.tokenizer, streaming)
        self._requests[sequence.id] = request
        return request

    def _remove(self, request: Request) -> None:
        del self._requests[request.sequence.id]
        self.scheduler.remove(request.sequence)

    def _cancel(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.sequence.id in self._requests:
                self._remove(request)

    def _tokens(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, checked."""
        tokens = self.encode(prompt) if isinstance(prompt, str) else _ids(prompt)
        if not tokens:
            raise UserError("the prompt is empty; give at least one token")
        if len(tokens) > self.plan.max_seq_len:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, the artifact takes {self.plan.max_seq_len}; shorten it, "
                "or compile with a larger --max-seq-len"
            )
        if min(tokens) < 0 or max(tokens) >= self.plan.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.plan.vocab_size)
            raise UserError(f"token id {wrong} is out of range: the vocabulary has {self.plan.vocab_size}")
        return tokens


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or several -> several."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], numbers.Integral)):
        return [prompts]
    return list(prompts)


def _ids(prompt: Any) -> list[int]:
    try:
        values = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        kinds = set(map(type, values))
        if bool in kinds:
            raise TypeError
        return values if kinds <= {int} else [operator.index(t) for t in values]
    except TypeError as error:
        raise UserError("a prompt is a string or a list of token ids (whole numbers)") from error


def _sampling(params: SamplingParams | None, sampling: Mapping[str, Any]) -> SamplingParams:
    if params is not None:
        if sampling:
            raise UserError("give sampling either as params or as keywords, not both")
        return params
    unknown = sampling.keys() - SamplingParams.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"unknown sampling parameter {sorted(unknown)[0]!r}")
    return SamplingParams(**{name: value for name, value in sampling.items() if value is not None})
