# SPDX-License-Identifier: Apache-2.0
"""The common class of all transforms: shapes, checks, the cache, and the way back; a transform run backwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from escnn.nn import FieldType
from pyro.distributions import TransformModule
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance, check_integer
from pyro_equiflow.ops.events import check_event, event_dim
from pyro_equiflow.ops.representations import validate_field_type, validate_over
from pyro_equiflow.ops.serialization import forget_param_store
from pyro_equiflow.ops.support import real_events
from pyro_equiflow.ops.tracing import full_precision, is_traced
from pyro_equiflow.transforms.described import Described
from pyro_equiflow.transforms.memory import Deferred, Memory
from pyro_equiflow.transforms.precision import PrecisionWatch, check_finite

__all__ = ["Deferred", "EquivariantTransform", "Inverse"]


class EquivariantTransform(Described, TransformModule):
    r"""A bijection of events that commutes with a symmetry group, :math:`T(g \cdot x) = g \cdot T(x)`.

    Events are plain tensors ``(*batch, C, *spatial)`` with ``C = field_type.size``. A subclass gives two hooks,
    each a map and the log-determinant of that same map's Jacobian:

    - ``_call_and_ladj(x) -> (y, log|det dy/dx|)``,
    - ``_inverse_and_ladj(y) -> (x, log|det dx/dy|)``.

    Everything else that Pyro and torch expect of a transform is here; checkpoints say which map theirs is.

    **Cache.** With ``cache_size=1`` the last pass is kept, and answers questions about the tensor that this object
    itself produced: sampling and then scoring the same draw calls no inverse. A tensor given by the user is never
    looked up, and a change of anything that the pass was made of forgets it: parameters and buffers (optimizer steps,
    in-place edits, loading, exchange for others), settings and modes of any part, the pass's own tensors. Edits through
    ``parameter.data`` in place leave no trace: after them score a copy of the draw. With ``cache_size=0`` a call is the
    map alone, no log-det is found: so for a layer of some other network, a classifier say.

    **Mode.** Copies by :meth:`with_cache` and those that a conditional transform gives are this module for another
    caller: they share its parts, its parameters and its mode, whichever of them ``train()`` or ``eval()`` is called on.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import EquivariantTransform
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> class Double(EquivariantTransform):
        ...     def _call_and_ladj(self, x):
        ...         return 2 * x, x.new_full(x.shape[:-1], x.shape[-1] * torch.tensor(2.0).log())
        ...     def _inverse_and_ladj(self, y):
        ...         return y / 2, y.new_full(y.shape[:-1], -y.shape[-1] * torch.tensor(2.0).log())
        >>> Double(vectors).call_and_ladj(torch.ones(6))
        (tensor([2., 2., 2., 2., 2., 2.]), tensor(4.1589))

    :param field_type: how the group acts on the event.
    :param out_type: how it acts on the image, over the same base space; by default as on the event.
    :param cache_size: 0 or 1.
    """

    bijective = True
    field_type: FieldType
    out_type: FieldType
    _mode: list[bool]

    def __init__(self, field_type: FieldType, *, out_type: FieldType | None = None, cache_size: int = 1) -> None:
        validate_field_type(field_type)
        if out_type is not None:
            validate_over(field_type.gspace, out_type, "out_type")
        super().__init__(cache_size=check_integer("cache_size", cache_size, 0, 1))
        self.field_type = field_type
        self.out_type = field_type if out_type is None else out_type
        self._event_dim = event_dim(field_type)
        self.domain = self.codomain = real_events(self._event_dim)
        self._memory = Memory()
        self._watch, self._inverse_watch = PrecisionWatch("image"), PrecisionWatch("inverse")

    @property
    def training(self) -> bool:
        """The mode, one for this transform and all its copies that share parameters."""
        return self._mode[0]

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__.setdefault("_mode", [mode])[0] = mode

    # ---- hooks ------------------------------------------------------------------------------------------------

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _call_deferred(self, x: Tensor) -> tuple[Tensor, Deferred]:
        """The map, and a function that gives the log-det: for transforms whose log-det costs more than the map."""
        y, ladj = self._call_and_ladj(x)
        return y, lambda: ladj

    def _inverse_deferred(self, y: Tensor) -> tuple[Tensor, Deferred]:
        x, ladj = self._inverse_and_ladj(y)
        return x, lambda: ladj

    def _log_det(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-det with both ends given."""
        return self._call_and_ladj(x)[1]

    # ---- the public contract ----------------------------------------------------------------------------------

    @property
    def event_dim(self) -> int:
        """Dimensions of an event: 1 without a base space, 3 on images, 4 on volumes."""
        return self._event_dim

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""The image of ``x`` and the log-determinant, in one pass.

        :param x: shape ``(*batch, C, *spatial)``.
        :return: ``y`` of the shape that :meth:`forward_shape` says, and :math:`\log|\det \partial y / \partial x|` of
            shape ``batch``.
        :raises TypeError: ``x`` is not a floating tensor of the parameters' dtype and device.
        :raises ValueError: wrong shape, or (with Pyro's validation on) values that are not finite.
        """
        return self._pass(x, backwards=False, scored=True)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""The preimage of ``y`` and the log-determinant of the inverse map, in one pass.

        :param y: shape ``(*batch, C, *spatial)``.
        :return: ``x`` of the shape that :meth:`inverse_shape` says, and :math:`\log|\det \partial x / \partial y|` of
            shape ``batch``.
        :raises TypeError: as for :meth:`call_and_ladj`.
        :raises ValueError: as for :meth:`call_and_ladj`.
        """
        return self._pass(y, backwards=True, scored=True)

    def __call__(self, x: Tensor) -> Tensor:
        """The image of ``x``, shape ``(*batch, C, *spatial)``."""
        return self._pass(x, backwards=False, scored=False)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._pass(y, backwards=True, scored=False)[0]

    @full_precision
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`\log|\det \partial y / \partial x|` of shape ``batch``."""
        last = self._memory.recall(self, x, y)
        if last is not None:
            return last.log_det()
        self._check(x, self.field_type)
        return self._log_det(x, y)

    @full_precision
    def _pass(self, given: Tensor, *, backwards: bool, scored: bool) -> tuple[Tensor, Any]:
        """The other end, and where it is ``scored`` the log-det of the way there."""
        memory = self._memory
        last = memory.recall(self, None, given) if backwards else memory.recall(self, given, None)
        if last is not None:
            end = last.x if backwards else last.y
            return end, (-last.log_det() if backwards else last.log_det()) if scored else None
        seen = self._check(given, self.out_type if backwards else self.field_type)
        kept = seen and self._cache_size > 0
        # A draw that nobody scores needs no log-det, nor does a pass that nobody remembers.
        at_once = scored or (kept and torch.is_grad_enabled())
        ladj: Any
        if backwards:
            end, ladj = self._inverse_and_ladj(given) if at_once else self._inverse_deferred(given)
        else:
            end, ladj = self._call_and_ladj(given) if at_once else self._call_deferred(given)
        end = end.contiguous()  # inside, channels may be outermost in memory
        if seen:
            watch, function = (self._inverse_watch, self._inverse) if backwards else (self._watch, self._call)
            watch(self, function, given, end)
        memory.last = None
        if kept and backwards:
            memory.keep(self, end, given, -ladj if at_once else lambda: -ladj(), end)
        elif kept:
            memory.keep(self, given, end, ladj, end)
        return end, ladj

    def _call(self, x: Tensor) -> Tensor:
        return self._call_deferred(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inverse_deferred(y)[0]

    @property
    def sign(self) -> int:
        """Not defined: the sign of the slope of a map of the line.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.sign: expected a monotone map of the line, found a map of whole events, which has "
            "no sign; take log_abs_det_jacobian"
        )

    def __dir__(self) -> list[str]:
        # torch.jit asks a module for every name that is listed.
        return [name for name in super().__dir__() if name != "sign"]

    @property
    def inv(self) -> EquivariantTransform:
        """The inverse, an :class:`~pyro_equiflow.Inverse`: a module whose parameters are this transform's."""
        inverse = self._memory.inverse()
        return Inverse(self) if inverse is None else inverse

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the image of a tensor of this shape: the same, unless a transform says otherwise.

        :raises ValueError: the shape holds no event of this transform.
        """
        return self._joint_shape(shape, self.field_type)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the preimage of a tensor of this shape: the same, unless a transform says otherwise.

        :raises ValueError: the shape holds no image of this transform.
        """
        return self._joint_shape(shape, self.out_type)

    def _joint_shape(self, shape: torch.Size, field_type: FieldType) -> torch.Size:
        dimensions = self.event_dim
        if len(shape) < dimensions or shape[len(shape) - dimensions] != field_type.size:
            raise ValueError(
                f"{type(self).__name__}: expected a shape (*batch, {field_type.size}, *spatial) with "
                f"{dimensions - 1} spatial dimensions, found {tuple(shape)}"
            )
        return shape

    def with_cache(self, cache_size: int = 1) -> EquivariantTransform:
        """This transform with another cache size; parameters are shared."""
        if check_integer("cache_size", cache_size, 0, 1) == self._cache_size:
            return self
        clone = copy.copy(self)
        clone._cache_size = cache_size
        return clone

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = TransformModule.__hash__

    # ---- checks, cache and copies -----------------------------------------------------------------------------

    def _check(self, x: Tensor, field_type: FieldType) -> bool:
        """Raises unless ``x`` holds events of a type in the parameters' dtype; says whether its values can be seen."""
        parameter = next(self.parameters(), None)
        dtype, device = (None, None) if parameter is None else (parameter.dtype, parameter.device)
        check_event(x, field_type, type(self).__name__, dtype, device)
        # Tensors of torch.func and of recordings show no values and, having no storage, no change.
        seen = not is_traced(x)
        if seen:
            check_finite(x, self._event_dim, type(self).__name__)
        return seen

    def _sources(self) -> tuple[Tensor, ...]:
        """Tensors that a pass is made of besides its ends, parameters and buffers."""
        return ()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self._memory.last = None
        return super()._apply(fn, *args, **kwargs)

    def __copy__(self) -> EquivariantTransform:
        # Shares everything but the memory; what __getstate__ takes off before pickling stays on.
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__, _memory=Memory())
        return clone

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return super().__getstate__()


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
        # Not by the class above: every question for .inv makes one, for which nothing is to be checked or remembered.
        TransformModule.__init__(self)
        self.field_type, self.out_type = transform.out_type, transform.field_type
        self.domain, self.codomain, self._event_dim = transform.codomain, transform.domain, transform._event_dim
        self._memory = Memory()
        self.transform = transform
        transform._memory.offer(self)

    def _pass(self, given: Tensor, *, backwards: bool, scored: bool) -> tuple[Tensor, Any]:
        return self.transform._pass(given, backwards=not backwards, scored=scored)

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
