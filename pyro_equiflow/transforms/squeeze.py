# SPDX-License-Identifier: Apache-2.0
"""Space to depth, with the field type that results."""

from __future__ import annotations

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.ops.arguments import check_flag
from pyro_equiflow.ops.cells import squeezed_type
from pyro_equiflow.ops.channels import ChannelOrder
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul
from pyro_equiflow.transforms.base import EquivariantTransform

__all__ = ["EquivariantSqueeze", "equivariant_squeeze"]


class EquivariantSqueeze(EquivariantTransform):
    r"""Space to depth: the 2x2 grid points of a cell (2x2x2 on volumes) become channels.

    Events ``(C, 2H, 2W)`` go to ``(4C, H, W)``, :math:`y(p) = B\,(x(2p + s))_s` with the cell's sites :math:`s` and an
    orthogonal matrix :math:`B`. A quarter turn or a flip carries cells to cells and permutes the sites inside, so
    the image transforms by another representation, and

    .. math:: T(g \cdot x) = g \cdot T(x), \qquad
        (g \cdot y)(p) = B\,(\pi(g) \otimes \rho(g))\,B^T\, y(g^{-1} p),

    with :math:`\pi` the permutation of the sites and :math:`\rho` that of ``field_type``. ``out_type`` is that type:
    under :math:`C_4`, for one, a trivial field becomes a regular one, a regular field four.

    Without ``haar`` the matrix orders channels only. Fields that permute their channels give such fields again (trivial
    and regular ones, else cosets of a subgroup), any other field the tensor product with the sites. With ``haar`` it is
    the orthonormal Haar transform of the cell: averages, which keep their fields and stand first, and differences in
    the basis of irreps.

    Log-det 0, inverse closed.

    Example::

        >>> import torch
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow import EquivariantSqueeze
        >>> space = gspaces.rot2dOnR2(4)
        >>> squeeze = EquivariantSqueeze(enn.FieldType(space, [space.trivial_repr]))
        >>> squeeze(torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 4, 4, 4])
        >>> squeeze.out_type
        [C4_on_R2[(None, 4)]: {regular (x1)}(4)]

    :param field_type: how the group acts on the event, over a 2-D or 3-D grid that every element permutes: in the plane
        :math:`C_1, C_2, C_4`, flips, :math:`D_1, D_2, D_4`. Other groups would turn a cell's points off the grid.
    :param haar: whether channels are averages and differences over cells, in place of sites.
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises ValueError: no base space, a group that does not permute the grid; at a call, sides that are not even.

    References: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803), section 3.6;
    Cohen and Welling, *Group Equivariant Convolutional Networks* (arXiv 1602.07576), on groups that permute grids.
    """

    def __init__(self, field_type: enn.FieldType, *, haar: bool = False, cache_size: int = 1) -> None:
        haar = check_flag("haar", haar)
        out_type, matrix = squeezed_type(field_type, haar)
        super().__init__(field_type, out_type=out_type, cache_size=cache_size)
        self.haar = haar
        self._spatial_dims = self.event_dim - 1
        # Without Haar's the matrix only puts channels in another order.
        self._constants = Constants(matrix=matrix) if haar else None
        self._order = ChannelOrder(matrix.argmax(1), self._spatial_dims)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, C, *spatial)`` to ``(*batch, 2^d C, *spatial / 2)``.

        :raises ValueError: the shape holds no event of this transform, or sides are not even.
        """
        dims = self._spatial_dims
        shape = super().forward_shape(shape)
        self._check_even(shape[len(shape) - dims :])
        halves = (side // 2 for side in shape[len(shape) - dims :])
        return torch.Size((*shape[: len(shape) - dims - 1], self.out_type.size, *halves))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, 2^d C, *spatial)`` to ``(*batch, C, 2 * spatial)``.

        :raises ValueError: the shape holds no image of this transform.
        """
        dims = self._spatial_dims
        shape = super().inverse_shape(shape)
        doubles = (2 * side for side in shape[len(shape) - dims :])
        return torch.Size((*shape[: len(shape) - dims - 1], self.field_type.size, *doubles))

    def _check_even(self, sides: torch.Size) -> None:
        if any(side % 2 for side in sides):
            raise ValueError(
                f"{type(self).__name__}: expected even side lengths, found {tuple(sides)}; pad or crop the data to "
                "even sides, or squeeze once less"
            )

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = self._spatial_dims
        batch, sides = x.shape[: x.dim() - dims - 1], x.shape[x.dim() - dims :]
        self._check_even(sides)
        cells = x.reshape(*batch, self.field_type.size, *(n for side in sides for n in (side // 2, 2)))
        # Sites go next to the channels.
        start = len(batch) + 1
        order = [*range(start), *range(start + 1, cells.dim(), 2), *range(start, cells.dim(), 2)]
        y = cells.permute(order).reshape(*batch, self.out_type.size, *(side // 2 for side in sides))
        if self._constants is None:
            y = self._order.apply(y)
        else:
            y = channel_matmul(self._constants.like(x)["matrix"], y, dims)
        return y, x.new_zeros(batch)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        dims = self._spatial_dims
        batch, sides = y.shape[: y.dim() - dims - 1], y.shape[y.dim() - dims :]
        if self._constants is None:
            cells = self._order.undo(y)
        else:
            cells = channel_matmul(self._constants.like(y)["matrix"].mT, y, dims)
        cells = cells.reshape(*batch, self.field_type.size, *dims * (2,), *sides)
        start = len(batch) + 1
        order = [*range(start), *(i for d in range(dims) for i in (start + dims + d, start + d))]
        x = cells.permute(order).reshape(*batch, self.field_type.size, *(2 * side for side in sides))
        return x, y.new_zeros(batch)


def equivariant_squeeze(field_type: enn.FieldType, *, haar: bool = False) -> EquivariantSqueeze:
    """An :class:`EquivariantSqueeze`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow import equivariant_squeeze
        >>> space = gspaces.flipRot2dOnR2(4)
        >>> equivariant_squeeze(enn.FieldType(space, [space.trivial_repr]), haar=True)(torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 4, 4, 4])

    :param field_type: how the group acts on the event.
    :param haar: whether channels are averages and differences over cells.
    """
    return EquivariantSqueeze(field_type, haar=haar)
