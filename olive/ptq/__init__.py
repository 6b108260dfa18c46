"""Post-training quantization of one weight: scale search and fitted codebooks."""

from olive.ptq.grids import PAIR_GRID, PAPER_GRID, PLAIN_GRID
from olive.ptq.search import QuantizedWeight, quantize_weight

__all__ = ["PAIR_GRID", "PAPER_GRID", "PLAIN_GRID", "QuantizedWeight", "quantize_weight"]
