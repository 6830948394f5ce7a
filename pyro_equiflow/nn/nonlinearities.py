# SPDX-License-Identifier: Apache-2.0
"""Exactly equivariant nonlinearities: pointwise on permutation fields, gates on irreps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation
from escnn.gspaces import GSpace
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule
from pyro_equiflow.ops.representations import is_permutation

__all__ = ["GatedNonLinearity", "PointwiseNonLinearity"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sin": torch.sin,
}


class PointwiseNonLinearity(SteerableModule):
    """A function of each channel by itself, on fields whose representation permutes channels.

    :param in_type: trivial, regular and quotient fields.
    :param function: ``"elu"``, ``"relu"``, ``"silu"``, ``"tanh"`` or ``"sin"``.
    :raises ValueError: a field that the group does not merely permute, or an unknown function.
    """

    def __init__(self, in_type: enn.FieldType, function: str = "silu") -> None:
        for representation in set(in_type.representations):
            if not is_permutation(representation):
                raise ValueError(
                    f"expected fields that permute their channels, found {representation}: pointwise functions "
                    "do not commute with it; use GatedNonLinearity"
                )
        if function not in FUNCTIONS:
            raise ValueError(f"function: expected one of {sorted(FUNCTIONS)}, found {function!r}")
        super().__init__(in_type, in_type)
        self.function = function

    def expanded(self) -> Expanded:
        """The function itself."""
        return Expanded(FUNCTIONS[self.function], ())


class GatedNonLinearity(SteerableModule):
    r"""Gates on irreps, and their lengths: invariants travel from field to field.

    On a type of scalars :math:`s`, one gate :math:`u_i` an irrep field, and irrep fields :math:`v_i`:

    .. math:: (s,\ u_i,\ v_i) \mapsto (\mathrm{silu}(s),\ \sqrt{1 + |v_i|^2},\ \sigma(u_i)\, v_i)

    The lengths take the gates' places, so the next linear layer turns the lengths of all fields into scalars
    and gates of all fields. Since layers mix fields linearly before, lengths carry inner products too.

    :param scalars: number of trivial fields :math:`s`.
    :param irreps: the non-trivial irreps :math:`v_i`, equal ones next to each other.
    :param gspace: the gspace of the type.
    """

    def __init__(self, gspace: GSpace, scalars: int, irreps: list[IrreducibleRepresentation]) -> None:
        if not irreps:
            raise ValueError("irreps: expected at least one, found none; take PointwiseNonLinearity for scalars alone")
        trivial = gspace.trivial_repr
        field_type = enn.FieldType(gspace, (scalars + len(irreps)) * [trivial] + list(irreps))
        super().__init__(field_type, field_type)
        self.scalars = scalars
        self.runs = [(len(list(run)), size) for (_, size), run in groupby((r.id, r.size) for r in irreps)]

    def expanded(self) -> Expanded:
        """The map above; runs of equal irreps are handled together."""
        scalars, runs = self.scalars, self.runs
        counts = [count for count, _ in runs]
        sizes = [scalars, sum(counts), *(count * size for count, size in runs)]
        points = self.in_type.gspace.dimensionality == 0
        dim = 0 if points else 1

        def fn(x: Tensor) -> Tensor:
            # Channels outermost: field-wise operations then run over long rows.
            s, u, *fields = (x.mT if points else x).split(sizes, dim)
            squares, gated = [], []
            for field, gate, (count, size) in zip(fields, torch.sigmoid(u).split(counts, dim), runs):
                v = field.unflatten(dim, (count, size))
                squares.append((v * v).sum(dim + 1))
                gated.append((v * gate.unsqueeze(dim + 1)).flatten(dim, dim + 1))
            lengths = (torch.cat(squares, dim) if len(squares) > 1 else squares[0]).add(1.0).sqrt()
            out = torch.cat([F.silu(s), lengths, *gated], dim)
            return out.mT if points else out

        return Expanded(fn, ())
