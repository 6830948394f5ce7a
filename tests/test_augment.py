# SPDX-License-Identifier: Apache-2.0
"""Auxiliary fields, against Gaussian marginals, quadrature over the auxiliary fields and conjugate models."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro.infer import HMC, MCMC, SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.reparam import NeuTraReparam

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.infer import evidence_estimate, importance_weighted_bound, importance_weights
from pyro_equiflow.ops.events import act, grid_elements
from tests.cases import field_type, point, randomize

SO2, O2, SO3 = group.so2_group(), group.o2_group(), group.so3_group()
PLANE, SPACE = point(SO2, SO2.irrep(1)), point(SO3, SO3.irrep(1))
POINT = torch.tensor([1.2, -0.7], dtype=torch.float64)


def normal(kind, spatial=(), dtype=torch.float64):
    base = pe.InvariantNormal(kind, spatial)
    # Narrower than the auxiliary fields' own normal, so that the variance of the weights is finite.
    return pe.InvariantNormal(kind, spatial, scale=0.8 * base.scale.to(dtype))


def augmented(kind, auxiliary, flow, spatial=(), dtype=torch.float64):
    joint = pe.augment(kind, auxiliary)
    base = normal(joint, spatial, dtype)
    return pe.AugmentedDistribution(dist.TransformedDistribution(base, [flow(joint).to(dtype)]), kind)


def linear(kind):
    """Mixes event and auxiliary vector: the marginal is a normal known in closed form, 0.34 nats above its bound."""
    flow, generator = pe.equivariant_linear(kind), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    return flow


def couplings(kind, **options):
    options = {"actnorm": False, "hidden_dims": (8,), "log_scale_bound": 0.5, **options}
    return randomize(pe.equivariant_flow(kind, num_transforms=2, **options))


def flow_of(density):
    return density.joint.transforms[0]


def covariance(density):
    """Of the joint, with its graph to the map's parameters."""
    size = density.joint.event_shape[0]
    rows = flow_of(density)(0.8 * torch.eye(size, dtype=torch.float64))
    return rows.T @ rows


def exact(density, x):
    size = x.shape[-1]
    return dist.MultivariateNormal(x.new_zeros(size), covariance(density)[:size, :size]).log_prob(x)


def elbo(density, x):
    """The bound of one particle in closed form: second moments of e are those of a standard normal."""
    size, joint = x.shape[-1], covariance(density)
    precision = torch.linalg.inv(joint)
    quadratic = x @ precision[:size, :size] @ x + precision[size:, size:].trace()
    constant = (len(joint) - size) - size * math.log(2 * math.pi)
    return 0.5 * (constant - quadratic - torch.logdet(joint))


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


# ---- the type ----------------------------------------------------------------------------------------------------


def test_augmented_type():
    assert pe.augment(PLANE, 2) == point(SO2, SO2.irrep(1), *2 * [SO2.trivial_representation])
    assert pe.augment(PLANE, PLANE) == point(SO2, SO2.irrep(1), SO2.irrep(1))
    assert pe.augment(field_type("C4-plane"), 1).size == field_type("C4-plane").size + 1


@pytest.mark.parametrize("auxiliary, error, message", [
    (0, ValueError, "auxiliary: expected a positive integer or an escnn.nn.FieldType, found 0"),
    (True, TypeError, "auxiliary: expected a positive integer or an escnn.nn.FieldType, found True"),
    (1.0, TypeError, "auxiliary: expected a positive integer or an escnn.nn.FieldType, found 1.0"),
    (SPACE, ValueError, r"auxiliary: expected a type over SO\(2\).* found one over SO\(3\)"),
])  # fmt: skip
def test_wrong_auxiliary_fields(auxiliary, error, message):
    with pytest.raises(error, match=message):
        pe.augment(PLANE, auxiliary)
    with pytest.raises(error, match=message):
        pe.AutoEquivariantFlow(conjugate, {"z": PLANE}, auxiliary=auxiliary)


# ---- the bound ---------------------------------------------------------------------------------------------------


