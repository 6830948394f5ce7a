# SPDX-License-Identifier: Apache-2.0
"""Conditioners: escnn module trees, builders of them, and their expansion to plain-tensor functions."""

from pyro_equiflow.nn.expand import Expanded, SteerableModule, expand
from pyro_equiflow.nn.invariant_gate import InvariantGateNet
from pyro_equiflow.nn.layers import SteerableConv, SteerableLinear
from pyro_equiflow.nn.lipschitz_gate import LipschitzGate
from pyro_equiflow.nn.networks import lipschitz_net, steerable_net
from pyro_equiflow.nn.nonlinearities import GatedNonLinearity, PointwiseNonLinearity

__all__ = [
    "Expanded",
    "GatedNonLinearity",
    "InvariantGateNet",
    "LipschitzGate",
    "PointwiseNonLinearity",
    "SteerableConv",
    "SteerableLinear",
    "SteerableModule",
    "expand",
    "lipschitz_net",
    "steerable_net",
]
