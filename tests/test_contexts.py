# SPDX-License-Identifier: Apache-2.0
"""Batches of contexts in distributions: independent noise for each, right batch shapes, in every family."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

import pyro_equiflow as pe
from tests.cases import point, randomize

FAMILIES = {
    "coupling": lambda *types: pe.conditional_equivariant_coupling(*types, hidden_dims=(8,)),
    "coupling-spline": lambda *types: pe.conditional_equivariant_coupling(
        *types, hidden_dims=(8,), transformer="spline"
    ),
    "iaf": lambda *types: pe.conditional_equivariant_iaf(*types, hidden_dims=(8,)),
    "residual": lambda *types: pe.conditional_equivariant_residual(*types, hidden_dims=(8,), lipschitz=0.5),
    "implicit": lambda *types: pe.conditional_equivariant_implicit(*types, hidden_dims=(8,), lipschitz=0.5),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def types(on_grid=False):
    if on_grid:
        space = gspaces.rot2dOnR2(4)
        return enn.FieldType(space, 2 * [space.trivial_repr]), enn.FieldType(space, [space.trivial_repr])
    so2 = group.so2_group()
    return point(so2, so2.irrep(1), so2.irrep(0), so2.irrep(1)), point(so2, so2.irrep(1), so2.irrep(0))


def family_of(name, on_grid=False):
    torch.manual_seed(3)
    return randomize(FAMILIES[name](*types(on_grid)), std=0.1)


@every_family
@pytest.mark.parametrize("inverted", [False, True])
def test_every_context_draws_noise_of_its_own(name, inverted):
    """The law of a draw under context c is that of the base pushed through T(. | c), draws of unlike contexts apart."""
    family = family_of(name)
    event_type, context_type = types()
    base = pe.InvariantNormal(event_type)
    contexts = torch.randn(400, context_type.size)
    conditioned = family.condition(contexts)
    flow = dist.TransformedDistribution(base, [pe.Inverse(conditioned) if inverted else conditioned])
    assert flow.batch_shape == (400,) and flow.event_shape == (event_type.size,)
    with torch.no_grad():
        x = flow.sample()
        assert x.shape == (400, event_type.size)
        noise = conditioned(x) if inverted else conditioned.inv(x)
        # Independent standard normals: 400 of them repeat nowhere, and have their mean square.
        assert len(noise[:, 0].unique()) > 390
        torch.testing.assert_close(noise.square().mean(), torch.tensor(1.0), atol=0.15, rtol=0)  # 5 standard errors
        for sample_shape in [(), (1,), (3, 1)]:
            x = flow.sample(sample_shape)
            assert x.shape == (*sample_shape, 400, event_type.size)
            assert flow.log_prob(x).shape == (*sample_shape, 400)
        # The density of one row is that given its context alone.
        x, scores = flow.sample(), None
        scores = flow.log_prob(x)
        for i in (0, 7):
            alone = family.condition(contexts[i])
            one = dist.TransformedDistribution(base, [pe.Inverse(alone) if inverted else alone])
            torch.testing.assert_close(one.log_prob(x[i]), scores[i], atol=1e-3, rtol=1e-4)


@every_family
def test_batches_on_grids(name):
    """A field as context and a vector as context; a base that has the batch already, and one that is broadcast."""
    family = family_of(name, on_grid=True)
    event_type, context_type = types(on_grid=True)
    base = pe.InvariantNormal(event_type, (3, 3))
    for context in (torch.randn(5, context_type.size, 3, 3), torch.randn(5, context_type.size)):
        with torch.no_grad():
            for given in (base, base.expand((5,)), base.expand((2, 1))):
                flow = dist.ConditionalTransformedDistribution(given, [family]).condition(context)
                expected = (2, 5) if given.batch_shape == (2, 1) else (5,)
                assert flow.batch_shape == expected
                x = flow.sample((4,))
                assert x.shape == (4, *expected, event_type.size, 3, 3)
                assert flow.log_prob(x).shape == (4, *expected)
                assert len(x[..., 0, 0, 0].flatten().unique()) == x[..., 0, 0, 0].numel()


def test_batches_of_contexts_inside_stacks():
    """Conditioned parts inside ``Compose`` and ``MultiScale``, with others before and after."""
    event_type, context_type = types()
    part = family_of("coupling").condition(torch.randn(6, context_type.size))
    for parts in ([part, pe.equivariant_linear(event_type)], [pe.equivariant_linear(event_type), part]):
        flow = dist.TransformedDistribution(pe.InvariantNormal(event_type), [pe.Compose(parts)])
        x = flow.rsample((2,))
        assert flow.batch_shape == (6,) and x.shape == (2, 6, event_type.size)
        assert len(x[..., 0].flatten().unique()) == 12 and flow.log_prob(x).shape == (2, 6)

    image_type = types(on_grid=True)[0]
    squeezed, deeper = pe.MultiScale.types(image_type)
    context_type = enn.FieldType(image_type.gspace, [image_type.gspace.trivial_repr])
    family = randomize(pe.conditional_equivariant_coupling(deeper, context_type, hidden_dims=(8,)), std=0.1)
    level = pe.MultiScale(image_type, pe.equivariant_linear(squeezed), family.condition(torch.randn(6, 1)))
    flow = dist.TransformedDistribution(pe.InvariantNormal(image_type, (4, 4)), [level])
    x = flow.sample((2,))
    assert flow.batch_shape == (6,) and x.shape == (2, 6, 2, 4, 4)
    assert len(x[..., 0, 0, 0].flatten().unique()) == 12
    torch.testing.assert_close(level(level.inv(x)), x)
    assert level.inv(x[0, 0]).shape == (6, 2, 4, 4)


def test_plates_and_wrong_batches():
    event_type, context_type = types()
    family = family_of("coupling")
    contexts = torch.randn(7, context_type.size)
    conditioned = dist.ConditionalTransformedDistribution(pe.InvariantNormal(event_type), [family]).condition(contexts)

    def guide():
        with pyro.plate("data", 7):
            return pyro.sample("z", conditioned)

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (7, event_type.size)
    assert trace.nodes["z"]["log_prob"].shape == (7,)
    with pyro.plate("particles", 3, dim=-2):
        assert guide().shape == (3, 7, event_type.size)
    given = family.condition(contexts)
    with pytest.raises(ValueError, match=r"context: expected a batch shape that broadcasts .* found \(7,\)"):
        dist.TransformedDistribution(pe.InvariantNormal(event_type).expand((5,)), [given])
    for shape in (given.forward_shape, given.inverse_shape, given.inv.forward_shape, given.inv.inverse_shape):
        assert shape(torch.Size((2, 1, event_type.size))) == (2, 7, event_type.size)
