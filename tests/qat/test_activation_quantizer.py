"""The quantizer of activations: how it sets itself up, what it learns, and how it is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from olive.ops import lsq
from olive.ops.lsq import lsq_initial_scale
from olive.qat import ActivationQuantizer


def _error(quantized: Tensor, input: Tensor) -> float:
    return float((quantized.detach() - input).square().mean())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_starts_no_worse_than_the_formula(bits: int, dim: int) -> None:
    input = torch.randn(4, 7, 12) * torch.rand(12).add(0.1)
    quantizer = ActivationQuantizer(bits, shape=0, dim=dim, signed=True)
    found = _error(quantizer(input), input)
    formula = lsq(input, lsq_initial_scale(input, bits, True, dim), bits, True, dim)
    assert found <= _error(formula, input)
    assert quantizer.scale.shape == (input.shape[dim],)


@pytest.mark.parametrize(
    ("input", "signed"),
    [
        (torch.randn(64, 32), True),
        (torch.randn(64, 32).relu(), False),
        (functional.gelu(2 * torch.randn(64, 32)), False),
    ],
    ids=["normal", "relu", "gelu"],
)
def test_first_input_decides_about_the_sign(input: Tensor, signed: bool) -> None:
    quantizer = ActivationQuantizer(2)
    quantizer(input)
    assert quantizer.is_signed is signed
    assert bool(quantizer.signed) is signed


def test_sign_that_is_given_stays() -> None:
    quantizer = ActivationQuantizer(2, signed=False)
    quantizer(torch.randn(64))
    assert not quantizer.is_signed


def test_only_the_first_input_counts() -> None:
    quantizer = ActivationQuantizer(4)
    quantizer(torch.randn(64))
    scale = quantizer.scale.detach().clone()
    quantizer(100 * torch.randn(64))
    assert torch.equal(quantizer.scale.detach(), scale)


def test_offsets_shift_before_and_after() -> None:
    quantizer = ActivationQuantizer(3, channels=6)
    input = torch.randn(5, 6)
    quantizer(input)
    with torch.no_grad():
        quantizer.offset.uniform_(-1, 1)
        quantizer.offset_after.uniform_(-1, 1)
    expected = (
        lsq(input + quantizer.offset, quantizer.scale, 3, quantizer.is_signed, -1) + quantizer.offset_after
    )
    assert torch.equal(quantizer(input), expected)
    quantizer(input).square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in quantizer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_has_the_input_s_dtype(dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(4, channels=8)
    assert quantizer(torch.randn(3, 8, dtype=dtype)).dtype == dtype
    assert quantizer.to(dtype)(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_state_dict_makes_it_ready() -> None:
    first = ActivationQuantizer(2, shape=7, dim=-2)
    input = torch.randn(4, 7, 12).relu()
    expected = first(input)
    second = ActivationQuantizer(2, shape=7, dim=-2)
    second.load_state_dict(first.state_dict())
    assert second.is_initialized and not second.is_signed
    assert torch.equal(second(input), expected)
    assert torch.equal(copy.deepcopy(second)(input), expected)


def test_a_scale_that_training_made_negative_is_not_set_anew() -> None:
    first = ActivationQuantizer(2)
    input = torch.randn(64)
    first(input)
    with torch.no_grad():
        first.scale.fill_(-1e-3)
    second = ActivationQuantizer(2)
    second.load_state_dict(first.state_dict())
    assert second.is_initialized
    assert torch.equal(second(input), first(input)) and float(second.scale.detach()) < 0


def test_other_length_than_scales_is_refused() -> None:
    quantizer = ActivationQuantizer(2, shape=0, dim=-2)
    quantizer(torch.randn(4, 7, 12))
    with pytest.raises(ValueError, match="expected 7 places along dimension -2"):
        quantizer(torch.randn(4, 8, 12))


def test_first_input_must_be_finite() -> None:
    with pytest.raises(ValueError, match="expected finite values in the first batch, got NaN or Inf"):
        ActivationQuantizer(2)(torch.tensor([1.0, float("nan")]))


def test_zeros_do_not_break_it() -> None:
    quantizer = ActivationQuantizer(2)
    assert torch.equal(quantizer(torch.zeros(8)), torch.zeros(8))
    assert quantizer.is_initialized


def test_compiles_without_a_break_once_ready() -> None:
    quantizer = ActivationQuantizer(4, channels=8)
    input = torch.randn(3, 8)
    expected = quantizer(input)
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(input), expected)


def ready(input: Tensor) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(2)
    quantizer(input)
    return quantizer


def copied(source: ActivationQuantizer, target: ActivationQuantizer) -> None:
    """Load as `torch.distributed.checkpoint` does: the tensors are written, and no module is told."""
    with torch.no_grad():
        for name, tensor in target.state_dict().items():
            tensor.copy_(source.state_dict()[name])


@pytest.mark.parametrize("known", [False, True])
def test_what_is_loaded_in_place_counts(known: bool) -> None:
    input = torch.randn(64).relu()
    first = ready(input)
    second = ready(torch.randn(64)) if known else ActivationQuantizer(2)
    copied(first, second)
    assert torch.equal(second(torch.full((64,), 9.0)), first(torch.full((64,), 9.0)))
    assert torch.equal(second(input), first(input)) and not second.is_signed
    copied(ready(torch.randn(64)), second)
    second(input)
    assert second.is_signed


def test_tensors_are_asked_only_after_somebody_wrote_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    input = torch.randn(64)
    quantizer = ready(input)
    calls: list[int] = []
    refresh = quantizer.refresh
    monkeypatch.setattr(quantizer, "refresh", lambda: [calls.append(1), refresh()])
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    for _ in range(3):
        quantizer(input).sum().backward()
        optimizer.step()
    assert calls == []
    quantizer.signed.fill_(False)
    quantizer(input)
    quantizer(input)
    assert calls == [1] and not quantizer.is_signed


def test_shapes_can_be_had_on_the_meta_device() -> None:
    quantizer = ready(torch.randn(64)).to("meta")
    assert quantizer(torch.empty(3, 4, device="meta")).shape == (3, 4)


def test_tensors_made_in_inference_mode_have_no_versions() -> None:
    with torch.inference_mode():
        quantizer = ready(torch.randn(64))
        assert quantizer(torch.randn(64)).shape == (64,)
