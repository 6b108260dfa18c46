"""Post-training quantization of one weight: scale search and fitted codebooks."""

from olive.ptq.grids import OVP8_GRID, PAIR_GRID, PAPER_GRID, PLAIN_GRID
from olive.ptq.search import QuantizedWeight, QuantizedWeight8, quantize_weight, quantize_weight8

__all__ = [
    "OVP8_GRID",
    "PAIR_GRID",
    "PAPER_GRID",
    "PLAIN_GRID",
    "QuantizedWeight",
    "QuantizedWeight8",
    "quantize_weight",
    "quantize_weight8",
]
