"""The Trainer in quantization-aware training: logs, exact resumption, mixed precision, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from olive.hf import AnnealingCallback, OscillationCallback
from olive.qat import QATConfig, convert, prepare
from olive.qat.latent import latent_weights
from olive.qat.steps import steps_of
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens

COUNT = 16
QKR = QATConfig(2, 4, qkr=True, activation_granularity="per_token", activation_offsets=True)
Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def vit() -> nn.Module:
    return prepare(tiny_vit(hidden_dropout_prob=0.1), QKR, batch=images(count=COUNT))


def llama() -> nn.Module:
    return prepare(tiny_llama(), QATConfig(3, 8, "lsq"), batch=tokens(count=COUNT))


MAKERS: dict[str, Make] = {"vit": vit, "llama": llama}


def rows(kind: str) -> list[dict[str, torch.Tensor]]:
    batch = images(count=COUNT) if kind == "vit" else tokens(count=COUNT)
    return [{key: value[place] for key, value in batch.items()} for place in range(COUNT)]


class Frozen(TrainerCallback):
    """Checks at every step that weights outside the boundary range keep their bits once annealing runs."""

    def __init__(self, model: nn.Module, boundary: float, first: int) -> None:
        self.latents, self.boundary, self.first = latent_weights(model), boundary, first
        self.frozen = self.free = self.moved = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {
            name: (one.weight_quantizer.margin(one.latent()) <= self.boundary, one.latent().clone())
            for name, one in self.latents.items()
        }

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.first:
            return
        for name, (inside, before) in self.before.items():
            changed = self.latents[name].latent() != before
            assert not bool((changed & ~inside).any()), name
            self.frozen += int((~inside).sum())
            self.free += int(inside.sum())
            self.moved += int((changed & inside).sum())


def trainer_of(
    kind: str,
    folder: Path,
    *,
    steps: int = 8,
    boundary: float = 0.05,
    start: float = 0.5,
    picture: Path | None = None,
    model: nn.Module | None = None,
    **more: Any,
) -> tuple[Trainer, Frozen]:
    torch.manual_seed(0)
    model = MAKERS[kind]() if model is None else model
    callbacks = [
        OscillationCallback(model, momentum=0.2, picture=picture),
        AnnealingCallback(boundary, start),
        Frozen(model, boundary, int(start * steps)),
    ]
    values: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "lr_scheduler_type": "constant",
        **more,
    }
    arguments = TrainingArguments(str(folder), **values)
    trainer = Trainer(
        model, arguments, train_dataset=rows(kind), eval_dataset=rows(kind), callbacks=callbacks
    )
    return trainer, callbacks[2]


@pytest.mark.parametrize("kind", list(MAKERS))
def test_logs_hold_both_shares_and_weights_are_frozen(kind: str, tmp_path: Path) -> None:
    picture = tmp_path / "oscillations.png" if kind == "vit" else None  # drawing takes seconds
    trainer, frozen = trainer_of(kind, tmp_path, picture=picture)
    trainer.train()
    records = [one for one in trainer.state.log_history if "loss" in one]
    assert [one["step"] for one in records] == [2, 4, 6, 8]
    for one in records:
        assert 0 <= one["qat/oscillating"] <= 1 and 0 <= one["qat/at_boundary"] <= 1
    assert records[-1]["qat/oscillating"] > 0
    assert frozen.frozen > frozen.free > 0 and frozen.moved > 0
    phases = steps_of(trainer.optimizer)
    assert phases.before == phases.restore == phases.observe == []  # all detached at the end
    if picture is not None:
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_resumed_run_is_exact(kind: str, tmp_path: Path) -> None:
    """Stopped before and while it is annealed: the same weights, records and logs, bit for bit."""
    whole, _ = trainer_of(kind, tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    expected = whole.model.state_dict()
    assert any(name.endswith(".frequency") and bool(one.any()) for name, one in expected.items())
    for step in (2, 6):
        resumed, _ = trainer_of(kind, tmp_path / f"from {step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        got = resumed.model.state_dict()
        assert got.keys() == expected.keys()
        assert [name for name, one in expected.items() if not torch.equal(one, got[name])] == []
        last = [one.state.log_history[-2] for one in (whole, resumed)]
        assert {key: one for key, one in last[0].items() if "qat" in key or key == "loss"} == {
            key: one for key, one in last[1].items() if "qat" in key or key == "loss"
        }


def test_another_boundary_range_is_refused_on_resuming(tmp_path: Path) -> None:
    trainer, _ = trainer_of("vit", tmp_path, steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    other, _ = trainer_of("vit", tmp_path, steps=4, boundary=0.1)
    with pytest.raises(ValueError, match=r"boundary_range: expected 0\.05, with which .* got 0\.1; resume"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    fresh, _ = trainer_of("vit", tmp_path / "fresh", steps=2, boundary=0.1)
    fresh.train()


def test_nan_in_a_weight_stops_training_with_its_name(tmp_path: Path) -> None:
    trainer, _ = trainer_of("vit", tmp_path, start=0.9)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kwargs["model"].vit.layers[1].mlp.fc1.weight.data[0, 0] = float("nan")

    trainer.add_callback(Spoil())
    with pytest.raises(ValueError, match=r"vit\.layers\.[01]\..*\.weight: expected finite latent weights"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", list(MAKERS))
def test_bfloat16_autocast(kind: str, tmp_path: Path) -> None:
    trainer, frozen = trainer_of(kind, tmp_path, bf16=True)
    trainer.train()
    assert frozen.frozen > frozen.free > 0 and frozen.moved > 0
    model = trainer.model
    assert all(one.dtype == torch.float32 for one in model.parameters())
    assert all(
        torch.isfinite(torch.tensor(one["loss"])) for one in trainer.state.log_history if "loss" in one
    )
    model.eval()
    batch = images() if kind == "vit" else tokens()
    with torch.no_grad():
        before, after = model(**batch).logits, convert(model)(**batch).logits
    assert (after - before).square().mean() <= 0.05 * before.square().mean()


def first_model(kind: str, folder: Path, checkpointing: bool = False, **more: Any) -> dict[str, torch.Tensor]:
    """The state after four steps, of a model without dropout."""
    torch.manual_seed(0)
    model = tiny_vit() if kind == "vit" else tiny_llama()
    batch = images(count=COUNT) if kind == "vit" else tokens(count=COUNT)
    prepare(model, QKR if kind == "vit" else QATConfig(3, 8, "lsq"), batch=batch)
    if checkpointing:
        # The name before transformers 5.2x, or the one after it.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))()
    trainer, frozen = trainer_of(kind, folder, steps=4, model=model, optim="sgd", max_grad_norm=0.0, **more)
    trainer.train()
    assert frozen.moved > 0
    return trainer.model.state_dict()


@pytest.mark.parametrize("kind", list(MAKERS))
def test_gradient_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    expected = first_model(kind, tmp_path / "plain")
    got = first_model(kind, tmp_path / "checkpointed", checkpointing=True)
    assert [name for name, one in expected.items() if not torch.equal(one, got[name])] == []


@pytest.mark.parametrize("kind", list(MAKERS))
def test_accumulated_gradients(kind: str, tmp_path: Path) -> None:
    """Steps, not batches, are counted; the trajectory is that of the larger batch up to rounding."""
    whole = first_model(kind, tmp_path / "whole")
    parts = first_model(
        kind, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    floats = [name for name, one in whole.items() if one.is_floating_point() and "frequency" not in name]
    distance = sum(float((whole[name] - parts[name]).square().sum()) for name in floats)
    size = sum(float(whole[name].square().sum()) for name in floats)
    assert distance <= 1e-4 * size


@pytest.mark.parametrize("start", [-0.1, 1, float("nan")])
def test_start_out_of_range_is_refused(start: float) -> None:
    with pytest.raises(ValueError, match="start: expected 0 to below 1, got"):
        AnnealingCallback(start=start)


@pytest.mark.parametrize("boundary", [0, 0.6])
def test_boundary_range_out_of_range_is_refused_at_once(boundary: float) -> None:
    with pytest.raises(ValueError, match=r"boundary_range: expected above 0 and up to 0\.5 steps"):
        AnnealingCallback(boundary)


def test_float_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a prepared model"):
        OscillationCallback(tiny_vit())
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(tiny_vit(), arguments, train_dataset=rows("vit"), callbacks=[AnnealingCallback()])
    with pytest.raises(ValueError, match="model: expected a prepared model"):
        trainer.train()


def test_evaluation_logs_shares_too(tmp_path: Path) -> None:
    trainer, _ = trainer_of("vit", tmp_path, steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    record = next(one for one in trainer.state.log_history if "eval_loss" in one)
    assert {"qat/oscillating", "qat/at_boundary"} <= record.keys()


def test_trained_models_are_converted_and_saved(tmp_path: Path) -> None:
    trainer, _ = trainer_of("llama", tmp_path, steps=2)
    trainer.train()
    model = convert(trainer.model.eval())
    model.save_pretrained(tmp_path / "converted")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        assert torch.equal(loaded(**tokens()).logits, model(**tokens()).logits)


def test_annealing_follows_the_optimizer_of_each_training() -> None:
    model = prepare(tiny_vit(), QATConfig(2), batch=images())
    callback = AnnealingCallback()
    state = transformers.TrainerState(max_steps=10)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    for (
        optimizer
    ) in optimizers:  # the first training ends by an exception, of which nobody tells the callback
        callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    assert [len(steps_of(optimizer).before) for optimizer in optimizers] == [0, 1]
