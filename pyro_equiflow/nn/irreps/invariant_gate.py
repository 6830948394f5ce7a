# SPDX-License-Identifier: Apache-2.0
"""Networks on points for continuous groups: invariants decide, irreps follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule
from pyro_equiflow.nn.irreps.isotypic import IrrepMap, IsotypicLayout, is_of_irreps
from pyro_equiflow.nn.irreps.products import IrrepMixture
from pyro_equiflow.nn.linear.entrywise import EntrywiseExpansion
from pyro_equiflow.nn.nonlinearities import FUNCTIONS
from pyro_equiflow.ops.arguments import check_choice, check_flag, check_integers
from pyro_equiflow.ops.representations import validate_field_type

# Far outside of data of order one; in a narrower ball fits were worse where lengths matter.
_RADIUS = 10.0

# Of squared lengths: what overflows times what vanishes would be no number.
_LARGEST = 1e30

__all__ = ["InvariantGate", "InvariantGateNet", "carried_channels", "hidden_widths"]


class InvariantGateNet(SteerableModule):
    r"""An equivariant perceptron on points: irreps are mixed, gated by a network of invariants, and mixed again.

    .. math::
        w = W_1 x \quad\text{or}\quad w = W_1' \bigl(W_1 x,\ C (W_1 x \otimes W_1 x)\bigr), \qquad
        v_i = \frac{w_i}{\sqrt{1 + |w_i|^2 / R^2}}, \\
        (t, u) = \operatorname{MLP}\bigl(x_0, \sqrt{1 + |v_1|^2}, \dots, \sqrt{1 + |v_m|^2}\bigr), \qquad
        y_0 = t, \quad y = W_2 (u \cdot v),

    where :math:`x_0, y_0` are the trivial fields of input and output, :math:`W_1, W_2` intertwiners, and each
    irrep field :math:`v_i` has its own gate :math:`u_i`. Mixtures are shortened into a ball of radius :math:`R = 10`,
    far outside of the data: far away the irreps' part is a constant of each direction, and a transform made of it grows
    like a linear map. Else gates times irreps would grow with the square of the input, a stack of transforms with
    powers of it, and one outlier would cost a density more than all other data.

    On a point no linear equivariant map joins different irreps
    (Schur's lemma), so a deep stack of gated layers would mix scalars with scalars and irreps with irreps all the same;
    here all depth goes to the invariants. Lengths of mixtures hold the inner products (polarisation), and for vectors
    under O(n) sums of invariants times vectors are all there is (Villar et al., *Scalars are universal*, arXiv
    2106.06610, theorem 4). Elsewhere lengths are not enough: they do not see the handedness of three vectors under
    SO(3), nor how irreps of different frequency stand to each other. There tensor products (:math:`C`, see
    :class:`~pyro_equiflow.nn.irreps.products.IrrepProducts`) come between two mixtures; they are left out where no
    product of the input's irreps holds an irrep of input or output. An output irrep that neither the input nor one
    product holds is zero.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import InvariantGateNet
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> net = InvariantGateNet(vectors, vectors, hidden_dims=(32, 32))
        >>> net(enn.GeometricTensor(torch.randn(5, 6), vectors)).shape
        torch.Size([5, 6])

    :param in_type: input field type with no base space, of irreps.
    :param out_type: output field type, of irreps.
    :param hidden_dims: channels of the hidden layers, the irreps carried along counted in (to at most one half).
    :param function: the MLP's function, see :class:`PointwiseNonLinearity`.
    :param tensor_products: whether to take products where they add something.
    :raises ValueError: a type that holds anything but irreps, an unknown function.

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
            validate_field_type(field_type, name)
            if not is_of_irreps(field_type):
                raise ValueError(f"{name}: expected irreps with no base space, found {field_type}")
        super().__init__(in_type, out_type)
        self.function = function
        self.hidden_dims = check_integers("hidden_dims", hidden_dims, 1)
        self.tensor_products = check_flag("tensor_products", tensor_products)
        self._build()
        # One tensor of weights and one of biases: an optimizer's cost goes by the number of tensors.
        self.weight = torch.nn.Parameter(torch.zeros(sum(self._gate.sizes)))
        self.bias = torch.nn.Parameter(torch.zeros(sum(self._gate.widths[1:])))
        self.reset_parameters()

    def _build(self) -> None:
        """Makes what follows from the types and widths alone."""
        inputs, outputs = IsotypicLayout(self.in_type), IsotypicLayout(self.out_type)
        irreps_in, irreps_out = (list(zip(own.irreps, own.counts)) for own in (inputs, outputs))
        mixture = IrrepMixture(irreps_in, irreps_out, carried_channels(self.hidden_dims), self.tensor_products)
        hidden = hidden_widths(self.hidden_dims, mixture.fields)
        self._gate = InvariantGate(inputs, outputs, mixture, hidden, self.function, radius=_RADIUS)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_gate"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He's initialisation, gates around one."""
        std = torch.as_tensor(self._gate.init_std, dtype=self.weight.dtype, device=self.weight.device)
        self.weight.normal_().mul_(std)
        self.bias.copy_(torch.as_tensor(self._gate.init_bias))

    @torch.no_grad()
    def zero_output(self) -> None:
        """Makes the output zero everywhere: the start of a transform that is the identity."""
        self.weight.masked_fill_(torch.as_tensor(self._gate.last, device=self.weight.device), 0.0)
        self.bias.split(self._gate.widths[1:])[-1][: self._gate.scalars_out] = 0.0

    def expanded(self) -> Expanded:
        """The map above on plain tensors; irreps with channels outermost in memory, scalars with samples outermost."""
        return self._gate.expanded(self._gate.expansion(self.weight), self.bias)


def carried_channels(hidden_dims: Sequence[int]) -> int:
    """Channels aimed at for the irreps carried along: a quarter of the widest layer's.

    The MLP of invariants decides and keeps the rest; its inputs, the lengths, are as many as the irreps carried along.
    Regressions of 5 vectors under O(2) and 4 under SO(3), 500 steps with layers of 64 channels, had 1.4 to 1.5 times
    the error with an eighth, 0.7 to 0.9 times with a half, which leaves the MLP 32 channels.
    """
    return max(hidden_dims, default=0) // 4


def hidden_widths(hidden_dims: Sequence[int], carried: Sequence[tuple[IrreducibleRepresentation, int]]) -> list[int]:
    """Channels of the MLP's hidden layers: those that the irreps carried along leave, at least one half."""
    channels = sum(count * irrep.size for irrep, count in carried)
    return [max(width - channels, width // 2, 1) for width in hidden_dims]


class InvariantGate:
    r"""The map of :class:`InvariantGateNet`, given the entries of all its matrices and its biases, flat.

    :param inputs: irreps of the input.
    :param outputs: irreps of the output.
    :param mixture: the intertwiner that gives the irreps carried along.
    :param hidden: channels of the MLP's hidden layers.
    :param function: the MLP's function.
    :param radius: of the ball into which the irreps carried along are shortened, :math:`v / \sqrt{1 + |v|^2 / R^2}`,
        before gates act on them: the map grows no faster than its input.
    :param far_lengths: whether the MLP sees lengths from before the irreps are shortened.
    :ivar widths: channels of the MLP's layers, input and output included.
    :ivar sizes: numbers of weights: of the mixture, of the MLP's layers, of the last intertwiner.
    :ivar expansion: from the weights to the entries.
    :ivar gated: which irreps of the mixture the output holds.
    :ivar init_std: standard deviations of the weights that keep unit variance (He).
    :ivar init_bias: biases of gates that are one and else nothing.
    :ivar last: which weights make the output zero if they are.
    :raises ValueError: an unknown function.
    """

    def __init__(
        self,
        inputs: IsotypicLayout,
        outputs: IsotypicLayout,
        mixture: IrrepMap | IrrepMixture,
        hidden: Sequence[int],
        function: str,
        *,
        radius: float,
        far_lengths: bool = False,
    ) -> None:
        check_choice("function", function, FUNCTIONS)
        self._inputs, self._outputs, self._mixture, self._function = inputs, outputs, mixture, FUNCTIONS[function]
        self._radius, self._far_lengths = radius, far_lengths
        counts = {irrep.id: count for irrep, count in zip(outputs.irreps, outputs.counts)}
        self.gated = [i for i, (irrep, _) in enumerate(mixture.fields) if irrep.id in counts]
        carried = [mixture.fields[i] for i in self.gated]
        self._turning = [irrep.id for irrep, _ in carried]
        self.out = IrrepMap(carried, [(irrep, counts[irrep.id]) for irrep, _ in carried])
        self._gates = [count for _, count in carried]
        scalars_in, self.scalars_out = (0 if p.trivial is None else p.counts[p.trivial] for p in (inputs, outputs))
        scalars_in += sum(count for _, count in mixture.fields)
        self.widths = [scalars_in, *hidden, self.scalars_out + sum(self._gates)]
        dense = [a * b for a, b in zip(self.widths, self.widths[1:])]
        self.sizes = [mixture.num_weights, *dense, self.out.num_weights]
        std = [np.full(a * b, 1 / math.sqrt(max(a, 1))) for a, b in zip(self.widths, self.widths[1:])]
        self.init_std = np.concatenate([mixture.init_std, *std, self.out.init_std])
        self.init_bias = np.repeat([0.0, 1.0], [sum(self.widths[1:]) - sum(self._gates), sum(self._gates)])
        whole = [EntrywiseExpansion(np.arange(size), np.ones(size)) for size in dense]
        expansions = [mixture.expansion, *whole, self.out.expansion]
        self._entries = [len(expansion) for expansion in expansions]
        self.expansion = EntrywiseExpansion.joined(expansions, self.sizes)
        to_scalars = self.widths[-2] * self.scalars_out
        ends = [sum(self.sizes[:-2]), to_scalars, dense[-1] - to_scalars, self.sizes[-1]]
        self.last = np.repeat([False, True, False, True], ends)

    def expanded(self, entries: Tensor, bias: Tensor) -> Expanded:
        """The map on plain tensors, channels outermost in memory."""
        mix, *dense, out = entries.split(self._entries)
        mixing, turning = self._mixture.matrices(mix), self.out.matrices(out)
        layers: list[Tensor] = []
        for flat, own, width in zip(dense, bias.unsqueeze(1).split(self.widths[1:]), self.widths):
            layers += [own, flat.view(len(own), width)]
        inputs, outputs, mixture = self._inputs, self._outputs, self._mixture
        for constants in (inputs, outputs):
            constants.prepare(entries)
        start, stop = len(mixing), len(mixing) + len(layers)
        function, gated = self._function, self.gated
        flattening, far_lengths = self._radius**-2, self._far_lengths
        shapes = [(count, irrep.size) for irrep, count in mixture.fields]

        def fn(x: Tensor, *tensors: Tensor) -> Tensor:
            components = inputs.split(x.mT)
            fields = [v.view(*s, -1) for v, s in zip(mixture.apply(components, tensors[:start]), shapes)]
            short, scalars = [], []
            for v in fields:
                square = (v * v).sum(1).clamp(max=_LARGEST)
                short.append((1 + flattening * square).rsqrt())
                scalars.append((1 + (square if far_lengths else square * short[-1] * short[-1])).sqrt())
            if inputs.trivial is not None or not fields:
                scalars.insert(0, x.mT[:0] if inputs.trivial is None else components[inputs.trivial])
            h = torch.cat(scalars) if len(scalars) > 1 else scalars[0]
            for index in range(start, stop, 2):
                h = torch.addmm(tensors[index], tensors[index + 1], function(h) if index > start else h)
            t, *gates = h.split([self.scalars_out, *self._gates])
            found: dict[tuple, Tensor] = {}
            if outputs.trivial is not None:
                found[outputs.ids[outputs.trivial]] = t
            turned = [(fields[i] * (gate * short[i]).unsqueeze(1)).flatten(0, 1) for i, gate in zip(gated, gates)]
            found |= zip(self._turning, self.out.apply(turned, tensors[stop:]))
            for name, size in zip(outputs.ids, outputs.sizes):
                if name not in found:  # an irrep that neither the input nor a product holds
                    found[name] = x.new_zeros(size, x.shape[-2])
            return outputs.merge([found[name] for name in outputs.ids]).mT

        return Expanded(fn, (*mixing, *layers, *turning))
