"""A prepared model brought to bfloat16: scales and what trackers record stay float32."""

from __future__ import annotations

import pytest
import torch

from olive.qat import IterativeFreezing, OscillationTracker, QATConfig, anneal, convert, prepare
from olive.qat.latent import latent_weights
from tests.qat.subjects import images, tiny_vit

HALF = torch.bfloat16
CONFIGS = {
    "lsq": QATConfig(3, 4, "lsq", activation_offsets=True),
    "qkr": QATConfig(2, 4, qkr=True, activation_offsets=True),
}


def is_kept(name: str) -> bool:
    ends = ("codes", "direction", "fixed", "frozen", "signed")
    return "quantizer" in name or name.endswith(("frequency", "average", "held", "bias_of_keys", *ends))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_only_the_float_model_s_own_tensors_change(kind: str) -> None:
    data = images()
    model = prepare(tiny_vit(), CONFIGS[kind], batch=data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = OscillationTracker(model)
    IterativeFreezing(model, optimizer, tracker, 0.3)
    anneal(model, optimizer, 0.05)
    model.train()(**data).loss.backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    model.to(HALF)
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    kept = [name for name in before if is_kept(name)]
    assert {name.rpartition(".")[2] for name in kept} >= {"scale", "offset", "frequency", "average"}
    assert kind == "lsq" or any(name.endswith("held") for name in kept)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) if is_kept(name) else tensor.dtype == HALF, name
    optimizer.zero_grad()
    data["pixel_values"] = data["pixel_values"].to(HALF)
    model(**data).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    tracker.update()
    assert set(tracker.shares()) == {"oscillating", "at_boundary"}


def test_what_is_added_to_logits_stays_float32_once_converted() -> None:
    model = convert(prepare(tiny_vit(), CONFIGS["qkr"], batch=images()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if is_kept(name)}
    model.to(HALF)
    assert any(name.endswith("bias_of_keys") for name in before)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_model_moves_to_another_device_as_ever() -> None:
    model = prepare(tiny_vit(), CONFIGS["qkr"], batch=images())
    OscillationTracker(model)
    model.to("meta", HALF)
    assert all(one.is_meta for one in model.state_dict().values())
    assert all(one.get_buffer("frequency").dtype == torch.float32 for one in latent_weights(model).values())
