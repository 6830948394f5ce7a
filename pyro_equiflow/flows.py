# SPDX-License-Identifier: Apache-2.0
"""Whole flows: ready stacks of equivariant transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from escnn.nn import FieldType

from pyro_equiflow.maps.blocks import block_layout
from pyro_equiflow.nn import MaskedSteerableNet, lipschitz_net, steerable_net
from pyro_equiflow.ops.arguments import check_choice, check_flag, check_integer, check_keywords
from pyro_equiflow.ops.cells import check_cells
from pyro_equiflow.ops.events import check_event, check_sides, event_dim
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.transforms import (
    Compose,
    EquivariantImplicit,
    EquivariantResidual,
    EquivariantTransform,
    Inverse,
    MultiScale,
    equivariant_actnorm,
    equivariant_coupling,
    equivariant_iaf,
    equivariant_implicit,
    equivariant_linear,
    equivariant_residual,
    equivariant_squeeze,
)

__all__ = ["equivariant_flow", "image_flow"]


def _coupling(
    field_type: FieldType, index: int, split_by: str | None, *, rotate: bool = False, **kwargs: Any
) -> EquivariantTransform:
    """Couplings take turns: the first half of the channels conditions the second, then the reverse.

    Linear maps mix equal irreps only, so under one fixed split unlike fields of one half never condition each other.
    """
    rotate = check_flag("rotate", rotate)
    layout = block_layout(field_type, split_by, "equivariant_flow")
    first = layout.first_half(index // 2 if rotate else 0)
    split = first if index % 2 == 0 else [i for i in range(len(layout.blocks)) if i not in set(first)]
    return equivariant_coupling(field_type, split=split, split_by=split_by, **kwargs)


def _iaf(field_type: FieldType, index: int, split_by: str | None, **kwargs: Any) -> EquivariantTransform:
    """Every other step has the blocks in reverse order, so that each comes to depend on all."""
    order = range(len(block_layout(field_type, split_by, "equivariant_flow").blocks))
    return equivariant_iaf(field_type, order=order if index % 2 == 0 else order[::-1], split_by=split_by, **kwargs)


def _whole(factory: Callable[..., EquivariantTransform]) -> Callable[..., EquivariantTransform]:
    """A kind that transforms the whole event at every step."""

    def make(field_type: FieldType, index: int, split_by: str | None, **kwargs: Any) -> EquivariantTransform:
        if split_by is not None:
            raise ValueError(f"split_by: expected None where nothing is split, found {split_by!r}")
        return factory(field_type, **kwargs)

    return make


_KINDS: dict[str, Callable[..., EquivariantTransform]] = {
    "coupling": _coupling,
    "iaf": _iaf,
    "implicit": _whole(equivariant_implicit),
    "residual": _whole(equivariant_residual),
}


# Whose keywords a flow of a kind takes, and which of them it sets itself.
_TAKERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "coupling": (_coupling, equivariant_coupling, steerable_net),
    "iaf": (equivariant_iaf, MaskedSteerableNet),
    "implicit": (equivariant_implicit, lipschitz_net, EquivariantImplicit),
    "residual": (equivariant_residual, lipschitz_net, EquivariantResidual),
}
_SET = ("context_type", "order", "split", "zero_init")


def equivariant_flow(
    field_type: FieldType,
    latent_dim: int | None = None,
    *,
    kind: str = "coupling",
    num_transforms: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    linear: bool = True,
    actnorm: bool = True,
    split_by: str | None = None,
    **kwargs: Any,
) -> Compose:
    r"""A ready stack of equivariant transforms, one :class:`~pyro_equiflow.Compose`.

    Each of the ``num_transforms`` steps is an actnorm, a linear map over equal irreps, and a transform of the chosen
    kind. Steps start as the identity, so the flow starts at its base distribution.

    Works where Pyro wants a callable of the latent dimension::

        >>> from functools import partial
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro.infer.autoguide import AutoNormalizingFlow
        >>> from pyro_equiflow import equivariant_flow
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> flow = equivariant_flow(vectors, num_transforms=2)
        >>> init_transform_fn = partial(equivariant_flow, vectors, num_transforms=2)
        >>> guide = AutoNormalizingFlow(lambda: None, init_transform_fn)

    :param field_type: how the group acts on the event.
    :param latent_dim: the event's size, if the caller knows it: checked against ``field_type.size``.
    :param kind: ``"coupling"``, ``"iaf"``, ``"residual"`` or ``"implicit"``.
    :param num_transforms: number of steps.
    :param hidden_dims: channels of the conditioners' hidden layers.
    :param linear: whether each step has an :class:`~pyro_equiflow.EquivariantLinear`.
    :param actnorm: whether each step has an :class:`~pyro_equiflow.EquivariantActNorm`, set by the first batch.
    :param split_by: blocks to split or to order are ``"fields"`` or ``"irreps"``, see
        :class:`~pyro_equiflow.EquivariantCoupling`.
    :param kwargs: further keywords of the factory of the kind, such as ``log_scale_bound`` or ``kernel_size``; with
        ``kind="coupling"`` also ``rotate``, whether every two steps the halves begin one block later.
    :raises TypeError: an argument of another type, an unknown keyword.
    :raises ValueError: a latent dimension unlike the field type's size, an unknown kind, no step, a type that
        cannot be split.
    """
    validate_field_type(field_type)
    if latent_dim is not None and check_integer("latent_dim", latent_dim, 1, also="None") != field_type.size:
        raise ValueError(
            f"latent_dim: expected the size {field_type.size} of field_type {field_type}, found {latent_dim}; the "
            "field type has to list every latent value of the model, invariant ones as trivial fields"
        )
    check_choice("kind", kind, _KINDS)
    check_keywords(equivariant_flow, kwargs, *_TAKERS[kind], without=_SET)
    num_transforms = check_integer("num_transforms", num_transforms, 1)
    linear, actnorm = check_flag("linear", linear), check_flag("actnorm", actnorm)
    steps: list[EquivariantTransform] = []
    for index in range(num_transforms):
        if actnorm:
            steps.append(equivariant_actnorm(field_type))
        if linear:
            steps.append(equivariant_linear(field_type))
        steps.append(_KINDS[kind](field_type, index, split_by, hidden_dims=hidden_dims, **kwargs))
    return Compose(steps)


def image_flow(
    field_type: FieldType,
    shape: Sequence[int],
    *,
    kind: str = "coupling",
    levels: int = 2,
    num_transforms: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    haar: bool = True,
    kept: Sequence[int] | None = None,
    padding_mode: str = "zeros",
    **kwargs: Any,
) -> Inverse:
    r"""A multi-scale flow of images, from noise of the image's shape to images.

    Each level squeezes (:class:`~pyro_equiflow.EquivariantSqueeze`), runs the steps of :func:`equivariant_flow` with
    convolutional conditioners, lets up to half of the channels stop and hands the others to the next
    level (:class:`~pyro_equiflow.MultiScale`). One channel is enough: the first squeeze makes several fields of it.

    The levels run forwards from images to noise, so scoring images needs no solver with ``kind="residual"``, and one
    network pass a step with ``kind="iaf"`` (a masked autoregressive flow); what is returned is their inverse. Steps
    start as the identity. The halves of couplings begin one field later every two steps, so that in four steps the
    averages and differences over the cells of a gray image all condition each other.

    With an invariant base distribution the density is invariant under the group. With ``padding_mode="circular"``
    images are periodic, and the flow also commutes with translations by multiples of :math:`2^{\text{levels}}` pixels,
    which carry the cells of every squeeze to cells. Other translations mix cells, and are not symmetries.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow import LogitTransform, bits_per_dim, image_flow
        >>> space = gspaces.flipRot2dOnR2(4)
        >>> gray = enn.FieldType(space, [space.trivial_repr])
        >>> flow = image_flow(gray, (8, 8), num_transforms=1, hidden_dims=(16,))
        >>> noise = dist.Normal(torch.zeros(1, 8, 8), 1.0).to_event(3)
        >>> density = dist.TransformedDistribution(noise, [flow, LogitTransform().inv])
        >>> images = torch.randint(17, (5, 1, 8, 8))
        >>> bits_per_dim(density, images, num_levels=17).shape
        torch.Size([5])

    :param field_type: how the group acts on the channels of an image: trivial fields for gray values and colours.
    :param shape: side lengths ``(H, W)`` of the grid, each a multiple of :math:`2^{\text{levels}}`; equal where the
        group exchanges the axes.
    :param kind: ``"coupling"``, ``"iaf"``, ``"residual"`` or ``"implicit"``.
    :param levels: number of squeezes.
    :param num_transforms: number of steps a level.
    :param hidden_dims: channels of the conditioners' hidden layers.
    :param haar: whether a level works on averages and differences over cells, in place of pixels. Without, more
        than one level needs two fields after the squeeze.
    :param kept: indices of the first level's squeezed fields that go on, see :class:`~pyro_equiflow.MultiScale`.
    :param padding_mode: of the conditioners' convolutions, ``"zeros"`` or ``"circular"``.
    :param kwargs: further keywords of :func:`equivariant_flow`, such as ``linear`` or ``kernel_size``.
    :raises ValueError: an empty grid, one that does not fit the group or levels, a group that does not permute it;
        else as :func:`equivariant_flow` and :class:`~pyro_equiflow.MultiScale`.

    References: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803), section 3.6;
    Bose, Brubaker and Kobyzev, *Equivariant Finite Normalizing Flows* (arXiv 2110.08649).
    """
    validate_field_type(field_type)
    check_choice("kind", kind, _KINDS)
    check_keywords(image_flow, kwargs, equivariant_flow, *_TAKERS[kind], without=_SET)
    levels, haar = check_integer("levels", levels, 1), check_flag("haar", haar)
    check_cells(field_type)
    shape = check_sides(shape, event_dim(field_type) - 1, "shape")
    check_event(torch.empty(field_type.size, *shape, device="meta"), field_type, "shape")
    if any(side % 2**levels for side in shape):
        raise ValueError(
            f"shape: expected side lengths that are multiples of {2**levels} for {levels} levels, found {shape}; pad "
            "or crop the images, or take fewer levels"
        )
    options = {"num_transforms": num_transforms, "hidden_dims": hidden_dims, "padding_mode": padding_mode, **kwargs}
    if kind == "coupling":
        options = {"rotate": True, **options}
    return Inverse(_levels(field_type, levels, haar, kept, {"kind": kind, **options}))


def _levels(
    field_type: FieldType, levels: int, haar: bool, kept: Sequence[int] | None, options: dict[str, Any]
) -> MultiScale:
    deeper = None
    if levels > 1:
        deeper = _levels(MultiScale.types(field_type, haar=haar, kept=kept)[1], levels - 1, haar, None, options)
    transform = equivariant_flow(equivariant_squeeze(field_type, haar=haar).out_type, **options)
    return MultiScale(field_type, transform, deeper, haar=haar, kept=kept)
