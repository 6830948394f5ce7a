# SPDX-License-Identifier: Apache-2.0
"""Invariant base distributions, against torch's distributions, explicit sums and quadrature."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.ops.events import act, grid_elements
from tests.cases import TYPES, field_type, point, spatial_shape


def random_normal(name, batch=(), dtype=torch.float64, **options):
    kind, spatial = field_type(name), spatial_shape(name)
    plain = pe.InvariantNormal(kind, spatial)
    loc = torch.randn(*batch, plain.num_locs, dtype=dtype)
    scale = 0.5 + torch.rand(*batch, plain.num_scales, dtype=dtype)
    return pe.InvariantNormal(kind, spatial, loc=loc, scale=scale, **options)


def dense(normal):
    """Mean and covariance of one position by escnn's own change of basis."""
    kind = normal.field_type
    basis = torch.as_tensor(kind.representation.change_of_basis, dtype=normal.scale.dtype)
    irreps = [kind.fibergroup.irrep(*i) for i in kind.representation.irreps]
    scales = torch.cat([s.expand(r.size) for s, r in zip(normal.scale, irreps)])
    coordinates = iter(normal.loc)
    loc = torch.cat([(next(coordinates) if r.is_trivial() else torch.zeros(())).expand(r.size) for r in irreps])
    return basis @ loc.to(basis), basis @ torch.diag(scales**2) @ basis.T


