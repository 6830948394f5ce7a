# SPDX-License-Identifier: Apache-2.0
"""A checkpoint says what it belongs to: it does not load in silence into a transform that computes something else."""

import copy
import io
import re

import pytest
import torch
from escnn import nn as enn

import pyro_equiflow as pe
from pyro_equiflow import nn as pe_nn
from tests.cases import ONE_OF_EACH, field_type, randomize


def coupling(**options):
    return pe.equivariant_coupling(field_type("SO2"), hidden_dims=(8,), identity_init=False, **options)


def iaf(**options):
    return pe.equivariant_iaf(field_type("SO2"), hidden_dims=(8,), identity_init=False, **options)


def residual(**options):
    return pe.equivariant_residual(field_type("SO2"), hidden_dims=(8,), identity_init=False, **options)


def image(**options):
    return pe.equivariant_coupling(field_type("C4-plane"), hidden_dims=(8,), identity_init=False, **options)


#: Two of the same keys and shapes that compute unlike maps, and what tells them apart.
UNLIKE = {
    "split": (coupling, {"split": [0, 1]}, {"split": [1, 3]}, "split"),
    "function": (coupling, {}, {"function": "tanh"}, "function"),
    "log_scale_bound": (coupling, {}, {"log_scale_bound": 1.0}, "transformer.log_scale_bound"),
    "bound": (coupling, {"transformer": "spline"}, {"transformer": pe.maps.Spline(bound=2.0)}, "transformer.bound"),
    "order": (iaf, {}, {"order": [4, 1, 2, 3, 0]}, "order"),
    "iaf's function": (iaf, {}, {"function": "tanh"}, "function"),
    "lipschitz": (residual, {}, {"lipschitz": 0.5}, "lipschitz"),
    "residual's function": (residual, {}, {"function": "sin"}, "function"),
    "padding": (image, {}, {"padding_mode": "circular"}, "padding_mode"),
}


def _outputs(transform):
    torch.manual_seed(0)
    spatial = (4, 4)[: transform.event_dim - 1] if transform.event_dim > 1 else ()
    return transform.eval()(torch.randn(5, transform.field_type.size, *spatial))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", UNLIKE)
def test_another_architecture_is_refused(name, nested):
    make, own, other, word = UNLIKE[name]
    saved, target = (pe.Compose([randomize(make(**kw))]) if nested else randomize(make(**kw)) for kw in (own, other))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=rf"expected the checkpoint .* found another architecture: .*{word}: expected"):
        target.load_state_dict(saved.state_dict())
    # Nothing is half loaded.
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    # All the same, by choice; and the case is a real one: with equal parameters the maps differ.
    target.load_state_dict(saved.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), target.parameters()))
    assert (_outputs(saved) - _outputs(target)).abs().max() > 1e-4


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_the_same_architecture_loads(case):
    """Twice built, copied, cast, in the other mode, through a file: always the same description."""
    transform, fresh = ONE_OF_EACH[case](), ONE_OF_EACH[case]()
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(transform).double().eval().state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.get_extra_state(), transform.get_extra_state())
    with_settings = copy.deepcopy(transform)
    for part in with_settings.modules():
        if hasattr(part, "tolerance"):
            part.tolerance, part.max_steps, part.on_failure = 1e-3, 7, "warn"
    fresh.load_state_dict(with_settings.state_dict())


def test_layers_of_a_users_own():
    """Classes and public settings of whatever network a user gives."""

    class Scaled(pe_nn.SteerableModule):
        def __init__(self, kind, factor):
            super().__init__(kind, kind)
            self.factor = factor

        def expanded(self):
            return pe_nn.Expanded(lambda x: self.factor * x, ())

    def make(factor):
        kind = field_type("SO2")
        in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
        net = enn.SequentialModule(Scaled(in_type, factor), pe_nn.steerable_net(in_type, out_type))
        return pe.EquivariantCoupling(kind, net)

    make(2.0).load_state_dict(make(2.0).state_dict())
    with pytest.raises(ValueError, match=r"network\.0\.factor: expected 3.0, found 2.0"):
        make(3.0).load_state_dict(make(2.0).state_dict())


def test_the_message_is_short_and_names_the_remedy():
    first = pe.Compose([coupling(split=[0, 1], function="tanh", log_scale_bound=1.0) for _ in range(4)])
    second = pe.Compose([coupling(split=[1, 3]) for _ in range(4)])
    with pytest.raises(ValueError, match=re.escape("load_state_dict(..., strict=False)")) as caught:
        second.load_state_dict(first.state_dict())
    assert "more." in str(caught.value) and len(str(caught.value)) < 900
    assert "transforms.0.split: expected [1, 3], found [0, 1]" in str(caught.value)


def test_inside_another_module():
    """A user's module that holds flows: refused as well, and loaded all the same without the descriptions."""
    saved, target = (torch.nn.ModuleList([coupling(split=split)]) for split in ([0, 1], [1, 3]))
    with pytest.raises(ValueError, match="another architecture"):
        target.load_state_dict(saved.state_dict())
    target.load_state_dict({k: v for k, v in saved.state_dict().items() if "_extra_state" not in k}, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), target.parameters()))


def test_a_state_without_a_description_is_not_taken_in_silence():
    state = {k: v for k, v in coupling().state_dict().items() if "_extra_state" not in k}
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        coupling().load_state_dict(state)
