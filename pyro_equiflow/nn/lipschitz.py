# SPDX-License-Identifier: Apache-2.0
"""Lipschitz bounds of steerable networks, and networks that are held below one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.conditioner import Conditioner
from pyro_equiflow.nn.expand import Expanded, SteerableModule, chained, expand
from pyro_equiflow.nn.layers import SteerableConv, SteerableLinear
from pyro_equiflow.nn.nonlinearities import FUNCTIONS, PointwiseFunction, PointwiseNonLinearity
from pyro_equiflow.nn.operator_norm import convolution_norm, frequencies, spectral_norm

__all__ = ["LipschitzConditioner", "Normalized", "lipschitz_bound", "weight_norm"]

# What rounding may add to a product of bounds, relative, a layer.
_ROUNDING = 1e-6

# Linear layers with a rule below; a subclass that computes something else has none.
_LINEAR = (SteerableLinear, SteerableConv, enn.Linear, enn.R2Conv, enn.R3Conv)


@functools.singledispatch
def lipschitz_bound(module: enn.EquivariantModule, spatial_shape: Sequence[int] | None = None) -> Tensor | float:
    r"""An upper bound of a module's Lipschitz constant, 2-norm over the event, from its present weights.

    Dispatches on the module's class; register a rule for a class of your own with
    ``@lipschitz_bound.register(MyModule)``, or give a ``SteerableModule`` an attribute ``lipschitz``. Linear layers are
    bounded by :func:`weight_norm`, a sequence by the product of its parts.

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
    if _is_linear(module):
        return weight_norm(module, _expanded_linear(module).tensors[0], spatial_shape)
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


@lipschitz_bound.register(enn.SequentialModule)
def _(module: enn.SequentialModule, spatial_shape: Sequence[int] | None = None) -> Tensor | float:
    if type(module).forward is not enn.SequentialModule.forward:
        return lipschitz_bound.dispatch(object)(module, spatial_shape)
    bounds = [lipschitz_bound(part, spatial_shape) for part in module._modules.values()]
    return math.prod(bounds)


def _activation(kind: type, constant: Callable[[Any], float]) -> None:
    @lipschitz_bound.register(kind)
    def _(module: enn.EquivariantModule, spatial_shape: Sequence[int] | None = None) -> Tensor | float:
        return constant(module) if _computes_as(module, kind) else lipschitz_bound.dispatch(object)(module)


_activation(enn.IdentityModule, lambda module: 1.0)
_activation(enn.ReLU, lambda module: 1.0)
_activation(enn.ELU, lambda module: max(1.0, abs(float(module.alpha))))


def _computes_as(module: enn.EquivariantModule, kind: type) -> bool:
    """Whether an instance of ``kind`` or of a subclass computes what ``kind`` does: a rule for it says nothing else."""
    return expand.dispatch(type(module)) is expand.dispatch(kind) and all(
        getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "expanded")
    )


