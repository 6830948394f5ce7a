# SPDX-License-Identifier: Apache-2.0
"""Steerable layers whose filters are one gather or a few small products of their free parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from escnn import nn as enn
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule, WithPullback
from pyro_equiflow.nn.gather import block_gather, is_disjoint
from pyro_equiflow.nn.kernels import kernel_basis
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.representations import intertwiner_basis, invariant_basis, is_permutation

__all__ = ["SteerableConv", "SteerableLinear"]


class _BasisLayer(SteerableModule):
    """A linear map ``sum_i weight_i basis_i``, plus a bias in the invariant subspace.

    The basis lives outside the tree of parameters and buffers: ``state_dict`` holds ``weight`` and ``bias``
    only, ``.double()`` on one layer cannot touch another's, and casting goes from the float64 original.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType, bias: bool) -> None:
        super().__init__(in_type, out_type)
        invariants = self._build()
        self.weight = torch.nn.Parameter(torch.zeros(self._plan.num_weights, dtype=torch.float32))
        if bias and invariants:
            self.bias = torch.nn.Parameter(torch.zeros(invariants, dtype=torch.float32))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _pair_basis(self, in_rep: Representation, out_rep: Representation) -> np.ndarray:
        """The basis between two representations, shape ``(number, out, in, *kernel)``."""
        raise NotImplementedError

    def _kernel_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _build(self) -> int:
        """Makes what follows from the types alone; returns the dimension of the invariant subspace."""
        bases = [torch.tensor(invariant_basis(r), device="cpu") for r in self.out_type.representations]
        invariants = torch.block_diag(*bases).numpy()
        self._plan = _ExpansionPlan(self.in_type, self.out_type, self._pair_basis, self._kernel_shape())
        self._constants = Constants(invariants=invariants, **self._plan.arrays())
        return int(invariants.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        # Bases can be large and follow from the types: a saved layer is its types and its parameters.
        return {k: v for k, v in self.__dict__.items() if k not in ("_plan", "_constants")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build()

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """He's initialisation on the filter: channels of unit variance keep ``gain`` squared of it; bias 0."""
        self.weight.normal_().mul_(torch.as_tensor(gain * self._plan.init_std, dtype=self.weight.dtype))
        if self.bias is not None:
            self.bias.zero_()

    def filter(self) -> Tensor:
        """The expanded filter ``(out_type.size, in_type.size, *kernel_shape)``."""
        return self._plan.expand(self.weight, self._constants.like(self.weight))

    def expanded_bias(self) -> Tensor | None:
        """The bias of every output channel, in the invariant subspace of ``out_type``."""
        if self.bias is None:
            return None
        return self._constants.like(self.bias)["invariants"] @ self.bias


class SteerableLinear(_BasisLayer):
    r"""An intertwiner with bias, :math:`y = W x + b`, :math:`W \rho_\mathrm{in}(g) = \rho_\mathrm{out}(g) W`.

    Spans all equivariant affine maps between two types with no base space (Schur's lemma).

    :param in_type: input field type with no base space.
    :param out_type: output field type over the same group.
    :param bias: whether to add a bias in the invariant subspace.
    :raises ValueError: the types have a base space, or different ones.
    """

    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType, *, bias: bool = True) -> None:
        _check_types(in_type, out_type, dimensions=(0,))
        super().__init__(in_type, out_type, bias)

    def _build(self) -> int:
        types = (self.in_type, self.out_type)
        self._rows = any(all(map(is_permutation, {*t.representations})) for t in types)
        return super()._build()

    def _pair_basis(self, in_rep: Representation, out_rep: Representation) -> np.ndarray:
        return intertwiner_basis(in_rep, out_rep)

    def _kernel_shape(self) -> tuple[int, ...]:
        return ()

    def expanded(self) -> Expanded:
        """``x @ filter.T + bias``, in the memory layout that suits what works on the result.

        Field-wise maps want channels outermost; pointwise ones, between permutation fields, do not care, and rows of
        samples save copies where Jacobians are taken.
        """
        bias = self.expanded_bias()
        tensors = (self.filter(),) if bias is None else (self.filter(), bias)
        return Expanded(_ROWS if self._rows else _CHANNELS_OUTERMOST, tensors)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None:
        return (weight @ x.mT).mT
    return torch.addmm(bias.unsqueeze(-1), weight, x.mT).mT


def _linear_pullback(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    return lambda p: p @ weight


_ROWS = WithPullback(F.linear, _linear_pullback)
_CHANNELS_OUTERMOST = WithPullback(_linear, _linear_pullback)


class SteerableConv(_BasisLayer):
    r"""A steerable convolution on a 2-D or 3-D grid, stride 1, output of the input's size.

    Its kernels solve :math:`\kappa(g x) = \rho_\mathrm{out}(g) \kappa(x) \rho_\mathrm{in}(g)^{-1}` (Weiler and
    Cesa, arXiv 1911.08251, eq. 2): escnn's basis, sampled in float64 and averaged over the elements that permute
    the grid, so that these act exactly.

    :param in_type: input field type over a 2-D or 3-D base space.
    :param out_type: output field type over the same space.
    :param kernel_size: odd number of points a side.
    :param padding_mode: ``"zeros"`` or ``"circular"`` (periodic grids: translations are exact too).
    :param bias: whether to add a bias in the invariant subspace.
    :raises ValueError: unlike base spaces, an even kernel, an unknown padding mode.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        kernel_size: int = 3,
        *,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        _check_types(in_type, out_type, dimensions=(2, 3))
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd positive integer, found {kernel_size!r}")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f'padding_mode: expected "zeros" or "circular", found {padding_mode!r}')
        self.kernel_size = kernel_size
        self.padding_mode = padding_mode
        super().__init__(in_type, out_type, bias)

    def _pair_basis(self, in_rep: Representation, out_rep: Representation) -> np.ndarray:
        return kernel_basis(self.in_type.gspace, self.kernel_size, in_rep, out_rep)

    def _kernel_shape(self) -> tuple[int, ...]:
        return int(self.in_type.gspace.dimensionality) * (self.kernel_size,)

    def expanded(self) -> Expanded:
        """A convolution with the expanded kernel."""
        dimensions, pad = len(self._kernel_shape()), self.kernel_size // 2
        convolve, transposed = (F.conv2d, F.conv_transpose2d) if dimensions == 2 else (F.conv3d, F.conv_transpose3d)
        circular = self.padding_mode == "circular" and pad > 0

        def fn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if circular:
                x = F.pad(x, 2 * dimensions * (pad,), mode="circular")
                return convolve(x, weight, bias)
            return convolve(x, weight, bias, padding=pad)

        def pullback(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
            def pull(p: Tensor) -> Tensor:
                if circular:
                    p = F.pad(p, 2 * dimensions * (pad,), mode="circular")
                return transposed(p, weight, padding=2 * pad if circular else pad)

            return pull

        bias = self.expanded_bias()
        return Expanded(WithPullback(fn, pullback), (self.filter(),) if bias is None else (self.filter(), bias))


@dataclass(frozen=True)
class _Pair:
    """The blocks of a filter between all fields of one representation and all of another."""

    fields_out: int
    fields_in: int
    start: int
    basis: np.ndarray
    where: tuple[np.ndarray, ...]


class _ExpansionPlan:
    """How a flat vector of weights becomes a filter, decided once from the bases of pairs of representations.

    If every entry of the filter hangs on one weight at most (bases of disjoint support: irreps, permutation
    representations on a point), expansion is one gather and one product. Else each pair of representations
    costs one product of matrices.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        pair_basis: Callable[[Representation, Representation], np.ndarray],
        kernel_shape: tuple[int, ...],
    ) -> None:
        self.shape = (out_type.size, in_type.size, *kernel_shape)
        in_fields, out_fields = _fields_by_representation(in_type), _fields_by_representation(out_type)
        self.pairs: list[_Pair] = []
        self.num_weights = 0
        std = [np.zeros(0)]
        for out_rep, out_starts in out_fields.items():
            bases = {rep: pair_basis(rep, out_rep) for rep in in_fields}
            # With weights of variance 1 over the basis elements' squared norms, a field's output variance is the
            # number of weights that it sums.
            fan = sum(len(bases[rep]) * len(starts) for rep, starts in in_fields.items())
            for in_rep, in_starts in in_fields.items():
                count = len(bases[in_rep]) * len(in_starts) * len(out_starts)
                if count:
                    rows = np.add.outer(out_starts, np.arange(out_rep.size)).ravel()
                    columns = np.add.outer(in_starts, np.arange(in_rep.size)).ravel()
                    where = np.ix_(rows, columns)
                    pair = _Pair(len(out_starts), len(in_starts), self.num_weights, bases[in_rep], where)
                    self.pairs.append(pair)
                    norm = np.linalg.norm(bases[in_rep][0])
                    std.append(np.full(count, math.sqrt(out_rep.size / fan) / norm))
                    self.num_weights += count
        self.init_std = np.concatenate(std)
        self.disjoint = all(is_disjoint(pair.basis) for pair in self.pairs)
        # One pair whose fields stand in order: the expanded block is the filter.
        self.in_order = len(self.pairs) == 1 and all(
            (np.diff(axis.ravel()) == 1).all() and axis.size == size
            for axis, size in zip(self.pairs[0].where, self.shape)
        )

    def weights(self, weight: Tensor, pair: _Pair) -> Tensor:
        """The free weights of one pair, ``(fields out, fields in, number)``, a view."""
        shape = (pair.fields_out, pair.fields_in, len(pair.basis))
        return weight.narrow(0, pair.start, math.prod(shape)).view(shape)

    def arrays(self) -> dict[str, np.ndarray | None]:
        """The constant arrays that :meth:`expand` takes."""
        if self.disjoint:
            index = np.zeros(self.shape, dtype=np.int64)
            factor = np.zeros(self.shape)
            for pair in self.pairs:
                entries, factor[pair.where] = block_gather(pair.basis, pair.fields_out, pair.fields_in)
                index[pair.where] = pair.start + entries
            # The trivial group's weights are the filter.
            as_it_is = index.size == self.num_weights and (index.ravel() == np.arange(index.size)).all()
            as_it_is = as_it_is and (factor == 1).all()
            return {"index": None if as_it_is else index.ravel(), "factor": factor}
        order = np.full(self.shape[:2], -1)
        offset = 0
        for pair in self.pairs:
            block = offset + np.arange(order[pair.where].size)
            order[pair.where] = block.reshape(order[pair.where].shape)
            offset += len(block)
        order[order < 0] = offset
        bases = {f"basis{i}": pair.basis.reshape(len(pair.basis), -1) for i, pair in enumerate(self.pairs)}
        return {"order": order.ravel(), **bases}

    def expand(self, weight: Tensor, constants: dict[str, Any]) -> Tensor:
        """The filter of shape ``(out, in, *kernel_shape)``, differentiable in ``weight``."""
        if not self.num_weights:
            return weight.new_zeros(self.shape)
        if self.disjoint:
            if constants["index"] is None:
                return weight.view(self.shape)
            return weight.index_select(0, constants["index"]).view(self.shape) * constants["factor"]
        blocks = []
        for i, pair in enumerate(self.pairs):
            size_out, size_in = pair.basis.shape[1:3]
            part = (self.weights(weight, pair) @ constants[f"basis{i}"]).unflatten(-1, (size_out, size_in, -1))
            blocks.append(part.transpose(1, 2).flatten(0, 3))
        if self.in_order:
            return blocks[0].view(self.shape)
        zero = blocks[0].new_zeros(1, blocks[0].shape[-1])
        return torch.cat([*blocks, zero]).index_select(0, constants["order"]).view(self.shape)


def _fields_by_representation(field_type: enn.FieldType) -> dict[Representation, np.ndarray]:
    starts: dict[Representation, list[int]] = {}
    start = 0
    for representation in field_type.representations:
        starts.setdefault(representation, []).append(start)
        start += representation.size
    return {representation: np.array(first) for representation, first in starts.items()}


def _check_types(in_type: enn.FieldType, out_type: enn.FieldType, dimensions: tuple[int, ...]) -> None:
    if in_type.gspace != out_type.gspace:
        raise ValueError(f"expected types over one gspace, found {in_type.gspace} and {out_type.gspace}")
    found = int(in_type.gspace.dimensionality)
    if found not in dimensions:
        raise ValueError(
            f"expected a base space of dimension {' or '.join(map(str, dimensions))}, found {found}: take "
            "SteerableLinear for no base space, SteerableConv for a grid"
        )
