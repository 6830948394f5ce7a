# SPDX-License-Identifier: Apache-2.0
"""Steerable layers whose filters are one look-up or a few small products of their free parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from escnn import nn as enn
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, SteerableModule, WithPullback
from pyro_equiflow.nn.linear.expansion_plan import ExpansionPlan
from pyro_equiflow.nn.linear.kernels import kernel_basis
from pyro_equiflow.nn.linear.periodic import pad_periodic
from pyro_equiflow.ops.arguments import check_choice, check_flag, check_instance, check_integer, check_number
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.representations import (
    intertwiner_basis,
    invariant_basis,
    is_permutation,
    validate_field_type,
    validate_over,
)

__all__ = ["SteerableConv", "SteerableLinear", "check_kernel", "steerable_layer"]


# What follows from a layer's types: not saved with it.
_FOLLOWING = ("plan", "invariants", "affine_map", "_constants")


class _BasisLayer(SteerableModule):
    """A linear map ``sum_i weight_i basis_i``, plus a bias in the invariant subspace.

    The basis lives outside the tree of parameters and buffers: ``state_dict`` holds ``weight`` and ``bias``
    only, ``.double()`` on one layer cannot touch another's, and casting goes from the float64 original.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    plan: ExpansionPlan
    invariants: np.ndarray
    affine_map: WithPullback

    def __init__(
        self, in_type: enn.FieldType, out_type: enn.FieldType, bias: bool, mask: np.ndarray | None = None
    ) -> None:
        bias = check_flag("bias", bias)
        super().__init__(in_type, out_type)
        self.mask = mask if mask is None else _check_mask(mask, in_type, out_type)
        invariants = self._build()
        self.weight = torch.nn.Parameter(torch.zeros(self.plan.num_weights))
        if bias and invariants:
            self.bias = torch.nn.Parameter(torch.zeros(invariants))
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
        types = (self.in_type, self.out_type)
        self.plan = ExpansionPlan(*types, self._pair_basis, self._kernel_shape(), self.mask)
        self.invariants = invariants
        self._constants = Constants(invariants=invariants)
        self.affine_map = self._affine_map()
        return int(invariants.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        # Bases can be large and follow from the types: a saved layer is its types and its parameters.
        return {k: v for k, v in self.__dict__.items() if k not in _FOLLOWING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build()

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """He's initialisation on the filter: channels of unit variance keep ``gain`` squared of it; bias 0."""
        gain = check_number("gain", gain, "[0, inf)")
        self.weight.normal_().mul_(torch.as_tensor(gain * self.plan.init_std, dtype=self.weight.dtype))
        if self.bias is not None:
            self.bias.zero_()

    def filter(self) -> Tensor:
        """The expanded filter ``(out_type.size, in_type.size, *kernel_shape)``."""
        return self.plan.expand(self.weight)

    def expanded_bias(self) -> Tensor | None:
        """The bias of every output channel, in the invariant subspace of ``out_type``."""
        if self.bias is None:
            return None
        return self._constants.like(self.bias)["invariants"] @ self.bias

    def expanded(self) -> Expanded:
        """The map by the expanded filter and bias."""
        weight, bias = self.filter(), self.expanded_bias()
        return Expanded(self.affine_map, (weight,) if bias is None else (weight, bias))

    def _affine_map(self) -> WithPullback:
        """The layer as a function of an event, a filter and a bias that somebody has expanded."""
        raise NotImplementedError

    def give_parameters(self) -> tuple[Tensor, Tensor]:
        """Takes the parameters off this layer: from now on it maps by ``affine_map`` alone.

        :return: the weights, and the biases, of length 0 where there are none.
        """
        weight, bias = self.weight.detach(), self.bias
        self.weight = self.bias = None  # type: ignore[assignment]
        return weight, weight.new_zeros(0) if bias is None else bias.detach()


class SteerableLinear(_BasisLayer):
    r"""An intertwiner with bias, :math:`y = W x + b`, :math:`W \rho_\mathrm{in}(g) = \rho_\mathrm{out}(g) W`.

    Spans all equivariant affine maps between two types with no base space (Schur's lemma).

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import SteerableLinear
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> SteerableLinear(vectors, vectors).filter().shape
        torch.Size([6, 6])

    :param in_type: input field type with no base space.
    :param out_type: output field type over the same group.
    :param bias: whether to add a bias in the invariant subspace.
    :param mask: which output field may see which input field, ``(fields out, fields in)``; what is masked has no
        weights. All may see all by default.
    :raises ValueError: the types have a base space, or different ones; a mask of another shape.
    """

    def __init__(
        self, in_type: enn.FieldType, out_type: enn.FieldType, *, bias: bool = True, mask: np.ndarray | None = None
    ) -> None:
        _check_types(in_type, out_type, dimensions=(0,))
        super().__init__(in_type, out_type, bias, mask)

    def _pair_basis(self, in_rep: Representation, out_rep: Representation) -> np.ndarray:
        return intertwiner_basis(in_rep, out_rep)

    def _kernel_shape(self) -> tuple[int, ...]:
        return ()

    def _affine_map(self) -> WithPullback:
        """``x @ weight.T + bias``, in the memory layout that suits what works on the result.

        Field-wise maps want channels outermost; pointwise ones, between permutation fields, do not care, and rows of
        samples save copies where Jacobians are taken.
        """
        rows = any(all(map(is_permutation, {*t.representations})) for t in (self.in_type, self.out_type))
        return _ROWS if rows else _CHANNELS_OUTERMOST


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

    Example::

        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow.nn import SteerableConv
        >>> space = gspaces.rot2dOnR2(4)
        >>> gray = enn.FieldType(space, [space.trivial_repr])
        >>> SteerableConv(gray, enn.FieldType(space, 2 * [space.regular_repr]), 3).filter().shape
        torch.Size([8, 1, 3, 3])

    :param in_type: input field type over a 2-D or 3-D base space.
    :param out_type: output field type over the same space.
    :param kernel_size: odd number of points a side.
    :param padding_mode: ``"zeros"`` or ``"circular"`` (periodic grids: translations are exact too).
    :param bias: whether to add a bias in the invariant subspace.
    :param mask: which output field may see which input field, as in :class:`SteerableLinear`; whole kernels.
    :raises ValueError: unlike base spaces, an even kernel, an unknown padding mode, a mask of another shape.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        kernel_size: int = 3,
        *,
        padding_mode: str = "zeros",
        bias: bool = True,
        mask: np.ndarray | None = None,
    ) -> None:
        _check_types(in_type, out_type, dimensions=(2, 3))
        self.kernel_size = check_kernel(kernel_size, padding_mode)
        self.padding_mode = padding_mode
        super().__init__(in_type, out_type, bias, mask)

    def _pair_basis(self, in_rep: Representation, out_rep: Representation) -> np.ndarray:
        return kernel_basis(self.in_type.gspace, self.kernel_size, in_rep, out_rep)

    def _kernel_shape(self) -> tuple[int, ...]:
        return int(self.in_type.gspace.dimensionality) * (self.kernel_size,)

    def _affine_map(self) -> WithPullback:
        """A convolution with the kernel ``weight``."""
        dimensions, pad = len(self._kernel_shape()), self.kernel_size // 2
        convolve, transposed = (F.conv2d, F.conv_transpose2d) if dimensions == 2 else (F.conv3d, F.conv_transpose3d)
        circular, widths = self.padding_mode == "circular" and pad > 0, dimensions * (pad,)

        def fn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if circular:
                return convolve(pad_periodic(x, widths), weight, bias)
            return convolve(x, weight, bias, padding=pad)

        def pullback(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
            def pull(p: Tensor) -> Tensor:
                if circular:
                    return transposed(pad_periodic(p, widths), weight, padding=2 * pad)
                return transposed(p, weight, padding=pad)

            return pull

        return WithPullback(fn, pullback)


def steerable_layer(
    in_type: enn.FieldType,
    out_type: enn.FieldType,
    kernel_size: int,
    padding_mode: str,
    mask: np.ndarray | None = None,
) -> SteerableLinear | SteerableConv:
    """The linear layer between two types: :class:`SteerableLinear` on points, :class:`SteerableConv` on grids."""
    if in_type.gspace.dimensionality == 0:
        return SteerableLinear(in_type, out_type, mask=mask)
    return SteerableConv(in_type, out_type, kernel_size, padding_mode=padding_mode, mask=mask)


def check_kernel(kernel_size: int, padding_mode: str) -> int:
    """The size of a kernel; raises unless it is odd and positive and the padding mode one that there is."""
    check_choice("padding_mode", padding_mode, ("zeros", "circular"))
    size = check_integer("kernel_size", kernel_size)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd positive integer, found {size}")
    return size


def _check_mask(mask: np.ndarray, in_type: enn.FieldType, out_type: enn.FieldType) -> np.ndarray:
    check_instance("mask", mask, np.ndarray, "an array of booleans or None")
    shape = (len(out_type.representations), len(in_type.representations))
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"mask: expected booleans of shape (fields out, fields in) = {shape}, found {mask.dtype} of {mask.shape}"
        )
    return mask


def _check_types(in_type: enn.FieldType, out_type: enn.FieldType, dimensions: tuple[int, ...]) -> None:
    validate_field_type(in_type, "in_type")
    validate_over(in_type.gspace, out_type, "out_type")
    found = int(in_type.gspace.dimensionality)
    if found not in dimensions:
        raise ValueError(
            f"in_type: expected a base space of dimension {' or '.join(map(str, dimensions))}, found {found}: take "
            "SteerableLinear for no base space, SteerableConv for a grid"
        )
