"""OVPExperts: fused experts compute as the classes of transformers do, with decoded weights."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.nn import OVPExperts, OVPSortedExperts
from tests import models

PLACES = {
    "mixtral": "model.layers.0.mlp.experts",
    "qwen3_moe": "model.layers.0.mlp.experts",
    "gpt_oss": "model.layers.0.mlp.experts",
    "nemotron_h": "model.layers.1.mixer.experts",
}
_cache: dict[str, tuple[nn.Module, nn.Module]] = {}


def pair(name: str) -> tuple[OVPExperts, nn.Module]:
    """Quantized experts, and transformers' own class with the decoded weights, in eager mode."""
    if name not in _cache:
        model = models.build(name)
        model.config._experts_implementation = "eager"  # type: ignore[union-attr]
        holder = nn.ModuleDict({"experts": model.get_submodule(PLACES[name])})
        olive.quantize(holder, olive.QuantConfig(group_size=32))
        _cache[name] = (holder, olive.dequantize(copy.deepcopy(holder)))
    quantized, floats = copy.deepcopy(_cache[name])
    assert isinstance(quantized["experts"], OVPExperts)  # type: ignore[index]
    return quantized["experts"], floats["experts"]  # type: ignore[index]


def routing(experts: int, tokens: int = 17, top_k: int = 2) -> tuple[Tensor, Tensor]:
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    return index, torch.rand(tokens, top_k)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    difference = (got.double() - expected.double()).abs()
    assert bool((difference <= tolerance * expected.double().abs().max()).all()), float(difference.max())


