# SPDX-License-Identifier: Apache-2.0
"""Masked steerable networks: what each output field may see is decided by degrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from escnn import nn as enn
from escnn.group import Representation

from pyro_equiflow.nn.expand import Expanded, SteerableModule
from pyro_equiflow.nn.linear.layers import SteerableConv, SteerableLinear, steerable_layer
from pyro_equiflow.nn.masked.invariant_gate import MaskedInvariantGate, evenly, useful_degrees
from pyro_equiflow.nn.networks import gates_by_invariants, hidden_layers
from pyro_equiflow.nn.nonlinearities import FieldGates, PointwiseNonLinearity
from pyro_equiflow.nn.packed import PackedLayers
from pyro_equiflow.ops.arguments import check_integers

__all__ = ["MaskedSteerableNet"]


class MaskedSteerableNet(SteerableModule):
    r"""An equivariant network in which an output field of degree :math:`d` sees the input fields below :math:`d`.

    Every field carries a degree. A hidden field sees the fields before it of at most its own degree, an output field
    the hidden fields below its own (MADE, on fields in place of numbers), so :math:`\partial\, \mathrm{out}_i /
    \partial\, \mathrm{in}_j = 0` wherever :math:`d_i \le d_j`: exactly, since masked weights do not exist. On grids
    masks act on whole kernels, never on positions, or equivariance would be lost.

    The network is that of :func:`steerable_net`: regular fields with a pointwise function for finite groups; for
    continuous ones on points that of :class:`InvariantGateNet`, gated irreps shortened into the unit ball, without
    tensor products (handedness under SO(3), and how irreps of different frequency stand to each other, are not seen);
    on grids scalars and irreps with :class:`GatedNonLinearity`. A field, its gate and its length have one degree.
    Degrees spread evenly over those that can be of use, kind by kind of field. Where a layer has too few fields for all
    of them, all layers keep to those it has: nothing hidden leads into a dead end.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import MaskedSteerableNet, expand
        >>> space = gspaces.no_base_space(group.cyclic_group(4))
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> net = MaskedSteerableNet(vectors, vectors, in_degrees=[1, 2, 3], out_degrees=[1, 2, 3])
        >>> x = torch.randn(6)
        >>> jacobian = torch.autograd.functional.jacobian(expand(net), x[None]).view(6, 6)
        >>> bool((jacobian[:2] == 0).all() and (jacobian[:4, 2:] == 0).all())
        True

    :param in_type: input field type.
    :param out_type: output field type, over the same gspace.
    :param in_degrees: a degree for each input field; what all outputs may see has one below all of theirs.
    :param out_degrees: a degree for each output field.
    :param hidden_dims: channels of each hidden layer; rounded up to whole fields.
    :param nonlinearity: ``"pointwise"`` (finite groups), ``"gated"``, or ``None`` to choose as above.
    :param function: the pointwise function, see :class:`PointwiseNonLinearity`.
    :param kernel_size: points a side of the kernels (odd); grids only.
    :param padding_mode: ``"zeros"`` or ``"circular"``; grids only.
    :param zero_init: whether the last layer starts at zero.
    :ivar weight: the free weights of all layers, one after the other.
    :ivar bias: the free biases of all layers.
    :raises ValueError: unlike gspaces, not one degree per field, a size that is not positive, an unknown nonlinearity.

    References: Germain, Gregor, Murray and Larochelle, *MADE: Masked Autoencoder for Distribution Estimation* (arXiv
    1502.03509), section 4.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        in_degrees: Sequence[int],
        out_degrees: Sequence[int],
        *,
        hidden_dims: Sequence[int] = (64, 64),
        nonlinearity: str | None = None,
        function: str = "silu",
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        zero_init: bool = False,
    ) -> None:
        hidden = hidden_layers(
            in_type, out_type, hidden_dims, nonlinearity, function, kernel_size, padding_mode, zero_init
        )
        super().__init__(in_type, out_type)
        self.in_degrees = _check_degrees("in_degrees", in_degrees, in_type)
        self.out_degrees = _check_degrees("out_degrees", out_degrees, out_type)
        self.hidden_dims = check_integers("hidden_dims", hidden_dims)
        self.nonlinearity, self.function = nonlinearity, function
        self.kernel_size, self.padding_mode = kernel_size, padding_mode
        degrees = self.in_degrees, self.out_degrees
        # Not in the module tree, where it would be walked over at every call: parameters are the network's alone.
        self._map: MaskedInvariantGate | MaskedLayers
        if gates_by_invariants(in_type, out_type, hidden):
            self._map = MaskedInvariantGate(in_type, out_type, *degrees, self.hidden_dims, function)
        else:
            self._map = MaskedLayers(in_type, out_type, *degrees, hidden, kernel_size, padding_mode)
        # One tensor of weights and one of biases: an optimizer's cost goes by the number of tensors.
        weight, bias = self._map.initial(zero_init)
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    @property
    def hidden_degrees(self) -> list[list[int]]:
        """For each hidden layer a degree for each of its fields."""
        return self._map.hidden_degrees

    def expanded(self) -> Expanded:
        """The network on plain tensors, weights expanded from the present parameters."""
        return self._map.expanded(self.weight, self.bias)


