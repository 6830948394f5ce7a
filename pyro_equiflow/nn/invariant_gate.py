# SPDX-License-Identifier: Apache-2.0
"""Networks on points for continuous groups: invariants decide, irreps follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule
from pyro_equiflow.nn.layers import SteerableLinear
from pyro_equiflow.nn.nonlinearities import FUNCTIONS
from pyro_equiflow.nn.parts import IrrepParts, irrep_parts

__all__ = ["InvariantGateNet"]


class InvariantGateNet(SteerableModule):
    r"""An equivariant perceptron on points: irreps are mixed, gated by a network of invariants, and mixed again.

    .. math::
        v = W_1 x, \qquad
        (t, u) = \operatorname{MLP}\bigl(x_0, \sqrt{1 + |v_1|^2}, \dots, \sqrt{1 + |v_m|^2}\bigr), \qquad
        y_0 = t, \quad y = W_2 (u \cdot v),

    where :math:`x_0, y_0` are the trivial fields of input and output, :math:`W_1, W_2` intertwiners, and each
    irrep field :math:`v_i` has its own gate :math:`u_i`. On a point no linear equivariant map joins different irreps
    (Schur's lemma), so a deep stack of gated layers would mix scalars with scalars and irreps with irreps all the same;
    here all depth goes to the invariants. Lengths of mixtures hold the inner products (polarisation), and for vectors
    under O(n) sums of invariants times vectors are all there is (Villar et al., *Scalars are universal*, arXiv
    2106.06610, theorem 4). It makes no irreps that its input lacks.

    :param in_type: input field type with no base space, of irreps.
    :param out_type: output field type, of irreps.
    :param hidden_dims: channels of the hidden layers, the irreps carried along counted in (to at most one half).
    :param function: the MLP's function, see :class:`PointwiseNonLinearity`.
    :raises ValueError: a type that holds anything but irreps.

    Reference: gates as in Weiler et al., *3D Steerable CNNs* (arXiv 1807.02547), section 4.2.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        hidden_dims: Sequence[int] = (64, 64),
        function: str = "silu",
    ) -> None:
        for name, field_type in (("in_type", in_type), ("out_type", out_type)):
            if irrep_parts(field_type) is None:
                raise ValueError(f"{name}: expected irreps with no base space, found {field_type}")
        if function not in FUNCTIONS:
            raise ValueError(f"function: expected one of {sorted(FUNCTIONS)}, found {function!r}")
        super().__init__(in_type, out_type)
        self.function = function
        gspace, trivial = in_type.gspace, in_type.gspace.trivial_repr
        inputs, outputs = IrrepParts(in_type), IrrepParts(out_type)
        moving = [(i, n) for i, n in zip(inputs.irreps, inputs.counts) if not i.is_trivial()]
        width = max(hidden_dims, default=0)
        share = width // (4 * sum(irrep.size for irrep, _ in moving)) if moving else 0
        carried = [irrep for irrep, count in moving for _ in range(max(count, share))]
        channels = sum(irrep.size for irrep in carried)
        scalars_in = len(carried) + sum(n for i, n in zip(inputs.irreps, inputs.counts) if i.is_trivial())
        scalars_out = sum(n for i, n in zip(outputs.irreps, outputs.counts) if i.is_trivial())
        widths = [scalars_in, *(max(w - channels, w // 2, 1) for w in hidden_dims), scalars_out + len(carried)]
        self._scalars_out = scalars_out
        self.mix = SteerableLinear(in_type, enn.FieldType(gspace, carried), bias=False) if carried else None
        self.scalars = torch.nn.ModuleList(
            SteerableLinear(enn.FieldType(gspace, a * [trivial]), enn.FieldType(gspace, b * [trivial]))
            for a, b in zip(widths, widths[1:])
        )
        turning = [r for r in out_type.representations if not gspace.fibergroup.irrep(*r.irreps[0]).is_trivial()]
        self.out = (
            SteerableLinear(enn.FieldType(gspace, carried), enn.FieldType(gspace, turning), bias=False)
            if carried and turning
            else None
        )
        with torch.no_grad():
            self._layers()[-1].affine()[1][scalars_out:] = 1.0
        self._build()

    def _build(self) -> None:
        self._inputs, self._outputs = IrrepParts(self.in_type), IrrepParts(self.out_type)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_inputs", "_outputs")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._build()

    @torch.no_grad()
    def zero_output(self) -> None:
        """Makes the output zero everywhere: the start of a transform that is the identity."""
        for tensor in self._layers()[-1].affine():
            tensor[: self._scalars_out] = 0.0
        if self.out is not None:
            torch.nn.init.zeros_(self.out.weight)

    def expanded(self) -> Expanded:
        """The map above on plain tensors; irreps with channels outermost in memory, scalars with samples outermost."""
        mix = None if self.mix is None else self.mix.expanded_parts()
        out = None if self.out is None else self.out.expanded_parts()
        layers = [layer.affine() for layer in self._layers()]
        tensors = (mix.tensors if mix else ()) + sum(layers, ()) + (out.tensors if out else ())
        start, stop = len(mix.tensors) if mix else 0, len(tensors) - (len(out.tensors) if out else 0)
        shapes = [] if mix is None else [(n, i.size) for n, i in zip(mix.out_parts.counts, mix.out_parts.irreps)]
        counts = [count for count, _ in shapes]
        function, inputs, outputs = FUNCTIONS[self.function], self._inputs, self._outputs
        scalars_out = self._scalars_out

        def fn(x: Tensor, *tensors: Tensor) -> Tensor:
            parts = inputs.split(x.mT)
            scalars = [] if inputs.trivial is None else [parts[inputs.trivial].mT]
            fields: list[Tensor] = []
            if mix is not None:
                mixed = mix.fn(parts, *tensors[:start])
                fields = [v.unflatten(0, shape) for v, shape in zip(mixed, shapes)]
                squares = [(v * v).sum(1) for v in fields]
                lengths = (torch.cat(squares) if len(squares) > 1 else squares[0]).add(1.0).sqrt()
                scalars.append(lengths.mT)
            h = torch.cat(scalars, -1) if len(scalars) > 1 else scalars[0]
            for index in range(start, stop, 2):
                h = F.linear(function(h) if index > start else h, tensors[index], tensors[index + 1])
            found: dict[tuple, Tensor] = {}
            if outputs.trivial is not None:
                found[outputs.ids[outputs.trivial]] = h[:, :scalars_out].mT
            if out is not None:
                gates = h[:, scalars_out:].mT.contiguous().split(counts)
                gated = [(v * gate.unsqueeze(1)).flatten(0, 1) for v, gate in zip(fields, gates)]
                found |= zip(out.out_parts.ids, out.fn(gated, *tensors[stop:]))
            zeros = x.new_zeros(1, 1)
            present = [found.get(i, zeros.expand(n, x.shape[-2])) for i, n in zip(outputs.ids, outputs.sizes)]
            return outputs.merge(present).mT

        return Expanded(fn, tensors)

    def _layers(self) -> list[SteerableLinear]:
        return [layer for layer in self.scalars if isinstance(layer, SteerableLinear)]
