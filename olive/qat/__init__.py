"""Quantization-aware training without oscillations: prepare a model, train it, convert it to integers."""

from __future__ import annotations

from olive._lazy import lazy_attributes

_PUBLIC = {
    "ActivationQuantizer": "olive.qat.activation_quantizer",
    "QATConfig": "olive.qat.config",
}
__all__ = list(_PUBLIC)
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
