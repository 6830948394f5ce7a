# SPDX-License-Identifier: Apache-2.0
"""Networks that are held below a Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.conditioner import Conditioner
from pyro_equiflow.nn.expand import Expanded, chained, expand
from pyro_equiflow.nn.lipschitz.bounds import WEIGHT_NORMS, expanded_linear, is_linear, lipschitz_bound, weight_norm
from pyro_equiflow.nn.lipschitz.gate import LipschitzGate
from pyro_equiflow.nn.nonlinearities import FUNCTIONS, PointwiseFunction, PointwiseNonLinearity
from pyro_equiflow.ops.arguments import check_number
from pyro_equiflow.ops.tracing import is_traced

__all__ = ["LipschitzConditioner", "Normalized"]

# What rounding may add to a product of bounds, relative, per layer: eight units in the last place of float32. A weight
# is rounded three times, half a unit each, where it is divided by its bound, and the bound, a product of few numbers
# beside its own allowance, three times; the rest is room.
_ROUNDING = 1e-6


class Normalized(NamedTuple):
    """A network held below a constant: ``bound`` is one of ``expanded.fn(x, *expanded.tensors)`` in ``x``."""

    expanded: Expanded
    bound: float


# Modules that leave zero where it is.
_FIXING_ZERO = (PointwiseNonLinearity, LipschitzGate, enn.IdentityModule, enn.ReLU, enn.ELU)


class _Addend(NamedTuple):
    """What one of a network's modules adds: its biases, its columns for the context, or its output at zero."""

    constant: float | Tensor
    biases: Sequence[Tensor] = ()
    columns: Tensor | None = None
    at_zero: Callable[[], Tensor] | None = None


class Offset(NamedTuple):
    r"""What a network adds to what it makes of an event.

    :ivar addends: what its modules add.
    :ivar spatial_shape: the grid.
    """

    addends: tuple[_Addend, ...]
    spatial_shape: tuple[int, ...]

    @torch.no_grad()
    def length(self, context: Tensor | None) -> Tensor:
        r"""A bound of the network's output at an event of zeros, with nothing cancelled: rounding goes by it.

        .. math:: \sum_i \Bigl(\prod_{j > i} l_j\Bigr) |b_i|

        over modules with constants :math:`l_j` and what they add, :math:`b_i`, the first one the context's part too. At
        an event :math:`x` vectors of total length :math:`c |x|` and this one are summed.

        :param context: shape ``(B, C, *spatial)``, or ``None`` where there is none.
        :return: shape ``(B,)``, or ``()`` without a context; float64.
        """
        given = torch.zeros((), dtype=torch.float64) if context is None else _length(context.flatten(1), 1)
        # A first module without columns for it takes the context as it takes the event.
        total = given if self.addends[0].columns is None else torch.zeros_like(given)
        root = math.sqrt(math.prod(self.spatial_shape))
        for constant, biases, columns, at_zero in self.addends:
            total = constant * total
            for bias in biases:
                total = total + root * _length(bias)
            if columns is not None:
                # Frobenius' norm bounds a matrix's, and with the root of the kernel's points a convolution's.
                total = total + math.sqrt(columns[0, 0].numel()) * _length(columns) * given
            if at_zero is not None:
                total = total + _length(at_zero())
        return total


