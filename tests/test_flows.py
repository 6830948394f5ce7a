# SPDX-License-Identifier: Apache-2.0
"""Whole flows: the stack, its splits, and Pyro's AutoNormalizingFlow."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group
from pyro.infer.autoguide import AutoNormalizingFlow

import pyro_equiflow as pe
from pyro_equiflow import testing
from tests.cases import field_type, point, randomize, spatial_shape


@pytest.mark.parametrize("name", ["trivial", "C4", "O2", "SO3", "C4-plane", "octahedral-space"])
@pytest.mark.parametrize("kind_of_step", ["coupling", "iaf"])
def test_flows_start_as_the_identity(kind_of_step, name):
    kind = field_type(name)
    options = {"nonlinearity": "gated"} if kind.gspace.dimensionality == 3 else {}
    flow = pe.equivariant_flow(kind, kind=kind_of_step, num_transforms=2, hidden_dims=(8,), **options)
    x = torch.randn(2, kind.size, *spatial_shape(name))
    y, ladj = flow.eval().call_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ladj, torch.zeros(2))


@pytest.mark.parametrize("kind_of_step", ["coupling", "iaf"])
def test_every_channel_moves(kind_of_step):
    """Two steps in turn leave nothing untouched, linear layers or not."""
    for name in ("C4", "O2", "C4-plane"):
        kind = field_type(name)
        options = {"linear": False, "actnorm": False, "hidden_dims": (8,)}
        flow = pe.equivariant_flow(kind, kind=kind_of_step, num_transforms=2, **options)
        assert len(flow) == 2
        x = torch.randn(8, kind.size, *spatial_shape(name))
        moved = (randomize(flow)(x) - x).abs().movedim(1, 0).flatten(1).amax(1)
        assert (moved > 1e-4).all()


def test_options_reach_their_parts():
    flow = pe.equivariant_flow(field_type("C4"), num_transforms=3, log_scale_bound=0.7, split_by="irreps")
    names = [type(part).__name__ for part in flow]
    assert names == 3 * ["EquivariantActNorm", "EquivariantLinear", "EquivariantCoupling"]
    assert all(p.transformer.log_scale_bound == 0.7 for p in flow if isinstance(p, pe.EquivariantCoupling))
    x = torch.randn(20, field_type("C4").size)
    flow = randomize(flow).double()
    testing.assert_equivariant(flow, x.double())
    testing.assert_inverse(flow, x.double())
    testing.assert_log_det(flow, x[:1].double())


def test_autoregressive_steps_take_turns():
    """Blocks in order, then in reverse: with two steps every block comes to depend on all others."""
    kind = field_type("C4")
    flow = pe.equivariant_flow(kind, kind="iaf", num_transforms=3, log_scale_bound=0.7, hidden_dims=(64,))
    steps = [part for part in flow if isinstance(part, pe.EquivariantIAF)]
    assert [type(part).__name__ for part in flow] == 3 * ["EquivariantActNorm", "EquivariantLinear", "EquivariantIAF"]
    assert [step.order for step in steps] == [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (0, 1, 2, 3, 4, 5)]
    assert all(step.transformer.log_scale_bound == 0.7 for step in steps)
    x = torch.randn(20, kind.size)
    flow(x)
    flow = randomize(flow).double()
    testing.assert_equivariant(flow, x.double())
    testing.assert_inverse(flow, x.double())
    testing.assert_log_det(flow, x[:1].double())
    by_irreps = pe.equivariant_flow(kind, kind="iaf", num_transforms=2, split_by="irreps", linear=False, actnorm=False)
    assert [step.order for step in by_irreps] == [tuple(range(9)), tuple(range(9))[::-1]]


@pytest.mark.parametrize("name, linear, actnorm", [("O2", True, True), ("C4-plane", False, False), ("C4", False, True)])
@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_stacks_of_solved_transforms(kind, name, linear, actnorm):
    """They start as the identity, and obey the laws with random weights; nothing needs to be split."""
    type_ = field_type(name)
    flow = pe.equivariant_flow(
        type_, kind=kind, num_transforms=2, hidden_dims=(8,), linear=linear, actnorm=actnorm, lipschitz=0.7,
        log_det=pe.logdet.Exact(), tolerance=1e-6,
    )  # fmt: skip
    assert len(flow) == 2 * (1 + linear + actnorm)
    x = torch.randn(8, type_.size, *spatial_shape(name))
    y, ladj = flow.eval().call_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ladj, torch.zeros(8))
    flow = randomize(flow.train()).double()
    for part in flow:
        part.tolerance = 1e-12
    x = x.double()
    assert (flow(x) - x).abs().max() > 1e-2
    testing.assert_equivariant(flow, x[:2])
    testing.assert_inverse(flow, x, tolerance=1e-10)
    testing.assert_log_det(flow, x[:1])


@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_one_vector_that_cannot_be_split(kind):
    so3 = group.so3_group()
    flow = pe.equivariant_flow(point(so3, so3.irrep(1)), 3, kind=kind, num_transforms=1, hidden_dims=(8,))
    testing.assert_equivariant(randomize(flow), torch.randn(5, 3))
    with pytest.raises(ValueError, match="split_by: expected None where nothing is split, found 'irreps'"):
        pe.equivariant_flow(point(so3, so3.irrep(1)), kind=kind, split_by="irreps")


def test_data_init_set_once_for_the_stack():
    kind = field_type("O2")
    flow = pe.equivariant_flow(kind, num_transforms=2, hidden_dims=(8,))
    data = 4.0 + 3.0 * torch.randn(100, kind.size)
    flow.inv(data)
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    assert all(bool(v) for k, v in state.items() if k.endswith("initialized"))
    flow(data)
    assert all(torch.equal(v, state[k]) for k, v in flow.state_dict().items())


@pytest.mark.parametrize("kwargs, message", [
    ({"latent_dim": 9}, "latent_dim: expected the size 8 .* found 9; .* invariant ones as trivial fields"),
    ({"kind": "spline"}, "kind: expected one of .coupling.*found 'spline'"),
    ({"num_transforms": 0}, "num_transforms: expected a positive integer, found 0"),
    ({"hidden_dims": (0,)}, r"hidden_dims: expected positive integers, found \(0,\)"),
    ({"split_by": "pixels"}, "split_by: expected .*fields.*irreps.* found 'pixels'"),
])  # fmt: skip
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pe.equivariant_flow(field_type("O2"), **kwargs)


def test_unknown_keywords():
    with pytest.raises(TypeError, match="equivariant_flow: expected keywords among .*kernel_size.* found kernel_sise"):
        pe.equivariant_flow(field_type("O2"), kernel_sise=3)


def test_a_type_that_cannot_be_split():
    so3 = group.so3_group()
    with pytest.raises(ValueError, match="equivariant_flow: expected a type of at least two irreps, found"):
        pe.equivariant_flow(point(so3, so3.irrep(1)))


# ---- as Pyro's guide ---------------------------------------------------------------------------------------------


def ring():
    """A posterior on the plane that O(2) leaves unchanged: log evidence by quadrature."""
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    radius = z.view(*z.shape[:-1], 2, 2).norm(dim=-1)
    pyro.sample("y", dist.Normal(radius, 0.5).to_event(1), obs=torch.tensor([2.0, 1.0]))


def test_auto_normalizing_flow():
    o2 = group.o2_group()
    kind = point(o2, o2.irrep(1, 1), o2.irrep(1, 1))
    guide = AutoNormalizingFlow(ring, partial(pe.equivariant_flow, kind, num_transforms=2, hidden_dims=(16,)))
    elbo = pyro.infer.Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = pyro.infer.SVI(ring, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), elbo)
    losses = [svi.step() for _ in range(250)]
    assert sum(losses[-25:]) < sum(losses[:25]) - 25 * 0.3
    posterior = guide.get_posterior()
    x = posterior.sample((16,))
    testing.assert_invariant(posterior, x, kind, tolerance=1e-3)
    assert guide()["z"].shape == (4,)


def test_auto_normalizing_flow_with_another_dimension():
    guide = AutoNormalizingFlow(ring, partial(pe.equivariant_flow, field_type("O2"), num_transforms=1))
    with pytest.raises(ValueError, match="latent_dim: expected the size 8 .* found 4"):
        guide()
