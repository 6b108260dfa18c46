"""Rotation of the residual stream: the same function, outliers gone, everything else refused or put back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import olive
from olive.eval import inject_outliers
from olive.ptq.rotation import ROTATABLE, rotate
from tests import models
from tests.test_quantize import assert_untouched, snapshot

ROTATE = olive.QuantConfig(rotate=True, group_size=32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    monkeypatch.setattr("olive.ptq.grids.PLAIN_GRID", (0.8,))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**models._decoder(sliding_window=8)))


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**models._decoder()))


BUILDERS = {
    "llama": lambda: models.llama(attention_bias=True, mlp_bias=True),
    "mistral": _mistral,
    "mixtral": models.mixtral,
    "qwen2": _qwen2,
    "qwen3": models.qwen3,
    "qwen3_moe": models.qwen3_moe,
}


def _built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """With norms and biases that are not their initial ones and zeros."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def test_every_known_type_is_tried() -> None:
    assert set(BUILDERS) == set(ROTATABLE)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_function_stays(name: str) -> None:
    model = _built(name)
    with torch.no_grad():
        before = models.logits(model)
        originals = snapshot(model)
        undo = rotate(model)
        after = models.logits(model)
        assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max()) + 1e-6
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and module.weight.shape == (96,):
                assert torch.equal(module.weight, torch.ones(96))
        undo()
        undo()  # once more does no harm
        assert torch.equal(models.logits(model), before)
    assert_untouched(model, originals)


def test_signs_are_drawn_from_the_seed() -> None:
    one, same, other = (_built("llama") for _ in range(3))
    rotate(one, seed=1), rotate(same, seed=1), rotate(other, seed=2)
    weights = [model.model.embed_tokens.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_outliers_of_a_channel_are_gone() -> None:
    model = _built("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 50
        rotate(model)
    weight = model.model.embed_tokens.weight.detach()
    assert float(weight.abs().max() / weight.square().mean().sqrt()) < 6


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_quantized_saved_and_loaded(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _built(name)
    with torch.no_grad():
        exact = models.logits(model)
        olive.quantize(model, ROTATE)
        rounded = models.logits(model)
    assert float((rounded - exact).norm() / exact.norm()) < 0.3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(models.logits(loaded), rounded)
    assert loaded.config.quantization_config.quant == ROTATE
    assert not loaded.config.tie_word_embeddings
    olive.dequantize(model)
    assert float((models.logits(model) - rounded).abs().max()) < 1e-4 * float(rounded.abs().max())


def test_injected_outliers_cost_nothing_once_they_are_rotated() -> None:
    plain = _built("llama")
    injected = copy.deepcopy(plain)
    inject_outliers(injected, factor=1000.0, share=0.03)
    errors = {}
    for rotated in (False, True):
        for name, model in (("plain", plain), ("injected", injected)):
            one = copy.deepcopy(model)
            with torch.no_grad():
                exact = models.logits(one)
                olive.quantize(one, olive.QuantConfig(rotate=rotated, group_size=32, activations="int8"))
                errors[name, rotated] = float((models.logits(one) - exact).norm() / exact.norm())
    assert errors["injected", False] > 1.3 * errors["plain", False]
    assert errors["injected", True] < 1.05 * errors["plain", True]


def test_with_gptq() -> None:
    model = _built("llama")
    config = olive.QuantConfig(method="gptq", rotate=True, codebook="nf4", group_size=32)
    with torch.no_grad():
        exact = models.logits(model)
        olive.quantize(model, config, calibration=[models.inputs(model)] * 3, progress=False)
        assert float((models.logits(model) - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("name", ["gemma2", "opt", "bert", "plain"])
def test_other_models_are_refused_by_name(name: str) -> None:
    model = models.plain() if name == "plain" else models.build(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"rotate=True knows \(llama, mistral, .*\), got "):
        olive.quantize(model, ROTATE)
    assert_untouched(model, before)


def test_models_without_a_head_are_refused() -> None:
    model = _built("llama").model
    before = snapshot(model)
    with pytest.raises(ValueError, match="output head"):
        olive.quantize(model, ROTATE)
    assert_untouched(model, before)


def test_hidden_sizes_without_a_matrix_are_refused() -> None:
    model = models.llama(hidden_size=172)
    with pytest.raises(ValueError, match="hidden size with a known Hadamard matrix, got 172"):
        olive.quantize(model, ROTATE)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_failure_later_on_takes_the_rotation_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.ptq import parameter

    model = _built(name)
    before = snapshot(model)
    tied = model.config.tie_word_embeddings

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(parameter, "quantize_parameter", fails)
    with pytest.raises(KeyboardInterrupt):
        olive.quantize(model, ROTATE)
    assert_untouched(model, before)
    assert model.config.tie_word_embeddings == tied


def test_while_loading_it_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _built("llama").save_pretrained(tmp_path)
    for config in (ROTATE, olive.QuantConfig(method="gptq")):
        with pytest.raises(ValueError, match=r"load the model without it first, then call olive.quantize"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
