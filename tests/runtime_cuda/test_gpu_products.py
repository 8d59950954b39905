"""The library's products on a GPU against float64."""

from __future__ import annotations

import pytest
import torch

from dscompile.runtime.products import PRODUCTS, Matrices
from tests.codegen.oracle import ACTIVATIONS
from tests.helpers import rms_ratio

pytestmark = pytest.mark.gpu
LIMIT = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(target, name, dtype):
    """Few rows of a long product, whose columns are shared, and many of a short one; x, out and residual are columns
    of wider matrices."""
    from dscompile.runtime.cuda_device import CudaDevice

    device, what = CudaDevice("cuda"), PRODUCTS[name]
    torch.manual_seed(0)
    with device.active():
        for rows, n, k in ((67, 512, 8192), (301, 1032, 264)):
            x, residual, out = (torch.randn(rows, width + 24, device="cuda").to(dtype)[:, 8:-16] for width in (k, n, n))
            weight, bias = (
                (torch.randn(n, k, device="cuda") / k**0.5).to(dtype),
                torch.randn(n, device="cuda").to(dtype),
            )
            expected = x.double() @ weight.double().T + (bias.double() if what.bias else 0)
            expected = ACTIVATIONS[what.activation](expected) + (residual.double() if what.residual else 0)
            out.fill_(torch.nan)
            given = Matrices(x, weight, out, bias if what.bias else None, residual if what.residual else None)
            launch = device.library.bind(what, given)
            for few in (rows - 1, rows - 7, rows - 2):
                out.fill_(torch.nan)
                launch(few, device.stream)
                assert rms_ratio(out[:few], expected[:few]) <= LIMIT[dtype]
                assert out[few:].isnan().all()
            launch(rows, device.stream)
            assert rms_ratio(out, expected) <= LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_stored_in_float32(target, dtype):
    from dscompile.runtime.cuda_device import CudaDevice

    device, rows, n, k = CudaDevice("cuda"), 131, 5003, 512
    torch.manual_seed(0)
    with device.active():
        x, weight = (torch.randn(count, k, device="cuda").to(dtype) for count in (rows, n))
        out = torch.full((rows, n), torch.nan, device="cuda")
        device.library.bind(PRODUCTS["mm"], Matrices(x, weight, out))(rows - 1, device.stream)
        expected = x.double() @ weight.double().T
        assert rms_ratio(out[:-1], expected[:-1]) <= LIMIT[torch.float32]
        assert out[-1].isnan().all()


def test_every_number_of_rows_can_use_the_algorithm_of_a_larger(target):
    from dscompile.runtime.cuda_device import CudaDevice

    device, k, n = CudaDevice("cuda"), 4096, 1024
    torch.manual_seed(0)
    with device.active():
        x, weight = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (700, n))
        out = torch.empty(700, n, device="cuda", dtype=torch.bfloat16)
        launch = device.library.bind(PRODUCTS["mm"], Matrices(x, weight, out))
        expected = x.float() @ weight.float().T
        for rows in (*range(1, 300), 513, 699):
            out.fill_(torch.nan)
            launch(rows, device.stream)
            assert rms_ratio(out[:rows], expected[:rows]) <= LIMIT[torch.bfloat16]
            assert out[rows:].isnan().all()
