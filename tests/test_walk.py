"""The rule which modules are quantized: names, classes, shared parameters, and the count of values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import olive
from olive.walk import EMBEDDING, VECTORS, skip_matches, walk
from tests import models


def reasons(model: nn.Module, config: olive.QuantConfig | None = None) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in walk(model, config).skipped}


def targets(model: nn.Module, config: olive.QuantConfig | None = None) -> list[str]:
    return [target.name for target in walk(model, config).targets]


@pytest.mark.parametrize(
    ("name", "skip", "entry"),
    [
        ("lm_head", ("lm_head",), "lm_head"),
        ("model.lm_head", ("lm_head",), "lm_head"),
        ("model.my_lm_head", ("lm_head",), None),
        ("lm_head.dense", ("lm_head",), "lm_head"),
        ("model.layers.1.mlp.down_proj", ("mlp.down_proj",), "mlp.down_proj"),
        ("model.layers.1.mlp.down_proj", ("model.layers.1",), "model.layers.1"),
        ("model.layers.10.mlp.down_proj", ("model.layers.1",), None),
        ("model.layers.1.mlp.down_proj", ("layers.*.mlp",), "layers.*.mlp"),
        ("model.layers.1.mlp.down_proj", ("*.down_*",), "*.down_*"),
        ("model.layers.1.mlp.down_proj", ("up_proj", "down_proj"), "down_proj"),
        ("model.layers.1.mlp.down_proj", (), None),
    ],
)
def test_skip_matches_names_and_what_is_inside(name: str, skip: tuple[str, ...], entry: str | None) -> None:
    assert skip_matches(name, skip) == entry


def test_every_parameter_is_counted_once() -> None:
    model = models.plain()
    inventory = walk(model)
    assert targets(model) == ["0", "3"] and reasons(model) == {"2": VECTORS}
    assert inventory.total_values == sum(parameter.numel() for parameter in model.parameters())
    assert inventory.quantizable_values == 96 * 200 + 200 * 33
    assert inventory.share == inventory.quantizable_values / inventory.total_values


def test_nothing_about_values_is_asked() -> None:
    with torch.device("meta"):
        model = models.plain()
    assert targets(model) == ["0", "3"]


def test_the_answer_can_be_found_again_in_the_quantized_model() -> None:
    model = models.plain()
    before = walk(model)
    after = walk(olive.quantize(model))
    assert after.targets == () and [target.name for target in after.quantized] == ["0", "3"]
    assert [target.kind for target in after.quantized] == ["linear", "linear"]
    assert (after.skipped, after.quantizable_values, after.total_values) == (
        before.skipped,
        before.quantizable_values,
        before.total_values,
    )


def test_the_config_is_remembered_for_the_reasons() -> None:
    model = models.plain()
    olive.quantize(model, olive.QuantConfig(skip=("3",)))
    assert reasons(model)["3"] == 'skip holds "3"'
    assert reasons(copy.deepcopy(model))["3"] == 'skip holds "3"'


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Embedding(7, 5), EMBEDDING),
        (lambda: nn.EmbeddingBag(7, 5), EMBEDDING),
        (lambda: nn.Conv2d(3, 8, 2), "Conv2d: convolution kernels are not quantized"),
        (lambda: nn.Conv1d(3, 8, 2), "Conv1d: convolution kernels are not quantized"),
        (lambda: nn.LayerNorm(8), VECTORS),
        (
            lambda: nn.Bilinear(3, 4, 5),
            "Bilinear: 3-D parameters, but not a class of transformers' experts interface",
        ),
        (lambda: nn.LSTM(3, 4), "LSTM: not one of the classes that can be quantized"),
        (lambda: nn.Linear(4, 0), r"Linear: weight of shape (0, 4)"),
        (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention: computes with its in_proj weights itself"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
            "its weight is computed (parametrized), not stored",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_reason_by_class(build: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), build())
    assert targets(model) == ["0"]
    assert reason in reasons(model)["1"]


def test_attention_output_read_by_its_owner_is_left() -> None:
    model = nn.TransformerEncoderLayer(96, 4, 192)
    assert targets(model) == ["linear1", "linear2"]
    assert "nn.MultiheadAttention uses its weight without calling it" in reasons(model)["self_attn.out_proj"]


class Doubled(nn.Linear):
    """Another forward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """The same forward."""


class Scaled(nn.Linear):
    """More parameters."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.extra = nn.Parameter(torch.ones(1))


def test_subclasses_of_linear() -> None:
    patched = nn.Linear(4, 4)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    model = nn.Sequential(Named(4, 4), Doubled(4, 4), Scaled(), patched)
    assert targets(model) == ["0"]
    assert reasons(model) == {
        "1": "Doubled: its forward is not that of Linear",
        "2": "Scaled: holds more than weight and bias",
        "3": "Linear: its forward is not that of Linear",
    }


def test_layers_that_share_a_weight_are_left_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert targets(model) == ["2"]
    assert reasons(model) == {
        "0": "its weight is tied to 1.weight",
        "1": "its weight is tied to 0.weight",
    }
    assert walk(model).total_values == sum(parameter.numel() for parameter in model.parameters())


def test_a_head_tied_to_the_embedding_is_left_whatever_skip_says() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(97, 96), "body": nn.Linear(96, 96), "head": nn.Linear(96, 97)}
    )
    model["head"].weight = model["embed"].weight  # type: ignore[assignment]
    assert targets(model, olive.QuantConfig(skip=())) == ["body"]
    assert reasons(model, olive.QuantConfig(skip=()))["head"] == "its weight is tied to embed.weight"


def test_one_module_in_two_places_is_one_target() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert targets(model) == ["0"]


def test_ties_are_known_before_the_weights_are_loaded() -> None:
    with torch.device("meta"):
        model = models.qwen3()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # type: ignore[union-attr,operator,assignment]
    found = reasons(model, olive.QuantConfig(skip=()))
    assert found["lm_head"] == "its weight is tied to model.embed_tokens.weight"
    with torch.device("meta"):
        tied = models.qwen3()
    assert walk(model).total_values == walk(tied).total_values


def test_the_output_head_is_found_by_its_role() -> None:
    model = models.bert(tie_word_embeddings=False)
    decoder = "cls.predictions.decoder"
    assert reasons(model)[decoder] == 'output head, and skip holds "lm_head"'
    assert decoder in targets(model, olive.QuantConfig(skip=()))


def test_experts_spread_over_devices_are_left() -> None:
    model = models.mixtral()
    model.model.layers[0].mlp.experts._is_expert_parallel = True  # type: ignore[union-attr,index]
    assert "quantize before distributing" in reasons(model)["model.layers.0.mlp.experts"]


def test_experts_with_another_forward_are_left() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Other(MixtralExperts):  # type: ignore[misc]
        def forward(self, *args: object) -> None:
            raise NotImplementedError

    model = models.mixtral()
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr,index]
    experts.__class__ = Other
    assert "not a class of transformers' experts interface" in reasons(model)["model.layers.0.mlp.experts"]
    experts.__class__ = MixtralExperts
    experts.extra = nn.Parameter(torch.ones(4, 3, 3))
    assert (
        "expected 3-D parameters gate_up_proj and down_proj" in reasons(model)["model.layers.0.mlp.experts"]
    )
