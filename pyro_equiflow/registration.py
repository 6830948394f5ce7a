# SPDX-License-Identifier: Apache-2.0
"""Makes the transforms known as ``pyro.distributions.transforms.…``."""

from __future__ import annotations

from pyro.distributions import transforms as pyro_transforms

from pyro_equiflow import transforms

__all__ = ["register"]


def register() -> None:
    """Adds our classes and factories to ``pyro.distributions.transforms``; twice is once.

    ``Compose``, ``Inverse`` and the abstract classes stay out: their names are too common for a shared place.

    :raises ValueError: a name is taken there by something else; nothing is added then.
    """
    names = [name for name in transforms.__all__ if "quivariant" in name and not name.endswith("Transform")]
    for name in names:
        present = getattr(pyro_transforms, name, None)
        if present is not None and present is not getattr(transforms, name):
            raise ValueError(
                f"pyro.distributions.transforms.{name} is taken by {present!r}; remove it before "
                "importing pyro_equiflow"
            )
    for name in names:
        setattr(pyro_transforms, name, getattr(transforms, name))
        if name not in pyro_transforms.__all__:
            pyro_transforms.__all__.append(name)
