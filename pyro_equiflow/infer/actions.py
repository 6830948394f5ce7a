# SPDX-License-Identifier: Apache-2.0
"""How a symmetry group acts on a model's latent values, site by site and on all of them in packing order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from escnn import gspaces
from escnn.group import trivial_group
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow.distributions.orbit import Orbit, check_orthogonal, orbit_of
from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.events import act
from pyro_equiflow.ops.representations import validate_field_type

__all__ = [
    "Numbered",
    "Representations",
    "block_diagonal",
    "field_norms",
    "latent_field_type",
    "latent_orbit",
    "moved",
    "site_actions",
    "trivial_type",
    "validate_representations",
]

Representations: TypeAlias = Mapping[str, FieldType | Tensor | np.ndarray]
"""How one group acts on latent sites: field types, or the matrices of all elements of a finite group."""


def validate_representations(representations: Representations) -> dict[str, Any]:
    """What is declared, with matrices in float64.

    :raises TypeError: not a mapping, or values that are neither field types nor matrices.
    :raises ValueError: nothing in it, a base space, unlike gspaces, or matrices of unlike number or of no group.
    """
    expected = "a dict of latent site names and escnn field types (or the matrices of a finite group)"
    check_instance("representations", representations, Mapping, expected)
    if not representations:
        raise ValueError(
            "representations: expected a field type for one latent site at least, found none; a guide without a "
            "symmetry is pyro.infer.autoguide.AutoNormalizingFlow"
        )
    for name in representations:
        check_instance("representations", name, str, "names of latent sites")
    given = [isinstance(value, (Tensor, np.ndarray, list, tuple)) for value in representations.values()]
    if any(given):
        if any(isinstance(value, FieldType) for value in representations.values()):
            raise ValueError(
                "representations: expected field types for all sites or matrices for all, found both; write the field "
                "types' matrices down, one per element in the order of the others"
            )
        return _validate_matrices(representations)
    first: str = ""
    gspace: Any = None
    for name, field_type in dict[str, Any](representations).items():
        check_instance("representations", field_type, FieldType, expected)
        validate_field_type(field_type, f"representations[{name!r}]")
        if field_type.gspace.dimensionality:
            raise ValueError(
                f"representations[{name!r}]: expected a field type without a base space, found one over "
                f"{field_type.gspace}; build it with escnn.gspaces.no_base_space(group), for the flattened value"
            )
        if gspace is None:
            first, gspace = name, field_type.gspace
        elif field_type.gspace != gspace:
            raise ValueError(
                f"representations: expected field types of one gspace, found {gspace} for {first!r} and "
                f"{field_type.gspace} for {name!r}; one group acts on the whole latent at once"
            )
    return dict(representations)


def _validate_matrices(representations: Representations) -> dict[str, Any]:
    """The matrices by site, in float64."""
    found = {name: check_orthogonal(value, f"representations[{name!r}]") for name, value in representations.items()}
    if len({len(matrices) for matrices in found.values()}) > 1:
        numbers = {name: len(matrices) for name, matrices in found.items()}
        raise ValueError(
            f"representations: expected one matrix of every site for each element of the group, found {numbers}; one "
            "group acts on the whole latent at once"
        )
    orbit_of(block_diagonal(list(found.values())), "representations")  # raises where they are no group
    return found


def block_diagonal(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks of matrices beside each other on the diagonal, ``(number, C, C)``."""
    size = sum(m.shape[-1] for m in matrices)
    found, start = np.zeros((len(matrices[0]), size, size)), 0
    for block in matrices:
        stop = start + block.shape[-1]
        found[:, start:stop, start:stop] = block
        start = stop
    return found


def site_actions(representations: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """How the group acts on each latent site: as declared, or trivially.

    :param representations: field types or matrices by site, as :func:`validate_representations` gives them.
    :param shapes: the shape of each site's unconstrained value.
    :raises ValueError: a site unknown to the model, or a size that is not the value's.
    """
    unknown = [name for name in representations if name not in shapes]
    if unknown:
        raise ValueError(
            f"representations: expected names of the model's continuous latent sites {sorted(shapes)}, found "
            f"{unknown[0]!r}"
        )
    first = next(iter(representations.values()))
    actions = {}
    for name, shape in shapes.items():
        action, number = representations.get(name), shape.numel()
        if action is None and isinstance(first, FieldType):
            action = FieldType(first.gspace, number * [first.gspace.trivial_repr])
        elif action is None:
            action = np.tile(np.eye(number), (len(first), 1, 1))
        size = action.size if isinstance(action, FieldType) else action.shape[-1]
        if size != number:
            raise ValueError(
                f"representations[{name!r}]: expected a field type of size {number} for an unconstrained value "
                f"of shape {tuple(shape)}, found size {size}; it acts on the flattened value, so a "
                "representation is repeated for each row of a plate"
            )
        actions[name] = action
    return actions


def latent_field_type(representations: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> FieldType:
    """The field type of all latent values, flattened and joined in the order of ``shapes``.

    Of matrices that of the trivial group.

    :param representations: how the group acts by latent site; sites left out are invariant.
    :param shapes: the shape of each site's unconstrained value, in packing order.
    :raises ValueError: as for the parts: an unknown site, a size that is not the value's.
    """
    actions = list(site_actions(representations, shapes).values())
    if isinstance(actions[0], FieldType):
        return FieldType(actions[0].gspace, [r for action in actions for r in action.representations])
    return trivial_type(sum(action.shape[-1] for action in actions))


def trivial_type(size: int) -> FieldType:
    """Coordinates that no symmetry ties together."""
    space = gspaces.no_base_space(trivial_group())
    return FieldType(space, size * [space.trivial_repr])


def latent_orbit(representations: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Orbit:
    """How a finite group moves all latent values.

    :raises ValueError: as :func:`latent_field_type`, or an infinite group.
    """
    actions = list(site_actions(representations, shapes).values())
    if isinstance(actions[0], FieldType):
        return orbit_of(latent_field_type(representations, shapes), "representations")
    return Orbit(block_diagonal(actions))


class Numbered(NamedTuple):
    """An element of a group given by matrices: its place among them, or the inverse of the one there."""

    number: int
    inverted: bool = False

    def __invert__(self) -> Numbered:
        return Numbered(self.number, not self.inverted)

    def __str__(self) -> str:
        return f"of matrix {self.number}"


def moved(actions: Mapping[str, Any], element: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of all sites, those that the group acts on moved by one element."""
    found = dict(values)
    for name, action in actions.items():
        flat = values[name].reshape(-1)
        if isinstance(action, FieldType):
            flat = act(action, element, flat)
        else:
            matrix = torch.tensor(action[element.number], dtype=flat.dtype, device=flat.device)
            flat = (matrix.mT if element.inverted else matrix) @ flat
        found[name] = flat.reshape(values[name].shape)
    return found


def field_norms(action: FieldType | np.ndarray, value: Tensor) -> Tensor:
    """At each entry the norm of its field; matrices may mix all entries."""
    if not isinstance(action, FieldType):
        return value.norm().expand(value.shape)
    sizes = torch.tensor([r.size for r in action.representations], device=value.device)
    field = torch.repeat_interleave(torch.arange(len(sizes), device=value.device), sizes)
    squares = value.new_zeros(len(sizes)).index_add(0, field, value.reshape(-1).square())
    return squares.sqrt()[field].reshape(value.shape)
