# SPDX-License-Identifier: Apache-2.0
"""The table of public callables: a call that works, and the sort of every argument.

Arguments have their sort by their name, :data:`SORTS`, unless the callable's own line says otherwise. A new callable is
one new line of :data:`LINES`, a new keyword one of :data:`SORTS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch
from escnn import group
from escnn import nn as enn
from escnn.group import Group, GroupElement
from matplotlib.figure import FigureBase
from pyro.infer.autoguide import AutoContinuous, AutoMultivariateNormal
from torch.distributions import Distribution, Transform

import pyro_equiflow as pe
from pyro_equiflow import logdet, nn, solvers
from tests.argument_names import (
    C4,
    CONTEXT,
    CONTRACTING,
    DENSITY,
    EVENTS,
    GRAY,
    HALF_TURNS,
    NETWORK,
    NORMAL,
    O2,
    OTHER_SPACE,
    REGULAR,
    SIDES,
    SORTS,
    TOLERANCE,
    TRANSFORM,
    TURNS,
    TYPE,
    VECTOR,
    VECTORS,
    WEIGHTS,
    X,
    coupling,
    guide,
    model,
    net,
)
from tests.argument_sorts import CALLABLE, FLAG, Sort, choice, instance, integer, integers, number

matplotlib.use("Agg")


@dataclass(frozen=True)
class Line:
    """A public callable.

    :ivar baseline: arguments of a call that works.
    :ivar sorts: those of arguments that mean something else here than by their name.
    :ivar through: callables whose keywords it takes as well.
    :ivar without: which of those it sets itself.
    :ivar named: how an error names an argument that it does not name as it is called.
    :ivar of: gives the callable, where it is a method.
    """

    baseline: Callable[[], dict[str, Any]]
    sorts: Mapping[str, Sort] = field(default_factory=dict)
    through: tuple[Callable[..., Any], ...] = ()
    without: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    of: Callable[[], Callable[..., Any]] | None = None


def line(*sorts: Mapping[str, Sort], through=(), without=(), named=(), of=None, **baseline: Any) -> Line:
    """A line whose baseline values may be functions without arguments, called when they are wanted."""
    lazy = {k: v for k, v in baseline.items() if isinstance(v, _Made)}
    made = functools.cache(lambda: {**baseline, **{k: v.make() for k, v in lazy.items()}})
    merged = {name: sort for group_ in sorts for name, sort in group_.items()}
    return Line(made, merged, tuple(through), tuple(without), dict(named), of)


@dataclass(frozen=True)
class _Made:
    make: Callable[[], Any]


_C = pe.EquivariantCoupling
_I = pe.EquivariantIAF
_NET = _Made(net)
_COUPLING_NET = _Made(lambda: nn.steerable_net(*_C.conditioner_types(VECTORS), hidden_dims=(8,)))
_CONTEXT_NET = _Made(lambda: nn.steerable_net(*_C.conditioner_types(VECTORS, context_type=CONTEXT), hidden_dims=(8,)))


def _masked(context_type=None) -> nn.MaskedSteerableNet:
    types = _I.conditioner_types(VECTORS, context_type=context_type)
    degrees = _I.conditioner_degrees(VECTORS, context_type=context_type)
    return nn.MaskedSteerableNet(*types, *degrees, hidden_dims=(8,))


_CONTEXTUAL = _Made(lambda: net(enn.FieldType(O2, [*VECTORS.representations, *CONTEXT.representations])))
_REQUIRED = {"context_type": OTHER_SPACE}
_OPTIONAL_TYPE = {"field_type": TYPE.or_none(), "out_type": TYPE.or_none()}
_MAPS = {"function": CALLABLE, **_OPTIONAL_TYPE}
_MASKED = {"conditioner": instance(nn.MaskedSteerableNet, net())}
_IMPLICIT_NAMES = {"conditioner_x": "conditioner", "conditioner_y": "conditioner"}
_DEGREES = integers(lambda v: len(v) == 4, 1, (1,), (1.0, 2, 3, 4), "abcd", numpy=(1, 2, 3, 4))
_SOLVED = {"tolerance": TOLERANCE.or_none()}
_OF_ANY = {"transform": instance(Transform)}
_NET_SET = ("hidden_dims", "zero_init")
_CERTIFIED = {
    "strict": FLAG.or_none(),
    "scale": instance(torch.Tensor, 1.0, torch.ones(99), torch.ones(99, 1)).or_none(),
}
_CALLED = {"lipschitz": number("[0, 1)", 0.5)}
_BATCH = instance(torch.Tensor, X.long(), X[0, 0], X.numpy())
_PHI = {"phi": CALLABLE, "x0": _BATCH, "value": _BATCH}
_TENSORS = Sort(lambda v: hasattr(v, "__iter__") and not isinstance(v, str | bytes | dict), ([1], (X, None), "", {}))
_BATCHED = Sort(lambda v: isinstance(v, list | tuple) and len(v) == 0, ([True, False], [1], "ab")).or_none()

_AX = _Made(lambda: plt.figure().subplots())
_ON_PLANE = {"field_type": TYPE.or_none().but(VECTORS)}
_SCORED = {"distribution": Sort(lambda v: callable(v) or isinstance(v, Distribution), ("normal",))}


def _half(x, *_):
    return 0.5 * x


def _augmented() -> pe.AugmentedDistribution:
    return pe.AugmentedDistribution(dist.Normal(torch.zeros(10), 1.0).to_event(1), VECTORS)


def _is_plane(value: Any) -> bool:
    return not isinstance(value, dict) and np.shape(value)[-1:] == (2,)


def _is_curve(value: Any) -> bool:
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return False
    return array.ndim in (1, 2) and array.size > 0


LINES: dict[str, Line] = {
    "AugmentedDistribution": line(joint=dist.Normal(torch.zeros(10), 1.0).to_event(1), field_type=VECTORS),
    "AutoEquivariantFlow": line(
        {"flow": CALLABLE.or_none().but(torch.distributions.ExpTransform()), "auxiliary": SORTS["auxiliary"].or_none()},
        model=model, representations={"z": VECTORS},
    ),
    "AutoOrbitMixture": line(
        {"guide": instance(AutoContinuous, model, pe.equivariant_linear(VECTORS))},
        guide=_Made(lambda: AutoMultivariateNormal(model)), representations={"z": TURNS},
    ),
    "Compose": line(transforms=_Made(lambda: [coupling()])),
    "ConditionalEquivariantCoupling": line(
        _REQUIRED, field_type=VECTORS, context_type=CONTEXT, conditioner=_CONTEXT_NET,
        through=[_C], without=["context_type"],
    ),
    "ConditionalEquivariantIAF": line(
        _REQUIRED, _MASKED, field_type=VECTORS, context_type=CONTEXT, conditioner=_Made(lambda: _masked(CONTEXT)),
        through=[_I], without=["context_type"],
    ),
    "ConditionalEquivariantImplicit": line(
        _REQUIRED, _SOLVED, field_type=VECTORS, context_type=CONTEXT, conditioner_x=_CONTEXTUAL,
        conditioner_y=_CONTEXTUAL, through=[pe.EquivariantImplicit], without=["context_type"], named=_IMPLICIT_NAMES,
    ),
    "ConditionalEquivariantResidual": line(
        _REQUIRED, _SOLVED, field_type=VECTORS, context_type=CONTEXT, conditioner=_CONTEXTUAL,
        through=[pe.EquivariantResidual], without=["context_type"],
    ),
    "ConditionalEquivariantTransform": line(
        _REQUIRED, transform=_Made(lambda: pe.conditional_equivariant_coupling(VECTORS, CONTEXT).transform),
        context_type=CONTEXT,
    ),
    "ConditionalEquivariantTransform.condition": line(
        of=lambda: pe.conditional_equivariant_coupling(VECTORS, CONTEXT).condition, context=torch.zeros(1),
        named={"context": "condition"},
    ),
    "Conditioner": line(network=_NET, in_type=VECTORS, out_type=VECTORS, named={"network": "conditioner"}),
    "EquivariantActNorm": line(field_type=VECTORS),
    "EquivariantCoupling": line(field_type=VECTORS, conditioner=_COUPLING_NET),
    "EquivariantCoupling.conditioner_types": line(of=lambda: _C.conditioner_types, field_type=VECTORS),
    "EquivariantIAF": line(_MASKED, field_type=VECTORS, conditioner=_Made(_masked)),
    "EquivariantIAF.conditioner_degrees": line(of=lambda: _I.conditioner_degrees, field_type=VECTORS),
    "EquivariantIAF.conditioner_types": line(of=lambda: _I.conditioner_types, field_type=VECTORS),
    "EquivariantImplicit": line(
        _SOLVED, field_type=VECTORS, conditioner_x=_NET, conditioner_y=_NET, named=_IMPLICIT_NAMES
    ),
    "EquivariantLinear": line(field_type=VECTORS),
    "EquivariantLinear.reset_parameters": line(of=lambda: pe.equivariant_linear(VECTORS).reset_parameters),
    "EquivariantResidual": line(_SOLVED, field_type=VECTORS, conditioner=_NET),
    "ContractionTransform.conditioner_types": line(
        of=lambda: pe.EquivariantResidual.conditioner_types, field_type=VECTORS
    ),
    "EquivariantSqueeze": line(field_type=GRAY),
    "EquivariantTransform": line({"out_type": TYPE.or_none()}, field_type=VECTORS),
    "EquivariantTransform.with_cache": line(of=lambda: coupling().with_cache),
    "Inverse": line(transform=_Made(coupling)),
    "Inverse.with_cache": line(of=lambda: coupling().inv.with_cache),
    "InvariantNormal": line(field_type=VECTORS),
    "LogitTransform": line(),
    "LogitTransform.with_cache": line(of=lambda: pe.LogitTransform().with_cache),
    "MeanFreePositions": line({"num_particles": integer(2, numpy=3)}, num_particles=3, dim=2),
    "MeanFreePositions.with_cache": line(of=lambda: pe.MeanFreePositions(3, 2).with_cache),
    "MultiScale": line(
        {"transform": TRANSFORM.but(coupling()), "kept": Sort(lambda v: v is None, ((0,), 1, "ab"))}, field_type=GRAY,
        transform=_Made(lambda: pe.equivariant_linear(pe.MultiScale.types(GRAY, haar=True)[0])), haar=True,
    ),
    "MultiScale.types": line(
        {"kept": integers(lambda v: False, 1, (0, 0), (9,), "ab").or_none()}, of=lambda: pe.MultiScale.types,
        field_type=GRAY, haar=True,
    ),
    "OrbitMixture": line(
        {"action": Sort(lambda v: False, ("ab", [[1.0]], 2 * torch.eye(2)[None]))},
        base=dist.Normal(torch.zeros(2), 1.0).to_event(1), action=VECTOR,
    ),
    "matrix_group": line(
        {"generators": Sort(lambda v: False, ("ab", [[1.0]], 2 * torch.eye(2)[None], None))},
        generators=-torch.eye(2)[None],
    ),
    "act": line({"x": instance(torch.Tensor, X[:, :5], X[0, 0], X.numpy())}, field_type=VECTORS,
                element=O2.fibergroup.identity, x=X),
    "align": line(
        {"draws": instance(torch.Tensor, X.long(), X[:0], X.numpy(), X * float("nan")),
         "reference": instance(torch.Tensor, X[:, 0], X[0].long()).or_none(),
         "action": Sort(lambda v: False, ("O(2)", ("S_8", 1), CONTEXT, GRAY, torch.ones(1, 8, 8), {"z": VECTORS}))},
        draws=X, reference=None, action="O(8)",
    ),
    "augment": line(field_type=VECTORS, auxiliary=2),
    "AugmentedDistribution.log_prob_bound": line(
        {"value": EVENTS}, of=lambda: _augmented().log_prob_bound, value=X
    ),
    "AveragedGuide.average_over": line(
        {"representations": SORTS["representations"].but({"z": VECTORS})},
        of=lambda: guide().average_over, representations={"z": enn.FieldType(C4, 4 * [C4.irrep(1)])},
    ),
    "TracePathGradient_ELBO": line(num_particles=2),
    "AveragedGuide.quantiles": line(
        {"quantiles": instance(list | tuple | torch.Tensor | np.ndarray, [2.0], [-0.1], "ab", [float("nan")], ["a"])},
        of=lambda: guide().quantiles, quantiles=[0.5],
    ),
    "bits_per_dim": line(density=dist.Uniform(torch.zeros(1, 4, 4), 1.0).to_event(3),
                         images=torch.zeros(2, 1, 4, 4, dtype=torch.long)),
    "check_model_invariance": line(
        {"tolerance": number("[0, inf)", 1e-3)}, model=model, representations={"z": VECTORS}
    ),
    "conditional_equivariant_coupling": line(
        _REQUIRED, field_type=VECTORS, context_type=CONTEXT, hidden_dims=(8,),
        through=[pe.equivariant_coupling, nn.steerable_net], without=["zero_init"],
    ),
    "conditional_equivariant_iaf": line(
        _REQUIRED, field_type=VECTORS, context_type=CONTEXT, hidden_dims=(8,),
        through=[pe.equivariant_iaf, nn.MaskedSteerableNet], without=["zero_init"],
    ),
    "conditional_equivariant_implicit": line(
        _REQUIRED, _SOLVED, {"function": CONTRACTING}, field_type=VECTORS, context_type=CONTEXT, hidden_dims=(8,),
        through=[pe.equivariant_implicit, nn.lipschitz_net, pe.EquivariantImplicit],
        without=(*_NET_SET, "context_type"),
    ),
    "conditional_equivariant_residual": line(
        _REQUIRED, _SOLVED, {"function": CONTRACTING}, field_type=VECTORS, context_type=CONTEXT, hidden_dims=(8,),
        through=[pe.equivariant_residual, nn.lipschitz_net, pe.EquivariantResidual],
        without=(*_NET_SET, "context_type"),
    ),
    "dequantize": line(images=torch.zeros(2, 1, 4, 4, dtype=torch.long)),
    "equivariant_actnorm": line(field_type=VECTORS),
    "equivariant_coupling": line(
        field_type=VECTORS, hidden_dims=(8,), through=[nn.steerable_net], without=_NET_SET
    ),
    "equivariant_flow": line(
        {"latent_dim": Sort(lambda v: v is None or (integer().takes(v) and v == 8), (7, 8.0, True, "8"), np.int64(8))},
        field_type=VECTORS, hidden_dims=(8,), num_transforms=1, through=[pe.equivariant_coupling, nn.steerable_net],
        without=("zero_init", "split"),
    ),
    "equivariant_iaf": line(field_type=VECTORS, hidden_dims=(8,), through=[nn.MaskedSteerableNet], without=_NET_SET),
    "diagnose": line({"num_samples": integer(25)}, model=model, guide=model, num_samples=25, max_plate_nesting=0),
    "equivariant_implicit": line(
        _SOLVED, {"function": CONTRACTING}, field_type=VECTORS, hidden_dims=(8,),
        through=[pe.equivariant_implicit, nn.lipschitz_net, pe.EquivariantImplicit],
        without=(*_NET_SET, "context_type"),
    ),
    "equivariant_linear": line(field_type=VECTORS),
    "equivariant_residual": line(
        _SOLVED, {"function": CONTRACTING}, field_type=VECTORS, hidden_dims=(8,),
        through=[pe.equivariant_residual, nn.lipschitz_net, pe.EquivariantResidual],
        without=(*_NET_SET, "context_type"),
    ),
    "equivariant_squeeze": line(field_type=GRAY),
    "evidence_estimate": line(log_weights=torch.linspace(-1, 0, 100)),
    "image_flow": line(
        {"nonlinearity": choice("pointwise", "gated").or_none(), "levels": integer().but(9),
         "kept": integers(lambda v: False, 1, (0, 0), (9,), "ab").or_none()},
        field_type=HALF_TURNS, shape=(4, 4), levels=1, hidden_dims=(4,), num_transforms=1,
        through=[pe.equivariant_flow, pe.equivariant_coupling, nn.steerable_net],
        without=("zero_init", "split"),
    ),
    "field_type": line(
        {"group": instance(Group, "U(1)", "S_5", ["O(2)"], "")}, group="O(2)", vectors=3
    ),
    "importance_weighted_bound": line(
        {"num_particles": integer(1, 3).but(4)}, log_weights=WEIGHTS, num_particles=2
    ),
    "importance_weights": line(
        model=model, guide=model, num_samples=2, max_plate_nesting=0
    ),
    "metropolis": line(log_weights=WEIGHTS),
    "particle_permutation": line(
        {"num_particles": integer(2, 4, numpy=3), "element": instance(GroupElement, O2.fibergroup.identity)},
        num_particles=3, element=group.dihedral_group(3).identity,
    ),
    "particle_type": line({"num_particles": integer(2, numpy=3)}, num_particles=3, vector=O2.irrep(1, 1)),
    "weighted_draws": line(
        {"distribution": DENSITY.but(dist.Normal(torch.zeros(3), 1.0))}, distribution=NORMAL,
        log_density=lambda x: -x.square().sum(-1), num_samples=2,
    ),
    # ---- networks
    "GatedNonLinearity": line(gspace=O2, scalars=1, irreps=[O2.irrep(1, 1)]),
    "InvariantGateNet": line(in_type=VECTORS, out_type=VECTORS, hidden_dims=(8,)),
    "LipschitzConditioner": line(
        network=_NET, in_type=VECTORS, out_type=VECTORS, lipschitz=0.9, named={"network": "conditioner"}
    ),
    "LipschitzGate": line({"function": CONTRACTING}, gspace=O2, scalars=1, irreps=[O2.irrep(1, 1)]),
    "MaskedSteerableNet": line(
        {"in_degrees": _DEGREES, "out_degrees": _DEGREES}, in_type=VECTORS, out_type=VECTORS,
        in_degrees=[1, 2, 3, 4], out_degrees=[1, 2, 3, 4], hidden_dims=(8,),
    ),
    "PointwiseNonLinearity": line({"in_type": TYPE.but(VECTOR)}, in_type=REGULAR),
    "_BasisLayer.reset_parameters": line(of=lambda: nn.SteerableLinear(VECTORS, VECTORS).reset_parameters),
    "SteerableConv": line({"out_type": TYPE.but(VECTORS)}, in_type=GRAY, out_type=GRAY),
    "SteerableLinear": line(in_type=VECTORS, out_type=VECTORS),
    "SteerableModule": line({"out_type": TYPE}, in_type=VECTORS, out_type=VECTORS),
    "expand": line({"module": instance(enn.EquivariantModule, torch.nn.Linear(2, 2))}, module=_NET),
    "lipschitz_bound": line(
        {"module": instance(enn.EquivariantModule, nn.GatedNonLinearity(O2, 1, [O2.irrep(1, 1)])),
         "spatial_shape": SIDES.or_none()},
        module=_Made(lambda: nn.SteerableConv(GRAY, GRAY)),
    ),
    "lipschitz_net": line({"function": CONTRACTING}, in_type=VECTORS, out_type=VECTORS, hidden_dims=(8,)),
    "steerable_net": line(in_type=VECTORS, out_type=VECTORS, hidden_dims=(8,)),
    "weight_norm": line(
        {"module": NETWORK, "weight": instance(torch.Tensor), "spatial_shape": SIDES.or_none()},
        module=_Made(lambda: nn.SteerableConv(GRAY, GRAY)), weight=torch.ones(1, 1, 3, 3),
    ),
    "Affine": line(),
    "Commutant": line(),
    "Spline": line(),
    # ---- numerics
    "Anderson": line(),
    "ByMode": line(training=logdet.Exact(), evaluation=logdet.Exact()),
    "Exact": line(),
    "FixedPoint": line(),
    "ImplicitAdjoint": line(_SOLVED, {"solver": instance(solvers.Solver)}),
    "PowerSeries": line(),
    "PowerSeries.terms_for": line(of=lambda: logdet.PowerSeries().terms_for, lipschitz=0.5),
    "RussianRoulette": line({"probes": integer()}),
    "RussianRoulette.terms_for": line(of=lambda: logdet.RussianRoulette().terms_for, lipschitz=0.5),
    "Solver.default_tolerance": line(
        _CALLED, {"dtype": instance(torch.dtype, torch.long, "float32")},
        of=lambda: solvers.FixedPoint().default_tolerance, dtype=torch.float32, lipschitz=0.5,
    ),
    "Solver.solve": line(
        _SOLVED, _CALLED, _PHI, _CERTIFIED, of=lambda: solvers.FixedPoint().solve, phi=_half, x0=X, lipschitz=0.5
    ),
    "UnrolledAdjoint": line(),
    "Adjoint.attach": line(
        _CALLED, _PHI, {"tensors": _TENSORS, "batched": _BATCHED, "jacobian": CALLABLE},
        of=lambda: solvers.ImplicitAdjoint().attach, phi=_half, value=X, tensors=(), lipschitz=0.5,
    ),
    "default_estimator": line(event_size=3),
    "fixed_point": line(
        _SOLVED, _CALLED, _PHI, _CERTIFIED,
        {"tensors": _TENSORS, "batched": _BATCHED, "jacobian": CALLABLE, "refine": FLAG, "wide": CALLABLE.or_none()},
        phi=_half, x0=X, tensors=(), lipschitz=0.5,
    ),
    # ---- checks
    "assert_equivariant": line(_MAPS, _SOLVED, function=torch.neg, x=X, field_type=VECTORS),
    "assert_invariant": line(_OPTIONAL_TYPE, _SOLVED, _SCORED, distribution=NORMAL, x=X, field_type=VECTORS),
    "assert_inverse": line(_OF_ANY, _SOLVED, transform=_Made(coupling), x=X),
    "assert_log_det": line(_OF_ANY, _SOLVED, transform=_Made(coupling), x=X),
    "equivariance_error": line(_MAPS, function=torch.neg, x=X, field_type=VECTORS),
    "equivariance_errors": line(_MAPS, function=torch.neg, x=X, field_type=VECTORS),
    "invariance_error": line(_OPTIONAL_TYPE, _SCORED, distribution=NORMAL, x=X, field_type=VECTORS),
    "inverse_error": line(_OF_ANY, transform=_Made(coupling), x=X),
    "rounding_error": line(
        {"function": CALLABLE, "x": instance(torch.Tensor, X.long(), X.double(), X.numpy()),
         "event_dim": integer(1, 2), "image": instance(torch.Tensor).or_none()},
        function=torch.neg, x=X,
    ),
    "log_det_error": line(_OF_ANY, transform=_Made(coupling), x=X[:1]),
    # ---- pictures
    "plot_density": line(
        {**_ON_PLANE, "resolution": integer(2, numpy=8), "limits": Sort(lambda v: False, (3, (1, 0), "ab", (0, 1, 2)))},
        log_prob=dist.Normal(torch.zeros(2), 1.0).to_event(1), limits=(-1, 1), resolution=8, ax=_AX,
        field_type=VECTOR, point=(1.0, 0.0),
    ),
    "plot_equivariance_error": line(
        {**_MAPS, "function": Sort(callable, ({}, {"a": 1}))},
        function=torch.neg, x=X, field_type=VECTORS, ax=_AX,
    ),
    "plot_rotations": line(
        {"function": CALLABLE.or_none(), "figure": instance((FigureBase,)).or_none(), "out_type": TYPE.or_none(),
         "elements": instance(list | tuple, [1], [], O2.fibergroup.identity).or_none(),
         "images": instance(torch.Tensor, torch.rand(1, 4, 4), torch.rand(2, 3, 4, 4))},
        images=torch.rand(2, 1, 4, 4), field_type=GRAY,
        figure=_Made(plt.figure),
    ),
    "plot_samples": line(
        {**_ON_PLANE, "samples": Sort(_is_plane, ("ab", X, {}, {"a": 1}))},
        samples=torch.zeros(3, 2), field_type=VECTOR, point=(1.0, 0.0), ax=_AX,
    ),
    "plot_training": line({"curves": Sort(_is_curve, ("ab", {}, {"a": 1}, [], 1.0))}, curves=[3.0, 2.0, 1.0], ax=_AX),
}  # fmt: skip

# ---- what has no line ---------------------------------------------------------------------------------------

_RESULT = "a result: users read it, only the package builds it"
_SHAPES = "a shape of torch's own making, checked there"
_PYRO = "part of torch's or Pyro's interface: they call it, and events are checked"

#: Public classes and methods without a line, and why.
EXEMPT: dict[str, str] = {
    **dict.fromkeys(
        ("EvidenceEstimate", "GuideReport", "InvarianceReport", "SiteChange", "MetropolisChain", "WeightedDraws",
         "Expanded", "Solution", "LogDet"),
        _RESULT,
    ),
    **dict.fromkeys(("Adjoint", "DenseAdjoint", "Estimator", "Solver"), "no argument, or abstract"),
    **dict.fromkeys(("ConvergenceError", "EquivarianceError", "EvidenceWarning", "PrecisionWarning"), "an exception"),
    **dict.fromkeys(("forward_shape", "inverse_shape", "evaluate_output_shape"), _SHAPES),
    **dict.fromkeys(("expand", "sample", "rsample", "rsample_augmented", "log_prob", "train"), _PYRO),
    "load_state_dict": _PYRO,
    "set_extra_state": _PYRO,
    "FamilyOfKind.made_by": "what the conditional factories are, which have lines",
    **dict.fromkeys(("get_posterior", "get_transform", "median", "sample_latent"), "the model's own arguments"),
    **dict.fromkeys(
        ("call_and_ladj", "inverse_and_ladj", "log_abs_det_jacobian", "forward_solution", "inverse_solution", "forward",
         "split", "auxiliary_log_prob"),
        "an event, whose checks tests/test_errors.py tries for every kind",
    ),
    "invariants": "a hook of the package's own layers, given what they made",
    **dict.fromkeys(("normalized", "with_offset"), "as lipschitz_bound, with one argument"),
    "lipschitz_bound": "as the function of that name",
    **dict.fromkeys(
        ("Block", "BlockMap", "FieldScalars", "Head", "bind", "heads", "inverse", "of_block", "parameters",
         "per_channel", "squares", "times", "total"),
        "what a map is written with, or given by a transform; bind checks what one says of itself",
    ),
}  # fmt: skip

#: Arguments that are handed on as they are.
HANDED_ON = {"args", "conditioners", "kwargs", "net_kwargs", "_instance", "point"}
