# SPDX-License-Identifier: Apache-2.0
"""Conditioners: escnn module trees, builders of them, and their expansion to plain-tensor functions."""

from pyro_equiflow.nn.conditioner import Conditioner
from pyro_equiflow.nn.expand import Expanded, SteerableModule, expand
from pyro_equiflow.nn.irreps.invariant_gate import InvariantGateNet
from pyro_equiflow.nn.linear.layers import SteerableConv, SteerableLinear
from pyro_equiflow.nn.lipschitz.bounds import lipschitz_bound, weight_norm
from pyro_equiflow.nn.lipschitz.conditioner import LipschitzConditioner
from pyro_equiflow.nn.lipschitz.gate import LipschitzGate
from pyro_equiflow.nn.masked.network import MaskedSteerableNet
from pyro_equiflow.nn.networks import lipschitz_net, steerable_net
from pyro_equiflow.nn.nonlinearities import GatedNonLinearity, PointwiseNonLinearity

__all__ = [
    "Conditioner",
    "Expanded",
    "GatedNonLinearity",
    "InvariantGateNet",
    "LipschitzConditioner",
    "LipschitzGate",
    "MaskedSteerableNet",
    "PointwiseNonLinearity",
    "SteerableConv",
    "SteerableLinear",
    "SteerableModule",
    "expand",
    "lipschitz_bound",
    "lipschitz_net",
    "steerable_net",
    "weight_norm",
]
