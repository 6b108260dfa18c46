"""transformers and PEFT: loading, saving, Trainer callbacks. Importing this package imports neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive._lazy import lazy_attributes

if TYPE_CHECKING:
    from olive.hf.qat_callbacks import AnnealingCallback as AnnealingCallback
    from olive.hf.qat_callbacks import OscillationCallback as OscillationCallback

_PUBLIC = {
    "AnnealingCallback": "olive.hf.qat_callbacks",
    "OscillationCallback": "olive.hf.qat_callbacks",
}
__all__ = ["AnnealingCallback", "OscillationCallback"]
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
