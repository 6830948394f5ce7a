# SPDX-License-Identifier: Apache-2.0
"""An automatic guide that is invariant under a declared symmetry of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import ComposeTransformModule
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_equiflow.distributions import OrbitMixture
from pyro_equiflow.distributions.augmented import AugmentedDistribution, augment
from pyro_equiflow.distributions.orbit import Orbit
from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.infer.actions import Representations, latent_field_type, latent_orbit, validate_representations
from pyro_equiflow.infer.averaged_guide import AveragedGuide
from pyro_equiflow.infer.cosets import split_symmetry
from pyro_equiflow.infer.diagnostics import largest_change
from pyro_equiflow.infer.latents import preserved_random_state
from pyro_equiflow.infer.param_store import take_stored_parameters
from pyro_equiflow.infer.starts import default_flow, flow_kind, location_and_scale
from pyro_equiflow.ops.arguments import check_choice, check_instance, check_integer, check_number
from pyro_equiflow.ops.data_parallel import refuse_within_data_parallel
from pyro_equiflow.ops.events import act
from pyro_equiflow.ops.representations import probe_elements
from pyro_equiflow.transforms import Compose, EquivariantTransform

__all__ = ["AutoEquivariantFlow"]

_ROUNDING = 1e-6  # nats, in float64
_INIT_ROWS = 1024  # base draws that set data-dependent layers


class AutoEquivariantFlow(AveragedGuide):
    r"""A normalizing-flow guide that keeps a symmetry of the model exactly, the best known setting by default.

    A compact group :math:`G` is its connected part :math:`G_0` and finitely many cosets :math:`h_i G_0`: SO(2) and a
    reflection for O(2), the trivial group and all elements for a finite one. The flow :math:`T` commutes with
    :math:`G_0`, and the guide is the average over the cosets,

    .. math:: q(u) = N\bigl(T^{-1}(u); 0, I\bigr) \left|\det \frac{\partial T^{-1}}{\partial u}\right|, \qquad
              T(g \cdot \epsilon) = g \cdot T(\epsilon) \;\; (g \in G_0), \qquad
              \bar q(u) = \frac{1}{m} \sum_{i=1}^m q(h_i^{-1} \cdot u) = \bar q(g \cdot u) \;\; (g \in G),

    with :math:`u` the unconstrained latent values, flattened and joined in the order of the model's sites. So where
    the posterior is invariant the guide is, by construction and at every step of training. A flow that commuted with
    the cosets too would have to stretch one mode, a base's, over all modes that they exchange, and it would leave the
    origin of moving coordinates where it is; averaged, it learns one mode and has them all. Training pays for no
    average: with gradients, in training mode, a draw is scored by the :math:`q` it comes from, which gives the ELBO of
    :math:`q`, a lower bound of that of :math:`\bar q`. With ``torch.no_grad()`` (as of ``SVI.evaluate_loss`` and
    :func:`importance_weights`) and in ``eval()`` mode scores are those of :math:`\bar q`; draws always are. Further
    finite groups are averaged over by :meth:`average_over`, any guide of Pyro's by :class:`AutoOrbitMixture`.

    The flow ends with a learned scale per irrep and a shift of what :math:`G_0` leaves unchanged. It starts at the
    location of ``init_loc_fn`` with ``init_scale`` as the standard deviation; coordinates that :math:`G_0` moves, which
    can have no location, start at the size of their initial values, or ``init_scale`` where that is larger. Where
    ``init_loc_fn`` gives a point that the finite rest leaves in place (zeros, equal components), which is as near to
    one of the modes as to another, what it moves starts at a draw from the prior instead.

    A latent that cannot be split (a single vector under SO(3), say) takes residual steps by default, or couplings with
    ``auxiliary`` fields :math:`e` beside it: the flow then acts on :math:`u \oplus e`, and so does the guide's site.
    With :math:`r = N(0, I)` as the target of :math:`e` the ELBO stays a lower bound, importance weights a consistent
    estimate of the evidence:

    .. math:: E_q\bigl[\log p(u, y) + \log r(e) - \log q(u, e)\bigr] \le E_q\bigl[\log p(u, y) - \log q(u)\bigr]
              \le \log p(y).

    The first gap is the mean of :math:`KL(q(e \mid u) \,\|\, r(e))`. :meth:`get_posterior` is then an
    :class:`~pyro_equiflow.AugmentedDistribution`, and ``NeuTraReparam`` needs the auxiliary values as a normal site of
    the model instead.

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
        *unconstrained* value; sites left out are invariant (trivial fields). Or, of a finite group, the orthogonal
        matrices of all elements (:func:`~pyro_equiflow.matrix_group`), in one order for all sites.
    :param flow: a callable that gives the transform for the field type of what is built in, :attr:`flow_type` (any
        :class:`~torch.distributions.Transform` module that commutes with its group); by default four couplings of
        splines, :func:`~pyro_equiflow.equivariant_flow`, with linear maps between them.
        It is moved to the dtype and device of the latent values. Data-dependent layers are set by draws of the base.
    :param built_in: what the flow commutes with: ``"connected"``, the connected part of the group, or ``"all"`` of it,
        with no average. A group of more than 128 cosets is built in.
    :param auxiliary: how the group acts on auxiliary fields, or a number of invariant ones, see
        :func:`~pyro_equiflow.augment`; the flow is then built for ``augment(latent_type, auxiliary)``.
    :param init_loc_fn: Pyro's per-site initialisation: the location of invariant coordinates, the size of moving ones.
    :param init_scale: the standard deviation that invariant coordinates start with.
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
        representations: Representations,
        flow: Callable[[FieldType], Transform] | None = None,
        *,
        built_in: str = "connected",
        auxiliary: FieldType | int | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        check_invariance: bool = True,
        num_quantile_samples: int = 10_000,
    ) -> None:
        check_instance("model", model, Callable, "a Pyro model")
        first = next(iter(validate_representations(representations).values()))
        if flow is not None and (not callable(flow) or isinstance(flow, Transform)):
            raise TypeError(
                "flow: expected a callable from the latent's field type to a transform, found "
                f"{type(flow).__name__}; for one that is built already pass lambda field_type: transform"
            )
        check_choice("built_in", built_in, ("connected", "all"))
        if built_in == "all" and not isinstance(first, FieldType):
            raise ValueError(
                "built_in: expected 'connected' with matrices, which are averaged over, found 'all'; "
                "declare field types"
            )
        init_scale = check_number("init_scale", init_scale, "(0, inf)")
        if isinstance(auxiliary, FieldType) and not isinstance(first, FieldType):
            raise TypeError(f"auxiliary: expected a number beside matrices, found the field type {auxiliary}")
        if isinstance(first, FieldType) and auxiliary is not None:
            augment(first, auxiliary)  # raises now what it would on the first call
        elif auxiliary is not None:
            auxiliary = check_integer("auxiliary", auxiliary, 1, also="None")
        super().__init__(
            model,
            representations,
            init_loc_fn=init_loc_fn,
            check_invariance=check_invariance,
            num_quantile_samples=num_quantile_samples,
        )
        self.built_in = built_in
        self.auxiliary = auxiliary
        self.init_scale = init_scale
        #: How the group acts on the whole latent.
        self.field_type: FieldType | None = None
        #: How the part of it acts that the flow commutes with, on the latent and the auxiliary fields.
        self.flow_type: FieldType | None = None
        self.transform: Transform | None = None
        self._flow = flow

    # ---- set-up -----------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        refuse_within_data_parallel(type(self).__name__)
        super()._setup_prototype(*args, **kwargs)

    def _set_up(self) -> None:
        self.field_type = latent_field_type(self.representations, self._unconstrained_shapes)
        self.flow_type, self.orbit = self._split_symmetry(self._with_auxiliary(self.field_type))
        self.transform = self._build(self.flow_type)

    def _with_auxiliary(self, field_type: FieldType) -> FieldType:
        return field_type if self.auxiliary is None else augment(field_type, self.auxiliary)

    def _split_symmetry(self, joint_type: FieldType) -> tuple[FieldType, Orbit | None]:
        """What the flow commutes with, and what its distribution is averaged over."""
        if isinstance(next(iter(self.representations.values())), FieldType):
            return split_symmetry(joint_type, self.built_in)
        return joint_type, self._extended(latent_orbit(self.representations, self._unconstrained_shapes))

    def _num_auxiliary(self) -> int:
        field_type: Any = self.field_type
        return self._with_auxiliary(field_type).size - self.latent_dim

    def _build(self, field_type: FieldType) -> Transform:
        flow = partial(default_flow if self._flow is None else self._flow, field_type)
        transform = flow()
        if not isinstance(transform, Transform):
            raise TypeError(f"flow: expected a callable that gives a transform, found {type(transform).__name__}")
        if transform.domain.event_dim != 1 or transform.codomain.event_dim != 1:
            raise ValueError(
                "flow: expected a transform of vectors, event_dim 1, found one of event_dim "
                f"{transform.domain.event_dim}"
            )
        if not isinstance(transform, torch.nn.Module):
            return transform
        latent = self._init_loc()
        transform.to(dtype=latent.dtype, device=latent.device)
        # One or a few particles a step say nothing of a layer's scale: base draws set it, once and for all.
        with preserved_random_state(), torch.no_grad():
            transform(torch.randn(_INIT_ROWS, field_type.size, dtype=latent.dtype, device=latent.device))
        last = location_and_scale(field_type, latent, self.init_scale, self.orbit, self._prior_draw())
        last = last.to(dtype=latent.dtype, device=latent.device)
        plain: Any = transform  # mypy takes no Transform that is a Module for an EquivariantTransform
        if isinstance(plain, EquivariantTransform):
            return Compose([plain, last])
        return ComposeTransformModule([plain, last])

    def _prior_draw(self) -> Tensor:
        """Unconstrained values of all sites, drawn from the distributions of the first trace."""
        trace: Any = self.prototype_trace
        with torch.no_grad():
            sites = [site["fn"] for _, site in trace.iter_stochastic_nodes()]
            return torch.cat([biject_to(fn.support).inv(fn.sample()).reshape(-1) for fn in sites])

    def _check_average(self, orbit: Orbit) -> None:
        flow_type: Any = self.flow_type
        if flow_type.fibergroup.order() == 1:
            return
        # Any flow that commutes with the group would do; this guide's own may stand at its start, where it is nothing.
        with preserved_random_state(), torch.no_grad():
            torch.manual_seed(0)
            options: dict[str, Any] = {
                "num_transforms": 2,
                "hidden_dims": (16,),
                "identity_init": False,
                "actnorm": False,
            }
            flow = equivariant_flow(flow_type, kind=flow_kind(flow_type), **options).double().eval()
            base = dist.Normal(torch.zeros(flow_type.size, dtype=torch.float64), 1.0).to_event(1)
            average = OrbitMixture(dist.TransformedDistribution(base, [flow]), orbit)
            moves = [partial(act, flow_type, g) for g in probe_elements(flow_type.fibergroup)]
            worst = largest_change(average, moves, 20)
        if worst > _ROUNDING:
            raise ValueError(
                f"representations: expected a group that maps {flow_type.fibergroup}, which the flow commutes with, to "
                f"itself, found one whose average changes under it by {worst:.2g} nats; declare a group that holds "
                "both in the constructor, or a smaller one there"
            )

    # ---- Pyro's contract --------------------------------------------------------------------------------------

    def get_base_dist(self) -> TorchDistribution:
        """The standard normal on the latent (and the auxiliary fields), in the flow's dtype and on its device."""
        self._require_set_up()
        flow_type: Any = self.flow_type
        like, size = self._like(), flow_type.size
        return dist.Normal(like.new_zeros(1), like.new_ones(1)).expand([size]).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The flow, from the base to the unconstrained latent values (followed by the auxiliary fields).

        It commutes with the group's connected part; the guide's distribution is an average over the rest.
        """
        self._require_set_up()
        if self._pyro_context.active and not pyro.settings.get("module_local_params"):
            module = self._modules.get("transform")
            if module is not None:
                take_stored_parameters(self._pyro_get_fullname("transform"), module, type(self).__name__)
        transform: Any = self.transform
        return transform

    def _get_unaveraged(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        return dist.TransformedDistribution(self.get_base_dist(), self.get_transform(*args, **kwargs))

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The guide's distribution of the unconstrained latent values: the flow's, averaged over the finite rest.

        With auxiliary fields it draws exactly, bounds the log-density, and has their joint as ``.joint``.
        """
        joint = super().get_posterior(*args, **kwargs)
        return joint if self.auxiliary is None else AugmentedDistribution(joint, self.field_type)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the latent at the guide's auxiliary site; auxiliary fields with it, weighed by their target."""
        joint = self._sample_joint(*args, **kwargs)
        if self.auxiliary is None:
            return joint
        latent, fields = joint.split([self.latent_dim, joint.shape[-1] - self.latent_dim], -1)
        # The model has no site for r(e), so it is taken off the guide; a factor would warn outside of inference.
        log_target = dist.Normal(fields.new_zeros(()), 1.0).log_prob(fields).sum(-1)
        target = dist.Delta(fields, log_density=-log_target, event_dim=1)
        pyro.sample(f"_{self._pyro_name}_auxiliary", target, infer={"is_auxiliary": True})
        return latent

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        if latent.shape[-1] != self.latent_dim:
            raise ValueError(
                f"{type(self).__name__}: expected {self.latent_dim} latent values, found {latent.shape[-1]}, with "
                "auxiliary fields; NeuTraReparam leaves out their density: in place of auxiliary= add a normal "
                "site to the model, pyro.sample(name, dist.Normal(torch.zeros(n), 1.0).to_event(1))"
            )
        return super()._unpack_latent(latent)

    def __getstate__(self) -> dict[str, Any]:
        # The transform's callable is not needed once the flow is built, and is often a lambda.
        state = super().__getstate__()
        return state if self.transform is None else {**state, "_flow": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoEquivariantFlow:
        memo[id(self._flow)] = self._flow
        clone = super().__deepcopy__(memo)
        clone.__dict__["_flow"] = self._flow
        return clone
