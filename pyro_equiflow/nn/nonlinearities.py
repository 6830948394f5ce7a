# SPDX-License-Identifier: Apache-2.0
"""Exactly equivariant nonlinearities: pointwise on permutation fields, gates on irreps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation
from escnn.gspaces import GSpace
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule, WithPullback
from pyro_equiflow.nn.gated import Gates
from pyro_equiflow.nn.silu import silu, silu_slope
from pyro_equiflow.ops.arguments import check_choice, check_instance, check_integer, check_items
from pyro_equiflow.ops.events import split
from pyro_equiflow.ops.representations import is_permutation, validate_field_type

__all__ = ["FUNCTIONS", "FieldGates", "GatedNonLinearity", "PointwiseNonLinearity", "require_one_lipschitz"]


@dataclass(frozen=True)
class PointwiseFunction:
    r"""A function of a number, :math:`f(x) = b\, f_0(a x)`: linear layers on either side can take over the scales.

    :ivar core: :math:`f_0`, on tensors.
    :ivar slope: its derivative.
    :ivar lipschitz: an upper bound of the slope of :math:`f`, reached but for the last digits.
    :ivar inner: :math:`a`.
    :ivar outer: :math:`b`.
    """

    core: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    lipschitz: float = 1.0
    inner: float = 1.0
    outer: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """The function at ``x``, entry by entry."""
        x = self.core(x if self.inner == 1 else self.inner * x)
        return x if self.outer == 1 else self.outer * x

    def _pullback(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        slope = self.slope(x)
        return lambda p: p.mul_(slope)

    @functools.cached_property
    def expanded_core(self) -> Expanded:
        """:math:`f_0` as an expanded map."""
        return Expanded(WithPullback(self.core, self._pullback), ())


FUNCTIONS: dict[str, PointwiseFunction] = {
    "elu": PointwiseFunction(F.elu, lambda x: x.clamp(max=0).exp()),
    "relu": PointwiseFunction(F.relu, lambda x: (x > 0).to(x.dtype)),
    "silu": PointwiseFunction(F.silu, silu_slope, lipschitz=1.1),  # the greatest slope is 1.09984
    "tanh": PointwiseFunction(torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "sin": PointwiseFunction(torch.sin, torch.cos),
    # In networks under a log-det, differentiated many times; for one backward pass torch's own is the cheaper.
    "lipswish": PointwiseFunction(silu, silu_slope, outer=1 / 1.1),
    "sin2pi": PointwiseFunction(torch.sin, torch.cos, inner=2 * math.pi, outer=1 / (2 * math.pi)),
}


def require_one_lipschitz(function: str) -> None:
    """Raises unless ``function`` is a known one whose Lipschitz constant is at most 1.

    :raises ValueError: an unknown function, or one that expands distances.
    """
    contracting = sorted(name for name, known in FUNCTIONS.items() if known.lipschitz <= 1)
    remedy = 'only these have a Lipschitz constant of at most 1; "lipswish" is silu / 1.1'
    check_choice("function", function, contracting, remedy=remedy)


class PointwiseNonLinearity(SteerableModule):
    r"""A function of each channel by itself, on fields whose representation permutes channels.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import PointwiseNonLinearity, expand
        >>> space = gspaces.no_base_space(group.cyclic_group(4))
        >>> layer = PointwiseNonLinearity(enn.FieldType(space, [space.regular_repr]), "relu")
        >>> expand(layer)(torch.tensor([[1.0, -1.0, 2.0, -2.0]]))
        tensor([[1., 0., 2., 0.]])

    :param in_type: trivial, regular and quotient fields.
    :param function: ``"elu"``, ``"relu"``, ``"silu"``, ``"tanh"``, ``"sin"``, ``"lipswish"``
        (:math:`x \sigma(x) / 1.1`, Chen et al., *Residual Flows*, arXiv 1906.02735, section 3.3) or ``"sin2pi"``
        (:math:`\sin(2 \pi x) / 2 \pi`).
    :ivar lipschitz: the function's Lipschitz constant, rounded up; 1 for all but ``"silu"``.
    :raises ValueError: a field that the group does not merely permute, or an unknown function.
    """

    def __init__(self, in_type: enn.FieldType, function: str = "silu") -> None:
        validate_field_type(in_type, "in_type")
        for representation in set(in_type.representations):
            if not is_permutation(representation):
                raise ValueError(
                    f"in_type: expected fields that permute their channels, found {representation}: "
                    "pointwise functions do not commute with it; use GatedNonLinearity"
                )
        check_choice("function", function, FUNCTIONS)
        super().__init__(in_type, in_type)
        self.function = function

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant of the function."""
        return FUNCTIONS[self.function].lipschitz

    def expanded(self) -> Expanded:
        """The function itself."""
        return Expanded(FUNCTIONS[self.function], ())


