"""On a GPU the operators run their reference: the CPU's codes, products within float32's rounding."""

import pytest
import torch

import olive
from olive import QuantConfig, ops
from olive.ptq import quantize_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_and_decode_match_the_cpu(group_size, dtype):
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(33, 200, generator=generator) * 0.02).to(dtype)
    config = QuantConfig(group_size=group_size)
    on_cpu, on_gpu = quantize_weight(weight, config), quantize_weight(weight.cuda(), config)
    for expected, got in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(expected, got.cpu())
    decoded = [ops.ovp_decode(*stored, 200, group_size, dtype) for stored in (on_cpu, on_gpu)]
    assert torch.equal(decoded[0], decoded[1].cpu())


def test_a_quantized_model_moves_to_the_gpu_and_back():
    torch.manual_seed(6)
    model = olive.quantize(torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 64)))
    x = torch.randn(7, 256)
    expected = model(x)
    moved = model.cuda()(x.cuda()).cpu()
    assert bool(((moved - expected).abs() <= 1e-4 * expected.abs().max()).all())
    assert torch.equal(model.cpu()(x), expected)
