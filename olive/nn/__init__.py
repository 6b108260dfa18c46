"""Modules that hold quantized weights and call the operators."""

from olive.nn.activation_figures import ActivationFigures
from olive.nn.ovp_experts import EXPERT_WEIGHTS, OVPExperts, OVPSortedExperts
from olive.nn.ovp_linear import OVPConv1D, OVPLinear
from olive.nn.ovp_weight import ACTIVATION_TENSORS, WEIGHT_TENSORS, OVPWeight
from olive.nn.uniform_conv import UniformConv2d
from olive.nn.uniform_embedding import UniformEmbedding
from olive.nn.uniform_linear import UniformLinear

__all__ = [
    "ACTIVATION_TENSORS",
    "EXPERT_WEIGHTS",
    "WEIGHT_TENSORS",
    "ActivationFigures",
    "OVPConv1D",
    "OVPExperts",
    "OVPLinear",
    "OVPSortedExperts",
    "OVPWeight",
    "UniformConv2d",
    "UniformEmbedding",
    "UniformLinear",
]
