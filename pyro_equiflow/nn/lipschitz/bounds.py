# SPDX-License-Identifier: Apache-2.0
"""Lipschitz bounds of steerable networks, from their present weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule, expand
from pyro_equiflow.nn.linear.layers import SteerableConv, SteerableLinear
from pyro_equiflow.nn.lipschitz.operator_norm import convolution_norm, frequencies, spectral_norm

__all__ = ["WEIGHT_NORMS", "expanded_linear", "is_linear", "lipschitz_bound", "weight_norm"]


@functools.singledispatch
def lipschitz_bound(module: enn.EquivariantModule, spatial_shape: Sequence[int] | None = None) -> Tensor | float:
    r"""An upper bound of a module's Lipschitz constant, 2-norm over the event, from its present weights.

    Dispatches on the module's class; register a rule for a class of your own with
    ``@lipschitz_bound.register(MyModule)``, or give a ``SteerableModule`` an attribute ``lipschitz``. Linear layers are
    bounded by :func:`weight_norm`, a sequence by the product of its parts. The rules for escnn's own layers hold for
    exactly these classes: a subclass may compute something else.

    Example::

        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import SteerableLinear, lipschitz_bound
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> layer = SteerableLinear(vectors, vectors)
        >>> bool(lipschitz_bound(layer) >= layer.filter().norm(p=2, dim=0).max())
        True

    :param module: an escnn ``EquivariantModule``.
    :param spatial_shape: the grid; ``None`` for a bound that holds on every grid.
    :return: a number, or a scalar tensor differentiable in the weights.
    :raises TypeError: no rule for the module's class.
    :raises ValueError: a convolution with stride, dilation, groups, an even kernel, or a padding that changes the grid.
    """
    if is_linear(module):
        return weight_norm(module, expanded_linear(module).tensors[0], spatial_shape)
    if type(module) in _ESCNN_RULES:
        return _ESCNN_RULES[type(module)](module, spatial_shape)
    raise TypeError(
        f"expected modules with a Lipschitz rule, found {type(module).__name__}; build the network with "
        "pyro_equiflow.nn.lipschitz_net, or register a rule with pyro_equiflow.nn.lipschitz_bound.register, for a "
        "linear layer, whose weight is to be scaled, with pyro_equiflow.nn.weight_norm.register"
    )


@lipschitz_bound.register
def _(module: SteerableModule, spatial_shape: Sequence[int] | None = None) -> Tensor | float:
    found = getattr(module, "lipschitz", None)
    if found is None:
        return lipschitz_bound.dispatch(object)(module, spatial_shape)
    return float(found)


# By exact class: what a subclass computes its parent's rule does not know.
_ESCNN_RULES: dict[type, Callable[[Any, Sequence[int] | None], Tensor | float]] = {
    enn.SequentialModule: lambda module, spatial_shape: math.prod(
        lipschitz_bound(part, spatial_shape) for part in module._modules.values()
    ),
    enn.IdentityModule: lambda module, spatial_shape: 1.0,
    enn.ReLU: lambda module, spatial_shape: 1.0,
    enn.ELU: lambda module, spatial_shape: max(1.0, abs(float(module.alpha))),
}


@functools.singledispatch
def weight_norm(module: enn.EquivariantModule, weight: Tensor, spatial_shape: Sequence[int] | None = None) -> Tensor:
    r"""An upper bound of the operator norm of a linear layer with an expanded weight.

    What has a rule here is scaled down where a network is to be held below a constant: dividing an expanded filter by
    a number keeps it steerable. A class of your own, a subclass of a known one included, needs a rule here
    (``@weight_norm.register(MyLayer)``) and one of :func:`~pyro_equiflow.nn.expand`: its first tensor is the weight,
    the others are added to the layer's result (biases).

    On a point the Schatten norm of the matrix, at most 1.03 times the largest singular value; on a grid the largest
    over frequencies, at most 1.05 times more, see
    :func:`~pyro_equiflow.nn.lipschitz.operator_norm.frequencies`. Small grids with zero padding may lie further below
    their bound, which holds for the periodic grid that contains them.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import SteerableLinear, expand, weight_norm
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> layer = SteerableLinear(vectors, vectors)
        >>> bound = weight_norm(layer, expand(layer).tensors[0])
        >>> bool(torch.linalg.matrix_norm(layer.filter(), 2) <= bound)
        True

    :param module: the layer.
    :param weight: its expanded weight, or some of that weight's input channels.
    :param spatial_shape: the grid; ``None`` for every grid.
    """
    if type(module) not in WEIGHT_NORMS:
        raise TypeError(f"module: expected a linear layer, found {type(module).__name__}")
    return WEIGHT_NORMS[type(module)](module, weight, spatial_shape)


def is_linear(module: enn.EquivariantModule) -> bool:
    """Whether a module is a linear layer with a rule of :func:`weight_norm` that is its own."""
    kind = type(module)
    return kind in WEIGHT_NORMS or weight_norm.dispatch(kind) is not weight_norm.dispatch(object)


def expanded_linear(module: enn.EquivariantModule) -> Expanded:
    """A linear layer's map, whose first tensor is its weight."""
    expanded = expand(module)
    if not expanded.tensors:
        raise TypeError(
            f"expected {type(module).__name__}, which has a rule of weight_norm, to have one of expand too, whose "
            "first tensor is its weight, found none; register it with pyro_equiflow.nn.expand.register"
        )
    return expanded


def _steerable_conv_norm(module: SteerableConv, weight: Tensor, spatial_shape: Sequence[int] | None) -> Tensor:
    angles, factor = frequencies(module.in_type, module.kernel_size // 2, module.padding_mode, spatial_shape)
    return convolution_norm(weight, angles, factor)


def _escnn_conv_norm(module: Any, weight: Tensor, spatial_shape: Sequence[int] | None) -> Tensor:
    half = module.kernel_size // 2
    found = {name: getattr(module, name) for name in ("stride", "dilation", "groups", "padding", "padding_mode")}
    wanted = {"stride": 1, "dilation": 1, "groups": 1, "padding": half}
    modes = ("zeros", "circular")
    even = module.kernel_size % 2 == 0
    if even or any(found[n] != value for n, value in wanted.items()) or found["padding_mode"] not in modes:
        raise ValueError(
            f'expected a convolution with an odd kernel_size, {wanted} and padding_mode "zeros" or "circular", found '
            f"kernel_size {module.kernel_size}, {found}: no bound of its norm is known here"
        )
    # In float32 escnn samples its bases, so they are steerable up to 5e-7 only: every frequency is looked at.
    angles, factor = frequencies(module.in_type, half, module.padding_mode, spatial_shape, use_symmetry=False)
    return convolution_norm(weight, angles, factor)


#: Rules of :func:`weight_norm` by exact class: what a subclass makes of its weight its parent's rule does not know.
WEIGHT_NORMS: dict[type, Callable[[Any, Tensor, Sequence[int] | None], Tensor]] = {
    SteerableLinear: lambda module, weight, spatial_shape: spectral_norm(weight),
    SteerableConv: _steerable_conv_norm,
    enn.Linear: lambda module, weight, spatial_shape: spectral_norm(weight),
    enn.R2Conv: _escnn_conv_norm,
    enn.R3Conv: _escnn_conv_norm,
}
