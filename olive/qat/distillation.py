"""`distill`: let a full-precision teacher's outputs be what a model is trained towards."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_IGNORED = -100  # label of positions that do not count, as in transformers and torch


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Cross entropy of softened outputs less the teacher's entropy: KL(teacher || student) t^2, averaged.

    Args:
        student: logits, float [..., C].
        teacher: logits, float [..., C]; gets no gradient.
        temperature: t, by which both are divided.
        mask: bool [...], which positions count; None = all.

    Returns:
        float32 scalar.

    Raises:
        ValueError: logits of two shapes.

    Source: Hinton et al., arXiv:1503.02531.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected logits of the student's shape {tuple(student.shape)}, got "
            f"{tuple(teacher.shape)}"
        )
    expected = functional.log_softmax(teacher.detach().float() / temperature, -1)
    got = functional.log_softmax(student.float() / temperature, -1)
    loss = functional.kl_div(got, expected, reduction="none", log_target=True).sum(-1)
    if mask is not None:
        loss = (loss * mask).sum() / mask.sum().clamp(min=1)
    return loss.mean() * temperature**2


class Distillation:
    """What `distill` set up; `remove` undoes it.

    Args:
        teacher: not registered as a part of the student, so it is neither trained nor saved with it.
        weight, temperature: as in `distill`.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._handle: Any = None

    def attach(self, student: nn.Module) -> None:
        """Act on the student's outputs from now on."""
        self._handle = student.register_forward_hook(self._mix, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        """What a copy of the student has: the same teacher, since nothing changes it."""
        new = memo[id(self)] = Distillation(self.teacher, self.weight, self.temperature)
        new._handle = copy.deepcopy(self._handle, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "model: expected one without a teacher to pickle, got one under distillation; call remove() on "
            "what olive.qat.distill returned first, or save model.state_dict()"
        )

    def remove(self) -> None:
        """Leave the student's outputs as they are."""
        self._handle.remove()

    def _mix(self, student: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not student.training:
            return None
        if not isinstance(output, MutableMapping) or "logits" not in output:
            raise ValueError(
                f"distill: expected a model whose outputs hold logits, got {type(output).__name__}; call it "
                f"with return_dict=True"
            )
        logits = output["logits"]
        parameter = next(self.teacher.parameters(), None)
        if parameter is not None and parameter.device != logits.device:
            self.teacher.to(logits.device)
        without_labels = {key: value for key, value in kwargs.items() if key != "labels"}
        with torch.no_grad():
            expected = self.teacher(*args, **without_labels)["logits"]
        mask = _counting_positions(logits, kwargs, _is_causal(student))
        distilled = distillation_loss(logits, expected, temperature=self.temperature, mask=mask)
        if (items := kwargs.get("num_items_in_batch")) is not None:
            # The Trainer sums losses over the batches of a step, each a sum divided by this number.
            distilled = distilled * (logits[..., 0].numel() if mask is None else mask.sum()) / items
        loss = output.get("loss")
        output["loss"] = distilled if loss is None else (1 - self.weight) * loss + self.weight * distilled
        return output


def _is_causal(model: nn.Module) -> bool:
    """Whether the logits of a position are of the token after it."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and not (
        getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    )


def _counting_positions(logits: Tensor, kwargs: dict[str, Any], causal: bool) -> Tensor | None:
    """Which positions of token logits count: those with a label; without labels those attended to.

    Args:
        causal: whether a position's label is that of the next one.
    """
    if logits.dim() != 3:
        return None
    labels, attended = kwargs.get("labels"), kwargs.get("attention_mask")
    if labels is not None and labels.shape == logits.shape[:2]:
        counts = torch.ne(labels, _IGNORED)
        return functional.pad(counts[:, 1:], (0, 1), value=False) if causal else counts
    if attended is None or attended.shape != logits.shape[:2]:
        return None
    mask: Tensor = attended.bool()
    return mask


def distill(
    model: nn.Module, teacher: nn.Module, *, weight: float = 1.0, temperature: float = 1.0
) -> Distillation:
    """From now on let `model`'s training loss contain its distance from a teacher's outputs.

    In training mode each forward pass of `model` runs the teacher on the same arguments, in eval mode and
    without gradients, and returns `weight * distillation_loss + (1 - weight) * loss`; so the Trainer and
    every loop that uses `output.loss` need no change. The teacher moves to where the model is.

    Args:
        model: of transformers; its outputs hold `logits`, and a `loss` where labels are given.
        teacher: usually the model in full precision, e.g. a copy made before `prepare`.
        weight: of the teacher, 0 to 1; without labels it is the only loss.
        temperature: by which logits are divided.

    Returns:
        What undoes it (`remove`).

    Raises:
        ValueError: a weight or temperature out of its range, or the model as its own teacher. In training, a
            model whose outputs hold no logits.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"weight: expected above 0 and up to 1, got {weight!r}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected above 0, got {temperature!r}")
    if teacher is model or set(teacher.parameters()) & set(model.parameters()):
        raise ValueError(
            "teacher: expected a model of its own, got one that shares parameters with the model; "
            "copy.deepcopy it before prepare"
        )
    teacher.eval().requires_grad_(False)
    distillation = Distillation(teacher, weight, temperature)
    distillation.attach(model)
    return distillation
