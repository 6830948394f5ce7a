# SPDX-License-Identifier: Apache-2.0
"""How errors are measured, and how large they may be."""

from __future__ import annotations

import torch
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow.ops.arguments import check_number

__all__ = ["TOLERANCES", "check_tolerance", "relative_error", "require", "tolerance_of"]

TOLERANCES: dict[tuple[str, torch.dtype], float] = {
    ("equivariance", torch.float32): 1e-5,
    ("equivariance", torch.float64): 1e-12,
    ("equivariance on grids", torch.float32): 1e-5,
    ("equivariance on grids", torch.float64): 1e-9,
    ("inverse", torch.float32): 1e-5,
    ("inverse", torch.float64): 1e-11,
    ("log_det", torch.float32): 1e-4,
    ("log_det", torch.float64): 1e-10,
}


def check_tolerance(tolerance: float | None) -> None:
    """Raises unless a tolerance is a positive number, or ``None``."""
    if tolerance is not None:
        check_number("tolerance", tolerance, "(0, inf)", also="None")


def relative_error(difference: Tensor, reference: Tensor, dimensions: int) -> float:
    """The largest length of an event's difference over that of its reference."""
    norm = torch.linalg.vector_norm
    axes = tuple(range(-dimensions, 0))
    return float((norm(difference, dim=axes) / norm(reference, dim=axes).clamp_min(1e-30)).max())


def tolerance_of(
    property_name: str, dtype: torch.dtype, tolerance: float | None, field_type: FieldType | None = None
) -> float:
    """The tolerance given, or that of a property."""
    if tolerance is not None:
        return tolerance
    if property_name == "equivariance" and field_type is not None and field_type.gspace.dimensionality:
        property_name = "equivariance on grids"
    return TOLERANCES[property_name, dtype]


def require(name: str, error: float, tolerance: float, where: object = None) -> None:
    """Raises ``AssertionError`` where an error is above its tolerance, or no number."""
    if not error <= tolerance:
        at = "" if where is None else f" at the group element {where}"
        raise AssertionError(f"{name} error {error:.3e} is above the tolerance {tolerance:.1e}{at}")
