# SPDX-License-Identifier: Apache-2.0
"""Guides that are averaged over a finite group: what they share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from torch import Tensor

from pyro_equiflow.distributions import OrbitMixture
from pyro_equiflow.distributions.orbit import Orbit, Turn
from pyro_equiflow.errors import EquivarianceError, PrecisionWarning
from pyro_equiflow.infer.actions import Representations, block_diagonal, latent_orbit, validate_representations
from pyro_equiflow.infer.invariance import InvarianceReport, check_model_invariance
from pyro_equiflow.infer.latents import refuse_subsampled_latents
from pyro_equiflow.infer.quantiles import constrained_quantiles
from pyro_equiflow.infer.supports import kept_inside
from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer, check_number
from pyro_equiflow.ops.serialization import forget_param_store
from pyro_equiflow.ops.warning import warn_caller

__all__ = ["AveragedGuide"]


class AveragedGuide(AutoContinuous):
    r"""A guide that is the exact average of some distribution over a finite group, :math:`\bar q`.

    .. math:: \bar q(u) = \frac{1}{|H|} \sum_{h \in H} q(h^{-1} \cdot u)

    Draws are always those of the average. While gradients are wanted in training mode a draw :math:`h \cdot u` is
    scored by the :math:`q(u)` it comes from, without a sum: for a model that the group leaves unchanged that is the
    ELBO of :math:`q`, a lower bound of the average's. Everything else (``torch.no_grad()``, as of
    ``SVI.evaluate_loss`` and :func:`importance_weights`, and ``eval()``) scores by :math:`\bar q` itself.

    A subclass gives :math:`q` by ``_get_unaveraged``, and sets ``orbit`` in ``_set_up``.
    """

    orbit: Orbit | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        representations: Representations,
        *,
        init_loc_fn: Callable[..., Any],
        check_invariance: bool,
        num_quantile_samples: int,
    ) -> None:
        representations = validate_representations(representations)
        check_instance("init_loc_fn", init_loc_fn, Callable, "a function of sites, as Pyro's init_to_median")
        check_invariance = check_flag("check_invariance", check_invariance)
        num_quantile_samples = check_integer("num_quantile_samples", num_quantile_samples, 1)
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.representations = representations
        self.check_invariance = check_invariance
        self.num_quantile_samples = num_quantile_samples
        #: Of the check on the first call.
        self.invariance_report: InvarianceReport | None = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            refuse_subsampled_latents(self.prototype_trace)
            self.invariance_report = self._check_model(self.representations, args, kwargs)
            self._set_up()
        except Exception:
            self.prototype_trace = None  # so that the next call sets up anew instead of going on half-made
            raise

    def _set_up(self) -> None:
        """What follows from the first trace of the model."""
        raise NotImplementedError

    def _get_unaveraged(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        raise NotImplementedError

    def _require_set_up(self) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                f"{type(self).__name__}: expected a guide that was called before, found a fresh one that is "
                "not built; call guide(*args) with the model's arguments once"
            )

    def _check_model(
        self, representations: Representations, args: tuple, kwargs: dict[str, Any]
    ) -> InvarianceReport | None:
        if not self.check_invariance:
            return None
        report = check_model_invariance(self.model, representations, *args, **kwargs)
        if not report.invariant:
            raise EquivarianceError(
                f"the model does not have the declared symmetry. Sites that change: {', '.join(report.offenders)}.\n"
                f"{report}\nDeclare another group or other representations (they act on unconstrained values), or "
                "pass check_invariance=False"
            )
        return report

    # ---- Pyro's contract --------------------------------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The guide's distribution of the unconstrained latent values: the average."""
        unaveraged = self._get_unaveraged(*args, **kwargs)
        return unaveraged if self.orbit is None else OrbitMixture(unaveraged, self.orbit)

    def _sample_joint(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw of the average at the guide's auxiliary site, scored as the class says."""
        name, unaveraged = f"_{self._pyro_name}_latent", self._get_unaveraged(*args, **kwargs)
        if self.orbit is None:
            return pyro.sample(name, unaveraged, infer={"is_auxiliary": True})
        if not self._trains():
            return pyro.sample(name, OrbitMixture(unaveraged, self.orbit), infer={"is_auxiliary": True})
        # Of log-density 0 and without a score: a draw's element, which a replayed trace keeps.
        zero = self._like().new_zeros(())
        place = pyro.sample(f"{name}_element", dist.Uniform(zero, zero + 1), infer={"is_auxiliary": True})
        which = (place * len(self.orbit)).long().clamp(max=len(self.orbit) - 1)
        turned = dist.TransformedDistribution(unaveraged, [Turn(self.orbit, which)])
        return pyro.sample(name, turned, infer={"is_auxiliary": True})

    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of what is drawn."""
        parameter = next(self.parameters(), None)
        return self._init_loc() if parameter is None else parameter

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the latent values at the guide's auxiliary site."""
        return self._sample_joint(*args, **kwargs)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for site, unconstrained in super()._unpack_latent(latent):
            kept = kept_inside(unconstrained, site["fn"].support)
            if kept is not unconstrained and not self._trains():
                warn_caller(
                    f"{type(self).__name__}: draws of {site['name']!r} reach beyond the numbers of {kept.dtype} in "
                    "its support; they stand at the last of these and are scored where they were. Train on, or take "
                    "float64",
                    PrecisionWarning,
                )
            yield site, kept

    def _trains(self) -> bool:
        """Whether scores are for gradients."""
        return self.training and torch.is_grad_enabled()

    def average_over(self, representations: Representations, *args: Any, **kwargs: Any) -> None:
        r"""From now on the guide is the exact average over a finite group more.

        Modes that a group maps onto each other are hard for a continuous map; it learns one of them. Where the
        posterior is invariant under :math:`H`, the average never lowers the ELBO, and adds up to :math:`\log |H|`. It
        can come before training or after; a density costs :math:`|H|` of the distribution averaged.

        Where what is averaged is invariant under a group that :math:`H` normalises (rotations and a reflection, say),
        the average is invariant under both. One that would not be, since :math:`H` does not normalise what the flow
        commutes with, is refused.

        :param representations: of a finite group by latent site: field types without a base space, or the orthogonal
            matrices of all elements (:func:`~pyro_equiflow.matrix_group`), in one order for all sites; acting on the
            flattened unconstrained value. Sites left out are invariant.
        :param args: the model's arguments, for the check of the symmetry.
        :param kwargs: the model's keyword arguments.
        :raises TypeError: representations of another kind.
        :raises ValueError: a guide that was not called before, an infinite group, unknown sites, sizes that do not fit,
            a group that breaks what the guide has built in.
        :raises EquivarianceError: the model lacks the symmetry (unless ``check_invariance=False``).
        """
        self._require_set_up()
        representations = validate_representations(representations)
        orbit = latent_orbit(representations, self._unconstrained_shapes)
        self._check_model(representations, args, kwargs)
        orbit = self._extended(orbit)
        orbit = orbit if self.orbit is None else orbit * self.orbit
        self._check_average(orbit)
        self.orbit = orbit

    def _check_average(self, orbit: Orbit) -> None:
        """Raises where an average over an orbit would lose what the guide has built in."""

    def _num_auxiliary(self) -> int:
        """How many auxiliary fields the unaveraged distribution has after the latent values."""
        return 0

    def _extended(self, orbit: Orbit) -> Orbit:
        """The same group, which leaves auxiliary fields as they are: their target is invariant under any action."""
        if not self._num_auxiliary():
            return orbit
        still = np.tile(np.eye(self._num_auxiliary()), (len(orbit), 1, 1))
        return Orbit(block_diagonal([orbit.matrices, still]))

    # ---- saving ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module, once the guide was called.

        :raises ValueError: the guide was not called before.
        """
        self._require_set_up()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """The matrices of what is averaged over, which :meth:`average_over` may have added to: part of the density."""
        return torch.zeros(0) if self.orbit is None else torch.from_numpy(self.orbit.matrices.copy())

    def set_extra_state(self, state: Tensor) -> None:
        """Averages over what the saved guide did."""
        if not len(state):
            self.orbit = None
        elif self.orbit is None or not np.array_equal(self.orbit.matrices, state.numpy()):
            self.orbit = Orbit(state.cpu().numpy())

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own clears the guide's model; only what is written down goes without it.
        forget_param_store(self)
        return {**self.__dict__, "_model": None, "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        models = [(name, guide._model) for name, guide in self.named_modules() if isinstance(guide, AutoGuide)]
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for name, model in models:  # one of Pyro's within lost its own when it was copied
            for guide in (self, clone):
                guide.get_submodule(name).__dict__["_model"] = model
        return clone

    # ---- summaries --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent value, by Monte Carlo: :meth:`quantiles` at one half.

        Of a value that the group moves it says little: an invariant guide's lies at the centre of the orbits.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent value, by Monte Carlo.

        Of ``num_quantile_samples`` draws (10 000 unless given to the constructor; random numbers are Pyro's, so
        :func:`pyro.set_rng_seed` repeats them). The standard error of the median is about 1.25 % of a standard
        deviation, that of the 5 % and 95 % quantiles about 2 %. Values of a site whose support is not a product of
        intervals (a simplex, say) are the images of unconstrained quantiles, and so in the support.

        :param quantiles: numbers between 0 and 1.
        :return: by site, shape ``(len(quantiles), *shape)``.
        :raises ValueError: numbers outside 0 to 1, or a guide that was not called before.
        """
        self._require_set_up()
        if not isinstance(quantiles, Tensor):
            for quantile in check_instance(
                "quantiles", quantiles, (list, tuple, np.ndarray), "numbers between 0 and 1"
            ):
                check_number("quantiles", quantile, "[0, 1]")
        latents = self.get_posterior(*args, **kwargs).sample((self.num_quantile_samples,))
        levels = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device).reshape(-1)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles: expected numbers between 0 and 1, found {levels.tolist()}")
        return {
            site["name"]: constrained_quantiles(unconstrained, levels, site["fn"].support)
            for site, unconstrained in self._sites_of(latents)
        }

    def _sites_of(self, latents: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Sites and unconstrained values, samples in front of the site's own shape."""
        position = 0
        trace: Any = self.prototype_trace
        for name, site in trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            part = latents[..., position : position + shape.numel()]
            yield site, part.reshape(*latents.shape[:-1], *shape)
            position += shape.numel()
