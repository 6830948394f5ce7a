# SPDX-License-Identifier: Apache-2.0
"""Any guide of Pyro's, averaged over a finite group."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.infer.autoguide.initialization import init_to_feasible

from pyro_equiflow.distributions.orbit import check_finite_group
from pyro_equiflow.infer.actions import Representations, latent_orbit
from pyro_equiflow.infer.averaged_guide import AveragedGuide
from pyro_equiflow.ops.arguments import check_instance

__all__ = ["AutoOrbitMixture"]


class AutoOrbitMixture(AveragedGuide):
    r"""The exact average of one of Pyro's automatic guides over a finite group.

    .. math:: \bar q(u) = \frac{1}{|H|} \sum_{h \in H} q(h^{-1} \cdot u)

    A posterior that :math:`H` leaves unchanged has modes that :math:`H` exchanges (relabelled components of a mixture,
    signs of factors). ``AutoNormal`` or ``AutoMultivariateNormal`` settle on one of them; their average has all, and
    an ELBO higher by up to :math:`\log |H|`. Training is that of the guide itself, at its cost: with gradients in
    training mode a draw is scored by the :math:`q(u)` it comes from; with ``torch.no_grad()`` or in ``eval()`` mode by
    :math:`\bar q`. Draws are always those of the average. For a guide that commutes with continuous groups as well
    see :class:`AutoEquivariantFlow`, which averages by itself.

    Example::

        >>> import itertools, torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> from pyro_equiflow import AutoOrbitMixture
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        ...     parts = dist.Normal(mu[..., None, :], 0.5)
        ...     pyro.factor("y", (parts.log_prob(y[:, None]).logsumexp(-1)).sum(-1))
        >>> y = torch.tensor([-2.0, -1.8, 0.1, 0.3, 2.2, 2.5])
        >>> relabelled = torch.eye(3)[torch.tensor(list(itertools.permutations(range(3))))]
        >>> guide = AutoOrbitMixture(AutoMultivariateNormal(model), {"mu": relabelled})
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        >>> loss = svi.step(y)
        >>> guide.get_posterior().log_prob(torch.zeros(3)).shape
        torch.Size([])

    :param guide: an ``AutoNormal``, or any of Pyro's guides of the joined unconstrained values
        (``AutoMultivariateNormal``, ``AutoLowRankMultivariateNormal``, ``AutoIAFNormal``, …), trained or not.
    :param representations: how the finite group acts by latent site, on flattened unconstrained values: field types
        without a base space, or the orthogonal matrices of all elements (:func:`~pyro_equiflow.matrix_group`), in one
        order for all sites. Sites left out are invariant.
    :param check_invariance: whether the symmetry of the model is checked on the first call.
    :param num_quantile_samples: draws behind :meth:`median` and :meth:`quantiles`.
    :raises TypeError: a guide or representations of another kind.
    :raises ValueError: an infinite group; on the first call unknown sites and sizes that do not fit.
    :raises EquivarianceError: on the first call, where the model lacks the symmetry.
    """

    def __init__(
        self,
        guide: AutoContinuous | AutoNormal,
        representations: Representations,
        *,
        check_invariance: bool = True,
        num_quantile_samples: int = 10_000,
    ) -> None:
        expected = "an AutoNormal or a guide of Pyro's on the joined unconstrained values, as AutoMultivariateNormal"
        check_instance("guide", guide, (AutoContinuous, AutoNormal), expected)
        super().__init__(
            guide.model,
            representations,
            init_loc_fn=init_to_feasible,
            check_invariance=check_invariance,
            num_quantile_samples=num_quantile_samples,
        )
        for kind in self.representations.values():
            if isinstance(kind, FieldType):
                check_finite_group(kind, "representations")
        # Not as an attribute of a PyroModule: that would rename the guide's parameters, which may be trained.
        self._modules["guide"] = guide

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self.guide.prototype_trace is None:
            with pyro.poutine.block():
                self.guide(*args, **kwargs)
        super()._setup_prototype(*args, **kwargs)

    def _set_up(self) -> None:
        self.orbit = latent_orbit(self.representations, self._unconstrained_shapes)

    def _get_unaveraged(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        self._require_set_up()
        guide: Any = self.guide
        with guide._pyro_context:  # parameters are those of the guide's own call
            if isinstance(guide, AutoContinuous):
                return guide.get_posterior(*args, **kwargs)
            pairs = [guide._get_loc_and_scale(name) for name in self._unconstrained_shapes]
        loc, scale = (torch.cat([value.reshape(-1) for value in values]) for values in zip(*pairs))
        return dist.Normal(loc, scale).to_event(1)
