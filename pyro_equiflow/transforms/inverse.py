# SPDX-License-Identifier: Apache-2.0
"""A transform run backwards."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.transforms.base import Deferred, EquivariantTransform

__all__ = ["Inverse"]


class Inverse(EquivariantTransform):
    """A transform run backwards, as a module that owns it.

    For density estimation put a transform whose inverse is cheap the other way round: ``Inverse(transform)``.
    Equivariant as the transform is; log-det and costs are the transform's with the directions exchanged.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import Inverse, equivariant_iaf
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> maf = Inverse(equivariant_iaf(vectors))
        >>> x = torch.randn(5, 6)
        >>> bool(torch.allclose(maf.inv(maf(x)), x, atol=1e-5))
        True

    :param transform: any :class:`EquivariantTransform`.
    :raises TypeError: anything else.
    """

    def __init__(self, transform: EquivariantTransform) -> None:
        check_instance("transform", transform, EquivariantTransform, "an EquivariantTransform")
        super().__init__(transform.out_type, out_type=transform.field_type, cache_size=0)
        self.transform = transform
        if transform._inverse_ref is None or transform._inverse_ref() is None:
            transform._inverse_ref = weakref.ref(self)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transform's :meth:`~EquivariantTransform.inverse_and_ladj`, its cache included."""
        return self.transform.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The transform's :meth:`~EquivariantTransform.call_and_ladj`, its cache included."""
        return self.transform.call_and_ladj(y)

    def __call__(self, x: Tensor) -> Tensor:
        """The preimage of ``x`` under the transform."""
        return self.transform._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the transform's."""
        return -self.transform.log_abs_det_jacobian(y, x)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform._inverse_and_ladj(x)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform._call_and_ladj(y)

    def _call_deferred(self, x: Tensor) -> tuple[Tensor, Deferred]:
        return self.transform._inverse_deferred(x)

    def _inverse_deferred(self, y: Tensor) -> tuple[Tensor, Deferred]:
        return self.transform._call_deferred(y)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The transform's :meth:`~EquivariantTransform.inverse_shape`."""
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The transform's :meth:`~EquivariantTransform.forward_shape`."""
        return self.transform.forward_shape(shape)

    @property
    def inv(self) -> EquivariantTransform:
        """The transform itself."""
        return self.transform

    def with_cache(self, cache_size: int = 1) -> EquivariantTransform:
        """The inverse of the transform with another cache size."""
        cached = self.transform.with_cache(cache_size)
        return self if cached is self.transform else Inverse(cached)