def test_bound_of_a_gaussian_marginal():
    """Below the exact value, rising with the particles, tending to it; with one particle in closed form."""
    density = augmented(PLANE, PLANE, linear)
    with torch.no_grad():
        truth = float(exact(density, POINT))
        found = {k: mean_and_error(density.log_prob_bound(POINT.expand(20_000 // k, 2), k)) for k in (1, 5, 50)}
        many = mean_and_error(density.log_prob_bound(POINT.expand(40, 2), 5000))
    assert abs(found[1][0] - float(elbo(density, POINT).detach())) < 4 * found[1][1]
    for fewer, more in ((1, 5), (5, 50)):
        assert found[more][0] - found[fewer][0] > 4 * math.hypot(found[more][1], found[fewer][1])
    assert found[5][0] < truth - 4 * found[5][1]
    # The bias of 5000 particles is below a tenth of the standard error.
    assert abs(many[0] - truth) < 4 * many[1] and many[1] < 5e-3


def test_gradients_of_the_bound():
    """Of one particle that of the closed form, of many that of the exact density, in 5 standard errors."""
    density = augmented(PLANE, PLANE, linear)
    event = POINT.clone().requires_grad_()
    parameters = [event, *flow_of(density).parameters()]

    def gradient(value):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)])

    for reference, particles, batch in ((elbo, 1, 1000), (exact, 1000, 1)):
        expected = gradient(reference(density, event))
        x = event.expand(batch, 2)
        found = torch.stack([gradient(density.log_prob_bound(x, particles).mean()) for _ in range(60)])
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - expected).abs() < 5 * error).all()
        assert (error < 0.05 * expected.norm()).all()


def quadrature(density, x, step=0.05, reach=9.0):
    """The log marginal and the bound of one particle, by the trapezium rule over two auxiliary channels."""
    axis = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    e = torch.cartesian_prod(axis, axis)
    log_joint = density.joint.log_prob(torch.cat([x.expand(len(e), 2), e], -1))
    log_target = dist.Normal(0.0, 1.0).log_prob(e).sum(-1)
    bound = (log_target.exp() * (log_joint - log_target)).sum() * step**2
    return float(log_joint.logsumexp(0)) + 2 * math.log(step), float(bound)


@torch.no_grad()
def test_bound_of_a_coupling_flow():
    density = augmented(PLANE, PLANE, lambda kind: couplings(kind, linear=False))
    truth, bound = quadrature(density, POINT)
    assert (truth, bound) == pytest.approx(quadrature(density, POINT, step=0.1), abs=1e-8)
    one = mean_and_error(density.log_prob_bound(POINT.expand(20_000, 2)))
    many = mean_and_error(density.log_prob_bound(POINT.expand(40, 2), 2500))
    assert abs(one[0] - bound) < 4 * one[1] and bound < truth - 0.1
    assert abs(many[0] - truth) < 4 * many[1] and many[1] < 1e-2


@torch.no_grad()
def test_draws_have_the_marginal():
    """Draws: the Gaussian's covariance; with the fields that came with them: the joint's."""
    density = augmented(PLANE, PLANE, linear)
    expected = covariance(density)
    x = density.sample((20_000,))
    joint = torch.cat(density.rsample_augmented((20_000,)), -1)
    error = 5 * math.sqrt(2 / 20_000) * float(expected.diagonal().max())
    torch.testing.assert_close(x.T.cov(), expected[:2, :2], rtol=0, atol=error)
    torch.testing.assert_close(joint.T.cov(), expected, rtol=0, atol=error)


def test_draws_carry_gradients():
    density = augmented(PLANE, 2, couplings)
    pyro.set_rng_seed(1)
    x = density.rsample((3,))
    pyro.set_rng_seed(1)
    plain = density.sample((3,))
    assert torch.equal(x, plain) and x.requires_grad and not plain.requires_grad and density.has_rsample
    x.square().sum().backward()
    assert all(p.grad is not None for p in flow_of(density).parameters())


@pytest.mark.parametrize("name, kind, auxiliary, spatial", [
    ("one vector of SO(3)", SPACE, 2, ()),
    ("one vector of SO(3), a vector beside it", SPACE, SPACE, ()),
    ("one vector of O(2)", point(O2, O2.irrep(1, 1)), 1, ()),
    ("a grey image", FieldType(gspaces.rot2dOnR2(4), [gspaces.rot2dOnR2(4).trivial_repr]), 1, (4, 4)),
])  # fmt: skip
@torch.no_grad()
def test_invariance(name, kind, auxiliary, spatial):
    density = augmented(kind, auxiliary, couplings, spatial)
    joint_type = pe.augment(kind, auxiliary)
    x, e = density.rsample_augmented((3,))
    assert x.shape == (3, *density.event_shape)
    testing.assert_invariant(density.joint, density.joint.sample((3,)), joint_type)
    value = density.log_prob_bound(x, 2)
    if auxiliary != SPACE and not spatial:
        # The group leaves these auxiliary fields as they are, so the same noise serves the moved event.
        for element in grid_elements(kind):
            pyro.set_rng_seed(5)
            value = density.log_prob_bound(x, 2)
            pyro.set_rng_seed(5)
            torch.testing.assert_close(density.log_prob_bound(act(kind, element, x), 2), value, rtol=0, atol=1e-11)
    assert value.shape == (3,) and torch.isfinite(value).all()
    flat = e.flatten(1)
    torch.testing.assert_close(density.auxiliary_log_prob(e), dist.Normal(0.0, 1.0).log_prob(flat).sum(-1))