@pytest.mark.parametrize("name", TYPES)
def test_normal_is_torchs(name):
    normal = random_normal(name)
    mean, covariance = dense(normal)
    theirs = torch.distributions.MultivariateNormal(mean, covariance)
    x = 2.0 * torch.randn(4, 2, *normal.event_shape, dtype=torch.float64)
    spatial = tuple(range(3, x.dim()))
    expected = theirs.log_prob(x.movedim(2, -1))
    if spatial:
        expected = expected.flatten(2).sum(-1)
    torch.testing.assert_close(normal.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    shape = (-1, *len(spatial) * (1,))
    torch.testing.assert_close(normal.mean, mean.view(shape).expand(normal.event_shape))
    torch.testing.assert_close(normal.variance, covariance.diagonal().view(shape).expand(normal.event_shape))
    assert normal.event_shape == (field_type(name).size, *spatial_shape(name)) and normal.batch_shape == ()


@pytest.mark.parametrize("name", TYPES)
def test_normal_is_invariant(name):
    for dtype in (torch.float32, torch.float64):
        normal = random_normal(name, dtype=dtype)
        testing.assert_invariant(normal, 2.0 * torch.randn(3, *normal.event_shape, dtype=dtype))


def test_normal_integrates_to_one():
    o2 = field_type("O2").fibergroup
    normal = random_normal_of(point(o2, o2.irrep(1, 1)))
    grid = torch.linspace(-12, 12, 400, dtype=torch.float64)
    total = normal.log_prob(torch.cartesian_prod(grid, grid)).exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(total - 1) < 1e-9


def random_normal_of(kind):
    plain = pe.InvariantNormal(kind)
    return pe.InvariantNormal(kind, scale=0.5 + torch.rand(plain.num_scales, dtype=torch.float64))


@pytest.mark.parametrize("name", ["C4", "O2", "D3", "C4-plane"])
def test_normal_draws_have_its_moments(name):
    normal = random_normal(name)
    mean, covariance = dense(normal)
    x = normal.rsample((20000,))
    assert x.shape == (20000, *normal.event_shape) and x.dtype == torch.float64
    rows = x.movedim(1, -1).reshape(-1, len(mean))
    noise = 5.0 / math.sqrt(len(rows))  # five standard errors for variances below 2.25
    torch.testing.assert_close(rows.mean(0), mean, rtol=0, atol=1.5 * noise)
    torch.testing.assert_close(rows.T.cov(), covariance, rtol=0, atol=3.2 * noise)


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane"])
@pytest.mark.parametrize("batch", [(2,), (3, 2)])
def test_normal_in_batches(name, batch):
    normal = random_normal(name, batch)
    assert normal.batch_shape == batch
    x = normal.sample((4,))
    assert x.shape == (4, *batch, *normal.event_shape)
    log_prob = normal.log_prob(x)
    assert log_prob.shape == (4, *batch)
    last = tuple(b - 1 for b in batch)
    alone = pe.InvariantNormal(normal.field_type, normal.spatial_shape, loc=normal.loc[last], scale=normal.scale[last])
    torch.testing.assert_close(log_prob[(slice(None), *last)], alone.log_prob(x[(slice(None), *last)]))
    wide = alone.expand((5, *batch))
    assert wide.batch_shape == (5, *batch) and wide.rsample().shape == (5, *batch, *alone.event_shape)
    torch.testing.assert_close(wide.log_prob(x[0]), alone.log_prob(x[0]).expand(5, *batch))
    torch.testing.assert_close(normal.log_prob(x[0][last]), normal.log_prob(x[0][last].expand(x[0].shape)))


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane"])
def test_normal_gradients(name):
    kind, spatial = field_type(name), spatial_shape(name)
    plain = pe.InvariantNormal(kind, spatial)
    loc = torch.randn(plain.num_locs, dtype=torch.float64, requires_grad=True)
    scale = (0.5 + torch.rand(plain.num_scales, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, *plain.event_shape, dtype=torch.float64, requires_grad=True)

    def log_prob(loc, scale, x):
        return pe.InvariantNormal(kind, spatial, loc=loc, scale=scale).log_prob(x)

    def draw(loc, scale):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return pe.InvariantNormal(kind, spatial, loc=loc, scale=scale).rsample((2,))

    assert torch.autograd.gradcheck(log_prob, (loc, scale, x))
    assert torch.autograd.gradcheck(draw, (loc, scale))
    expanded = pe.InvariantNormal(kind, spatial, loc=loc, scale=scale).expand((3,))
    expanded.log_prob(x[:1]).sum().backward()
    assert scale.grad.any()


def test_normal_learns_its_scales_in_svi():
    kind = field_type("O2")
    truth = pe.InvariantNormal(kind, loc=torch.tensor([1.0]), scale=torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5]))
    data = truth.sample((2000,))

    def model():
        loc = pyro.param("loc", torch.zeros(1))
        scale = pyro.param("scale", torch.ones(5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(data)):
            pyro.sample("x", pe.InvariantNormal(kind, loc=loc, scale=scale), obs=data)

    def guide():
        pyro.param("unused", torch.zeros(()))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(150):
            svi.step()
    torch.testing.assert_close(pyro.param("scale").detach(), truth.scale, rtol=0.1, atol=0.0)
    torch.testing.assert_close(pyro.param("loc").detach(), truth.loc, rtol=0.1, atol=0.0)


def test_normal_survives_pickle():
    normal = random_normal("C4")
    x = normal.sample((2,))
    torch.testing.assert_close(pickle.loads(pickle.dumps(normal)).log_prob(x), normal.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("arguments, message", [
    ({"scale": torch.ones(4)}, r"scale: expected shape \(\*batch, 5\), found \(4,\)"),
    ({"loc": torch.zeros(3)}, r"loc: expected shape \(\*batch, 1\), found \(3,\)"),
    ({"spatial_shape": (3,)}, r"spatial_shape: expected 0 side lengths, found \(3,\)"),
    ({"scale": torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])}, "scale"),
])  # fmt: skip
def test_normal_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pe.InvariantNormal(field_type("O2"), **arguments, validate_args=True)


# ---- orbit mixtures ------------------------------------------------------------------------------------------

FINITE = ["flips", "C4", "D3", "octahedral", "C4-plane", "D4-plane", "octahedral-space"]


def mixture(name, batch=()):
    kind, spatial = field_type(name), spatial_shape(name)
    shape = (kind.size, *spatial)
    base = dist.Normal(torch.randn(*batch, *shape).double(), 0.5 + torch.rand(*batch, *shape).double())
    return pe.OrbitMixture(base.to_event(len(shape)), kind)


