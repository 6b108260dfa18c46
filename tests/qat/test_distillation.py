"""Distillation: the loss against torch's formula, and what `distill` changes of a model's forward."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from olive.qat import QATConfig, distill, distillation_loss, prepare
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens, train


def written_out(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) t^2 for each position, from probabilities."""
    expected = (teacher / temperature).softmax(-1)
    got = (student / temperature).softmax(-1)
    return (expected * (expected.log() - got.log())).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 7), (1, 1)])
def test_value_and_gradient(shape: tuple[int, ...], temperature: float) -> None:
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(student, teacher, temperature=temperature)
    expected = written_out(student, teacher.detach(), temperature).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)  # float32 inside
    (gradient,) = torch.autograd.grad(loss, student)
    (wanted,) = torch.autograd.grad(expected, student)
    assert bool(((gradient - wanted).abs() <= 1e-6).all())
    # In closed form: t (softmax(s / t) - softmax(t / t)) / positions.
    closed = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    assert bool(((gradient - closed * shape[-1] / student.numel()).abs() <= 1e-6).all())
    assert teacher.grad is None


def test_it_is_cross_entropy_less_the_teacher_s_entropy() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    probabilities = teacher.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    cross = functional.cross_entropy(student, probabilities)
    assert distillation_loss(student, teacher).item() == pytest.approx((cross - entropy).item(), rel=1e-5)
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_a_mask_says_what_counts() -> None:
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.rand(3, 4) < 0.5
    expected = written_out(student, teacher, 1.0)[mask].mean()
    assert distillation_loss(student, teacher, mask=mask).item() == pytest.approx(expected.item(), rel=1e-5)
    student.requires_grad_()
    nothing = distillation_loss(student, teacher, mask=torch.zeros(3, 4, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0 and not student.grad.any()


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    expected = distillation_loss(student.float(), teacher.float())
    assert torch.equal(distillation_loss(student, teacher), expected)


def test_logits_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher: expected logits of the student's shape \(4, 5\), got"):
        distillation_loss(torch.randn(4, 5), torch.randn(4, 1))


def pair() -> tuple[nn.Module, nn.Module]:
    """A prepared student, and another model for its teacher."""
    return prepare(tiny_vit(), QATConfig(2, 4), batch=images()), tiny_vit(seed=1)


def test_loss_is_mixed_in_training_alone() -> None:
    model, teacher = pair()
    data = images()
    plain = model.train()(**data)
    distill(model, teacher, weight=0.3, temperature=2.0)
    mixed = model(**data)
    expected = distillation_loss(plain.logits, teacher(data["pixel_values"]).logits, temperature=2.0)
    assert torch.equal(mixed.logits, plain.logits)
    assert mixed.loss.item() == pytest.approx((0.7 * plain.loss + 0.3 * expected).item(), rel=1e-6)
    assert torch.equal(model.eval()(**data).loss, plain.loss)
    assert model(data["pixel_values"]).loss is None


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_without_labels_the_teacher_is_all_there_is(how: str) -> None:
    model, teacher = pair()
    pixels = images()["pixel_values"]
    distill(model.train(), teacher, weight=0.3)
    output = model(pixels) if how == "position" else model(pixel_values=pixels)
    expected = distillation_loss(output.logits, teacher(pixels).logits)
    assert torch.equal(output.loss, expected)


def test_teacher_is_neither_trained_nor_saved() -> None:
    model, teacher = pair()
    teacher.train()
    names = set(model.state_dict())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distill(model, teacher)
    assert not teacher.training and not any(one.requires_grad for one in teacher.parameters())
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), images(), 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(one.grad is None for one in teacher.parameters())
    assert not teacher.training and set(model.state_dict()) == names
    assert not set(teacher.parameters()) & set(model.parameters())


def test_teacher_moves_to_where_the_model_is() -> None:
    model, teacher = tiny_vit().to("meta").train(), tiny_vit(seed=1)
    distill(model, teacher)
    assert model(torch.empty(2, 3, 8, 8, device="meta")).loss.is_meta
    assert all(one.is_meta for one in teacher.parameters())


def test_removing_leaves_outputs_as_they_are() -> None:
    model, teacher = pair()
    data = images()
    expected = model.train()(**data).loss
    handle = distill(model, teacher)
    assert not torch.equal(model(**data).loss, expected)
    handle.remove()
    handle.remove()
    assert torch.equal(model(**data).loss, expected)


@pytest.mark.parametrize("case", ["labels", "attention", "all"])
def test_positions_of_token_logits_that_count(case: str) -> None:
    model, teacher = tiny_llama(), tiny_llama(seed=1)
    ids = tokens()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 3:] = 0
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    counting = mask.bool()
    if case == "labels":
        labels = ids.clone()
        labels[:, :4] = -100
        arguments["labels"] = labels
        counting = functional.pad(
            labels[:, 1:] != -100, (0, 1), value=False
        )  # a label is of the next position
    elif case == "all":
        del arguments["attention_mask"]
        counting = torch.ones_like(counting)
    distill(model.train(), teacher)
    output = model(**arguments)
    without = {key: value for key, value in arguments.items() if key != "labels"}
    each = written_out(output.logits, teacher(**without).logits, 1.0)
    assert output.loss.item() == pytest.approx(each[counting].mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_trainer_steps_of_several_batches_are_one_of_all(kind: str, tmp_path: Path) -> None:
    """Accumulated in four parts or taken at once, the loss and the step are the same."""
    from transformers import Trainer, TrainingArguments

    found = []
    for parts in (1, 4):
        model, teacher = (tiny_vit(), tiny_vit(1)) if kind == "vit" else (tiny_llama(), tiny_llama(1))
        batch = images(count=8) if kind == "vit" else tokens(count=8)
        distill(model, teacher, weight=0.5)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            learning_rate=0.1,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{key: value[place] for key, value in batch.items()} for place in range(8)]
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        weights = torch.cat([one.detach().flatten() for one in model.parameters()])
        found.append((trainer.state.log_history[0]["loss"], weights))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert bool(((found[0][1] - found[1][1]).abs() <= 1e-5).all())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weight": 0}, "weight: expected above 0 and up to 1, got 0"),
        ({"weight": 1.1}, r"weight: expected above 0 and up to 1, got 1\.1"),
        ({"weight": float("nan")}, "weight: expected above 0 and up to 1, got nan"),
        ({"temperature": 0}, "temperature: expected above 0, got 0"),
        ({"temperature": float("nan")}, "temperature: expected above 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(values: dict[str, float], words: str) -> None:
    model, teacher = pair()
    with pytest.raises(ValueError, match=words):
        distill(model, teacher, **values)
    assert not model._forward_hooks and teacher.training


def test_a_model_is_not_its_own_teacher() -> None:
    model, _ = pair()
    shallow = copy.copy(model)
    for teacher in (model, shallow):
        with pytest.raises(ValueError, match=r"teacher: expected a model of its own, .*copy\.deepcopy"):
            distill(model, teacher)


def test_a_copy_of_the_model_has_the_same_teacher() -> None:
    model, teacher = pair()
    data = images()
    handle = distill(model.train(), teacher)
    twin = copy.deepcopy(model)
    (hook,) = twin._forward_hooks.values()
    assert hook.__self__ is not handle and hook.__self__.teacher is teacher
    mixed = model(**data).loss
    assert torch.equal(twin(**data).loss, mixed)
    hook.__self__.remove()
    assert not torch.equal(twin(**data).loss, mixed)
    assert torch.equal(model(**data).loss, mixed)
    assert copy.deepcopy(handle).teacher is teacher


def test_a_model_with_a_teacher_is_not_pickled() -> None:
    model, teacher = pair()
    handle = distill(model, teacher)
    with pytest.raises(TypeError, match=r"expected one without a teacher to pickle.* call remove\(\)"):
        torch.save(model, io.BytesIO())
    handle.remove()
    torch.save(model, io.BytesIO())