@torch.no_grad()
def test_batches():
    """Each of a batch of distributions has its own marginal; events and distributions broadcast."""
    joint_type = pe.augment(PLANE, PLANE)
    scale = torch.tensor([[0.8, 1.0], [1.0, 0.9], [1.2, 1.1]], dtype=torch.float64)
    flow = linear(joint_type).double()
    base = pe.InvariantNormal(joint_type, scale=scale)
    density = pe.AugmentedDistribution(dist.TransformedDistribution(base, [flow]), PLANE)
    assert density.batch_shape == (3,) and density.event_shape == (2,) and density.event_dim == 1
    assert density.sample((4,)).shape == (4, 3, 2)
    matrix = flow(torch.eye(4, dtype=torch.float64)).T
    for x in (POINT, POINT.expand(2, 1, 2)):
        found = density.log_prob_bound(x, 50_000)
        assert found.shape == (*x.shape[:-2], 3)
        for index, (a, b) in enumerate(scale):
            root = matrix * torch.stack([a, a, b, b])
            marginal = dist.MultivariateNormal(torch.zeros(2).double(), (root @ root.T)[:2, :2])
            assert (found[..., index] - marginal.log_prob(POINT)).abs().max() < 0.03
    wide = density.expand((5, 3))
    assert wide.batch_shape == (5, 3) and wide.log_prob_bound(POINT, 2).shape == (5, 3)
    assert wide.sample().shape == (5, 3, 2)


def test_seeds_copies_and_dtypes():
    for dtype in (torch.float32, torch.float64):
        density = augmented(SPACE, 2, couplings, dtype=dtype)
        x = density.sample((4,))
        results = []
        for each in (density, copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
            pyro.set_rng_seed(2)
            results.append(each.log_prob_bound(x, 3))
        assert x.dtype == results[0].dtype == dtype
        assert all(torch.equal(other, results[0]) for other in results[1:])
    other = augmented(SPACE, 2, couplings)
    flow_of(other).load_state_dict(flow_of(density).state_dict())
    pyro.set_rng_seed(2)
    assert torch.equal(other.log_prob_bound(x, 3), results[0])


def shell(count):
    """Points about a sphere of radius 2, and their exact log-density: a normal radius over the sphere's area."""
    radius = 2 + 0.1 * torch.randn(count, 1, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=-1)
    log_area = (4 * math.pi * radius.square()).log()
    return radius * direction, (dist.Normal(2.0, 0.1).log_prob(radius) - log_area).squeeze(-1)


def test_maximum_likelihood():
    """As a factor of a model with a subsampling plate: better than any normal, and by Gibbs below the data's own."""
    options = {"num_transforms": 4, "hidden_dims": (16, 16), "identity_init": False}
    density = augmented(SPACE, 2, lambda kind: pe.equivariant_flow(kind, **options))
    data, own = shell(2000)

    def model():
        pyro.module("flow", flow_of(density))
        with pyro.plate("data", len(data), subsample_size=200) as index:
            pyro.factor("x", density.log_prob_bound(data[index], 4))

    with torch.no_grad():
        density.joint.log_prob(torch.cat([data, torch.randn(2000, 2, dtype=torch.float64)], -1))  # sets the actnorms
    svi = SVI(model, lambda: None, pyro.optim.ClippedAdam({"lr": 5e-3}), Trace_ELBO())
    for _ in range(100):
        svi.step()
    with torch.no_grad():
        gap = density.log_prob_bound(data, 20) - own
    best_normal = -1.5 * math.log(2 * math.pi * math.e * data.square().mean())
    assert float(gap.mean() + own.mean()) > best_normal + 0.5
    assert float(gap.mean()) < 4 * mean_and_error(gap)[1]


def test_refusals():
    density = augmented(PLANE, 2, couplings)
    with pytest.raises(NotImplementedError, match="no exact log_prob.*log_prob_bound.*equivariant_residual"):
        density.log_prob(POINT)
    with pytest.raises(ValueError, match="num_particles: expected a positive integer, found 0"):
        density.log_prob_bound(POINT, 0)
    with pytest.raises(ValueError, match=r"expected an input of shape \(\*batch, 2\) .* found \(4,\)"):
        density.log_prob_bound(torch.zeros(4).double())
    with pytest.raises(TypeError, match="floating-point"):
        density.log_prob_bound(torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="joint: expected a distribution, found Compose"):
        pe.AugmentedDistribution(flow_of(density), PLANE)
    with pytest.raises(ValueError, match=r"more than the 2 channels .* found \(2,\); build the joint for augment"):
        pe.AugmentedDistribution(normal(PLANE), PLANE)
    with pytest.raises(TypeError, match="field_type: expected an escnn.nn.FieldType, found str"):
        pe.AugmentedDistribution(normal(PLANE), "plane")
    image = FieldType(gspaces.rot2dOnR2(4), [gspaces.rot2dOnR2(4).trivial_repr])
    grey = pe.AugmentedDistribution(normal(pe.augment(image, 1), (4, 4)), image)
    with pytest.raises(ValueError, match=r"value: expected events of shape \(1, 4, 4\), .* found \(1, 3, 3\)"):
        grey.log_prob_bound(torch.zeros(1, 3, 3))


# ---- the guide ---------------------------------------------------------------------------------------------------

SPREAD = 0.5
EVIDENCE = float(dist.Normal(0.0, math.hypot(1.0, SPREAD)).expand([3]).log_prob(torch.zeros(3)).sum())


def conjugate(dtype=torch.float64):
    """A normal vector seen at the origin with normal noise: the evidence is a normal's density."""
    zero = torch.zeros(3, dtype=dtype)
    z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, SPREAD).to_event(1), obs=zero)


