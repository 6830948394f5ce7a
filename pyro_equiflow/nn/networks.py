# SPDX-License-Identifier: Apache-2.0
"""Builders of conditioners: steerable perceptrons on points, steerable CNNs on 2-D and 3-D grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation

from pyro_equiflow.nn.irreps.invariant_gate import InvariantGateNet
from pyro_equiflow.nn.irreps.isotypic import is_of_irreps
from pyro_equiflow.nn.linear.layers import SteerableConv, SteerableLinear, check_kernel, steerable_layer
from pyro_equiflow.nn.lipschitz.gate import LipschitzGate
from pyro_equiflow.nn.nonlinearities import (
    FUNCTIONS,
    FieldGates,
    GatedNonLinearity,
    PointwiseNonLinearity,
    require_one_lipschitz,
)
from pyro_equiflow.nn.packed import PackedNet
from pyro_equiflow.ops.arguments import check_choice, check_flag, check_integers
from pyro_equiflow.ops.representations import IrrepDecomposition, validate_field_type, validate_over

__all__ = ["gates_by_invariants", "hidden_layer", "hidden_layers", "lipschitz_net", "steerable_net"]


def steerable_net(
    in_type: enn.FieldType,
    out_type: enn.FieldType,
    *,
    hidden_dims: Sequence[int] = (64, 64),
    nonlinearity: str | None = None,
    function: str = "silu",
    kernel_size: int = 3,
    padding_mode: str = "zeros",
    zero_init: bool = False,
) -> enn.EquivariantModule:
    r"""An equivariant network from ``in_type`` to ``out_type``: a conditioner ready for every transform.

    Finite groups: regular hidden fields with a pointwise function, between :class:`SteerableLinear` layers on points
    and :class:`SteerableConv` on grids. Continuous groups: :class:`InvariantGateNet` on points, scalars and irreps with
    :class:`GatedNonLinearity` on grids. Its parameters are two tensors or few more, whatever the number of layers: an
    optimizer's cost goes by their number.

    Example::

        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import steerable_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 5 * [space.irrep(1, 1)])
        >>> net = steerable_net(vectors, vectors, hidden_dims=(32, 32))

    :param in_type: input field type.
    :param out_type: output field type, over the same gspace.
    :param hidden_dims: channels of each hidden layer; rounded up to whole fields.
    :param nonlinearity: ``"pointwise"`` (finite groups), ``"gated"``, or ``None`` to choose as above.
    :param function: the pointwise function, see :class:`PointwiseNonLinearity`.
    :param kernel_size: points a side of the kernels (odd); grids only.
    :param padding_mode: ``"zeros"`` or ``"circular"``; grids only.
    :param zero_init: whether the last layer starts at zero, so that the transform starts as the identity.
    :raises ValueError: unlike gspaces, a size that is not positive, an unknown nonlinearity.
    """
    layers = hidden_layers(in_type, out_type, hidden_dims, nonlinearity, function, kernel_size, padding_mode, zero_init)
    if gates_by_invariants(in_type, out_type, layers):
        net = InvariantGateNet(in_type, out_type, hidden_dims, function)
        if zero_init:
            net.zero_output()
        return net
    return PackedNet(_linears(in_type, out_type, layers, kernel_size, padding_mode), layers, zero_init)


def lipschitz_net(
    in_type: enn.FieldType,
    out_type: enn.FieldType,
    *,
    hidden_dims: Sequence[int] = (64, 64),
    nonlinearity: str | None = None,
    function: str = "lipswish",
    kernel_size: int = 3,
    padding_mode: str = "zeros",
    zero_init: bool = False,
) -> enn.SequentialModule:
    r"""An equivariant network whose nonlinearities have Lipschitz constant 1, so its layers' norms bound its own.

    Finite groups: regular hidden fields with a pointwise function. Continuous groups: scalars and irreps with
    :class:`LipschitzGate`, gates half open at the start. Between them :class:`SteerableLinear` layers on points,
    :class:`SteerableConv` on grids.

    The network itself is not normalised: its Lipschitz constant is at most the product of its layers' norms, whatever
    these are. The transforms ``EquivariantResidual`` and ``EquivariantImplicit`` bound each norm from the present
    weights, and shrink a layer that exceeds its share.

    Example::

        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import lipschitz_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 5 * [space.irrep(1, 1)])
        >>> net = lipschitz_net(vectors, vectors, hidden_dims=(32, 32))

    :param in_type: input field type.
    :param out_type: output field type, over the same gspace.
    :param hidden_dims: channels of each hidden layer; rounded up to whole fields.
    :param nonlinearity: ``"pointwise"`` (finite groups), ``"gated"``, or ``None`` to choose as above. Regular fields
        of large groups are slow to build on 3-D grids; gates are not.
    :param function: the function of scalars and regular fields, see :class:`PointwiseNonLinearity`, of Lipschitz
        constant at most 1.
    :param kernel_size: points a side of the kernels (odd); grids only.
    :param padding_mode: ``"zeros"`` or ``"circular"``; grids only.
    :param zero_init: whether the last layer starts at zero, so that the transform starts as the identity.
    :raises ValueError: unlike gspaces, a size that is not positive, an unknown nonlinearity, a function that expands
        distances.
    """
    layers = hidden_layers(
        in_type, out_type, hidden_dims, nonlinearity, function, kernel_size, padding_mode, zero_init, lipschitz=True
    )
    linears = _linears(in_type, out_type, layers, kernel_size, padding_mode)
    for linear, hidden in zip(linears, layers):
        if isinstance(hidden, LipschitzGate) and linear.bias is not None:
            # Shut gates would let nothing through where the input holds no scalars. The type's invariants are its
            # trivial fields: scalars, then gates.
            torch.nn.init.constant_(linear.bias[hidden.scalars :], hidden.half_open)
    if zero_init:
        torch.nn.init.zeros_(linears[-1].weight)
    between = [module for pair in zip(linears, layers) for module in pair]
    return enn.SequentialModule(*between, linears[-1])


def hidden_layers(
    in_type: enn.FieldType,
    out_type: enn.FieldType,
    hidden_dims: Sequence[int],
    nonlinearity: str | None,
    function: str,
    kernel_size: int,
    padding_mode: str,
    zero_init: bool,
    *,
    lipschitz: bool = False,
) -> list[PointwiseNonLinearity | FieldGates]:
    """The nonlinearities of a network. All arguments of its builder are checked, those too that it has no use for."""
    validate_field_type(in_type, "in_type")
    validate_over(in_type.gspace, out_type, "out_type")
    if nonlinearity is not None:
        check_choice("nonlinearity", nonlinearity, ("pointwise", "gated"), also="None")
    check_choice("function", function, FUNCTIONS)
    if lipschitz:
        require_one_lipschitz(function)
    check_kernel(kernel_size, padding_mode)
    check_flag("zero_init", zero_init)
    widths = check_integers("hidden_dims", hidden_dims, 1)
    return [
        hidden_layer(in_type, out_type, width, nonlinearity=nonlinearity, function=function, lipschitz=lipschitz)
        for width in widths
    ]


def gates_by_invariants(
    in_type: enn.FieldType, out_type: enn.FieldType, layers: Sequence[PointwiseNonLinearity | FieldGates]
) -> bool:
    """Whether a network of invariants takes the place of hidden layers with gates."""
    gated = any(isinstance(layer, FieldGates) for layer in layers)
    return gated and is_of_irreps(in_type) and is_of_irreps(out_type)


def _linears(
    in_type: enn.FieldType,
    out_type: enn.FieldType,
    layers: Sequence[PointwiseNonLinearity | FieldGates],
    kernel_size: int,
    padding_mode: str,
) -> list[SteerableLinear | SteerableConv]:
    """The linear layers, on points or grids, around the nonlinearities given."""
    starts, ends = [in_type, *(layer.out_type for layer in layers)], [*(layer.in_type for layer in layers), out_type]
    return [steerable_layer(start, end, kernel_size, padding_mode) for start, end in zip(starts, ends)]


def hidden_layer(
    in_type: enn.FieldType,
    out_type: enn.FieldType,
    width: int,
    *,
    nonlinearity: str | None = None,
    function: str = "silu",
    lipschitz: bool = False,
) -> PointwiseNonLinearity | FieldGates:
    """The nonlinearity of about ``width`` channels that suits a network between two types.

    :param width: channels aimed at; rounded up to whole fields.
    :param nonlinearity: ``"pointwise"``, ``"gated"`` or ``None`` for the group's default.
    :param lipschitz: whether gates are to have Lipschitz constant 1.
    :raises ValueError: pointwise functions asked for under a continuous group that moves the fields.
    """
    gspace = in_type.gspace
    finite = gspace.fibergroup.order() > 0
    irreps = _moving_irreps(in_type, out_type)
    invariant = not irreps
    if nonlinearity is None:
        nonlinearity = "pointwise" if finite or invariant else "gated"
    if nonlinearity == "pointwise":
        if finite and not invariant:
            representation = gspace.regular_repr
        elif all(irrep.is_trivial() for t in (in_type, out_type) for irrep, _ in IrrepDecomposition(t).isotypic()):
            representation = gspace.trivial_repr
        else:
            raise ValueError(
                f'nonlinearity: expected "gated" for the continuous group {gspace.fibergroup}, found "pointwise"'
            )
        count = max(1, -(-width // representation.size))
        return PointwiseNonLinearity(enn.FieldType(gspace, count * [representation]), function)
    if invariant:
        raise ValueError('nonlinearity: expected "pointwise" where every field is invariant, found "gated"')
    share = sum(2 + irrep.size for irrep in irreps)
    copies = max(1, width // share)
    scalars = max(copies, width - copies * sum(1 + irrep.size for irrep in irreps))
    fields = [irrep for irrep in irreps for _ in range(copies)]
    if lipschitz:
        return LipschitzGate(gspace, scalars, fields, function)
    return GatedNonLinearity(gspace, scalars, fields)


def _moving_irreps(*types: enn.FieldType) -> list[IrreducibleRepresentation]:
    """The non-trivial irreps of hidden fields, each once, in the order of their ids: those of some types.

    Between types without any, those of the grid's own directions: a kernel between invariant fields is isotropic, so a
    network of such fields alone would see no direction. Without a base space there are none.
    """
    found = {i.id: i for t in types for i, _ in IrrepDecomposition(t).isotypic() if not i.is_trivial()}
    gspace = types[0].gspace
    if not found and gspace.dimensionality > 0:
        irreps = (gspace.fibergroup.irrep(*i) for i in gspace.basespace_action.irreps)
        found = {i.id: i for i in irreps if not i.is_trivial()}
    return [found[key] for key in sorted(found)]
