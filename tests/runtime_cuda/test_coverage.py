"""Every architecture of the tests in float16 on a GPU, held to the gate by the kernels it will run."""

from __future__ import annotations

import pytest
import torch

from dscompile.runtime import load
from tests.compiler.tiny import CONFIGS, ENCODERS
from tests.helpers import rms_ratio

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [*CONFIGS, *ENCODERS])
def test_artifacts_agree_with_their_models(name, target, summary, tmp_path):
    pytest.importorskip("transformers")
    from benchmarks.coverage_gpu import compile_on_gpu

    report = compile_on_gpu(name, tmp_path)
    assert report.verification.status == "passed"
    worst = max(report.verification.checks, key=lambda c: c.error / c.limit)
    summary(f"{name}: {worst.name} {worst.error:.1e}, limit {worst.limit:.1e}")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_those_of_the_cpu(pooling, target, tmp_path):
    """Ragged texts in several steps, against the CPU executor on the same artifact."""
    pytest.importorskip("transformers")
    from benchmarks.coverage_gpu import compile_on_gpu

    compile_on_gpu("bert", tmp_path)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 128, (1 + 7 * i % 64,), generator=generator).tolist() for i in range(40)]
    vectors = [load(tmp_path / "out", device).embed(texts, pooling, normalize=True) for device in ("cuda", "cpu")]
    assert rms_ratio(*vectors) <= 4e-3
    assert torch.nn.functional.cosine_similarity(*vectors).min() >= 0.9999