def make_guide(auxiliary=2, representations=None, **options):
    return pe.AutoEquivariantFlow(
        conjugate,
        {"z": SPACE} if representations is None else representations,
        lambda kind: pe.equivariant_flow(kind, num_transforms=2, hidden_dims=(16,), log_scale_bound=1.0),
        auxiliary=auxiliary,
        init_scale=1.0,
        **options,
    )


def train(guide, steps=60, elbo=Trace_ELBO):
    loss = elbo(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(conjugate, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), loss)
    return [svi.step() for _ in range(steps)]


def test_guide_without_auxiliary_fields_names_them():
    with pytest.raises(ValueError, match="Add fields .*augment.*auxiliary=2 of AutoEquivariantFlow"):
        make_guide(auxiliary=None)()


@pytest.mark.parametrize("auxiliary", [2, SPACE], ids=["numbers", "vector"])
def test_evidence(auxiliary):
    """A guide nats from the posterior: the evidence within errors, bounds below it in order; training closes gaps."""
    guide = make_guide(auxiliary)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    before = importance_weights(conjugate, guide, num_samples=20_000, batch_size=20_000)
    found = evidence_estimate(before)
    assert found.efficiency > 0.02 and abs(found.log_evidence - EVIDENCE) < 4 * found.log_evidence_stderr
    bounds = [importance_weighted_bound(before, k) for k in (1, 4, 16)]
    assert bounds[0][0] == pytest.approx(found.elbo)
    assert all(more[0] - fewer[0] > 4 * more[1] for fewer, more in zip(bounds, bounds[1:]))
    assert bounds[-1][0] < EVIDENCE + 4 * bounds[-1][1]
    train(guide, steps=100)
    after = evidence_estimate(importance_weights(conjugate, guide, num_samples=4000))
    assert after.elbo > found.elbo + 1 and after.elbo < EVIDENCE + 4 * after.elbo_stderr
    assert abs(after.log_evidence - EVIDENCE) < 4 * after.log_evidence_stderr


def test_evidence_of_a_model_with_a_plate():
    """Particles stand to the left of the plate: of two independent vectors the evidence is the product."""

    def pair():
        zero = torch.zeros(3, dtype=torch.float64)
        with pyro.plate("vectors", 2):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, SPREAD).to_event(1), obs=zero)

    two = point(SO3, SO3.irrep(1), SO3.irrep(1))
    guide = pe.AutoEquivariantFlow(
        pair, {"z": two}, lambda kind: pe.equivariant_linear(kind), auxiliary=two, init_scale=1.0
    )
    found = evidence_estimate(importance_weights(pair, guide, num_samples=20_000, batch_size=20_000))
    assert abs(found.log_evidence - 2 * EVIDENCE) < 4 * found.log_evidence_stderr < 0.2
    elbo = -Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1).loss(pair, guide)
    assert abs(elbo - found.elbo) < 4 * math.sqrt(2) * found.elbo_stderr


