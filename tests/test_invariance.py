# SPDX-License-Identifier: Apache-2.0
"""The check of models: Jacobians, rounding against large data, trades among sites, discrete sites summed out."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.infer import AutoEquivariantFlow, check_model_invariance
from pyro_equiflow.infer.joint_density import LogJoint

TURNS = gspaces.no_base_space(group.so2_group())
FLIP = gspaces.no_base_space(group.cyclic_group(2))
VECTOR = {"z": FieldType(TURNS, [TURNS.irrep(1)])}
SIGN = {"s": FieldType(FLIP, [FLIP.irrep(1)])}
PRIOR = dist.Normal(torch.tensor(0.0).double(), 3.0)
SWAP = {"m": FieldType(FLIP, [FLIP.regular_repr])}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# ---- Jacobians -------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("wrap", ["plain", "plate", "subsample"])
def test_sign_flips_of_a_positive_site(wrap, dtype):
    """log s is normal: about 0 it may be flipped, about 1 not; without the Jacobian it would be the other way round."""

    def model(location):
        law = dist.LogNormal(torch.as_tensor(location, dtype=dtype), 1.0)
        if wrap == "plain":
            pyro.sample("s", law)
        else:
            with pyro.plate("rows", 6, subsample_size=3 if wrap == "subsample" else None):
                pyro.sample("s", law)

    size = {"plain": 1, "plate": 6, "subsample": 3}[wrap]
    flips = {"s": FieldType(FLIP, size * [FLIP.irrep(1)])}
    assert check_model_invariance(model, flips, 0.0).invariant
    assert check_model_invariance(model, flips, 1.0).offenders == ["s"]


def test_jacobian_of_the_unit_interval():
    """The logit of a Beta number is symmetric where both of its parameters are equal."""

    def model(a, b):
        pyro.sample("s", dist.Beta(torch.tensor(a), torch.tensor(b)))

    assert check_model_invariance(model, SIGN, 2.0, 2.0).invariant
    assert not check_model_invariance(model, SIGN, 2.0, 1.0).invariant


# ---- rounding --------------------------------------------------------------------------------------------------


def many_data(centre=0.0, count=1_000_000, dtype=torch.float32, scale=1.0, seed=0):
    data = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor([centre, 0.0], dtype=dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.norm(dim=-1, keepdim=True), scale).to_event(1), obs=data)

    return model


def test_many_data_hide_no_prior():
    for centre, count in ((3.0, 100_000), (1e-3, 100_000), (1e-4, 100)):
        report = check_model_invariance(many_data(centre, count), VECTOR)
        assert not report.invariant and report.offenders == ["z"], (centre, count)
        # log p(z) changes by centre * (z - g z) at most, for |z| of up to 10.
        assert centre / 10 < report.sites["z"].change < 20 * centre + 0.5 * centre**2
    assert not check_model_invariance(many_data(1e-9, 1000, torch.float64), VECTOR).invariant


@DTYPES
def test_many_data_break_no_symmetry(dtype):
    some = list(TURNS.fibergroup.testing_elements())[::5]
    assert check_model_invariance(many_data(count=1_000_000, dtype=dtype), VECTOR, elements=some).invariant


def pairs(draw_distance, scale, dtype, count=12):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(count, 2, dtype=dtype), 5.0).to_event(2))
        observed = torch.ones(count, count, dtype=dtype)
        pyro.sample("d", dist.Normal(draw_distance(z), scale).to_event(2), obs=observed)

    return model, {"z": FieldType(TURNS, count * [TURNS.irrep(1)])}


def by_products(z):
    """Cancels: off by the root of machine epsilon where distances vanish."""
    return torch.cdist(z, z, compute_mode="use_mm_for_euclid_dist")


def by_differences(z):
    return (z[:, None] - z[None]).square().sum(-1).add(1e-12).sqrt()


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("distance", [by_products, by_differences])
def test_rounding_is_no_offence(distance, scale, dtype):
    for seed in range(2):
        pyro.set_rng_seed(seed)
        report = check_model_invariance(*pairs(distance, scale, dtype))
        assert report.invariant, report


@DTYPES
def test_large_terms_that_cancel(dtype):
    """A density whose parts are ten times the whole, the same for all data: rounding comes in large, rare steps."""
    data = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.5
    space = gspaces.no_base_space(group.o3_group())

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Gamma(1e4 * z.norm() + 1, 1e4).expand([200]).to_event(1), obs=data)

    for seed in (0, 5, 13):  # in float64 the last two need more than the first probes
        pyro.set_rng_seed(seed)
        assert check_model_invariance(model, {"z": FieldType(space, [space.irrep(1, 1)])}).invariant


def test_tolerance_in_nats():
    model = many_data(1e-2, 10)
    report = check_model_invariance(model, VECTOR)
    assert not report.invariant
    assert check_model_invariance(model, VECTOR, tolerance=1.01 * report.absolute).invariant
    assert not check_model_invariance(model, VECTOR, tolerance=0.5 * report.absolute).invariant
    for wrong in (-1.0, math.nan, "loose", True):
        with pytest.raises((TypeError, ValueError), match="tolerance: expected a number .*found"):
            check_model_invariance(model, VECTOR, tolerance=wrong)


@pytest.mark.parametrize("elements", [[], [0.5], list(FLIP.fibergroup.testing_elements())])
def test_elements_of_another_group(elements):
    with pytest.raises((TypeError, ValueError), match="elements: expected .*, found"):
        check_model_invariance(many_data(count=2), VECTOR, elements=elements)


# ---- sites that trade density ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 20_000])
@pytest.mark.parametrize("centre", [3.0, 1e-2])
@pytest.mark.parametrize("honest", [True, False])
def test_sites_may_trade(honest, centre, count):
    """A factor takes the prior's centre back; with many data beside, or as part of them."""
    data = torch.randn(count, generator=torch.Generator().manual_seed(0))
    centre = torch.tensor([centre, 0.0])

    def model():
        z = pyro.sample("z", dist.Normal(centre, 1.0).to_event(1))
        pyro.factor("back", -(centre @ z) * (1.0 if honest else 0.99))
        if count:
            pyro.sample("y", dist.Normal(z.norm(dim=-1, keepdim=True), 1.0).to_event(1), obs=data)

    report = check_model_invariance(model, VECTOR)
    assert report.invariant is honest
    assert set(report.offenders) == {"z", "back"}
    assert ("trade" in str(report)) is honest


