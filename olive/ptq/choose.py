"""Which codebook a weight gets where the configuration leaves it open."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from olive.config import AUTO, PAPER_CODEBOOKS, QuantConfig
from olive.formats import PAPER
from olive.formats.codebooks import CODEBOOKS, LEARNED, Codebook, get_codebook
from olive.ptq.learned import SAMPLE_VALUES, Sample, fit_codebook, sample_rows


def choose_codebook(weight: Tensor, config: QuantConfig, importance: Tensor | None = None) -> Codebook:
    """The codebook of one tensor.

    "learned" is fitted; "paper" is int4 or flint4, whichever has the least squared error on the tensor, as
    OliVe chooses; "auto" is the best of all, fitted tables among them, by the error that `importance` weighs,
    on a sample of the rows.

    Args:
        weight: float [N, K], finite, or a stack [E, N, K], which has one codebook.
        config: of 4 bits. Where it quantizes activations, "auto" leaves out flint4, which has no integer
            products.
        importance: float32 [K] or None, as in `quantize_weight`.
    """
    if config.codebook in CODEBOOKS:
        return get_codebook(config.codebook)
    weight = weight.flatten(0, -2)
    if config.codebook == LEARNED:
        return fit_codebook(weight, config.group_size, importance)
    if config.codebook == PAPER:
        books: Sequence[Codebook] = [get_codebook(name) for name in PAPER_CODEBOOKS]
        rows = weight.float().contiguous()
    else:
        assert config.codebook == AUTO
        named = [book for book in CODEBOOKS.values() if book.is_int8 or config.activations is None]
        books = [fit_codebook(weight, config.group_size, importance), *named]
        rows = sample_rows(weight, SAMPLE_VALUES)
    sample = Sample(rows, config.group_size, importance, config.method)
    return min(books, key=lambda book: sample.search(book)[0])
