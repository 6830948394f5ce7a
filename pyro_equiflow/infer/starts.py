# SPDX-License-Identifier: Apache-2.0
"""The flow of a guide when nothing is said, and where it starts."""

from __future__ import annotations

import torch
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow.distributions.orbit import Orbit
from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.maps import Spline
from pyro_equiflow.ops.coordinates import IrrepCoordinates
from pyro_equiflow.ops.representations import IrrepDecomposition
from pyro_equiflow.transforms import EquivariantActNorm, EquivariantTransform, Inverse

__all__ = ["default_flow", "flow_kind", "location_and_scale"]


def flow_kind(field_type: FieldType) -> str:
    """Couplings where there is something to split; a single irrep takes residual steps."""
    return "coupling" if len(IrrepDecomposition(field_type).blocks) > 1 else "residual"


def default_flow(field_type: FieldType) -> EquivariantTransform:
    """Spline couplings; of a single irrep, which has nothing to split, residual steps."""
    if flow_kind(field_type) == "coupling":
        return equivariant_flow(field_type, num_transforms=4, transformer=Spline(log_scale_bound=0.5), actnorm=False)
    return equivariant_flow(field_type, kind="residual", num_transforms=6, actnorm=False)


def location_and_scale(
    field_type: FieldType, latent: Tensor, init_scale: float, orbit: Orbit | None, draw: Tensor
) -> Inverse:
    """A last layer, learned: a scale per irrep and a shift of what is invariant, from one point of the latent space.

    Invariant coordinates start at its values with ``init_scale``; irreps that the group moves, which have no location,
    at its lengths; auxiliary fields, which it has no values of, as the standard normals that are their target. What the
    orbit alone moves starts at ``draw`` where the point is one that it leaves in place: there all modes that it
    exchanges are equally near, and a fit would settle between them.
    """
    layer, coordinates = EquivariantActNorm(field_type, data_init=False), IrrepCoordinates(field_type)
    size, irreps = len(latent), coordinates.irreps
    point, auxiliary = torch.zeros(2, field_type.size, dtype=torch.float64)
    point[:size], auxiliary[size:] = latent, 1.0
    z = coordinates.coordinates(point)
    if orbit is not None:
        still = torch.from_numpy(orbit.matrices.mean(0))
        located = torch.zeros_like(point)
        located[coordinates.trivial] = 1.0
        moved, other = z - coordinates.coordinates(still @ point), torch.zeros_like(point)
        other[:size] = draw
        if (located * moved).square().sum() <= init_scale**2 * located.sum():
            z = z + located * coordinates.coordinates(other - still @ other)
    scales = (irreps.squares(z) / torch.as_tensor(irreps.repeats)).sqrt().clamp(min=init_scale)
    scales[coordinates.trivial_irreps] = init_scale
    scales[irreps.squares(coordinates.coordinates(auxiliary)) > 0] = 1.0
    with torch.no_grad():
        layer.log_scale.copy_(-scales.log())
        layer.loc.copy_(z[coordinates.trivial])
    return Inverse(layer)
