# SPDX-License-Identifier: Apache-2.0
"""Exceptions and warnings of the package. Bad arguments raise plain ``ValueError`` or ``TypeError``."""

from __future__ import annotations

__all__ = ["ConvergenceError", "EquivarianceError", "EvidenceWarning", "PrecisionWarning"]


class ConvergenceError(RuntimeError):
    """An iteration ended short of its tolerance: the message says by how much, for how many, and what to change.

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import FixedPoint
        >>> FixedPoint().solve(lambda x, index: 0.9 * x + 1, torch.zeros(1, 1), lipschitz=0.9, max_steps=3)
        Traceback (most recent call last):
            ...
        pyro_equiflow.errors.ConvergenceError: 1 of 1 samples (first: 0) did not converge in 3 steps: ...
    """


class EquivarianceError(ValueError):
    """A declared symmetry does not hold: the message gives the error, the tolerance and where it is largest.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import AutoEquivariantFlow
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> AutoEquivariantFlow(model, {"z": enn.FieldType(space, [space.irrep(1)])})()
        Traceback (most recent call last):
            ...
        pyro_equiflow.errors.EquivarianceError: the model does not have the declared symmetry. Sites that change: z. ...
    """


class EvidenceWarning(RuntimeWarning):
    """Importance weights do not determine an evidence or its standard error: the message says why, and what to change.

    Example::

        >>> import torch, warnings
        >>> from pyro_equiflow import evidence_estimate
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     found = evidence_estimate(3 * torch.randn(1000))
        >>> print(caught[0].message)
        log_weights: expected a Pareto k-hat of at most 0.67 for 1000 weights, found ...
    """


class PrecisionWarning(RuntimeWarning):
    """Single precision does not determine a result: the message says for how many events, how far, and what to change.

    Example::

        >>> import torch, warnings
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import PrecisionWarning, equivariant_linear
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> steep = equivariant_linear(enn.FieldType(space, 2 * [space.trivial_repr]))
        >>> steep.weight.data = torch.tensor([0.0, 9.0, 9.0, 0.0])  # stretches by exp(9) and exp(-9)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     x = steep.inv(steep(torch.ones(1, 2)).detach().clone())
        >>> print(caught[0].message)
        EquivariantLinear: float32 does not determine the inverse to 0.0001 for 1 of 1 events: ...
    """
