# SPDX-License-Identifier: Apache-2.0
"""The common class of all transforms: shapes, checks, the cache, and the way back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from escnn.nn import FieldType
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyro_equiflow.ops.architecture import decode, described, differences, encode
from pyro_equiflow.ops.arguments import check_integer
from pyro_equiflow.ops.events import check_event, event_dim
from pyro_equiflow.ops.fingerprint import Fingerprint
from pyro_equiflow.ops.representations import validate_field_type, validate_over
from pyro_equiflow.ops.serialization import forget_param_store
from pyro_equiflow.ops.support import real_events
from pyro_equiflow.ops.tracing import full_precision, is_traced
from pyro_equiflow.transforms.precision import PrecisionWatch

__all__ = ["Deferred", "EquivariantTransform", "check_finite"]

_DESCRIPTION = "_extra_state"  # torch's name for what get_extra_state() gives
_NAMED = 5  # how many rows that are not finite an error names

Deferred = Callable[[], Tensor]


class _Entry(NamedTuple):
    """One pass: its ends, the forward log-det, which of the two ends was the product, and what it was made of."""

    x: Tensor
    y: Tensor
    ladj: Tensor | Deferred
    product: Tensor
    grad_enabled: bool
    made_of: Fingerprint


class EquivariantTransform(TransformModule):
    r"""A bijection of events that commutes with a symmetry group, :math:`T(g \cdot x) = g \cdot T(x)`.

    Events are plain tensors ``(*batch, C, *spatial)`` with ``C = field_type.size``. A subclass gives two hooks,
    each a map and the log-determinant of that same map's Jacobian:

    - ``_call_and_ladj(x) -> (y, log|det dy/dx|)``,
    - ``_inverse_and_ladj(y) -> (x, log|det dx/dy|)``.

    Everything else that Pyro and torch expect of a transform is here.

    **Cache.** With ``cache_size=1`` the last pass is kept, and answers questions about the tensor that this object
    itself produced: sampling and then scoring the same draw calls no inverse. A tensor given by the user is never
    looked up, and a change of anything that the pass was made of forgets it: parameters and buffers (optimizer steps,
    in-place edits, loading, exchange for others), settings and modes of any part, the pass's own tensors. Edits through
    ``parameter.data`` in place leave no trace: after them score a copy of the draw. With ``cache_size=0`` a call is the
    map alone, no log-det is found: so for a layer of some other network, a classifier say.

    **Mode.** Copies by :meth:`with_cache` and those that a conditional transform gives are this module for another
    caller: they share its parts, its parameters and its mode, whichever of them ``train()`` or ``eval()`` is called on.

    **Checkpoints.** ``state_dict()`` tells of each transform what it computes besides its parameters: classes, splits,
    orders, functions, bounds. ``load_state_dict`` compares before anything of the transform is loaded; with
    ``strict=False`` it does not (inside another module: leave out the keys that end in ``_extra_state``).

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
        self._entry: _Entry | None = None
        self._inverse_ref: weakref.ref | None = None
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
        return event_dim(self.field_type)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real events."""
        return real_events(self.event_dim)

    codomain = domain

    @full_precision
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""The image of ``x`` and the log-determinant, in one pass.

        :param x: shape ``(*batch, C, *spatial)``.
        :return: ``y`` of the shape that :meth:`forward_shape` says, and :math:`\log|\det \partial y / \partial x|` of
            shape ``batch``.
        :raises TypeError: ``x`` is not a floating tensor of the parameters' dtype and device.
        :raises ValueError: wrong shape, or (with Pyro's validation on) values that are not finite.
        """
        entry = self._entry
        if entry is not None and entry.product is entry.x is x and self._answers(entry):
            return entry.y, self._ladj(entry)
        self._check(x)
        y, ladj = self._call_and_ladj(x)
        y = y.contiguous()  # inside, channels may be outermost in memory
        self._watch(self, self._call, x, y)
        self._remember(x, y, ladj, product=y)
        return y, ladj

    @full_precision
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""The preimage of ``y`` and the log-determinant of the inverse map, in one pass.

        :param y: shape ``(*batch, C, *spatial)``.
        :return: ``x`` of the shape that :meth:`inverse_shape` says, and :math:`\log|\det \partial x / \partial y|` of
            shape ``batch``.
        :raises TypeError: as for :meth:`call_and_ladj`.
        :raises ValueError: as for :meth:`call_and_ladj`.
        """
        entry = self._entry
        if entry is not None and entry.product is entry.y is y and self._answers(entry):
            return entry.x, -self._ladj(entry)
        self._check(y, self.out_type)
        x, ladj = self._inverse_and_ladj(y)
        x = x.contiguous()
        self._inverse_watch(self, self._inverse, y, x)
        self._remember(x, y, -ladj, product=x)
        return x, ladj

    @full_precision
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`\log|\det \partial y / \partial x|` of shape ``batch``."""
        entry = self._entry
        if entry is not None and entry.x is x and entry.y is y and self._answers(entry):
            return self._ladj(entry)
        self._check(x)
        return self._log_det(x, y)

    @full_precision
    def __call__(self, x: Tensor) -> Tensor:
        """The image of ``x``, shape ``(*batch, C, *spatial)``."""
        entry = self._entry
        if self._scores_at_once() or (entry is not None and entry.product is x):
            return self.call_and_ladj(x)[0]
        self._check(x)
        y, ladj = self._call_deferred(x)
        y = y.contiguous()
        self._watch(self, self._call, x, y)
        self._remember(x, y, ladj, product=y)
        return y

    def _scores_at_once(self) -> bool:
        # A draw that nobody scores needs no log-det, nor does a pass that nobody remembers.
        return self._cache_size > 0 and torch.is_grad_enabled() and not is_traced()

    def _call(self, x: Tensor) -> Tensor:
        return self._call_deferred(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inverse_deferred(y)[0]

    @full_precision
    def _inv_call(self, y: Tensor) -> Tensor:
        entry = self._entry
        if self._scores_at_once() or (entry is not None and entry.product is y):
            return self.inverse_and_ladj(y)[0]
        self._check(y, self.out_type)
        x, ladj = self._inverse_deferred(y)
        x = x.contiguous()
        self._inverse_watch(self, self._inverse, y, x)
        self._remember(x, y, lambda: -ladj(), product=x)
        return x

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
        inverse = None if self._inverse_ref is None else self._inverse_ref()
        if inverse is None:
            from pyro_equiflow.transforms.inverse import Inverse  # which builds on this class

            inverse = Inverse(self)
        return inverse

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the image of a tensor of this shape: the same, unless a transform says otherwise.

        :raises ValueError: the shape holds no event of this transform.
        """
        return self._checked_shape(shape, self.field_type)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the preimage of a tensor of this shape: the same, unless a transform says otherwise.

        :raises ValueError: the shape holds no image of this transform.
        """
        return self._checked_shape(shape, self.out_type)

    def _checked_shape(self, shape: torch.Size, field_type: FieldType) -> torch.Size:
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

    # ---- checks and cache -------------------------------------------------------------------------------------

    def _check(self, x: Tensor, field_type: FieldType | None = None) -> None:
        parameter = next(self.parameters(), None)
        dtype, device = (None, None) if parameter is None else (parameter.dtype, parameter.device)
        check_event(x, field_type or self.field_type, type(self).__name__, dtype, device)
        check_finite(x, self.event_dim, type(self).__name__)

    def _sources(self) -> tuple[Tensor, ...]:
        """Tensors that a pass is made of besides its ends, parameters and buffers."""
        return ()

    def _fingerprint(self, x: Tensor, y: Tensor) -> Fingerprint:
        return Fingerprint(self, (x, y, *self._sources()), ("_entry", "_inverse_ref"))

    def _ladj(self, entry: _Entry) -> Tensor:
        if isinstance(entry.ladj, Tensor):
            return entry.ladj
        ladj = entry.ladj()
        self._entry = entry._replace(ladj=ladj)
        return ladj

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor | Deferred, product: Tensor) -> None:
        self._entry = None
        # Tensors of inference mode have no version, those of torch.func no storage: nothing would show a change.
        if not self._cache_size or is_traced():
            return
        made_of = self._fingerprint(x, y)
        if not made_of.has_inference_tensors:
            self._entry = _Entry(x, y, ladj, product, torch.is_grad_enabled(), made_of)

    def _answers(self, entry: _Entry) -> bool:
        """Whether a pass still holds; one that does not is forgotten."""
        if self._fingerprint(entry.x, entry.y) != entry.made_of:
            self._entry = None
            return False
        # A pass made without a graph cannot answer where gradients are wanted.
        return entry.grad_enabled or not torch.is_grad_enabled()

    # ---- copies and checkpoints -------------------------------------------------------------------------------

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self._entry = None
        return super()._apply(fn, *args, **kwargs)

    def __copy__(self) -> EquivariantTransform:
        # Shares everything but the cache; what __getstate__ takes off before pickling stays on.
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__, _entry=None, _inverse_ref=None, _inv=None)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return {**self.__dict__, "_entry": None, "_inverse_ref": None, "_inv": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _architecture(self) -> dict[str, Any]:
        """What decides, besides the parameters, which map this is: by path of each part its class and settings."""
        found = described(self, EquivariantTransform)
        for name in ("tolerance", "max_steps", "on_failure"):  # how closely a map is computed, not which
            found[""].pop(name, None)
        return found

    def get_extra_state(self) -> Tensor:
        """What the transform computes besides its parameters, as bytes of JSON."""
        return encode(self._architecture())

    def set_extra_state(self, state: Any) -> None:
        """Nothing: what a checkpoint says of the transform is compared before anything is loaded."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a checkpoint of a transform that computes something else is refused, unless not ``strict``.

        :raises ValueError: another architecture; nothing is loaded then.
        """
        if not strict:
            state_dict = {name: value for name, value in state_dict.items() if not name.endswith(_DESCRIPTION)}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._check_architecture(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_architecture(self, state_dict: dict[str, Any], prefix: str) -> None:
        lines = []
        for name, part in self.named_modules(prefix=prefix.removesuffix(".")):
            if isinstance(part, EquivariantTransform):
                at = f"{name}." if name else ""
                saved = decode(state_dict.get(at + _DESCRIPTION))
                if saved is not None:
                    own = decode(part.get_extra_state()) or {}
                    lines += [f"{at}{line}" for line in differences(own, saved)]
        if lines:
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ValueError(
                f"{type(self).__name__}: expected the checkpoint of a transform that computes the same from its "
                f"parameters, found another architecture: {'; '.join(lines[:5])}{more}. Build the transform as the one "
                "that was saved, or load all the same with load_state_dict(..., strict=False)"
            )


def check_finite(x: Tensor, dimensions: int, owner: str) -> None:
    if not pyro.settings.get("validate_distributions_torch") or is_traced(x):
        return
    # The sum is finite only if every term is, and costs a tenth of looking at each.
    if torch.isfinite(x.detach().sum()):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).flatten(x.dim() - dimensions).any(-1)
        rows = [tuple(row) if len(row) > 1 else row[0] for row in bad.nonzero().tolist() if row]
        where = f" (at {', '.join(map(str, rows[:_NAMED]))}{', ...' * (len(rows) > _NAMED)})" if rows else ""
        raise ValueError(
            f"{owner}: expected finite values, found NaN or infinity in {int(bad.sum())} of {bad.numel()} samples"
            f"{where}; an earlier step diverged (try a smaller learning rate) or the data are not clean"
        )