@functools.singledispatch
def weight_norm(module: enn.EquivariantModule, weight: Tensor, spatial_shape: Sequence[int] | None = None) -> Tensor:
    r"""An upper bound of the operator norm of a linear layer with an expanded weight.

    What has a rule here is scaled down where a network is to be held below a constant: dividing an expanded filter by
    a number keeps it steerable. A class of your own needs a rule of :func:`~pyro_equiflow.nn.expand` too: its first
    tensor is the weight, the others are added to the layer's result (biases).

    On a point the Schatten norm of the matrix, at most 1.03 times the largest singular value; on a grid the largest
    over frequencies, at most 1.05 times more, see :func:`~pyro_equiflow.nn.operator_norm.frequencies`. Small grids with
    zero padding may lie further below their bound, which holds for the periodic grid that contains them.

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
    raise TypeError(f"expected a linear layer, found {type(module).__name__}")


def _is_linear(module: enn.EquivariantModule) -> bool:
    rule = weight_norm.dispatch(type(module))
    if rule is weight_norm.dispatch(object):
        return False
    return all(
        _computes_as(module, kind)
        for kind in _LINEAR
        if weight_norm.dispatch(kind) is rule and isinstance(module, kind)
    )


def _expanded_linear(module: enn.EquivariantModule) -> Expanded:
    expanded = expand(module)
    if not expanded.tensors:
        raise TypeError(
            f"expected {type(module).__name__}, which has a rule of weight_norm, to have one of expand too, whose "
            "first tensor is its weight, found none; register it with pyro_equiflow.nn.expand.register"
        )
    return expanded


@weight_norm.register(SteerableLinear)
@weight_norm.register(enn.Linear)
def _(module: enn.EquivariantModule, weight: Tensor, spatial_shape: Sequence[int] | None = None) -> Tensor:
    return spectral_norm(weight)


@weight_norm.register
def _(module: SteerableConv, weight: Tensor, spatial_shape: Sequence[int] | None = None) -> Tensor:
    angles, factor = frequencies(module.in_type, module.kernel_size // 2, module.padding_mode, spatial_shape)
    return convolution_norm(weight, angles, factor)


@weight_norm.register(enn.R2Conv)
@weight_norm.register(enn.R3Conv)
def _(module: Any, weight: Tensor, spatial_shape: Sequence[int] | None = None) -> Tensor:
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


class Normalized(NamedTuple):
    """A network held below a constant: ``bound`` is one of ``expanded.fn(x, *expanded.tensors)`` in ``x``."""

    expanded: Expanded
    bound: float


class LipschitzConditioner(Conditioner):
    r"""A network whose Lipschitz constant is held below :math:`c`, by weights normalised at every use.

    Each of the :math:`L` linear layers has its weight scaled by

    .. math:: \min(1, a / \|W\|), \qquad a = (c / \textstyle\prod_j l_j)^{1/L}

    where :math:`\|W\|` is the upper bound of :func:`weight_norm`, found anew from the present weights, and :math:`l_j`
    are the constants of all other layers. So the bound holds after any optimizer step, load or cast. The parameters
    themselves are not touched.

    With ``context`` channels behind the event's, the constant is that in the event: in the first layer, if it is
    linear, the context's part of the weight is left as it is.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import LipschitzConditioner, lipschitz_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> network = LipschitzConditioner(lipschitz_net(vectors, vectors), vectors, vectors, 0.9)
        >>> expanded, bound = network.normalized()
        >>> expanded(torch.randn(5, 6)).shape, bool(bound <= 0.9)
        (torch.Size([5, 6]), True)

    :param network: an escnn ``EquivariantModule``: linear layers and others with a rule of :func:`lipschitz_bound`.
    :param in_type: the type it has to take, the context's fields last.
    :param out_type: the type it has to give.
    :param lipschitz: :math:`c`, inside (0, 1).
    :raises ValueError: ``lipschitz`` outside (0, 1), or no linear layer; else as
        :class:`~pyro_equiflow.nn.conditioner.Conditioner`.
    :raises TypeError: a module without a rule; else as :class:`~pyro_equiflow.nn.conditioner.Conditioner`.
    """

    def __init__(
        self, network: enn.EquivariantModule, in_type: enn.FieldType, out_type: enn.FieldType, lipschitz: float
    ) -> None:
        if not 0 < lipschitz < 1:
            raise ValueError(
                f"lipschitz: expected a number inside (0, 1), found {lipschitz!r}: x + F(x) need not be invertible "
                "otherwise"
            )
        super().__init__(network, in_type, out_type)
        self.lipschitz = float(lipschitz)
        self._channels = out_type.size
        #: Whether all that the map depends on is among its expanded tensors, so that they can be cast.
        self.is_expanded = all(expand(leaf).tensors or not list(leaf.parameters()) for leaf in _leaves(network))
        lipschitz_bound(network)
        if not any(map(_is_linear, _leaves(network))):
            raise ValueError("conditioner: expected at least one linear layer, whose weight can be scaled, found none")

    def normalized(self, spatial_shape: Sequence[int] | None = None) -> Normalized:
        """The network's map on plain tensors, weights expanded and scaled from the present parameters.

        :param spatial_shape: the grid that it will be used on; ``None`` for every grid.
        """
        leaves = _leaves(self.network)
        linear = [_is_linear(leaf) for leaf in leaves]
        bound = math.prod(_number(lipschitz_bound(leaf, spatial_shape)) for leaf, k in zip(leaves, linear) if not k)
        cap = (self.lipschitz / (bound * (1 + _ROUNDING) ** len(leaves))) ** (1 / sum(linear))
        between = _functions_between(leaves, linear)
        parts = []
        for i, leaf in enumerate(leaves):
            if i in between:
                parts.append(between[i].expanded_core())
                continue
            part = _expanded_linear(leaf) if linear[i] else expand(leaf)
            if linear[i]:
                weight, *bias = part.tensors
                free = weight.shape[1] - self._channels if i == 0 else 0
                limited = weight.narrow(1, 0, self._channels) if free else weight
                norm = weight_norm(leaf, limited, spatial_shape)
                found = norm.item()
                bound *= min(found, cap)
                # The scales of the functions before and after.
                before = between[i - 1].outer if i - 1 in between else 1.0
                after = between[i + 1].inner if i + 1 in between else 1.0
                limited = limited * ((before * after) if found <= cap else (before * after * cap) / norm)
                if free:
                    limited = torch.cat([limited, weight.narrow(1, self._channels, free) * after], 1)
                part = part._replace(tensors=(limited, *(b if after == 1 else b * after for b in bias)))
            parts.append(part)
        return Normalized(chained(parts), min(bound * (1 + _ROUNDING) ** len(parts), self.lipschitz))

    def expanded(self) -> Expanded:
        """The normalised network's map on plain tensors, for every grid."""
        return self.normalized().expanded


def _number(bound: Tensor | float) -> float:
    return bound.item() if isinstance(bound, Tensor) else bound


def _functions_between(leaves: Sequence[enn.EquivariantModule], linear: Sequence[bool]) -> dict[int, PointwiseFunction]:
    """The pointwise functions with a linear layer on either side, which can take over their scales."""
    return {
        i: FUNCTIONS[leaf.function]
        for i, leaf in enumerate(leaves)
        if type(leaf) is PointwiseNonLinearity and 0 < i < len(leaves) - 1 and linear[i - 1] and linear[i + 1]
    }


def _leaves(module: enn.EquivariantModule) -> list[enn.EquivariantModule]:
    """The modules of nested sequences in order."""
    if lipschitz_bound.dispatch(type(module)) is not lipschitz_bound.dispatch(enn.SequentialModule):
        return [module]
    return [leaf for part in module._modules.values() for leaf in _leaves(part)]
