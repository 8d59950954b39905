"""Measure an artifact: prefill, decode step, and the share of the machine's read bandwidth that the step reaches."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import torch

from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Plan
from dscompile.runtime.traffic import bytes_by_kernel, bytes_per_step

BANDWIDTH_BYTES = 4 << 30
BANDWIDTH_SUMS = 100
WARM_UPS = 2


def bench(engine: Any, batches: Sequence[int], prompt_tokens: int, new_tokens: int, repeat: int) -> dict[str, Any]:
    """Measure each batch size through the engine, host time included.

    returns: device, prompt_tokens, new_tokens, read_bandwidth (bytes/s, None on the CPU), and per batch size
    prefill_ms, decode_step_ms (of steps in which all sequences decode) and its deviation over the runs,
    tokens_per_second, bytes_per_step, and on a GPU bandwidth_fraction and gpu_idle, the part of a step's time in
    which its captured graph does not run.
    raises UserError for a batch size or a length the artifact was not compiled for, or too few new tokens.
    """
    _check(engine.plan, batches, prompt_tokens, new_tokens)
    bandwidth = read_bandwidth(engine.device) if engine.device.type == "cuda" else None
    rows = [_measure(engine, batch, prompt_tokens, new_tokens, repeat, bandwidth) for batch in batches]
    return {
        "device": _device_name(engine.device),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "read_bandwidth": bandwidth,
        "batches": rows,
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the best of many sums over 4 GiB of float32 (less where memory is short).

    As many come before them: clocks of a GPU that has been idle take a tenth of a second to rise.
    """
    free, _ = torch.cuda.mem_get_info(device)
    data = torch.ones(min(BANDWIDTH_BYTES, free // 2) // 4, device=device)
    times = []
    for _ in range(2 * BANDWIDTH_SUMS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return data.numel() * 4 / min(times[BANDWIDTH_SUMS:])


def kernel_times(
    engine: Any, batch: int, prompt_tokens: int, steps: int = 64, bandwidth: float | None = None
) -> list[dict[str, Any]]:
    """GPU time per kernel of a decode step, slowest first, from the difference of two profiled generations.

    steps: by which they differ; more than it takes to read the prompts, beside which the first sequences decode.
    bandwidth: bytes per second, of which kernels that read weights or the cache are given the fraction they reach.
    Kernels of a step overlap: a kernel's time is what it adds, so that the times of a step sum to the step's.
    """
    if engine.device.type != "cuda":
        raise UserError("--kernels times GPU kernels; this engine runs on the CPU (leave --kernels out)")
    prompts = _prompts(engine.plan, batch, prompt_tokens)
    steps = min(steps, (engine.plan.max_seq_len - prompt_tokens) // 2)
    long, short = (_profile(engine, prompts, n + 1) for n in (2 * steps, steps))
    per_step: dict[str, tuple[float, float]] = {}
    for name, (count, total) in long.items():
        short_count, short_total = short.get(name, (0, 0.0))
        if count > short_count:
            per_step[name] = (count - short_count) / steps, (total - short_total) / steps
    whole = sum(time for _, time in per_step.values()) or 1.0
    regions = _regions_by_kernel(engine.plan)
    read = bytes_by_kernel(engine.plan, batch, prompt_tokens + steps + steps // 2)
    return [
        {
            "kernel": name,
            "regions": regions.get(name, ""),
            "launches_per_step": launches,
            "us_each": time / launches,
            "us_per_step": time,
            "share": time / whole,
            "bandwidth_fraction": 1e6 * read[name] / time / bandwidth if bandwidth and name in read else None,
        }
        for name, (launches, time) in sorted(per_step.items(), key=lambda item: -item[1][1])
    ]


def prefill_ms(engine: Any, batch: int, prompt_tokens: int, repeat: int) -> float:
    """Median milliseconds of a call that generates one token for each of `batch` prompts, host time included."""
    prompts = _prompts(engine.plan, batch, prompt_tokens)
    for _ in range(WARM_UPS):
        _generate(engine, prompts, 1)
    return 1e3 * statistics.median(_seconds(lambda: _generate(engine, prompts, 1)) for _ in range(repeat))


def gpu_idle(engine: Any, prompts: list[list[int]], new_tokens: int) -> float | None:
    """The part of the time from one decode step to the next in which the GPU does not run the captured graph.

    None where new_tokens are too few to tell.
    """
    replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch() -> None:
        nonlocal replays
        replays = engine.executor.watch_replays()

    _seconds_and_steps(engine, prompts, new_tokens, watch)
    torch.cuda.synchronize(engine.device)
    if len(replays) < 3:
        return None
    steady = replays[1:]
    busy = sum(begin.elapsed_time(end) for begin, end in steady[:-1])
    return 1 - busy / steady[0][0].elapsed_time(steady[-1][0])


def _measure(
    engine: Any, batch: int, prompt_tokens: int, new_tokens: int, repeat: int, bandwidth: float | None
) -> dict[str, Any]:
    prompts = _prompts(engine.plan, batch, prompt_tokens)
    _generate(engine, prompts, new_tokens)
    prefill = prefill_ms(engine, batch, prompt_tokens, repeat)
    steps = [_step_seconds(engine, prompts, new_tokens) for _ in range(repeat)]
    step = statistics.median(steps)
    size = bytes_per_step(engine.plan, batch, prompt_tokens + new_tokens // 2)
    return {
        "batch": batch,
        "prefill_ms": prefill,
        "decode_step_ms": 1e3 * step,
        "decode_step_ms_deviation": 1e3 * statistics.pstdev(steps),
        "tokens_per_second": batch / step,
        "bytes_per_step": size,
        "bandwidth_fraction": size / step / bandwidth if bandwidth else None,
        "gpu_idle": gpu_idle(engine, prompts, new_tokens) if bandwidth else None,
    }


def _step_seconds(engine: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Mean seconds, host included, of the steps in which every sequence decodes."""
    seconds, steps = _seconds_and_steps(engine, prompts, new_tokens, lambda: None)
    if not steps:
        raise UserError(
            f"--new-tokens {new_tokens} is too few for {len(prompts)} prompts of {len(prompts[0])} tokens: the first "
            "sequence ends before the last prompt is read; ask for more, or for a smaller --batch"
        )
    return seconds / steps


def _seconds_and_steps(
    engine: Any, prompts: list[list[int]], new_tokens: int, begin: Callable[[], None]
) -> tuple[float, int]:
    """Seconds and number of the steps from where every sequence decodes, when `begin` is called, to the first's end."""
    requests = [engine.add_request(p, max_new_tokens=new_tokens, ignore_eos=True) for p in prompts]
    try:
        while not all(len(r.new_tokens) >= min(2, new_tokens - 1) for r in requests):
            engine.step()
        begin()
        start, steps = perf_counter(), 0
        while not any(r.done for r in requests):
            engine.step()
            steps += 1
        return perf_counter() - start, steps
    finally:
        for request in requests:
            engine.cancel(request)


def _check(plan: Plan, batches: Sequence[int], prompt_tokens: int, new_tokens: int) -> None:
    if new_tokens < 2:
        raise UserError("--new-tokens must be at least 2: the first token belongs to the prefill")
    if prompt_tokens + new_tokens > plan.max_seq_len:
        raise UserError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the artifact's max_seq_len of "
            f"{plan.max_seq_len}; ask for fewer with --prompt-tokens and --new-tokens"
        )
    for batch in batches:
        if not 1 <= batch <= plan.max_batch:
            raise UserError(f"--batch {batch}: the artifact was compiled for 1 to {plan.max_batch}")


def _prompts(plan: Plan, batch: int, length: int) -> list[list[int]]:
    """Prompts that differ from each other, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, plan.vocab_size, (batch, length), generator=generator).tolist()


def _generate(engine: Any, prompts: list[list[int]], new_tokens: int) -> None:
    engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)


def _seconds(function: Callable[[], None]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def _profile(engine: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, tuple[int, float]]:
    """Kernel name -> (launches, microseconds) of one generation."""
    _generate(engine, prompts, new_tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _generate(engine, prompts, new_tokens)
        torch.cuda.synchronize(engine.device)
    events = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return added_times((e.name, e.time_range.start, e.time_range.end) for e in events)


def added_times(spans: Iterable[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """Name -> (count, sum of what each span of that name adds: from the latest end before it to its own end).

    spans: name, start, end; a span that ends before another that began earlier adds nothing
    """
    totals: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    latest = None
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        count, total = totals[name]
        totals[name] = (count + 1, total + max(0.0, end - (start if latest is None else latest)))
        latest = end if latest is None else max(latest, end)
    return dict(totals)


def _regions_by_kernel(plan: Plan) -> dict[str, str]:
    """Name of kernel -> the regions whose steps launch it, "attn_in+mlp_in" for a step that covers two."""
    found: dict[str, set[str]] = defaultdict(set)
    for step in plan.steps:
        for case in plan.programs[step.program].cases if step.program else ():
            for launch in case.launches:
                found[launch.target].add("+".join(step.regions))
    return {name: ", ".join(sorted(regions)) for name, regions in found.items()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
