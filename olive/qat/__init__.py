"""Quantization-aware training without oscillations: prepare a model, train it, convert it to integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive._lazy import lazy_attributes

if TYPE_CHECKING:
    from olive.qat.activation_quantizer import ActivationQuantizer as ActivationQuantizer
    from olive.qat.annealing import Annealing as Annealing
    from olive.qat.annealing import anneal as anneal
    from olive.qat.config import QATConfig as QATConfig
    from olive.qat.conversion import convert as convert
    from olive.qat.dampening import dampening_loss as dampening_loss
    from olive.qat.distillation import Distillation as Distillation
    from olive.qat.distillation import distill as distill
    from olive.qat.distillation import distillation_loss as distillation_loss
    from olive.qat.freezing import IterativeFreezing as IterativeFreezing
    from olive.qat.preparation import prepare as prepare
    from olive.qat.schedule import CosineSchedule as CosineSchedule
    from olive.qat.selection import Selection as Selection
    from olive.qat.selection import select as select
    from olive.qat.tracking import OscillationTracker as OscillationTracker

_PUBLIC = {
    "ActivationQuantizer": "olive.qat.activation_quantizer",
    "Annealing": "olive.qat.annealing",
    "CosineSchedule": "olive.qat.schedule",
    "Distillation": "olive.qat.distillation",
    "IterativeFreezing": "olive.qat.freezing",
    "OscillationTracker": "olive.qat.tracking",
    "QATConfig": "olive.qat.config",
    "Selection": "olive.qat.selection",
    "anneal": "olive.qat.annealing",
    "convert": "olive.qat.conversion",
    "dampening_loss": "olive.qat.dampening",
    "distill": "olive.qat.distillation",
    "distillation_loss": "olive.qat.distillation",
    "prepare": "olive.qat.preparation",
    "select": "olive.qat.selection",
}
__all__ = [
    "ActivationQuantizer",
    "Annealing",
    "CosineSchedule",
    "Distillation",
    "IterativeFreezing",
    "OscillationTracker",
    "QATConfig",
    "Selection",
    "anneal",
    "convert",
    "dampening_loss",
    "distill",
    "distillation_loss",
    "prepare",
    "select",
]
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
