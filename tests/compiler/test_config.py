"""Options are checked before anything is read or written."""

from __future__ import annotations

import pytest
import torch

from dscompile.compiler.config import parse_config, parse_targets, resolve_dtype, resolve_limits
from dscompile.runtime.errors import UserError


def test_defaults():
    config = parse_config(target="cpu")
    assert config.targets == ()
    assert resolve_dtype(config, "float16") == "float32"
    assert resolve_limits(config, 77).max_seq_len == 77


def test_targets():
    assert parse_targets("sm_90,sm_80") == ("sm_80", "sm_90")
    assert parse_targets(["sm_80", "cpu", "sm_80"]) == ("sm_80",)
    assert parse_targets("cpu") == ()


def test_auto_dtype_on_a_gpu_is_the_checkpoints():
    config = parse_config(target="sm_90")
    assert resolve_dtype(config, "bfloat16") == "bfloat16"
    assert resolve_dtype(config, "float64") == "float32"
    assert resolve_dtype(config, None) == "float32"
    assert parse_config(target="sm_90", dtype=torch.float16).dtype == "float16"


def test_dummy_weights():
    assert parse_config(target="cpu", dummy_weights=True).dummy_weights == "generated"
    assert parse_config(target="cpu", dummy_weights=False).dummy_weights is None
    assert parse_config(target="cpu", dummy_weights="stored").dummy_weights == "stored"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"target": "sm_12"}, "unknown target 'sm_12'"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"target": ""}, "no target"),
        ({"quant": "int3"}, "unknown quant"),
        ({"quant_lm_head": True}, "--quant int8 too"),
        ({"calibrate": "text.txt"}, "--quant int8 too"),
        ({"max_perplexity_increase": -1}, "percentage"),
        ({"max_perplexity_increase": float("nan")}, "percentage"),
        ({"rounding": "gptq"}, "--quant int8 too"),
        ({"quant": "int8", "rounding": "down"}, "unknown rounding"),
        ({"static_activations": True}, "give --quant int8"),
        ({"quant": "int8-weight-only", "static_activations": True}, "give --quant int8"),
        ({"kv_dtype": "fp8"}, "unknown kv_dtype 'fp8'"),
        ({"kv_dtype": "int8", "quant_lm_head": True}, "--quant int8 too"),
        ({"tensor_parallel": 2}, "not available"),
        ({"pipeline_parallel": 2}, "not available"),
        ({"tensor_parallel": 0}, "positive"),
        ({"max_batch": -1}, "max_batch must be a positive integer"),
        ({"max_seq_len": float("nan")}, "max_seq_len must be a positive integer"),
        ({"max_seq_len": 1.5}, "max_seq_len must be a positive integer"),
        ({"max_batch": "many"}, "max_batch must be a positive integer"),
        ({"dummy_weights": "some"}, "unknown dummy_weights"),
        ({"require_fusion": "attn_inn"}, "unknown require_fusion 'attn_inn'"),
        ({"tune": True}, "tune"),
        ({"frobnicate": 1}, "unknown option 'frobnicate'"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(**{"target": "cpu"} | options)
    assert "\n" not in str(caught.value)


def test_sequences_beyond_the_models_limit():
    with pytest.raises(UserError, match="more than the model's limit of 64"):
        resolve_limits(parse_config(target="cpu", max_seq_len=65), 64)
    assert resolve_limits(parse_config(target="cpu", max_seq_len=65), None).max_seq_len == 65


def test_old_architectures_lack_bfloat16():
    with pytest.raises(UserError, match="sm_75 does not compute in bfloat16"):
        resolve_dtype(parse_config(target="sm_75", dtype="bfloat16"), None)
