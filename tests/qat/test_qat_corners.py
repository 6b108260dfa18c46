"""Models and uses that ask for more than the plain case: each was wrong once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from olive.nn import UniformConv2d
from olive.qat import QATConfig, anneal, convert, distill, prepare, select
from olive.qat.attention import QATAttention
from olive.qat.weight_quantizers import MinMax
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MERGED = QATConfig(2, 2, qkr=True)


def test_no_weight_counts_as_clipped_by_its_own_magnitude() -> None:
    weight = torch.randn(4096, 64, requires_grad=True)
    MinMax(8)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_checkpoint_from_before_annealing_thaws_merged_entries() -> None:
    model = prepare(tiny_vit(), MERGED, batch=images())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealing = anneal(model, optimizer)
    train(model, optimizer, images(), 3)
    annealing.detach()
    model.load_state_dict(before, strict=False)
    (attention, *_) = (module for module in model.modules() if isinstance(module, QATAttention))
    fresh = prepare(tiny_vit(), MERGED, batch=images())
    fresh.load_state_dict(before)
    (expected, *_) = (module for module in fresh.modules() if isinstance(module, QATAttention))
    assert attention.merged_weight.frozen is None
    assert torch.equal(attention.merged(), expected.merged())


def test_adapters_on_merged_projections_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = prepare(tiny_vit(), MERGED, batch=images())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"expected the projections .* got others in q_proj or k_proj"):
        adapted(**images())


def test_adapters_are_left_alone() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    found = select(adapted, QATConfig())
    assert not any("lora_" in layer.name for layer in found.layers)
    assert {one.reason for one in found.skipped if "lora_" in one.name} == {"adapter"}


def test_layers_whose_weight_torch_reads_itself_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 32), nn.Linear(16, 16), nn.Linear(16, 4)
    )
    found = select(model, QATConfig())
    assert [layer.name for layer in found.layers] == ["0", "2", "3"]
    assert {one.name for one in found.skipped} >= {"1.linear1", "1.linear2"}


def test_rows_of_a_batch_are_no_positions() -> None:
    from tests import models

    model = models.bert()
    batch = {"input_ids": torch.randint(3, 97, (6, 7))}
    prepare(model, QATConfig(4, 4, activation_granularity="per_token"), batch=batch)
    fewer = {"input_ids": batch["input_ids"][:2]}
    model.eval()
    expected = model(**fewer)
    got = convert(model)(**fewer)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.values(), expected.values(), strict=True))


def test_every_table_of_the_input_embedding_is_quantized_and_saved(tmp_path: object) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    batch = {"input_ids": torch.randint(0, 61, (3, 7)), "labels": torch.randint(0, 61, (3, 5))}
    model = convert(prepare(model, QATConfig(4, 8), batch=batch)).eval()
    model.save_pretrained(str(tmp_path))
    loaded = T5ForConditionalGeneration.from_pretrained(str(tmp_path))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not any(
        isinstance(module, nn.Embedding) and module.num_embeddings == 61 for module in model.modules()
    )


def test_the_teacher_is_followed_where_a_causal_model_predicts() -> None:
    model, teacher = tiny_llama(), tiny_llama(seed=1)
    ids = tokens()["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    distill(model, teacher, weight=1.0)
    model.train()
    loss = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        student, expected = model(input_ids=ids).logits[:, 3:-1], teacher(input_ids=ids).logits[:, 3:-1]
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean()
    assert torch.allclose(loss, divergence, rtol=1e-4)


def test_outputs_without_logits_are_refused() -> None:
    model = tiny_llama()
    distill(model, tiny_llama(seed=1))
    model.train()
    with pytest.raises(ValueError, match="expected a model whose outputs hold logits, got tuple"):
        model(**tokens(), return_dict=False)


def test_wrapped_models_are_named_by_convert() -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
    with pytest.raises(
        ValueError, match="expected the model that was prepared, got a OptimizedModule around it"
    ):
        convert(torch.compile(model))  # type: ignore[arg-type]


def test_scales_that_are_not_finite_are_named_by_convert() -> None:
    model = prepare(tiny_vit(), MERGED, batch=images())
    model.vit.layers[0].attention.key_quantizer.scale.data[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.key_quantizer\.scale: expected finite values"
    ):
        convert(model)


def test_padding_of_one_bit_is_refused_before_training() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
    with pytest.raises(
        ValueError, match="1: expected more than 1 bit for the input of a convolution that pads"
    ):
        prepare(model, QATConfig(1, 1))


def test_double_precision_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).double()
    with pytest.raises(TypeError, match=r"expected float32, bfloat16 or float16, got torch\.float64"):
        prepare(model)


def test_an_empty_first_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    prepare(model, QATConfig(4, 4))
    with pytest.raises(ValueError, match=r"expected values in the first batch, got shape \(0, 8\)"):
        model(torch.empty(0, 8))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8)])
def test_converted_convolutions_take_what_float_ones_take(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3))
    expected = prepare(model)(torch.zeros(shape))
    got = convert(model)(torch.zeros(shape))
    assert isinstance(model[1], UniformConv2d)
    assert torch.allclose(got, expected, atol=1e-5) and got.shape == expected.shape


def test_a_config_s_skip_must_be_a_list_of_names() -> None:
    with pytest.raises(TypeError, match="skip: expected a tuple of module names, got 'lm_head'"):
        QATConfig.from_dict({"skip": "lm_head"})
    with pytest.raises(TypeError, match="skip: expected a tuple of module names, got 5"):
        QATConfig(skip=5)  # type: ignore[arg-type]
