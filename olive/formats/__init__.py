"""Number formats: codebooks, outlier-victim pairs, stored scales. Pure functions on tensors."""

from olive.formats.activations import ACTIVATION_CODEBOOKS, ACTIVATION_FORMATS, PAPER, ActivationFormat
from olive.formats.codebooks import CODEBOOK_NAMES, CODEBOOKS, LEARNED, Codebook, get_codebook
from olive.formats.layout import (
    GROUP_SIZES,
    PER_CHANNEL,
    PER_TENSOR,
    check_group_size,
    codes_shape,
    groups_per_row,
    scale_shape,
)
from olive.formats.ovp4 import PAIRINGS, Pairing, outlier_pairs, ovp4_decode, ovp4_encode, ovp4_validate
from olive.formats.ovp8 import outlier_pairs8, ovp8_decode, ovp8_encode, ovp8_validate
from olive.formats.scales import pack_scale, round_scale, unpack_scale

__all__ = [
    "ACTIVATION_CODEBOOKS",
    "ACTIVATION_FORMATS",
    "CODEBOOKS",
    "CODEBOOK_NAMES",
    "GROUP_SIZES",
    "LEARNED",
    "PAIRINGS",
    "PAPER",
    "PER_CHANNEL",
    "PER_TENSOR",
    "ActivationFormat",
    "Codebook",
    "Pairing",
    "check_group_size",
    "codes_shape",
    "get_codebook",
    "groups_per_row",
    "outlier_pairs",
    "outlier_pairs8",
    "ovp4_decode",
    "ovp4_encode",
    "ovp4_validate",
    "ovp8_decode",
    "ovp8_encode",
    "ovp8_validate",
    "pack_scale",
    "round_scale",
    "scale_shape",
    "unpack_scale",
]
