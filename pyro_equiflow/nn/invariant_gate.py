# SPDX-License-Identifier: Apache-2.0
"""Networks on points for continuous groups: invariants decide, irreps follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule
from pyro_equiflow.nn.nonlinearities import FUNCTIONS
from pyro_equiflow.nn.parts import IrrepMap, IrrepParts
from pyro_equiflow.nn.products import IrrepMixture
from pyro_equiflow.ops.events import split

__all__ = ["InvariantGateNet"]


class InvariantGateNet(SteerableModule):
    r"""An equivariant perceptron on points: irreps are mixed, gated by a network of invariants, and mixed again.

    .. math::
        v = W_1 x \quad\text{or}\quad v = W_1' \bigl(W_1 x,\ C (W_1 x \otimes W_1 x)\bigr), \qquad
        (t, u) = \operatorname{MLP}\bigl(x_0, \sqrt{1 + |v_1|^2}, \dots, \sqrt{1 + |v_m|^2}\bigr), \qquad
        y_0 = t, \quad y = W_2 (u \cdot v),

    where :math:`x_0, y_0` are the trivial fields of input and output, :math:`W_1, W_2` intertwiners, and each
    irrep field :math:`v_i` has its own gate :math:`u_i`. On a point no linear equivariant map joins different irreps
    (Schur's lemma), so a deep stack of gated layers would mix scalars with scalars and irreps with irreps all the same;
    here all depth goes to the invariants. Lengths of mixtures hold the inner products (polarisation), and for vectors
    under O(n) sums of invariants times vectors are all there is (Villar et al., *Scalars are universal*, arXiv
    2106.06610, theorem 4). Elsewhere lengths are not enough: they do not see the handedness of three vectors under
    SO(3), nor how irreps of different frequency stand to each other. There tensor products (:math:`C`, see
    :class:`~pyro_equiflow.nn.products.IrrepProducts`) come between two mixtures; they are left out where no product of
    the input's irreps holds an irrep of input or output. An output irrep that neither the input nor one product
    holds is zero.

    :param in_type: input field type with no base space, of irreps.
    :param out_type: output field type, of irreps.
    :param hidden_dims: channels of the hidden layers, the irreps carried along counted in (to at most one half).
    :param function: the MLP's function, see :class:`PointwiseNonLinearity`.
    :param tensor_products: whether to take products where they add something.
    :raises ValueError: a type that holds anything but irreps.

    Reference: gates as in Weiler et al., *3D Steerable CNNs* (arXiv 1807.02547), section 4.2.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        hidden_dims: Sequence[int] = (64, 64),
        function: str = "silu",
        *,
        tensor_products: bool = True,
    ) -> None:
        for name, field_type in (("in_type", in_type), ("out_type", out_type)):
            if not IrrepParts.fit(field_type):
                raise ValueError(f"{name}: expected irreps with no base space, found {field_type}")
        if function not in FUNCTIONS:
            raise ValueError(f"function: expected one of {sorted(FUNCTIONS)}, found {function!r}")
        super().__init__(in_type, out_type)
        self.function = function
        self.hidden_dims = tuple(hidden_dims)
        self.tensor_products = tensor_products
        self._build()
        # One tensor of weights and one of biases: an optimizer's cost goes by the number of tensors.
        self.weight = torch.nn.Parameter(torch.zeros(sum(self._sizes), dtype=torch.float32))
        self.bias = torch.nn.Parameter(torch.zeros(sum(self._widths[1:]), dtype=torch.float32))
        self.reset_parameters()

    def _build(self) -> None:
        """Makes what follows from the types and widths alone."""
        self._inputs, self._outputs = inputs, outputs = IrrepParts(self.in_type), IrrepParts(self.out_type)
        irreps_in, irreps_out = (list(zip(parts.irreps, parts.counts)) for parts in (inputs, outputs))
        self._mixture = IrrepMixture(irreps_in, irreps_out, max(self.hidden_dims, default=0) // 4, self.tensor_products)
        carried = self._mixture.fields
        present = {irrep.id for irrep, _ in carried}
        turning = [(irrep, count) for irrep, count in irreps_out if irrep.id in present]
        self._turning = [irrep.id for irrep, _ in turning]
        self._out = IrrepMap(carried, turning)
        gates = sum(count for _, count in carried)
        channels = sum(count * irrep.size for irrep, count in carried)
        trivial_in = 0 if inputs.trivial is None else inputs.counts[inputs.trivial]
        self._scalars_out = 0 if outputs.trivial is None else outputs.counts[outputs.trivial]
        hidden = [max(width - channels, width // 2, 1) for width in self.hidden_dims]
        self._widths = [trivial_in + gates, *hidden, self._scalars_out + gates]
        dense = [a * b for a, b in zip(self._widths, self._widths[1:])]
        self._sizes = [self._mixture.num_weights, *dense, self._out.num_weights]

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("_inputs", "_outputs", "_mixture", "_out", "_turning", "_widths", "_sizes")
        return {k: v for k, v in self.__dict__.items() if k not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He's initialisation, gates around one."""
        dense = [np.full(a * b, 1 / math.sqrt(a)) for a, b in zip(self._widths, self._widths[1:])]
        std = np.concatenate([self._mixture.init_std, *dense, self._out.init_std])
        self.weight.normal_().mul_(torch.as_tensor(std, dtype=self.weight.dtype, device=self.weight.device))
        self.bias.zero_()[len(self.bias) - self._widths[-1] + self._scalars_out :] = 1.0

    @torch.no_grad()
    def zero_output(self) -> None:
        """Makes the output zero everywhere: the start of a transform that is the identity."""
        *_, last, out = self.weight.split(self._sizes)
        out.zero_()
        last.view(self._widths[-1], self._widths[-2])[: self._scalars_out] = 0.0
        self.bias.split(self._widths[1:])[-1][: self._scalars_out] = 0.0

    def expanded(self) -> Expanded:
        """The map above on plain tensors; irreps with channels outermost in memory, scalars with samples outermost."""
        mix, *dense, out = self.weight.split(self._sizes)
        mixing, turning = self._mixture.expand(mix), self._out.expand(out)
        layers: list[Tensor] = []
        for flat, bias in zip(dense, self.bias.split(self._widths[1:])):
            layers += [flat.view(len(bias), -1), bias]
        inputs, outputs, mixture = self._inputs, self._outputs, self._mixture
        for constants in (inputs, outputs, mixture):
            constants.prepare(self.weight)
        counts = [count for count, _ in mixture.shapes]
        start, stop = len(mixing), len(mixing) + len(layers)

        def fn(x: Tensor, *tensors: Tensor) -> Tensor:
            parts = inputs.split(x.mT)
            scalars = [] if inputs.trivial is None else [parts[inputs.trivial].mT]
            fields = mixture.apply(parts, tensors[:start])
            if fields:
                squares = [(v * v).sum(1) for v in fields]
                lengths = (torch.cat(squares) if len(squares) > 1 else squares[0]).add(1.0).sqrt()
                scalars.append(lengths.mT)
            h = torch.cat(scalars, -1) if len(scalars) > 1 else scalars[0]
            for index in range(start, stop, 2):
                h = F.linear(function(h) if index > start else h, tensors[index], tensors[index + 1])
            t, u = h.split([scalars_out, h.shape[1] - scalars_out], 1)
            found: dict[tuple, Tensor] = {}
            if outputs.trivial is not None:
                found[outputs.ids[outputs.trivial]] = t.mT
            if turns:
                gates = split(u.mT.contiguous(), counts)
                gated = [(v * gate.unsqueeze(1)).flatten(0, 1) for v, gate in zip(fields, gates)]
                found |= zip(self._turning, self._out.apply(gated, tensors[stop:]))
            for name, size in zip(outputs.ids, outputs.sizes):
                if name not in found:  # an irrep that neither the input nor a product holds
                    found[name] = x.new_zeros(size, x.shape[-2])
            present = [found[name] for name in outputs.ids]
            return outputs.merge(present).mT

        function, scalars_out, turns = FUNCTIONS[self.function], self._scalars_out, bool(turning)
        return Expanded(fn, (*mixing, *layers, *turning))
