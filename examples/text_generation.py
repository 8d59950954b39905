"""A transformers text-generation pipeline on a compiled model: four sampled continuations of one prompt."""

from __future__ import annotations

import argparse

import torch
from transformers import pipeline, set_seed

from dscompile.compiler import init_inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="EleutherAI/gpt-j-6b", help="hub id or local directory")
    parser.add_argument("--prompt", default="The function returns")
    parser.add_argument("--new-tokens", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    generator = pipeline("text-generation", model=args.model, dtype=dtype, device=0 if on_gpu else -1)
    generator.model = init_inference(generator.model, dtype=dtype)

    set_seed(args.seed)
    outputs = generator(args.prompt, do_sample=True, num_return_sequences=4, max_new_tokens=args.new_tokens)
    for number, output in enumerate(outputs, 1):
        print(f"--- {number}\n{output['generated_text']}")


if __name__ == "__main__":
    main()
