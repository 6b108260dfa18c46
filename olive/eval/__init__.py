"""What quantization costs a model, and outliers like those of large models.

Names are loaded when first used; none of them imports transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive._lazy import lazy_attributes

if TYPE_CHECKING:
    from olive.eval.comparison import CausalComparison as CausalComparison
    from olive.eval.comparison import compare_causal as compare_causal
    from olive.eval.embeddings import embedding_distance as embedding_distance
    from olive.eval.embeddings import mean_pooled as mean_pooled
    from olive.eval.layers import layer_sqnr as layer_sqnr
    from olive.eval.outliers import InjectedNorm as InjectedNorm
    from olive.eval.outliers import LeftOut as LeftOut
    from olive.eval.outliers import OutlierInjection as OutlierInjection
    from olive.eval.outliers import inject_outliers as inject_outliers
    from olive.eval.scoring import perplexity as perplexity

_PUBLIC = {
    "CausalComparison": "olive.eval.comparison",
    "InjectedNorm": "olive.eval.outliers",
    "LeftOut": "olive.eval.outliers",
    "OutlierInjection": "olive.eval.outliers",
    "compare_causal": "olive.eval.comparison",
    "embedding_distance": "olive.eval.embeddings",
    "inject_outliers": "olive.eval.outliers",
    "layer_sqnr": "olive.eval.layers",
    "mean_pooled": "olive.eval.embeddings",
    "perplexity": "olive.eval.scoring",
}
__all__ = [
    "CausalComparison",
    "InjectedNorm",
    "LeftOut",
    "OutlierInjection",
    "compare_causal",
    "embedding_distance",
    "inject_outliers",
    "layer_sqnr",
    "mean_pooled",
    "perplexity",
]
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
