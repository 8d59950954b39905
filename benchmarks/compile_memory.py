"""Peak memory and time of compiling large checkpoints, the verification aside.

python -m benchmarks.compile_memory --model llama3-8b            (writes a random checkpoint of the real size first)
python -m benchmarks.compile_memory --model llama3-70b --dummy   (traces and plans from the configuration alone)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.machine import RESULTS, write_result
from benchmarks.models import MODELS

SHARD_BYTES = 2 << 30
COMPILE = """
import sys
from dscompile.compiler import compile_model
model, out, dtype, dummy = sys.argv[1:]
dummy = dummy == "True" or None
compile_model(model, out, dtype=dtype, target="sm_90", verify=False, dummy_weights=dummy, max_seq_len=2048)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def main() -> None:
    args = _parse()
    make, dtype = MODELS[args.model]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        model = Path(scratch) / "model"
        make().save_pretrained(model)
        size = 0 if args.dummy else write_checkpoint(make(), dtype, model)
        start = time.perf_counter()
        command = [sys.executable, "-c", COMPILE, str(model), str(Path(scratch) / "out"), dtype, str(args.dummy)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    peak = 1024 * int(done.stdout.split()[-1])
    row = {"model": args.model, "checkpoint_bytes": size, "seconds": round(seconds, 1), "peak_resident_bytes": peak}
    print(f"{args.model}: checkpoint {size / 2**30:.1f} GiB, {seconds:.0f} s, peak {peak / 2**30:.2f} GiB resident")
    words = f"--model {args.model}" + (" --dummy" if args.dummy else "")
    name = f"compile_memory-{args.model}"
    print(write_result(name, {"command": f"python -m benchmarks.compile_memory {words}", "rows": [row]}, args.out))


def write_checkpoint(config: PretrainedConfig, dtype: str, directory: Path) -> int:
    """Write a sharded random checkpoint of a configuration, a shard in memory at a time; returns its bytes."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).state_dict()
    shards: list[list[str]] = [[]]
    held = total = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if held and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held, total = held + size, total + size
    index = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.empty(state[n].shape, dtype=state[n].dtype).normal_(0, 0.02) for n in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(_index(index, total))
    return total


def _index(weight_map: dict[str, str], total: int) -> str:
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama3-8b", choices=list(MODELS))
    parser.add_argument("--dummy", action="store_true", help="no checkpoint: config.json alone")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint goes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