@pytest.mark.parametrize("name", PLACES)
def test_same_as_the_eager_experts_with_decoded_weights(name: str) -> None:
    quantized, floats = pair(name)
    states = torch.randn(17, 96)
    index, weights = routing(quantized.num_experts)
    with torch.no_grad():
        # Two float32 sums in different orders, one after the other.
        assert_close(quantized(states, index, weights), floats(states, index, weights), 5e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_no_token_chose_are_not_run(name: str) -> None:
    quantized, floats = pair(name)
    states, weights = torch.randn(5, 96), torch.rand(5, 2)
    index = torch.tensor([[1, 3]] * 5)
    with torch.no_grad():
        assert_close(quantized(states, index, weights), floats(states, index, weights), 5e-5)


def test_the_index_past_the_last_expert_stands_for_none() -> None:
    quantized, floats = pair("mixtral")
    states, weights = torch.randn(4, 96), torch.rand(4, 2)
    index = torch.tensor([[0, 4], [4, 4], [2, 1], [4, 3]])
    with torch.no_grad():
        out = quantized(states, index, weights)
        expected = floats(states, index.clamp(max=3), weights * (index < 4))
    assert_close(out, expected, 5e-5)
    assert bool((out[1] == 0).all())


def test_no_tokens_give_no_rows() -> None:
    quantized, _ = pair("mixtral")
    out = quantized(torch.empty(0, 96), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert out.shape == (0, 96)


def test_bfloat16_states_with_float32_routing_weights() -> None:
    quantized, floats = pair("qwen3_moe")
    quantized.bfloat16()
    states = torch.randn(17, 96, dtype=torch.bfloat16)
    index, weights = routing(quantized.num_experts)
    with torch.no_grad():
        out = quantized(states, index, weights)
        expected = floats(states.float(), index, weights)
    # Four roundings to bfloat16 on the way, each half an ulp of a part of the sum.
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, 4 * torch.finfo(torch.bfloat16).eps)


def test_names_of_gpt_oss_work() -> None:
    quantized, _ = pair("gpt_oss")
    states = torch.randn(17, 96)
    index, weights = routing(quantized.num_experts)
    named = quantized(states, router_indices=index, routing_weights=weights)
    assert torch.equal(named, quantized(states, index, weights))
    with pytest.raises(
        TypeError, match="top_k_index, top_k_weights: expected the router's two tensors, got None"
    ):
        quantized(states)


def test_gradients_reach_states_and_routing_weights() -> None:
    quantized, floats = pair("mixtral")
    gradients = []
    states, (index, weights) = torch.randn(17, 96), routing(4)
    for experts in (quantized, floats):
        leaves = [states.clone().requires_grad_(), weights.clone().requires_grad_()]
        experts(leaves[0], index, leaves[1]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_state_dict_keys_and_round_trip(name: str) -> None:
    quantized, _ = pair(name)
    state = {key: value.clone() for key, value in quantized.state_dict().items()}
    expected = {
        f"{stack}.{part}"
        for stack in ("gate_up_proj", "down_proj")
        for part in ("codes", "scale", "codebook")
    }
    if name == "gpt_oss":
        expected |= {"gate_up_proj_bias", "down_proj_bias"}
    assert set(state) == expected
    assert state["gate_up_proj.codes"].shape == (4, 384, 48) and state["gate_up_proj.scale"].shape == (
        4,
        384,
        3,
    )
    states, (index, weights) = torch.randn(17, 96), routing(4)
    before = quantized(states, index, weights)
    other = copy.deepcopy(quantized)
    other.gate_up_proj.codes.zero_()  # type: ignore[union-attr,operator]
    assert not torch.equal(other(states, index, weights), before)
    other.load_state_dict(state)
    assert torch.equal(other(states, index, weights), before)
    state["down_proj.codes"] = state["down_proj.codes"][:-1]
    with pytest.raises(
        RuntimeError, match=r"down_proj.codes: expected shape \(4, 96, 96\), got \(3, 96, 96\)"
    ):
        other.load_state_dict(state)


def test_pickle_gives_the_same_experts() -> None:
    quantized, _ = pair("mixtral")
    states, (index, weights) = torch.randn(17, 96), routing(4)
    twin = pickle.loads(pickle.dumps(quantized))
    assert torch.equal(twin(states, index, weights), quantized(states, index, weights))


def test_dequantize_gives_the_class_back() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    quantized, floats = pair("gpt_oss")
    assert type(floats) is GptOssExperts
    assert floats.gate_up_proj.shape == (4, 96, 384)
    assert torch.equal(floats.gate_up_proj, quantized.gate_up_proj.dequantize().transpose(1, 2))  # type: ignore[union-attr,operator]
    assert (floats.limit, floats.alpha, floats.is_transposed) == (quantized.limit, quantized.alpha, True)


def test_attributes_set_after_quantization_survive_dequantize() -> None:
    quantized, _ = pair("mixtral")
    quantized.config = copy.copy(quantized.config)
    assert quantized.to_experts().config is quantized.config


def test_llama4_experts_take_sorted_tokens() -> None:
    model = models.build("llama4")
    holder = nn.ModuleDict({"experts": model.get_submodule("model.layers.0.feed_forward.experts")})
    olive.quantize(holder, olive.QuantConfig(group_size=32))
    quantized = holder["experts"]
    assert isinstance(quantized, OVPSortedExperts)
    floats = quantized.to_experts()
    states = torch.randn(4 * 6, 96)
    with torch.no_grad():
        assert_close(quantized(states), floats(states), 5e-5)


def test_a_norm_after_each_expert_is_kept() -> None:
    from types import SimpleNamespace

    from transformers.integrations.moe import use_experts_implementation

    if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        pytest.skip("this version of transformers has no experts with a norm")

    @use_experts_implementation(has_post_expert_norm=True)
    class NormedExperts(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts = 3
            self.gate_up_proj = nn.Parameter(0.1 * torch.randn(3, 80, 96))
            self.down_proj = nn.Parameter(0.1 * torch.randn(3, 96, 40))
            self.act_fn = nn.SiLU()
            self.post_expert_norm = nn.LayerNorm(96)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise NotImplementedError

    holder = nn.ModuleDict({"experts": NormedExperts(SimpleNamespace(_experts_implementation="batched_mm"))})
    olive.quantize(holder, olive.QuantConfig(group_size=32))
    quantized = holder["experts"]
    floats = olive.dequantize(copy.deepcopy(holder))["experts"]  # type: ignore[index]
    states, (index, weights) = torch.randn(17, 96), routing(3)
    with torch.no_grad():
        assert_close(quantized(states, index, weights), floats(states, index, weights), 5e-5)


@pytest.mark.parametrize("codebook", ["learned", "int4"])
@pytest.mark.parametrize("group_size", [0, -1, 32])
def test_every_group_size_and_a_fitted_codebook(codebook: str, group_size: int) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts = MixtralExperts(MixtralConfig(hidden_size=48, intermediate_size=40, num_local_experts=3))
    floats = 0.1 * torch.randn(3, 48, 40)
    with torch.no_grad():
        experts.down_proj.copy_(floats)
        experts.gate_up_proj.normal_()
    holder = olive.quantize(
        nn.ModuleDict({"experts": experts}), olive.QuantConfig(codebook=codebook, group_size=group_size)
    )
    weight = holder["experts"].down_proj  # type: ignore[index]
    assert weight.canonical()[1].shape == (3, 1 if group_size == 0 else 48, 2 if group_size == 32 else 1)
    error = (weight.dequantize() - floats).double().square().sum() / floats.double().square().sum()
    assert float(error) < 0.05
    assert weight.sqnr_db == pytest.approx(float(-10 * torch.log10(error)), abs=1e-4)
