"""Modules that hold quantized weights and call the operators."""

from olive.nn.ovp_experts import EXPERT_WEIGHTS, OVPExperts, OVPSortedExperts
from olive.nn.ovp_linear import OVPConv1D, OVPLinear
from olive.nn.ovp_weight import OVPWeight

__all__ = ["EXPERT_WEIGHTS", "OVPConv1D", "OVPExperts", "OVPLinear", "OVPSortedExperts", "OVPWeight"]