def test_a_trade_below_rounding_of_one_site():
    """The data's site takes back what the prior changes, less than its own rounding: still a trade."""
    centre = torch.tensor([0.05, 0.0])

    def model(share):
        z = pyro.sample("z", dist.Normal(centre, 1.0).to_event(1))
        back = torch.zeros(200_000)
        back[0] = -share * (centre @ z)
        pyro.factor("y", torch.full((200_000,), -5.0) + back)

    # Terms of 1e6 in all may be off by 4 * 1.2e-7 * 1.2e6 = .6, ten times the prior's change.
    assert check_model_invariance(model, VECTOR, 1.0).invariant
    assert not check_model_invariance(model, VECTOR, 0.0).invariant


# ---- discrete sites --------------------------------------------------------------------------------------------

DATA = torch.tensor([-2.0, -1.8, 2.0, 2.2, 1.9], dtype=torch.float64)
EVEN, UNEVEN = (torch.tensor(weights, dtype=torch.float64) for weights in ([0.5, 0.5], [0.4, 0.6]))


def mixture(weights=EVEN, subsample=None, mask=None):
    m = pyro.sample("m", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
    with pyro.plate("data", 5, subsample_size=subsample) as index:
        k = pyro.sample("k", dist.Categorical(weights))
        with poutine.mask(mask=True if mask is None else mask[index]):
            pyro.sample("y", dist.Normal(Vindex(m)[..., k], 1.0), obs=DATA[index])


def hmm(flip=0.3):
    m = pyro.sample("m", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
    turn = torch.tensor([[0.7, 0.3], [flip, 1 - flip]]).double()
    k = pyro.sample("k0", dist.Categorical(EVEN))
    for t in pyro.markov(range(4)):
        k = pyro.sample(f"k{t + 1}", dist.Categorical(Vindex(turn)[..., k, :]))
        pyro.sample(f"y{t}", dist.Normal(Vindex(m)[..., k], 1.0), obs=DATA[t])


def switch(weights=EVEN):
    """A discrete site outside of the plate that depends on it."""
    m = pyro.sample("m", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
    k = pyro.sample("k", dist.Categorical(weights))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(Vindex(m)[..., k], 1.0), obs=DATA)


WRAPS = {
    "plain": lambda model: model,
    "parallel": config_enumerate,
    "sequential": lambda model: config_enumerate(model, default="sequential"),
    "hidden": lambda model: poutine.block(model, hide=["k", "k0", "k1", "k2", "k3", "k4"]),
    "exposed": lambda model: poutine.block(config_enumerate(model), expose=["m"]),
    "marked outside": lambda model: config_enumerate(poutine.block(model, expose=["m"])),
}


@pytest.mark.parametrize(
    "model, broken, wrap",
    [(mixture, UNEVEN, wrap) for wrap in WRAPS.values()]
    + [
        (model, broken, WRAPS[wrap]) for model, broken in ((switch, UNEVEN), (hmm, 0.4)) for wrap in ("plain", "hidden")
    ],
    ids=[*WRAPS, "switch", "switch hidden", "chain", "chain hidden"],
)
def test_relabelled_components(model, broken, wrap):
    report = check_model_invariance(wrap(model), SWAP)
    assert report.invariant, report
    assert report.summed[0] in ("k", "k0") and "summed out: k" in str(report) and not report.held
    found = check_model_invariance(wrap(model), SWAP, broken)
    assert not found.invariant and found.offenders[0].startswith("k")


def test_hidden_data_count():
    """A guide sees a model whose likelihood is hidden; the ELBO does not."""

    def model():
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.sample("y", dist.Normal(m[..., 0], 1.0), obs=torch.tensor(1.0))

    assert check_model_invariance(poutine.block(model, expose=["m"]), SWAP).offenders == ["y"]


def test_held_sites():
    """Counts have no finite support, and a site may be kept out of the sum; hidden continuous sites stay as well."""

    def model():
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": None})
        n = pyro.sample("n", dist.Poisson(3.0))
        w = pyro.sample("w", dist.Normal(m.sum(-1), 1.0))
        pyro.sample("y", dist.Normal(m[k] + n + w, 1.0), obs=torch.tensor(1.0))

    report = check_model_invariance(poutine.block(model, hide=["w"]), SWAP)
    assert report.offenders == ["y"] and report.summed == () and set(report.held) == {"k", "n", "w"}
    assert "held fixed: k, n, w" in str(report)


def test_models_that_do_not_enumerate():
    def model():
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        if pyro.sample("k", dist.Bernoulli(0.5)):
            pyro.sample("y", dist.Normal(m.sum(-1), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(
        ValueError, match='discrete sites k enumerated in parallel, found RuntimeError: Boolean.*"enumerate": None'
    ):
        check_model_invariance(model, SWAP)
    marked = poutine.infer_config(model, config_fn=lambda site: {"enumerate": None})
    assert check_model_invariance(marked, SWAP).held == ("k",)


def brute_force(model, m, *args):
    """log p(m, y) by running the model once per assignment: scales outside, masks inside of the sum."""
    with poutine.block(), poutine.trace() as start:
        poutine.condition(model, {"m": m})(*args)
    ks = [name for name in start.trace.nodes if name.startswith("k")]
    shapes = [start.trace.nodes[name]["value"].shape for name in ks]
    total, joints = sum(shape.numel() for shape in shapes), []
    for bits in itertools.product([0, 1], repeat=total):
        values, rest = {"m": m}, list(bits)
        for name, shape in zip(ks, shapes):
            values[name] = torch.tensor([rest.pop(0) for _ in range(shape.numel())]).reshape(shape)
        with poutine.block():
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
        trace.compute_log_prob()
        joints.append(sum(s["log_prob_sum"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != "m"))
    return torch.stack(joints).logsumexp(0) + PRIOR.log_prob(m).sum()


@pytest.mark.parametrize("model", [mixture, switch, hmm], ids=lambda x: x.__name__)
def test_sums_over_assignments(model):
    joint = LogJoint(model, (), {})
    m = torch.tensor([0.3, -1.7], dtype=torch.float64)
    found = sum(site.value for site in joint({"m": m}).values())
    assert found == pytest.approx(float(brute_force(model, m)), rel=1e-12)


def test_scales_and_masks_of_summed_sites():
    """Scales stand outside of the logarithm, masks inside, as in TraceEnum_ELBO."""
    mask = torch.tensor([True, False, True, True, False])
    m = torch.tensor([0.3, -1.7], dtype=torch.float64)
    joint = LogJoint(mixture, (UNEVEN, None, mask), {})
    each = (dist.Normal(m, 1.0).log_prob(DATA[:, None]) + UNEVEN.log()).logsumexp(-1)
    prior = PRIOR.log_prob(m).sum()
    assert sum(s.value for s in joint({"m": m}).values()) == pytest.approx(float(prior + each[mask].sum()), rel=1e-12)
    pyro.set_rng_seed(0)
    joint = LogJoint(mixture, (UNEVEN, 2), {})
    index = joint._start.nodes["data"]["value"]
    expected = prior + 5 / 2 * each[index].sum()
    assert sum(s.value for s in joint({"m": m}).values()) == pytest.approx(float(expected), rel=1e-12)


def test_unlike_scales_are_refused():
    def model():
        pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", 10, subsample_size=5):
            pyro.sample("y", dist.Normal(k.double(), 1.0), obs=torch.zeros(5))

    with pytest.raises(ValueError, match="expected one scale.*k: 1.0, y: 2.0"):
        check_model_invariance(model, SWAP)


def test_guide_of_a_mixture():
    """The guide's first call passes, and the fit is that of the whole model with its assignments summed out."""
    marked = config_enumerate(mixture)
    guide = AutoEquivariantFlow(
        poutine.block(marked, expose=["m"]),
        SWAP,
        lambda t: equivariant_flow(t, kind="iaf", num_transforms=2, hidden_dims=(8,)),
    )
    svi = SVI(marked, guide, pyro.optim.Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step()) and guide.invariance_report.summed == ("k",)
    refused = AutoEquivariantFlow(poutine.block(marked, hide=["k"]), SWAP)
    with pytest.raises(ValueError, match="Sites that change: k . y"):
        refused(UNEVEN)