class MaskedLayers(PackedLayers):
    """Linear layers with masks between fields, and nonlinearities between them.

    Parameters as of :class:`MaskedSteerableNet`, with ``hidden`` the nonlinearities.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        in_degrees: Sequence[int],
        out_degrees: Sequence[int],
        hidden: Sequence[PointwiseNonLinearity | FieldGates],
        kernel_size: int,
        padding_mode: str,
    ) -> None:
        self.hidden_degrees = _spread(in_type, in_degrees, out_degrees, hidden)
        kernel = kernel_size, padding_mode
        linears: list[SteerableLinear | SteerableConv] = []
        present, degrees = in_type, in_degrees
        for layer, own in zip(hidden, self.hidden_degrees):
            linears.append(steerable_layer(present, layer.in_type, *kernel, np.greater_equal.outer(own, degrees)))
            present, degrees = layer.out_type, own
        linears.append(steerable_layer(present, out_type, *kernel, np.greater.outer(out_degrees, degrees)))
        super().__init__(linears, hidden)


def _spread(
    in_type: enn.FieldType,
    in_degrees: Sequence[int],
    out_degrees: Sequence[int],
    hidden: Sequence[PointwiseNonLinearity | FieldGates],
) -> list[list[int]]:
    """Degrees of every hidden field."""
    useful = useful_degrees(in_degrees, out_degrees)
    kinds = [_kinds(layer) for layer in hidden]
    counts = [Counter(names) for names in kinds]
    levels = {
        kind: evenly(_visible(in_type, in_degrees, kind, useful), min(count[kind] for count in counts))
        for kind in dict.fromkeys(kind for names in kinds for kind in names)
    }
    spread = []
    for layer, names, count in zip(hidden, kinds, counts):
        left = {kind: iter(evenly(list(dict.fromkeys(levels[kind])), count[kind])) for kind in count}
        degrees = [next(left[kind]) for kind in names]
        # The type of a gate: scalars, one gate per field, the fields; and the lengths take the gates' places.
        spread.append(degrees + degrees[layer.scalars :] if isinstance(layer, FieldGates) else degrees)
    return spread


def _visible(in_type: enn.FieldType, in_degrees: Sequence[int], kind: Representation, useful: list[int]) -> list[int]:
    """The degrees at which a field has something to see: on a point irreps see their like only."""
    if in_type.gspace.dimensionality > 0 or kind.is_trivial() or len(kind.irreps) > 1:
        return useful
    fields = zip(in_type.representations, in_degrees)
    first = min((degree for field, degree in fields if kind.irreps[0] in field.irreps), default=useful[0])
    return [degree for degree in useful if degree >= first] or useful


def _kinds(layer: PointwiseNonLinearity | FieldGates) -> list[Representation]:
    """The fields of a hidden layer that have degrees of their own."""
    fields = list(layer.in_type.representations)
    if isinstance(layer, FieldGates):
        moving = sum(count for count, _ in layer.runs)
        return fields[: layer.scalars] + fields[layer.scalars + moving :]
    return fields


def _check_degrees(name: str, degrees: Sequence[int], field_type: enn.FieldType) -> list[int]:
    found = list(check_integers(name, degrees))
    if len(found) != len(field_type.representations):
        raise ValueError(
            f"{name}: expected an integer for each of the {len(field_type.representations)} fields, found {found}"
        )
    return found
