# SPDX-License-Identifier: Apache-2.0
"""An automatic guide that is invariant under a declared symmetry of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.params.param_store import param_with_module_name
from torch import Tensor
from torch.distributions import Transform

from pyro_equiflow.distributions import OrbitMixture
from pyro_equiflow.distributions.augmented import AugmentedDistribution, augment
from pyro_equiflow.errors import EquivarianceError
from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.infer.invariance import InvarianceReport, check_model_invariance
from pyro_equiflow.infer.latents import (
    latent_field_type,
    preserved_random_state,
    refuse_subsampled_latents,
    validate_representations,
)
from pyro_equiflow.infer.quantiles import constrained_quantiles
from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer, check_number
from pyro_equiflow.ops.data_parallel import refuse_within_data_parallel
from pyro_equiflow.ops.serialization import forget_param_store

__all__ = ["AutoEquivariantFlow"]

_INIT_ROWS = 1024  # base draws that set data-dependent layers


class AutoEquivariantFlow(AutoContinuous):
    r"""A normalizing-flow guide that keeps a symmetry of the model exactly.

    .. math:: q(u) = N\bigl(T^{-1}(u); 0, I\bigr) \left|\det \frac{\partial T^{-1}}{\partial u}\right|, \qquad
              T(g \cdot \epsilon) = g \cdot T(\epsilon) \;\Rightarrow\; q(g \cdot u) = q(u),

    with :math:`u` the unconstrained latent values, flattened and joined in the order of the model's sites. Where the
    posterior is invariant, so is the guide, by construction and at every step of training.

    A latent that cannot be split (a single vector, say) takes couplings with ``auxiliary`` fields :math:`e` beside it:
    the flow then acts on :math:`u \oplus e`, and so does the guide's site. With :math:`r = N(0, I)` as the target of
    :math:`e` the ELBO stays a lower bound, importance weights a consistent estimate of the evidence:

    .. math:: E_q\bigl[\log p(u, y) + \log r(e) - \log q(u, e)\bigr] \le E_q\bigl[\log p(u, y) - \log q(u)\bigr]
              \le \log p(y).

    The first gap is the mean of :math:`KL(q(e \mid u) \,\|\, r(e))`. :meth:`get_posterior` is then an
    :class:`~pyro_equiflow.AugmentedDistribution`, and ``NeuTraReparam`` needs the auxiliary values as a normal site of
    the model instead. Where :math:`\log q(u)` itself is asked for, prefer a flow of ``kind="residual"`` or
    ``"implicit"``, which takes any latent at dearer steps.

    On its first call the guide runs the model, checks the declared symmetry against the model's log joint
    (:func:`check_model_invariance`) and builds the flow; parameters exist from then on. Call a fresh guide once before
    a ``state_dict`` is loaded into it or ``DistributedDataParallel`` wraps it. As with Pyro's own guides, values that
    Pyro's parameter store holds under the guide's names (after ``ParamStoreDict.load``, or left by an earlier guide)
    are taken over; start another fit with :func:`pyro.clear_param_store`.

    ``deepcopy`` works; ``pickle`` and ``torch.save`` write the guide without its model, as with Pyro's own: what is
    read back draws and scores latent values.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_equiflow.infer import AutoEquivariantFlow
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        ...     pyro.sample("y", dist.Normal(torch.pdist(z) if z.dim() == 2 else z.norm(dim=-1), 0.1).to_event(1),
        ...                 obs=torch.tensor([1.0, 1.0, 1.5]))
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> guide = AutoEquivariantFlow(model, {"z": enn.FieldType(space, 3 * [space.irrep(1, 1)])})
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO(num_particles=4))
        >>> loss = svi.step()
        >>> guide.median()["z"].shape
        torch.Size([3, 2])

    :param model: a Pyro model of continuous latent sites and static structure.
    :param representations: field types by latent site, without a base space and of one group, acting on the flattened
        *unconstrained* value; sites left out are invariant (trivial fields).
    :param flow: a callable that gives the transform for the latent's field type (any
        :class:`~torch.distributions.Transform` module that commutes with the group); by default
        :func:`~pyro_equiflow.equivariant_flow`.
        It is moved to the dtype and device of the latent values. Data-dependent layers are set by draws of the base.
    :param auxiliary: how the group acts on auxiliary fields, or a number of invariant ones, see
        :func:`~pyro_equiflow.augment`; the flow is then built for ``augment(latent_type, auxiliary)``.
    :param init_loc_fn: Pyro's per-site initialisation, used to find the sites' shapes only.
    :param check_invariance: whether the symmetry is checked on the first call.
    :param num_quantile_samples: draws behind :meth:`median` and :meth:`quantiles`.
    :raises TypeError: ``representations``, ``flow`` or ``auxiliary`` of another kind.
    :raises ValueError: field types over a base space or of unlike groups; on the first call also sites unknown to the
        model, sizes that do not fit, and latent sites in a subsampled plate, whose rows change with every step.
    :raises EquivarianceError: on the first call, where the model lacks the symmetry; the sites are named.

    References: Köhler, Klein and Noé, *Equivariant flows: exact likelihood generative learning for symmetric
    densities* (arXiv 2006.02425), theorem 1; Kucukelbir et al., *Automatic differentiation variational inference*
    (arXiv 1603.00788); Huang, Dinh and Courville, *Augmented Normalizing Flows* (arXiv 2002.07101).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        representations: Mapping[str, FieldType],
        flow: Callable[[FieldType], Transform] | None = None,
        *,
        auxiliary: FieldType | int | None = None,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        check_invariance: bool = True,
        num_quantile_samples: int = 10_000,
    ) -> None:
        check_instance("model", model, Callable, "a Pyro model")
        validate_representations(representations)
        if flow is not None and (not callable(flow) or isinstance(flow, Transform)):
            raise TypeError(
                "flow: expected a callable from the latent's field type to a transform, found "
                f"{type(flow).__name__}; for one that is built already pass lambda field_type: transform"
            )
        num_quantile_samples = check_integer("num_quantile_samples", num_quantile_samples, 1)
        check_invariance = check_flag("check_invariance", check_invariance)
        check_instance("init_loc_fn", init_loc_fn, Callable, "a function of sites, as Pyro's init_to_feasible")
        if auxiliary is not None:
            augment(next(iter(representations.values())), auxiliary)  # raises now what it would on the first call
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.representations = dict(representations)
        self.auxiliary = auxiliary
        self.check_invariance = check_invariance
        self.num_quantile_samples = num_quantile_samples
        #: Of the check on the first call.
        self.invariance_report: InvarianceReport | None = None
        #: How the group acts on the whole latent.
        self.field_type: FieldType | None = None
        #: How the finite group of :meth:`average_over` acts on it.
        self.average_type: FieldType | None = None
        self.transform: Transform | None = None
        self._flow = flow

    # ---- set-up -----------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        refuse_within_data_parallel(type(self).__name__)
        super()._setup_prototype(*args, **kwargs)
        try:
            refuse_subsampled_latents(self.prototype_trace)
            self.field_type = latent_field_type(self.representations, self._unconstrained_shapes)
            if self.check_invariance:
                self.invariance_report = self._check_model(self.representations, args, kwargs)
            self.transform = self._build(self._with_auxiliary(self.field_type))
        except Exception:
            self.prototype_trace = None  # so that the next call sets up anew instead of going on half-made
            raise

    def _check_model(
        self, representations: Mapping[str, FieldType], args: tuple, kwargs: dict[str, Any]
    ) -> InvarianceReport:
        report = check_model_invariance(self.model, representations, *args, **kwargs)
        if not report.invariant:
            raise EquivarianceError(
                f"the model does not have the declared symmetry. Sites that change: {', '.join(report.offenders)}.\n"
                f"{report}\nDeclare another group or other representations (they act on unconstrained values), or "
                "pass check_invariance=False"
            )
        return report

    def _with_auxiliary(self, field_type: FieldType) -> FieldType:
        return field_type if self.auxiliary is None else augment(field_type, self.auxiliary)

    def _build(self, field_type: FieldType) -> Transform:
        flow = partial(equivariant_flow, field_type) if self._flow is None else partial(self._flow, field_type)
        transform = flow()
        if not isinstance(transform, Transform):
            raise TypeError(f"flow: expected a callable that gives a transform, found {type(transform).__name__}")
        if transform.domain.event_dim != 1 or transform.codomain.event_dim != 1:
            raise ValueError(
                "flow: expected a transform of vectors, event_dim 1, found one of event_dim "
                f"{transform.domain.event_dim}"
            )
        if isinstance(transform, torch.nn.Module):
            latent = self._init_loc()
            transform.to(dtype=latent.dtype, device=latent.device)
            # One or a few particles a step say nothing of a layer's scale: base draws set it, once and for all.
            with preserved_random_state(), torch.no_grad():
                rows = torch.randn(_INIT_ROWS, field_type.size, dtype=latent.dtype, device=latent.device)
                transform(rows)
        return transform

    def _require_set_up(self) -> Transform:
        transform = self.transform
        if transform is None:
            raise ValueError(
                f"{type(self).__name__}: expected a guide that was called before, found a fresh one whose flow is "
                "not built; call guide(*args) with the model's arguments once"
            )
        return transform

    # ---- Pyro's contract --------------------------------------------------------------------------------------

    def get_base_dist(self) -> TorchDistribution:
        """The standard normal on the latent (and the auxiliary fields), in the flow's dtype and on its device."""
        self._require_set_up()
        like = next(self.parameters(), None)
        like = self._init_loc() if like is None else like
        size = self._with_auxiliary(self.field_type).size
        return dist.Normal(like.new_zeros(1), like.new_ones(1)).expand([size]).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The flow, from the base to the unconstrained latent values (followed by the auxiliary fields)."""
        transform = self._require_set_up()
        if self._pyro_context.active and not pyro.settings.get("module_local_params"):
            self._take_stored_parameters()
        return transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The guide's distribution of the unconstrained latent values; after :meth:`average_over` the average.

        With auxiliary fields it draws exactly, bounds the log-density, and has their joint as ``.joint``.
        """
        joint = super().get_posterior(*args, **kwargs)
        if self.average_type is not None:
            # The finite group leaves the auxiliary fields as they are: their target is invariant under any action.
            fields = joint.event_shape[0] - self.latent_dim
            joint = OrbitMixture(joint, augment(self.average_type, fields) if fields else self.average_type)
        return joint if self.auxiliary is None else AugmentedDistribution(joint, self.field_type)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the latent at the guide's auxiliary site; auxiliary fields with it, weighed by their target."""
        if self.auxiliary is None:
            return super().sample_latent(*args, **kwargs)
        posterior, name = self.get_posterior(*args, **kwargs), f"_{self._pyro_name}"
        joint = pyro.sample(f"{name}_latent", posterior.joint, infer={"is_auxiliary": True})
        latent, fields = posterior.split(joint)
        # The model has no site for r(e), so it is taken off the guide; a factor would warn outside of inference.
        target = dist.Delta(fields, log_density=-posterior.auxiliary_log_prob(fields), event_dim=1)
        pyro.sample(f"{name}_auxiliary", target, infer={"is_auxiliary": True})
        return latent

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        if latent.shape[-1] != self.latent_dim:
            raise ValueError(
                f"{type(self).__name__}: expected {self.latent_dim} latent values, found {latent.shape[-1]}, with "
                "auxiliary fields; NeuTraReparam leaves out their density: in place of auxiliary= add a normal "
                "site to the model, pyro.sample(name, dist.Normal(torch.zeros(n), 1.0).to_event(1))"
            )
        return super()._unpack_latent(latent)

    def average_over(self, representations: Mapping[str, FieldType], *args: Any, **kwargs: Any) -> None:
        r"""From now on the guide is the exact average of the flow's distribution over a finite group as well.

        .. math:: \bar q(u) = \frac{1}{|H|} \sum_{h \in H} q(h^{-1} \cdot u)

        (:class:`~pyro_equiflow.OrbitMixture`). Modes that a group maps onto each other are hard for a flow, which is
        continuous; the flow then learns one of them. Where the posterior is invariant under :math:`H`, the average
        never lowers the ELBO, and adds up to :math:`\log |H|`. It can come before training or after; a density costs
        :math:`|H|` inverse passes, and trained on one mode the flow need not pay for them.

        Where the flow's group is normalised by :math:`H` (rotations and a reflection, say), the average is invariant
        under both. :meth:`get_transform` stays the flow itself.

        :param representations: field types of a finite group by latent site, as for the constructor.
        :param args: the model's arguments, for the check of the symmetry.
        :param kwargs: the model's keyword arguments.
        :raises ValueError: a guide that was not called before, an infinite group, and as for the constructor.
        :raises EquivarianceError: the model lacks the symmetry (unless ``check_invariance=False``).
        """
        self._require_set_up()
        validate_representations(representations)
        field_type = latent_field_type(representations, self._unconstrained_shapes)
        if field_type.fibergroup.order() < 1:
            raise ValueError(
                f"representations: expected a finite group to average over, found {field_type.fibergroup}; restrict "
                "the field types to a finite subgroup, or give the infinite one to the constructor"
            )
        if self.check_invariance:
            self._check_model(representations, args, kwargs)
        self.average_type = field_type

    def _take_stored_parameters(self) -> None:
        """Follows the parameter store where it holds other tensors under this guide's names, as PyroParams do."""
        transform = self._modules.get("transform")
        if transform is None:
            return
        store, name = pyro.get_param_store(), self._pyro_get_fullname("transform")
        keys = {param_with_module_name(name, key): value for key, value in transform.named_parameters()}
        first = next(iter(keys), None)
        if first is None or first not in store or store[first] is keys[first]:
            return  # the store holds all of a module's parameters or none
        for key, parameter in keys.items():
            if key in store and store[key].shape != parameter.shape:
                raise ValueError(
                    f"{type(self).__name__}: expected {key!r} of shape {tuple(parameter.shape)} in Pyro's parameter "
                    f"store, found {tuple(store[key].shape)}, of another guide; call pyro.clear_param_store() before "
                    "a new fit"
                )
        pyro.module(name, transform, update_module_params=True)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module, once the guide was called.

        :raises ValueError: the guide was not called before.
        """
        self._require_set_up()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own clears the guide's model; only what is written down goes without it. The transform's callable
        # is not needed once the flow is built, and is often a lambda.
        forget_param_store(self)
        state = {**self.__dict__, "_model": None, "master": None}
        return state if self.transform is None else {**state, "_flow": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoEquivariantFlow:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        state = {**self.__getstate__(), "_flow": None}
        clone.__setstate__(copy.deepcopy(state, memo))
        clone.__dict__["_model"] = self._model
        clone.__dict__["_flow"] = self._flow
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