def _length(vector: Tensor, dim: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(vector.detach(), dim=dim, dtype=torch.float64)


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
        remedy = "x + F(x) need not be invertible otherwise"
        lipschitz = check_number("lipschitz", lipschitz, "(0, 1)", remedy=remedy)
        super().__init__(network, in_type, out_type)
        self.lipschitz = lipschitz
        #: Channels of a context, behind the event's.
        self._context = _context_channels(in_type, out_type)
        #: Whether all that the map depends on is among its expanded tensors, so that they can be cast.
        self.is_expanded = all(expand(leaf).tensors or not list(leaf.parameters()) for leaf in _leaves(network))
        lipschitz_bound(network)
        leaves = _leaves(network)
        if not any(map(is_linear, leaves)):
            raise ValueError("conditioner: expected at least one linear layer, whose weight can be scaled, found none")
        if self._context and is_linear(leaves[0]):
            _check_columns(leaves[0])
        for i, leaf in enumerate(leaves):
            if is_linear(leaf):
                _check_linear(leaf, 0 if i else self._context)

    def normalized(self, spatial_shape: Sequence[int] | None = None) -> Normalized:
        """The network's map on plain tensors, weights expanded and scaled from the present parameters.

        :param spatial_shape: the grid that it will be used on; ``None`` for every grid.
        """
        return self.with_offset(spatial_shape)[0]

    def with_offset(self, spatial_shape: Sequence[int] | None = None) -> tuple[Normalized, Offset]:
        """What :meth:`normalized` gives, and the size of what the network adds to an event's part.

        :param spatial_shape: as there; the offset is that on one point without it.
        """
        leaves = _leaves(self.network)
        linear = [type(leaf) in WEIGHT_NORMS or is_linear(leaf) for leaf in leaves]
        # Where values are not to be seen the bound is the constant itself.
        seen = not is_traced()
        constants = [1.0 if k else lipschitz_bound(leaf, spatial_shape) for leaf, k in zip(leaves, linear)]
        if seen:
            constants = [constant.item() if isinstance(constant, Tensor) else constant for constant in constants]
        bound = math.prod(constants)
        cap = (self.lipschitz / (bound * (1 + _ROUNDING) ** len(leaves))) ** (1 / sum(linear))
        between = _functions_between(leaves, linear)
        maps, addends, like = [], [], next(self.network.parameters())
        for i, leaf in enumerate(leaves):
            if not linear[i]:
                addends.append(_Addend(constants[i], at_zero=_at_zero(leaf, like, spatial_shape)))
            if i in between:
                maps.append(between[i].expanded_core)
                continue
            part = expanded_linear(leaf) if linear[i] else expand(leaf)
            if linear[i]:
                weight, *bias = part.tensors
                free = self._context if i == 0 else 0
                limited = weight.narrow(1, 0, weight.shape[1] - free) if free else weight
                norm = weight_norm(leaf, limited, spatial_shape)
                within = min(norm.item(), cap) if seen else norm.detach().clamp(max=cap)
                bound = bound * within
                # The scales of the functions before and after.
                before = between[i - 1].outer if i - 1 in between else 1.0
                after = between[i + 1].inner if i + 1 in between else 1.0
                limited = limited * (
                    (before * after) if seen and within < cap else before * after * cap / norm.clamp(min=cap)
                )
                columns = weight.narrow(1, weight.shape[1] - free, free) if free else None
                addends.append(_Addend(within, bias, columns))
                if columns is not None:
                    limited = torch.cat([limited, columns * after], 1)
                part = part._replace(tensors=(limited, *(b if after == 1 else b * after for b in bias)))
            maps.append(part)
        reached = min(float(bound) * (1 + _ROUNDING) ** len(maps), self.lipschitz) if seen else self.lipschitz
        normalized = Normalized(chained(maps), reached)
        return normalized, Offset(tuple(addends), tuple(spatial_shape or ()))

    def expanded(self) -> Expanded:
        """The normalised network's map on plain tensors, for every grid."""
        return self.normalized().expanded


def _at_zero(
    leaf: enn.EquivariantModule, like: Tensor, spatial_shape: Sequence[int] | None
) -> Callable[[], Tensor] | None:
    """Gives a module's output at one event of zeros, where that need not be zeros."""
    if type(leaf) in _FIXING_ZERO:
        return None
    return lambda: expand(leaf)(like.new_zeros(1, leaf.in_type.size, *(spatial_shape or ())))


def _context_channels(in_type: enn.FieldType, out_type: enn.FieldType) -> int:
    """How many channels of ``in_type`` are a context's: all behind those of ``out_type``."""
    event = len(out_type.representations)
    if in_type.gspace != out_type.gspace or in_type.representations[:event] != out_type.representations:
        raise ValueError(
            f"in_type: expected the fields of out_type {out_type}, then those of a context if there is one, found "
            f"{in_type}"
        )
    return int(in_type.size - out_type.size)


def _check_columns(first: enn.EquivariantModule) -> None:
    """Raises unless each input channel of a first layer has a column of the weight to itself."""
    weight, channels = expanded_linear(first).tensors[0], first.in_type.size
    if weight.dim() < 2 or weight.shape[1] != channels:
        raise ValueError(
            f"conditioner: expected a first layer with a column of the weight for each of the {channels} channels of "
            f"event and context, found {type(first).__name__} with a weight of {tuple(weight.shape)}: the part that "
            "acts on the event, which is to be bounded, cannot be told from the context's; put a SteerableLinear or a "
            "SteerableConv in front"
        )


@torch.no_grad()
def _check_linear(layer: enn.EquivariantModule, context: int) -> None:
    """Raises where a user's layer on points does not use its weight as a layer that is scaled has to.

    Linear in the weight, plus what does not hang on the event; and with a context, whose columns come last, those
    alone see it.
    """
    if layer.in_type.gspace.dimensionality or type(layer) in WEIGHT_NORMS:
        return
    fn, (weight, *rest) = expanded_linear(layer)
    # Numbers without a pattern, and the global generator left alone.
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(s, generator=generator).to(weight) for s in ((2, layer.in_type.size), weight.shape))
    event = x.clone()
    event[:, x.shape[1] - context :] = 0

    def of_event(weight: Tensor) -> Tensor:
        return fn(x, weight, *rest) - fn(x - event, weight, *rest)

    once, twice = of_event(noise), of_event(2 * noise)
    if (twice - 2 * once).abs().max() > 1e-3 * once.abs().max():
        raise ValueError(
            f"conditioner: expected {type(layer).__name__}, which has a rule of weight_norm, to be linear in the first "
            "of its expanded tensors, found that twice the weight does not double what it does to an event; let its "
            "rule of expand give the weight that is multiplied last, or register it with lipschitz_bound alone"
        )
    if context:
        noise[:, : weight.shape[1] - context] = 0
        if of_event(noise).abs().max() > 1e-3 * once.abs().max():
            raise ValueError(
                f"conditioner: expected {type(layer).__name__} to see the event through the first columns of its "
                f"weight, one per channel, found that the last {context}, the context's, act on it as well; put a "
                "SteerableLinear in front"
            )


def _functions_between(leaves: Sequence[enn.EquivariantModule], linear: Sequence[bool]) -> dict[int, PointwiseFunction]:
    """The pointwise functions with a linear layer on either side, which can take over their scales."""
    return {
        i: FUNCTIONS[leaf.function]
        for i, leaf in enumerate(leaves)
        if type(leaf) is PointwiseNonLinearity and 0 < i < len(leaves) - 1 and linear[i - 1] and linear[i + 1]
    }


def _leaves(module: enn.EquivariantModule) -> list[enn.EquivariantModule]:
    """The modules of nested sequences in order."""
    leaves, pending = [], [module]
    while pending:
        part = pending.pop()
        if type(part) is enn.SequentialModule:
            pending += reversed(part._modules.values())
        else:
            leaves.append(part)
    return leaves
