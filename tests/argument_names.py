# SPDX-License-Identifier: Apache-2.0
"""Values that arguments may have, and the sort of an argument by its name."""

from __future__ import annotations

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from escnn import group, gspaces
from escnn import nn as enn
from escnn.group import GroupElement, Representation
from matplotlib.axes import Axes
from torch.distributions import Distribution

import pyro_equiflow as pe
from pyro_equiflow import logdet, maps, nn, solvers
from tests.argument_sorts import CALLABLE, FLAG, MAPPING, Sort, choice, instance, integer, integers, number

# ---- valid values -------------------------------------------------------------------------------------------

O2 = gspaces.no_base_space(group.o2_group())
C4 = gspaces.no_base_space(group.cyclic_group(4))
PLANE = gspaces.rot2dOnR2(4)
VECTORS = enn.FieldType(O2, 4 * [O2.irrep(1, 1)])
CONTEXT = enn.FieldType(O2, [O2.trivial_repr])
VECTOR = enn.FieldType(C4, [C4.irrep(1)])
GRAY = enn.FieldType(PLANE, [PLANE.trivial_repr])
_C2 = gspaces.rot2dOnR2(2)
HALF_TURNS = enn.FieldType(_C2, [_C2.trivial_repr])
REGULAR = enn.FieldType(C4, [C4.regular_repr])
_SKEW = Representation(C4.fibergroup, "skew", [(0,), (1,)], np.array([[1.0, 0, 0.5], [0, 1, 0], [0, 0, 2]]), [])
X = torch.linspace(-1, 1, 24).reshape(3, 8)
WEIGHTS = torch.linspace(-1, 0, 6)
NORMAL = dist.Normal(torch.zeros(8), 1.0).to_event(1)


def net(in_type=VECTORS, out_type=VECTORS):
    """A network that every transform without a split takes."""
    return nn.lipschitz_net(in_type, out_type, hidden_dims=(8,))


@functools.cache
def coupling() -> pe.EquivariantCoupling:
    """The transform of checks."""
    return pe.equivariant_coupling(VECTORS, hidden_dims=(8,))


def model():
    """A model with one vector."""
    pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))


@functools.cache
def guide() -> pe.AutoEquivariantFlow:
    """A guide that was called."""
    made = pe.AutoEquivariantFlow(model, {"z": VECTORS}, lambda kind: pe.equivariant_linear(kind))
    made()
    return made


TURNS = enn.FieldType(C4, 4 * [C4.irrep(1)])


# ---- sorts --------------------------------------------------------------------------------------------------

TYPE = instance(enn.FieldType, VECTORS.gspace, enn.FieldType(C4, [_SKEW]))
OTHER_SPACE = TYPE.but(GRAY)
TRANSFORM = instance(pe.EquivariantTransform, torch.distributions.ExpTransform())
NETWORK = instance(enn.EquivariantModule, enn.IdentityModule(CONTEXT), torch.nn.Linear(8, 8))
DENSITY = instance(Distribution)
EVENTS = instance(torch.Tensor, X.long(), X[:, :5], X[0, 0], X.numpy())
LOG_WEIGHTS = instance(
    torch.Tensor, WEIGHTS[:1], WEIGHTS.long(), torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("inf")])
)
FUNCTION = choice("elu", "lipswish", "relu", "silu", "sin", "sin2pi", "tanh")
CONTRACTING = choice("elu", "lipswish", "relu", "sin", "sin2pi", "tanh").but("silu")
IMAGES = instance(torch.Tensor, torch.rand(2, 1, 4, 4), torch.full((2, 1, 4, 4), 256), torch.full((1, 4, 4), -1))
ELEMENTS = instance(list | tuple, [1], [C4.fibergroup.element(1)], O2.fibergroup.identity, "ab")
SCALE, LOC = number("(0, inf)", 1.0), number("(-inf, inf)", 0.0)
LIPSCHITZ = number("(0, 1)", 0.5)
TOLERANCE = number("(0, inf)", 1e-3)
AXES = instance((Axes,))
NO_SIDES = integers(lambda v: len(v) == 0, (2,), "ab", 3)
SIDES = integers(lambda v: len(v) == 2 and min(v) >= 1, (2,), (2, 2, 2), (0, 3), "ab", 3)
CHANNELS = integers(lambda v: all(i >= 1 for i in v), 64, (8, 0), (8.5,), (True,), "88", None, numpy=(8,))