def test_log_weights_are_the_joint_ones():
    """The guide's log-density is log q(z, e) - log r(e), and so are its gradients, those along the draw included."""
    guide = make_guide(SPACE)
    train(guide, steps=3)
    trace = pyro.poutine.trace(guide).get_trace()
    joint = trace.nodes["_AutoEquivariantFlow_latent"]["value"]
    z, e = joint[..., :3], joint[..., 3:]
    assert torch.equal(trace.nodes["z"]["value"], z)
    posterior = guide.get_posterior()
    expected = posterior.joint.log_prob(joint.clone()) - dist.Normal(0.0, 1.0).log_prob(e).sum()
    found = trace.log_prob_sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, list(guide.parameters()), retain_graph=True) for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    testing.assert_invariant(posterior.joint, posterior.joint.sample((5,)), pe.augment(SPACE, SPACE), tolerance=1e-10)


def test_other_objectives():
    guide = make_guide()
    losses = train(guide, steps=40, elbo=TraceGraph_ELBO)
    assert sum(losses[-10:]) < sum(losses[:10]) - 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guide_in_use(dtype):
    guide = make_guide()
    assert guide(dtype)["z"].dtype == dtype
    for parallel in (False, True):
        draws = Predictive(conjugate, guide=guide, num_samples=5, parallel=parallel, return_sites=["z", "y"])(dtype)
        assert draws["z"].shape == (5, 3)
    posterior = guide.get_posterior()
    assert isinstance(posterior, pe.AugmentedDistribution) and posterior.event_shape == (3,)
    assert posterior.log_prob_bound(posterior.sample((4,)), 2).dtype == dtype
    # 5 standard errors of 10 000 draws.
    assert float(guide.median()["z"].abs().max()) < 0.1
    spread = guide.quantiles([0.1, 0.9])["z"]
    assert spread.shape == (2, 3) and bool((spread[0] < spread[1]).all())


def test_auxiliary_fields_are_forgotten():
    """Under the guide's seed, quantiles are those of the latent columns of joint draws."""
    guide = make_guide(SPACE)
    train(guide, steps=3)
    pyro.set_rng_seed(4)
    found = guide.quantiles([0.25])["z"][0]
    pyro.set_rng_seed(4)
    draws = guide.get_posterior().joint.sample((10_000,))[:, :3]
    torch.testing.assert_close(found, draws.quantile(0.25, dim=0))


def test_average_over_a_group():
    """A flow under no group, averaged over rotations by quarters: each log-density, and the evidence."""
    cube, trivial = group.octa_group(), group.trivial_group()
    nothing = point(trivial, *3 * [trivial.trivial_representation])
    guide = make_guide(2, {"z": nothing})
    train(guide, steps=20)
    plain = guide.get_posterior().joint
    turned = point(cube, cube.irrep(1))
    guide.average_over({"z": turned})
    average = guide.get_posterior()
    joint = average.joint.sample((4,))
    z, e = average.split(joint)
    orbit = [plain.log_prob(torch.cat([act(turned, g, z), e], -1)) for g in cube.elements]
    expected = torch.stack(orbit).logsumexp(0) - math.log(24)
    torch.testing.assert_close(average.joint.log_prob(joint), expected)
    assert (expected - orbit[0]).abs().max() > 1e-3
    found = evidence_estimate(importance_weights(conjugate, guide, num_samples=4000))
    assert abs(found.log_evidence - EVIDENCE) < 4 * found.log_evidence_stderr
    assert guide.median()["z"].shape == (3,) and all(map(math.isfinite, train(guide, steps=2)))


def test_guide_survives(tmp_path):
    guide = make_guide()
    train(guide, steps=3)
    joint = guide.get_posterior().joint
    latent = joint.sample((4,))
    expected = joint.log_prob(latent.clone())
    fresh = make_guide()
    pyro.get_param_store().save(str(tmp_path / "store"))
    state = copy.deepcopy(guide.state_dict())
    copies = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))]
    pyro.clear_param_store()
    fresh()
    fresh.load_state_dict(state)
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    stored = make_guide()
    stored()
    for each in (*copies, fresh, stored):
        assert torch.equal(each.get_posterior().joint.log_prob(latent.clone()), expected)
        assert each()["z"].shape == (3,)


def test_neutra_is_refused():
    guide = make_guide()
    guide()
    model = pyro.poutine.reparam(conjugate, config=lambda _: NeuTraReparam(guide))
    mcmc = MCMC(HMC(model, step_size=0.1, num_steps=2), num_samples=2, warmup_steps=1, disable_progbar=True)
    with pytest.raises(ValueError, match="expected 3 latent values, found 5.*normal site to the model"):
        mcmc.run()