@pytest.mark.parametrize("name", FINITE)
def test_mixture_is_the_explicit_sum(name):
    q = mixture(name)
    kind = q.field_type
    x = torch.randn(3, *q.event_shape, dtype=torch.float64)
    elements = list(kind.fibergroup.elements)
    terms = torch.stack([q.base.log_prob(act(kind, ~g, x)) for g in elements])
    expected = terms.logsumexp(0) - math.log(len(elements))
    torch.testing.assert_close(q.log_prob(x), expected, rtol=1e-10, atol=1e-10)
    testing.assert_invariant(q, x, tolerance=1e-9)


@pytest.mark.parametrize("name", ["flips", "C4", "C4-plane"])
@pytest.mark.parametrize("batch", [(2,), (4,), (3, 2)])
def test_mixture_in_batches(name, batch):
    """Batch sizes equal to the group's order and not: an orbit dimension must not meet a batch dimension."""
    q = mixture(name, batch)
    x = torch.randn(*q.event_shape, dtype=torch.float64)
    found = q.log_prob(x)
    assert found.shape == q.batch_shape == batch
    for index in torch.cartesian_prod(*(torch.arange(b) for b in batch)).view(-1, len(batch)).tolist():
        index = tuple(index)
        base = q.base.base_dist
        alone = dist.Normal(base.loc[index], base.scale[index]).to_event(len(q.event_shape))
        torch.testing.assert_close(found[index], pe.OrbitMixture(alone, q.field_type).log_prob(x))
    full = q.log_prob(x.expand(5, *batch, *x.shape))
    assert full.shape == (5, *batch)
    torch.testing.assert_close(full[3], found)
    partly = q.log_prob(x.expand(batch[-1], *x.shape))
    torch.testing.assert_close(partly, found)
    assert q.sample((7,)).shape == (7, *batch, *q.event_shape)
    assert q.expand((6, *batch)).batch_shape == (6, *batch)
    torch.testing.assert_close(q.expand((6, *batch)).log_prob(x)[4], found)


def test_mixture_integrates_to_one_and_samples_itself():
    d3 = group.dihedral_group(3)
    kind = point(d3, d3.irrep(1, 1))
    base = dist.MultivariateNormal(torch.tensor([2.0, 0.7]), torch.tensor([[0.5, 0.2], [0.2, 0.3]])).expand(())
    q = pe.OrbitMixture(base, kind)
    side = 60
    edges = torch.linspace(-6, 6, side + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    density = q.log_prob(torch.cartesian_prod(middle, middle)).exp().view(side, side)
    cell = float(edges[1] - edges[0]) ** 2
    assert abs(density.sum() * cell - 1) < 1e-3
    # A histogram of draws against the density, coarse cells: chi squared a degree of freedom near 1.
    number = 20000
    draws = q.sample((number,))
    counts, _ = torch.histogramdd(draws, bins=[12, 12], range=[-6.0, 6.0, -6.0, 6.0])
    expected = number * cell * density.view(12, 5, 12, 5).sum((1, 3))
    cells = expected > 20
    chi_squared = ((counts - expected).square() / expected)[cells].sum() / cells.sum()
    assert 0.6 < chi_squared < 1.5
    assert draws.mean(0).norm() < 0.08  # no vector is invariant under D_3


def test_mixture_draws_carry_gradients():
    c4 = group.cyclic_group(4)
    kind = point(c4, c4.irrep(1))
    loc = torch.tensor([1.0, 0.0], requires_grad=True)
    q = pe.OrbitMixture(dist.Normal(loc, 0.3).to_event(1), kind)
    assert q.has_rsample
    q.rsample((50,)).square().sum().backward()
    assert loc.grad.isfinite().all() and loc.grad[0] > 50.0  # d |x|^2 / d loc = 2 loc on average, in any turn
    assert not q.sample((3,)).requires_grad
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    twice = pe.OrbitMixture(dist.Normal(loc.detach().double(), 0.3).to_event(1), kind)
    assert torch.autograd.gradcheck(twice.log_prob, (x,))


def test_mixture_of_a_flow():
    """Any density becomes invariant, a plain flow of Pyro's too."""
    kind = field_type("C4")
    spline = dist.transforms.Spline(kind.size, count_bins=4)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(kind.size), 1.0).to_event(1), [spline])
    x = torch.randn(4, kind.size)
    with pytest.raises(AssertionError, match="invariance error"):
        testing.assert_invariant(flow, x, kind)
    testing.assert_invariant(pe.OrbitMixture(flow, kind), x, tolerance=1e-4)