#: The sort of an argument by its name.
SORTS: dict[str, Sort] = {
    "actnorm": FLAG,
    "adjoint": instance(solvers.Adjoint).or_none(),
    "built_in": choice("all", "connected"),
    "bound": number("(0, inf)", 2.0),
    "alpha": number("[0, 0.5)", 0.1),
    "auxiliary": Sort(lambda v: isinstance(v, enn.FieldType) or integer().takes(v), (0, -1, True, GRAY, 1.0)),
    "ax": AXES.or_none(),
    "base": DENSITY.but(dist.Normal(torch.zeros(3), 1.0).to_event(1)),
    "batch_size": integer(),
    "bias": FLAG,
    "cache_size": integer(0, 1, numpy=1),
    "check_invariance": FLAG,
    "centre": FLAG,
    "conditioner": NETWORK,
    "conditioner_x": NETWORK,
    "conditioner_y": NETWORK,
    "context": instance(torch.Tensor, torch.zeros(3), torch.zeros(1).long(), torch.zeros(1).double()),
    "context_type": OTHER_SPACE.or_none(),
    "data_init": FLAG,
    "deeper": TRANSFORM.or_none().but(coupling()),
    "density": DENSITY,
    "dim": integer(),
    "distribution": choice("rademacher", "gaussian"),
    "dtype": instance(torch.dtype, torch.long, "float32").or_none(),
    "element": instance(GroupElement, C4.fibergroup.element(1)),
    "elements": ELEMENTS.or_none(),
    "evaluation": CALLABLE,
    "event_size": integer(),
    "exact_terms": integer().or_none(),
    "field_type": TYPE,
    "function": FUNCTION,
    "gain": number("[0, inf)", 1.0),
    "gspace": instance(gspaces.GSpace, O2.fibergroup),
    "guide": CALLABLE,
    "haar": FLAG,
    "hidden_dims": CHANNELS,
    "identity_init": FLAG,
    "images": IMAGES,
    "in_type": TYPE,
    "init_loc_fn": CALLABLE,
    "init_scale": number("(0, inf)", 0.1),
    "irreps": instance(list | tuple, [], [1], [C4.irrep(1)], [C4.regular_repr], O2.irrep(1, 1), "ab"),
    "joint": DENSITY.but(NORMAL),
    "kept": integers(lambda v: 0 < len(set(v)) == len(v) < 4 and set(v) <= {0, 1, 2, 3}, 1, (4,), ()).or_none(),
    "kernel_size": Sort(lambda v: integer().takes(v) and v % 2 == 1, (2, 0, -1, 3.0, True, "3"), np.int64(3)),
    "kind": choice("coupling", "iaf", "implicit", "residual"),
    "levels": integer(),
    "linear": FLAG,
    "lipschitz": LIPSCHITZ,
    "loc": Sort(
        lambda v: (v.dtype.is_floating_point and v.dim() == 0) if isinstance(v, torch.Tensor) else LOC.takes(v),
        (torch.zeros(3), torch.zeros(1).long(), float("nan"), "0"), np.float64(0)),
    "log_density": CALLABLE,
    "log_det": CALLABLE.or_none().but(logdet.Exact, "exact"),
    "log_prob": Sort(lambda v: callable(v) or isinstance(v, Distribution), ("function",)),
    "log_scale_bound": number("(0, inf)", 1.0).or_none(),
    "log_weights": LOG_WEIGHTS,
    "mask": instance(np.ndarray, np.ones((4, 4)), np.ones((3, 4), bool), np.ones(4, bool)).or_none(),
    "max_order": integer(numpy=10),
    "max_plate_nesting": integer(0).or_none(),
    "max_steps": integer(numpy=100).or_none(),
    "memory": integer(),
    "model": CALLABLE,
    "module": NETWORK,
    "network": NETWORK,
    "nonlinearity": choice("gated").or_none().but("pointwise"),
    "num_bins": integer(2, 500, numpy=4),
    "num_levels": integer(2, numpy=256),
    "num_particles": integer(),
    "retain_graph": FLAG.or_none(),
    "num_quantile_samples": integer(),
    "num_samples": integer(),
    "num_transforms": integer(),
    "on_failure": choice("raise", "warn", "ignore"),
    "order": integers(lambda v: sorted(v) == [0, 1, 2, 3], 0, (0, 1), (0, 1, 2, 4), (0.0, 1, 2, 3), "ab").or_none(),
    "out_type": OTHER_SPACE,
    "padding_mode": choice("zeros", "circular").but("reflect"),
    "permutations": FLAG,
    "probability": number("(0, 1)", 0.5).or_none(),
    "probes": integer().or_none(),
    "progress": CALLABLE.or_none(),
    "pseudoscalars": integer(0),
    "pseudovectors": integer(0),
    "radius": number("(0, inf)", 1.0),
    "regularization": number("[0, 1)", 0.5),
    "representations": MAPPING.but({}, {"z": 1}, {"z": GRAY}, {1: VECTORS}),
    "return_elements": FLAG,
    "rotate": FLAG,
    "rounding": number("[0, inf)", 1.0),
    "rows": integer(),
    "scalars": integer(0),
    "scale": Sort(  # of tensors torch tells the values, where arguments are validated
        lambda v: (v.dtype.is_floating_point and v.dim() == 0) if isinstance(v, torch.Tensor) else SCALE.takes(v),
        (torch.ones(3), torch.ones(4).long(), 0.0, float("nan"), "1"), np.float64(1)),
    "shape": integers(lambda v: False, 8, (8,), (8, 7), (8.0, 8.0), (-8, -8), (0, 0), "88", (8, 8, 8)),
    "smooth": integer(),
    "solver": instance(solvers.Solver).or_none(),
    "spatial_shape": NO_SIDES,
    "split": integers(
        lambda v: 0 < len(set(v)) == len(v) < 4 and set(v) <= {0, 1, 2, 3}, 1, (1.5,), (4,), (0, 0), (), "ab", (True,)
    ).or_none(),
    "split_by": choice("fields", "irreps").or_none(),
    "std": number("[0, inf)", 0.1),
    "steps": integer().or_none(),
    "tensor_products": FLAG,
    "terms": integer().or_none(),
    "tolerance": TOLERANCE,
    "training": CALLABLE,
    "transform": TRANSFORM,
    "transformer": choice("affine", "commutant", "spline").or_instance(maps.BlockMap).but(maps.Spline),
    "transforms": instance(list | tuple, [], [1], [torch.distributions.ExpTransform()], coupling()),
    "validate_args": FLAG.or_none(),
    "vector": instance(Representation, "irrep"),
    "vectors": integer(0, numpy=2),
    "x": EVENTS,
    "ylabel": Sort(lambda v: isinstance(v, str), (3,)),
    "vectorize_particles": FLAG,
    "zero_init": FLAG,
}  # fmt: skip
