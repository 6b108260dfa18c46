"""What quantization costs a language model: its perplexity, and outliers like those of large models.

Names are loaded when first used; none of them imports transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive._lazy import lazy_attributes

if TYPE_CHECKING:
    from olive.eval.outliers import InjectedNorm as InjectedNorm
    from olive.eval.outliers import LeftOut as LeftOut
    from olive.eval.outliers import OutlierInjection as OutlierInjection
    from olive.eval.outliers import inject_outliers as inject_outliers
    from olive.eval.scoring import perplexity as perplexity

_PUBLIC = {
    "InjectedNorm": "olive.eval.outliers",
    "LeftOut": "olive.eval.outliers",
    "OutlierInjection": "olive.eval.outliers",
    "inject_outliers": "olive.eval.outliers",
    "perplexity": "olive.eval.scoring",
}
__all__ = ["InjectedNorm", "LeftOut", "OutlierInjection", "inject_outliers", "perplexity"]
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
