# SPDX-License-Identifier: Apache-2.0
"""Networks of invariants with masks: which irreps, lengths and gates may see which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded
from pyro_equiflow.nn.gather import Gather
from pyro_equiflow.nn.invariant_gate import InvariantGate
from pyro_equiflow.nn.parts import IrrepMap, IrrepParts

__all__ = ["MaskedInvariantGate", "evenly", "useful_degrees"]


class MaskedInvariantGate:
    r"""The map of :class:`~pyro_equiflow.nn.InvariantGateNet` without products, every part of it with a degree.

    .. math::
        v_i = \sum_{d_j \le m_i} W_{1,ij}\, x_j, \qquad y_o = \sum_{m_i < d_o} W_{2,oi}\, u_i v_i,

    where a mixture :math:`v_i` of degree :math:`m_i`, its length and its gate :math:`u_i` see the input fields of at
    most that degree. The MLP of invariants between lengths and gates is masked as in MADE, its last layer strictly for
    the trivial fields of the output.

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
        inputs, outputs = IrrepParts(in_type), IrrepParts(out_type)
        useful = useful_degrees(in_degrees, out_degrees)
        given = {name: [in_degrees[f] for f in fields] for name, fields in zip(inputs.ids, inputs.fields)}
        wanted = {name: [out_degrees[f] for f in fields] for name, fields in zip(outputs.ids, outputs.fields)}
        moving = {irrep.id: irrep for irrep in inputs.irreps if not irrep.is_trivial()}
        turning = {irrep.id: irrep.size for irrep in [*outputs.irreps, *moving.values()] if not irrep.is_trivial()}
        share = max(hidden_dims) // (4 * max(1, sum(turning.values())))
        mixed = {}
        for name in moving:
            levels = _levels(given[name], wanted.get(name, ()), useful)
            if levels:
                mixed[name] = evenly(levels, max(len(given[name]), len(levels), share))

        mixture = IrrepMap(
            list(zip(inputs.irreps, inputs.counts)), [(moving[name], len(degrees)) for name, degrees in mixed.items()]
        )
        channels = sum(count * irrep.size for irrep, count in mixture.fields)
        hidden = [max(width - channels, width // 2, 1) for width in hidden_dims]
        self._gate = InvariantGate(inputs, outputs, mixture, hidden, function)
        levels = evenly(useful, min(hidden))
        self.hidden_degrees = [evenly(list(dict.fromkeys(levels)), width) for width in hidden]

        mixing = [np.greater_equal.outer(degrees, given[name]) for name, degrees in mixed.items()]
        turned = {name: degrees for name, degrees in mixed.items() if name in wanted}
        turns = [np.greater.outer(wanted[name], degrees) for name, degrees in turned.items()]
        trivial = in_type.gspace.trivial_repr.irreps[0]
        first = [*given.get(trivial, []), *(degree for degrees in mixed.values() for degree in degrees)]
        *below, last = [first, *self.hidden_degrees]
        dense = [np.greater_equal.outer(b, a) for a, b in zip(below, self.hidden_degrees)]
        # A gate that no output reads sees nothing, so that no weight is idle.
        gates = [
            np.greater_equal.outer(degrees, last) & (turn.sum(0) > 0)[:, None]
            for degrees, turn in zip(turned.values(), turns)
        ]
        ends = np.concatenate([np.greater.outer(wanted.get(trivial, []), last), *gates])
        gains = [
            mixture.per_weight([_gain(mask) for mask in mixing]),
            *(_gain(mask).ravel() for mask in (*dense, ends)),
            self._gate.out.per_weight([_gain(mask) for mask in turns]),
        ]
        gain = np.concatenate(gains)
        seen = gain != 0
        self._std, self._last = (self._gate.init_std * gain)[seen], self._gate.last[seen]
        # Entries that are masked read some weight, times zero.
        whole, place = self._gate.gather, np.maximum(np.cumsum(seen) - 1, 0)
        self._gather = Gather(place[whole.index], whole.factor * seen[whole.index])

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["_arguments"])  # type: ignore[misc]

    def initial(self, zero_init: bool) -> tuple[Tensor, Tensor]:
        """Weights by He's rule and biases, gates around one; the output is zero if asked for."""
        weight = torch.randn(len(self._std)) * torch.as_tensor(self._std, dtype=torch.float32)
        if zero_init:
            weight[torch.as_tensor(self._last)] = 0.0
        return weight, torch.as_tensor(self._gate.init_bias, dtype=torch.float32)

    def expanded(self, weight: Tensor, bias: Tensor) -> Expanded:
        """The map on plain tensors."""
        return self._gate.expanded(self._gather(weight), bias)


def useful_degrees(in_degrees: Sequence[int], out_degrees: Sequence[int]) -> list[int]:
    """The degrees of hidden fields that something is in and some output sees."""
    return sorted({d for d in in_degrees if d < max(out_degrees)}) or [min(in_degrees)]


def evenly(levels: list[int], count: int) -> list[int]:
    """``count`` values spread over ``levels``, all of them where there is room, else about the middle of each share."""
    return [levels[(2 * i + 1) * len(levels) // (2 * count)] for i in range(count)]


def _levels(given: Sequence[int], wanted: Sequence[int], useful: list[int]) -> list[int]:
    """The degrees that mixtures of an irrep need: see :class:`MaskedInvariantGate`."""
    highest = {max((level for level in useful if level < degree), default=-1) for degree in wanted}
    return sorted({*given} & {*useful} | {level for level in highest if level >= min(given)})


def _gain(mask: np.ndarray) -> np.ndarray:
    """How a field's weights grow for what it does not see: the variance is that of the whole."""
    return mask * np.sqrt(mask.shape[1] / np.maximum(mask.sum(1, keepdims=True), 1))
