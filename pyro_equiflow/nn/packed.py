# SPDX-License-Identifier: Apache-2.0
"""Linear layers with nonlinearities between them, all weights in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Chain, Expanded, SteerableModule, expand
from pyro_equiflow.nn.linear.expansion_plan import JointExpansion
from pyro_equiflow.nn.linear.layers import SteerableConv, SteerableLinear
from pyro_equiflow.ops.architecture import settings

__all__ = ["PackedLayers", "PackedNet"]


class PackedLayers:
    """The map of some layers by their weights and biases, each one tensor: an optimizer's cost goes by the number.

    :param linears: linear layers; their parameters are taken off them by :meth:`initial`.
    :param between: the nonlinearities between them, one fewer, without parameters.
    """

    def __init__(
        self, linears: Sequence[SteerableLinear | SteerableConv], between: Sequence[enn.EquivariantModule]
    ) -> None:
        self.linears, self.between = tuple(linears), tuple(between)
        self._build()

    def _build(self) -> None:
        layers = self.linears
        self._joint = JointExpansion([layer.plan for layer in layers], [layer.invariants for layer in layers])
        with_bias = any(layer.invariants.shape[1] for layer in layers)
        functions: list[tuple[Callable[..., Tensor], int]] = []
        for layer, nonlinearity in zip(layers, (*self.between, None)):
            functions.append((layer.affine_map, 2 if with_bias else 1))
            if nonlinearity is not None:
                functions.append((expand(nonlinearity).fn, 0))
        self._chain = Chain(functions)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_joint", "_chain")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    def initial(self, zero_init: bool) -> tuple[Tensor, Tensor]:
        """Takes the layers' own weights and biases over; the last weights are zero if asked for."""
        if zero_init:
            torch.nn.init.zeros_(self.linears[-1].weight)
        weights, biases = zip(*(layer.give_parameters() for layer in self.linears))
        return torch.cat(weights), torch.cat(biases)

    def architecture(self) -> list[dict[str, Any]]:
        """The layers' classes and settings, in order."""
        return [settings(layer) for layer in (*self.linears, *self.between)]

    def expanded(self, weight: Tensor, bias: Tensor) -> Expanded:
        """The layers one after the other."""
        tensors: list[Tensor] = []
        for own_filter, own_bias in zip(self._joint.filters(weight), self._joint.biases(bias)):
            tensors.append(own_filter)
            if own_bias is not None:
                tensors.append(own_bias)
        return Expanded(self._chain, tuple(tensors))


class PackedNet(SteerableModule):
    """A steerable perceptron or CNN with all its parameters in two tensors.

    The layers themselves stay out of the module tree, where they would be walked over at every call.

    :param linears: the linear layers, from the input type to the output type.
    :param between: the nonlinearities between them, one fewer.
    :param zero_init: whether the last layer starts at zero.
    :ivar weight: the free weights of all layers, one after the other.
    :ivar bias: the free biases of all layers; ``None`` where no layer's output has invariants.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        linears: Sequence[SteerableLinear | SteerableConv],
        between: Sequence[enn.EquivariantModule],
        zero_init: bool = False,
    ) -> None:
        super().__init__(linears[0].in_type, linears[-1].out_type)
        self.layers = PackedLayers(linears, between)
        weight, bias = self.layers.initial(zero_init)
        self.weight = torch.nn.Parameter(weight)
        # A parameter that takes part in nothing would have no gradient.
        self.register_parameter("bias", torch.nn.Parameter(bias) if len(bias) else None)

    def expanded(self) -> Expanded:
        """The network on plain tensors, weights expanded from the present parameters."""
        return self.layers.expanded(self.weight, self.weight.new_zeros(0) if self.bias is None else self.bias)
