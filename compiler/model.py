"""Build a transformers model whose parameters take no memory and whose buffers keep their values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dscompile.compiler.encoders import auto_class, is_encoder
from dscompile.compiler.quiet import quiet
from dscompile.runtime.errors import UserError


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a configuration, or the encoder, in float32, parameters on the meta device.

    Tracing in float32 lets every cast between a model's dtype and float32 vanish. Raises UserError for a
    configuration that transformers knows neither for, or cannot build.
    """
    try:
        with quiet(), _parameters_on_meta():
            # A copy: transformers writes the dtype and the attention into the configuration it is given.
            own = copy.deepcopy(config)
            model = auto_class(config).from_config(own, attn_implementation="eager", dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = "an encoder" if is_encoder(config) else "a causal language model"
        raise UserError(f"transformers cannot build {kind} from this config.json: {reason}") from error
    return model.eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send parameters to the meta device as modules register them; buffers are computed on the CPU as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