def test_mixture_refuses():
    so2 = field_type("SO2")
    normal = dist.Normal(torch.zeros(so2.size), 1.0).to_event(1)
    with pytest.raises(ValueError, match="expected a finite group to average over, found SO.2."):
        pe.OrbitMixture(normal, so2)
    with pytest.raises(ValueError, match=r"base: expected events of shape \(12,\), found \(9,\)"):
        pe.OrbitMixture(normal, field_type("C4"))
    plane = field_type("C8-plane")
    image = dist.Normal(torch.zeros(plane.size, 4, 4), 1.0).to_event(3)
    with pytest.raises(ValueError, match="expected a group that permutes the grid, found .* with 4 elements"):
        pe.OrbitMixture(image, plane)


# ---- checks that see faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["O2", "C4", "C4-plane"])
def test_a_base_that_is_not_invariant_is_caught(name):
    kind, spatial = field_type(name), spatial_shape(name)
    shape = (kind.size, *spatial)
    base = dist.Normal(torch.zeros(shape), torch.linspace(0.5, 1.5, math.prod(shape)).view(shape)).to_event(len(shape))
    x = torch.randn(3, *shape)
    with pytest.raises(AssertionError, match="invariance error .* at the group element"):
        testing.assert_invariant(base, x, kind)
    assert len(grid_elements(kind)) > 1


def test_one_number_serves_for_all():
    """A number, or a tensor without dimensions, is the scale of every irrep, and gives draws their dtype."""
    kind = field_type("O2")
    plain = pe.InvariantNormal(kind)
    x = torch.randn(5, kind.size, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    one, each = (pe.InvariantNormal(kind, scale=s) for s in (scale, scale.expand(plain.num_scales)))
    assert one.sample().dtype == torch.float64
    torch.testing.assert_close(one.log_prob(x), each.log_prob(x), rtol=0, atol=0)
    truth = torch.distributions.Normal(torch.zeros(kind.size, dtype=torch.float64), 2.0).log_prob(x).sum(-1)
    torch.testing.assert_close(one.log_prob(x), truth)
    torch.testing.assert_close(pe.InvariantNormal(kind, scale=2.0).log_prob(x), truth, rtol=1e-6, atol=1e-6)
    one.log_prob(x).sum().backward()
    assert scale.grad is not None
    assert one.expand((3,)).sample().shape == (3, kind.size)
    with pytest.raises(ValueError, match="scale"):
        pe.InvariantNormal(kind, scale=-1.0)


@pytest.mark.parametrize("checked", [True, False])
def test_values_are_checked_as_asked(checked):
    kind = field_type("C4")
    unchecked = dist.Normal(torch.zeros(kind.size), 1.0, validate_args=False)
    base = dist.Independent(unchecked, 1, validate_args=False)
    bad = torch.zeros(2, kind.size)
    bad[1, 2] = torch.nan
    for density in (
        pe.InvariantNormal(kind, validate_args=checked),
        pe.OrbitMixture(base, kind, validate_args=checked),
    ):
        density.log_prob(bad[0])
        if checked:
            with pytest.raises(ValueError, match="within the support"):
                density.log_prob(bad)
        else:
            assert density.log_prob(bad).isnan().tolist() == [False, True]
