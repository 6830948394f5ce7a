# SPDX-License-Identifier: Apache-2.0
"""Networks of invariants with masks: which irreps, lengths and gates may see which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded
from pyro_equiflow.nn.irreps.invariant_gate import InvariantGate, carried_channels, hidden_widths
from pyro_equiflow.nn.irreps.isotypic import IrrepMap, IsotypicLayout
from pyro_equiflow.nn.linear.entrywise import EntrywiseExpansion

__all__ = ["MaskedInvariantGate", "evenly", "useful_degrees"]


class MaskedInvariantGate:
    r"""The map of :class:`~pyro_equiflow.nn.InvariantGateNet` without products, every part of it with a degree.

    .. math::
        v_i = \sum_{d_j \le m_i} W_{1,ij}\, x_j, \qquad
        y_o = \sum_{m_i < d_o} W_{2,oi}\, u_i \frac{v_i}{\sqrt{1 + |v_i|^2}},

    where a mixture :math:`v_i` of degree :math:`m_i`, its length and its gate :math:`u_i` see the input fields of at
    most that degree. The MLP of invariants between lengths and gates is masked as in MADE, its last layer strictly for
    the trivial fields of the output. Mixtures are shortened, so that the map grows no faster than its input: gates grow
    with the lengths, and in a deep stack of flows powers of powers would overflow.

    One degree serves a mixture and its gate: a gate that saw more than its mixture would only keep from the mixture
    what the output may see. There are mixtures of every degree that matters: those of the input's fields, where lengths
    change, and for each output field the highest below its own.

    :param in_type: input field type with no base space, of irreps.
    :param out_type: output field type, of irreps.
    :param in_degrees: a degree for each input field.
    :param out_degrees: a degree for each output field.
    :param hidden_dims: channels of the hidden layers, see :class:`~pyro_equiflow.nn.InvariantGateNet`.
    :param function: the MLP's function.
    :ivar hidden_degrees: for each hidden layer of the MLP a degree for each of its channels.
    :raises ValueError: an unknown function.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        in_degrees: Sequence[int],
        out_degrees: Sequence[int],
        hidden_dims: Sequence[int],
        function: str,
    ) -> None:
        self._arguments = (in_type, out_type, in_degrees, out_degrees, hidden_dims, function)
        inputs, outputs = IsotypicLayout(in_type), IsotypicLayout(out_type)
        given, wanted = _by_irrep(inputs, in_degrees), _by_irrep(outputs, out_degrees)
        useful = useful_degrees(in_degrees, out_degrees)
        moving = {irrep.id: irrep for irrep in inputs.irreps if not irrep.is_trivial()}
        sizes = {irrep.id: irrep.size for irrep in [*outputs.irreps, *inputs.irreps] if not irrep.is_trivial()}
        share = carried_channels(hidden_dims) // max(1, sum(sizes.values()))
        levels = {name: _levels(given[name], wanted.get(name, []), useful) for name in moving}
        mixed = {name: evenly(own, max(len(given[name]), len(own), share)) for name, own in levels.items() if len(own)}
        carried = [(moving[name], len(degrees)) for name, degrees in mixed.items()]
        mixture = IrrepMap(list(zip(inputs.irreps, inputs.counts)), carried)
        hidden = hidden_widths(hidden_dims, carried)
        self._gate = InvariantGate(inputs, outputs, mixture, hidden, function, radius=1.0, far_lengths=True)
        had = list(dict.fromkeys(evenly(useful, min(hidden))))
        self.hidden_degrees = [evenly(had, width) for width in hidden]

        trivial = in_type.gspace.trivial_repr.irreps[0]
        invariants = [*given.get(trivial, []), *(degree for degrees in mixed.values() for degree in degrees)]
        below = [invariants, *self.hidden_degrees]
        mixing = [np.greater_equal.outer(degrees, given[name]) for name, degrees in mixed.items()]
        dense = [np.greater_equal.outer(b, a) for a, b in zip(below, self.hidden_degrees)]
        ends, turning = [np.greater.outer(wanted.get(trivial, []), below[-1])], []
        for name, degrees in mixed.items():
            if name in wanted:
                turning.append(np.greater.outer(wanted[name], degrees))
                # A gate that no output reads sees nothing: no weight is idle.
                read = turning[-1].sum(0) > 0
                ends.append(np.greater_equal.outer(degrees, below[-1]) & read[:, None])
        gain = np.concatenate(
            [
                mixture.per_weight([_gain(mask) for mask in mixing]),
                *(_gain(mask).ravel() for mask in (*dense, np.concatenate(ends))),
                self._gate.out.per_weight([_gain(mask) for mask in turning]),
            ]
        )
        seen = gain > 0
        self._std, self._last = (self._gate.init_std * gain)[seen], self._gate.last[seen]
        # Entries that are masked read some weight, times zero.
        whole, place = self._gate.expansion, np.maximum(np.cumsum(seen) - 1, 0)
        self._expansion = EntrywiseExpansion(place[whole.index], whole.factor * seen[whole.index])

    def __reduce__(self) -> tuple:
        return MaskedInvariantGate, self._arguments

    def initial(self, zero_init: bool) -> tuple[Tensor, Tensor]:
        """Weights by He's rule and biases, gates around one; the output is zero if asked for."""
        weight = torch.randn(len(self._std))
        weight = weight * torch.as_tensor(self._std).to(weight)
        if zero_init:
            weight[torch.as_tensor(self._last)] = 0.0
        return weight, torch.as_tensor(self._gate.init_bias).to(weight)

    def expanded(self, weight: Tensor, bias: Tensor) -> Expanded:
        """The map on plain tensors."""
        return self._gate.expanded(self._expansion(weight), bias)


def useful_degrees(in_degrees: Sequence[int], out_degrees: Sequence[int]) -> list[int]:
    """The degrees of hidden fields that something is in and some output sees."""
    return sorted({d for d in in_degrees if d < max(out_degrees)}) or [min(in_degrees)]


def evenly(levels: list[int], count: int) -> list[int]:
    """``count`` values spread over ``levels``, all of them where there is room, else about the middle of each share."""
    return [levels[(2 * i + 1) * len(levels) // (2 * count)] for i in range(count)]


def _by_irrep(layout: IsotypicLayout, degrees: Sequence[int]) -> dict[tuple, list[int]]:
    """The degrees of an irrep's fields, by the irrep's id."""
    return {name: [degrees[field] for field in fields] for name, fields in zip(layout.ids, layout.fields)}


def _levels(given: Sequence[int], wanted: Sequence[int], useful: list[int]) -> list[int]:
    """The degrees that mixtures of an irrep need: see :class:`MaskedInvariantGate`."""
    highest = {max((level for level in useful if level < degree), default=-1) for degree in wanted}
    return sorted({*given} & {*useful} | {level for level in highest if level >= min(given)})


def _gain(mask: np.ndarray) -> np.ndarray:
    """How a field's weights grow for what it does not see: the variance is that of the whole."""
    return mask * np.sqrt(mask.shape[1] / np.maximum(mask.sum(1, keepdims=True), 1))
