"""init_inference: a live transformers model becomes a compiled one that answers the same generate() call."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from dscompile.compiler.compile import compile_model
from dscompile.compiler.generation import join, read_arguments, unpad
from dscompile.runtime import load
from dscompile.runtime.errors import UserError
from dscompile.runtime.sampler import SamplingParams

# DeepSpeed's options about how it injects its kernels; there is nothing to choose here.
ACCEPTED = {
    "replace_with_kernel_inject",
    "replace_method",
    "injection_policy",
    "enable_cuda_graph",
    "triangular_masking",
    "keep_module_on_host",
    "return_tuple",
    "set_empty_params",
    "use_triton",
}


class InferenceModel:
    """A compiled model in the place of a transformers one.

    engine: the runtime's engine; artifact: the directory it was loaded from; config and generation_config: the model's.
    """

    def __init__(self, engine: Any, artifact: Path, config: Any, generation_config: Any) -> None:
        self.engine = engine
        self.artifact = artifact
        self.config = config
        self.generation_config = generation_config

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def can_generate(self) -> bool:
        return True

    def eval(self) -> InferenceModel:
        return self

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: Any = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """Continue each row, as transformers' generate() does.

        input_ids:      [B, P] integers; rows shorter than P are padded on the left
        attention_mask: [B, P], 0 where a row is padded; default: where pad tokens stand, if they are not end tokens
        arguments:      do_sample, num_beams=1, num_return_sequences, temperature, top_k, top_p, min_p,
                        repetition_penalty, max_new_tokens, max_length, min_new_tokens, min_length, eos_token_id ...
        returns:        [B * num_return_sequences, P + N] int64 on input_ids' device: the prompt as given, the new
                        tokens, pad_token_id after a row's end
        Raises UserError for an argument that would change the result and is not supported.
        """
        given = (generation_config.to_dict() if generation_config is not None else {}) | arguments
        limit = self.engine.plan.max_seq_len
        request = read_arguments(self.generation_config.to_dict(), given, input_ids.shape[1], limit)
        prompts = unpad(input_ids, attention_mask, self._pad_in_prompts(given))
        prompts = [prompt for prompt in prompts for _ in range(request.copies)]
        # One seed per row, from torch's generator: torch.manual_seed makes a call repeatable, as it does there.
        seeds = torch.randint(0, 1 << 62, (len(prompts),)).tolist()
        params = [SamplingParams(**request.sampling, seed=seed) for seed in seeds]
        results = self.engine.generate(prompts, params)
        heads = input_ids.cpu().long().repeat_interleave(request.copies, 0)
        return join(heads, [result.tokens for result in results], request.pad_id).to(input_ids.device)

    def _pad_in_prompts(self, given: dict[str, Any]) -> int | None:
        """The id that marks padding where no mask says so: the pad token, unless it also ends sequences."""
        config = self.generation_config
        pad = given.get("pad_token_id", config.pad_token_id)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        return None if pad in ends else pad


def init_inference(
    model: Any,
    tensor_parallel: int | dict[str, Any] = 1,
    dtype: str | torch.dtype | None = None,
    *,
    mp_size: int = 1,
    max_out_tokens: int | None = None,
    max_batch: int | None = None,
    target: str = "native",
    quant: str = "none",
    kv_dtype: str = "auto",
    quant_lm_head: bool = False,
    static_activations: bool = False,
    rounding: str = "nearest",
    calibrate: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    max_perplexity_increase: float | None = None,
    verify: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    **deepspeed_options: Any,
) -> InferenceModel:
    """Compile a transformers model for the device at hand and return an object with its generate().

    model:           a decoder of transformers; it is read, not changed
    tensor_parallel: number of GPUs, or DeepSpeed's {"tp_size": N}; mp_size is its older name
    dtype:           torch.float16, "float16" ...; None: the model's on a GPU, float32 on the CPU
    max_out_tokens:  longest sequence, prompt and new tokens; None: the model's own limit
    quant, kv_dtype, quant_lm_head, static_activations, rounding, calibrate, max_perplexity_increase: as compile_model's
    tokenizer:       the model's, to read the text with that quantization is calibrated on and judged by
    cache_dir:       where artifacts are kept, by content; default: $XDG_CACHE_HOME/dscompile/inference
    DeepSpeed's options about kernel injection are accepted and have no effect: every model is compiled.
    Raises UserError as compile_model does, and for an option that is not known.
    """
    unknown = sorted(deepspeed_options.keys() - ACCEPTED)
    if unknown:
        raise UserError(f"init_inference: option {unknown[0]!r} is not supported; leave it out")
    options = {
        "dtype": _dtype_name(dtype, model, target),
        "target": target,
        "quant": quant,
        "kv_dtype": kv_dtype,
        "quant_lm_head": quant_lm_head,
        "static_activations": static_activations,
        "rounding": rounding,
        "calibrate": calibrate,
        "max_perplexity_increase": max_perplexity_increase,
        "max_seq_len": max_out_tokens,
        "max_batch": max_batch,
        "tensor_parallel": max(_tensor_parallel(tensor_parallel), mp_size),
    }
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dscompile/inference").expanduser()
    artifact = root / _content_key(model, options | {"text": _text_key(calibrate, tokenizer)})
    if not artifact.exists():
        root.mkdir(parents=True, exist_ok=True)
        _compile(model, tokenizer, artifact, options, verify)
    return InferenceModel(load(artifact), artifact, model.config, model.generation_config)


def _compile(model: Any, tokenizer: Any, artifact: Path, options: dict[str, Any], verify: bool) -> None:
    checkpoint = tempfile.mkdtemp(prefix="checkpoint-", dir=artifact.parent)
    try:
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(checkpoint)
        if tokenizer is not None:
            tokenizer.save_pretrained(checkpoint)
        compile_model(checkpoint, artifact, verify=verify, **{k: v for k, v in options.items() if v is not None})
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _content_key(model: Any, options: dict[str, Any]) -> str:
    """A name for what this model with these options compiles to: its weights, its configuration, the tools."""
    versions = {"dscompile": importlib.metadata.version("dscompile"), "transformers": transformers.__version__}
    facts = {"config": model.config.to_dict(), "options": options, "versions": versions, "device": _device()}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _text_key(calibrate: str | os.PathLike[str] | None, tokenizer: Any) -> str:
    """Which text a model is calibrated on, and by which tokenizer; compile_model names a file that is not there."""
    text = Path(calibrate).read_bytes() if calibrate is not None and Path(calibrate).is_file() else b""
    return hashlib.blake2b(text + repr(tokenizer).encode(), digest_size=16).hexdigest()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _dtype_name(dtype: str | torch.dtype | None, model: Any, target: str) -> str:
    if dtype is None:
        on_gpu = target not in ("native", "cpu") or (target == "native" and torch.cuda.is_available())
        dtype = model.dtype if on_gpu else torch.float32
    return str(dtype).removeprefix("torch.").replace("half", "float16")


def _tensor_parallel(value: int | dict[str, Any]) -> int:
    return int(value.get("tp_size", 1)) if isinstance(value, dict) else int(value)
