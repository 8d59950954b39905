"""The prompts of the gate: ragged, across blocks of the cache and past attention windows."""

from __future__ import annotations

import torch

from dscompile.runtime.plan import Plan

NEW_TOKENS = 8
LENGTHS = (1, 5, 17, 33, 48)
# How far past a window the longest prompt goes: decoding its last positions then drops keys.
PAST_WINDOW = 12
# Parameters times tokens that a CPU may spend on one prompt.
CPU_WORK = 2e12


def choose_prompts(plan: Plan, num_params: int, avoid: int | None = None, seed: int = 0) -> tuple[list[list[int]], str]:
    """Random token ids of several lengths, and a note on what they leave out.

    avoid: the padding token, where transformers does not count it when it numbers a text's tokens.
    """
    longest = max(1, plan.max_seq_len - NEW_TOKENS)
    lengths = list(dict.fromkeys(min(length, longest) for length in LENGTHS))
    note = ""
    for window in sorted({group.window or group.chunk for group in plan.kv_groups} - {0}):
        if window + PAST_WINDOW > longest:
            continue
        if num_params * window > CPU_WORK and not torch.cuda.is_available():
            note = f"no prompt went past the window of {window} tokens"
        elif window + PAST_WINDOW > max(lengths):
            lengths.append(window + PAST_WINDOW)
    generator = torch.Generator().manual_seed(seed)
    return [_random_tokens(plan.vocab_size, n, avoid, generator) for n in lengths], note


def choose_texts(plan: Plan, num_params: int, avoid: int | None, seed: int = 0) -> tuple[list[list[int]], str]:
    """The same for an encoder, the longest text it takes among them."""
    lengths = {min(length, plan.max_seq_len) for length in LENGTHS}
    note = ""
    if num_params * plan.max_seq_len <= CPU_WORK or torch.cuda.is_available():
        lengths.add(plan.max_seq_len)
    else:
        note = f"no text had all {plan.max_seq_len} tokens"
    generator = torch.Generator().manual_seed(seed)
    return [_random_tokens(plan.vocab_size, n, avoid, generator) for n in sorted(lengths)], note


def _random_tokens(vocab_size: int, length: int, avoid: int | None, generator: torch.Generator) -> list[int]:
    tokens = torch.randint(vocab_size - (avoid is not None), (length,), generator=generator)
    return (tokens if avoid is None else tokens + (tokens >= avoid).long()).tolist()


def kv_tokens(plan: Plan, prompts: list[list[int]]) -> int:
    """Tokens of cache that all prompts and what they generate need, in whole blocks."""
    page = plan.page_size
    return sum(-(-(len(prompt) + NEW_TOKENS) // page) + 1 for prompt in prompts) * page