class FieldGates(SteerableModule):
    r"""What gates on irreps have in common: the types' layout, and one factor per irrep field.

    On a type of scalars :math:`s`, one gate :math:`u_i` an irrep field, and irrep fields :math:`v_i`; subclasses say
    what becomes of the invariants :math:`s`, :math:`u_i`, :math:`|v_i|^2`, and each :math:`v_i` is multiplied by one
    of them.

    :param gspace: the gspace of the type.
    :param scalars: number of trivial fields :math:`s`.
    :param irreps: the non-trivial irreps :math:`v_i`, equal ones next to each other.
    :raises ValueError: no irreps.
    """

    def __init__(self, gspace: GSpace, scalars: int, irreps: list[IrreducibleRepresentation]) -> None:
        check_instance("gspace", gspace, GSpace, "an escnn gspace")
        scalars = check_integer("scalars", scalars, 0)
        irreps = check_items("irreps", irreps, IrreducibleRepresentation, "a list of irreps, such as gspace.irrep(1)")
        for irrep in irreps:
            if irrep.group != gspace.fibergroup:
                raise ValueError(f"irreps: expected irreps of {gspace.fibergroup}, found one of {irrep.group}")
        if not irreps:
            raise ValueError("irreps: expected at least one, found none; take PointwiseNonLinearity for scalars alone")
        trivial = gspace.trivial_repr
        field_type = enn.FieldType(gspace, (scalars + len(irreps)) * [trivial] + list(irreps))
        super().__init__(field_type, field_type)
        self.scalars = scalars
        self.runs = [(len(list(run)), size) for (_, size), run in groupby((r.id, r.size) for r in irreps)]

    def invariants(self, s: Tensor, u: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new scalars, what takes the gates' places, and the fields' factors, of the shapes given."""
        raise NotImplementedError

    def expanded(self) -> Expanded:
        """The map above; runs of equal irreps are handled together."""
        runs, invariants = self.runs, self.invariants
        counts = [count for count, _ in runs]
        sizes = [self.scalars, sum(counts), *(count * size for count, size in runs)]
        points = self.in_type.gspace.dimensionality == 0
        dim = 0 if points else 1

        def fn(x: Tensor) -> Tensor:
            # Channels outermost: field-wise operations then run over long rows.
            s, u, *flat = (x.mT if points else x).split(sizes, dim)
            fields = [field.unflatten(dim, run) for field, run in zip(flat, runs)]
            squares = [(v * v).sum(dim + 1) for v in fields]
            s, lengths, factors = invariants(s, u, torch.cat(squares, dim) if len(squares) > 1 else squares[0])
            gates = split(factors, counts, dim)
            gated = [(v * gate.unsqueeze(dim + 1)).flatten(dim, dim + 1) for v, gate in zip(fields, gates)]
            out = torch.cat([s, lengths, *gated], dim)
            return out.mT if points else out

        return Expanded(fn, ())


class GatedNonLinearity(FieldGates):
    r"""Gates on irreps, and their lengths: invariants travel from field to field.

    On a type of scalars :math:`s`, one gate :math:`u_i` an irrep field, and irrep fields :math:`v_i`:

    .. math:: (s,\ u_i,\ v_i) \mapsto (\mathrm{silu}(s),\ \sqrt{1 + |v_i|^2},\ \sigma(u_i)\, v_i)

    The lengths take the gates' places, so the next linear layer turns the lengths of all fields into scalars
    and gates of all fields. Since layers mix fields linearly before, lengths carry inner products too. Products of
    inputs have no Lipschitz constant; :class:`LipschitzGate` has.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group
        >>> from pyro_equiflow.nn import GatedNonLinearity, expand
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> layer = GatedNonLinearity(space, 1, [space.irrep(1)])
        >>> expand(layer)(torch.tensor([[0.0, 0.0, 3.0, 4.0, 0.0]]))  # a scalar, a gate, a vector
        tensor([[0.0000, 5.0990, 1.5000, 2.0000, 0.0000]])

    :param gspace: the gspace of the type.
    :param scalars: number of trivial fields :math:`s`.
    :param irreps: the non-trivial irreps :math:`v_i`, equal ones next to each other.
    :raises ValueError: no irreps.
    """

    def expanded(self) -> Expanded:
        """The map above."""
        if self.in_type.gspace.dimensionality > 0:
            return Expanded(Gates(self.scalars, self.runs, 1), ())
        gates = Gates(self.scalars, self.runs, 0)  # channels outermost, as in FieldGates
        return Expanded(lambda x: gates(x.mT).mT, ())
