# SPDX-License-Identifier: Apache-2.0
"""The transforms as Pyro's users find them: in pyro.distributions.transforms."""

import inspect

import pyro.distributions.transforms as pyro_transforms
import pytest

import pyro_equiflow as pe
from pyro_equiflow import infer, logdet, maps, nn, solvers, transforms
from pyro_equiflow.registration import register

NAMES = [n for n in transforms.__all__ if "quivariant" in n and not n.endswith("Transform")]


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    assert getattr(pyro_transforms, name) is getattr(pe, name) is getattr(transforms, name)
    assert name in pyro_transforms.__all__


def test_names_are_the_public_ones():
    assert {"EquivariantCoupling", "ConditionalEquivariantCoupling", "equivariant_coupling"} <= set(NAMES)
    # A factory for each class.
    for name in NAMES:
        if name[0].isupper():
            snake = "".join("_" + c.lower() if c.isupper() else c for c in name)[1:]
            assert snake.replace("act_norm", "actnorm").replace("i_a_f", "iaf") in NAMES


def test_twice_is_once():
    before = list(pyro_transforms.__all__)
    register()
    assert pyro_transforms.__all__ == before
    assert len(before) == len(set(before))


def test_common_names_stay_pyros():
    assert pyro_transforms.ComposeTransform is not pe.Compose
    assert not hasattr(pyro_transforms, "Inverse") and not hasattr(pyro_transforms, "Compose")


def test_a_name_taken_is_an_error_and_adds_nothing(monkeypatch):
    monkeypatch.setattr(pyro_transforms, "equivariant_linear", object())
    monkeypatch.delattr(pyro_transforms, "equivariant_coupling")
    with pytest.raises(ValueError, match="pyro.distributions.transforms.equivariant_linear is taken by .object"):
        register()
    assert not hasattr(pyro_transforms, "equivariant_coupling")


#: A keyword of classes, twins and factories means the same wherever it stands, left out as well.
DEFAULTS = {
    "batch_size": 1000,
    "bias": True,
    "cache_size": 1,
    "check_invariance": True,
    "data_init": True,
    "distribution": "rademacher",
    "hidden_dims": (64, 64),
    "identity_init": True,
    "kernel_size": 3,
    "lipschitz": 0.9,
    "memory": 5,
    "num_levels": 256,
    "num_quantile_samples": 10_000,
    "on_failure": "raise",
    "padding_mode": "zeros",
    "probes": 1,
    "regularization": 1e-12,
    "rounding": 2.0,
    "rows": 64,
    "transformer": "affine",
    "zero_init": False,
}


def signatures():
    public = [
        (name, getattr(m, name)) for m in (pe, infer, logdet, maps, nn, solvers, transforms) for name in m.__all__
    ]
    for name, thing in public:
        parts = [thing] if inspect.isfunction(thing) else list(vars(thing).values()) if inspect.isclass(thing) else []
        for part in (getattr(part, "__func__", part) for part in parts):
            if inspect.isfunction(part):
                yield f"{name}: {part.__name__}", inspect.signature(part)


def test_a_keyword_has_one_default():
    seen = set()
    for owner, signature in signatures():
        for name, parameter in signature.parameters.items():
            if name in DEFAULTS and parameter.default is not parameter.empty:
                # As torch's own, elementwise maps of a line keep nothing.
                expected = 0 if owner in ("LogitTransform: __init__", "MeanFreePositions: __init__") else DEFAULTS[name]
                assert parameter.default == expected, f"{owner}: {name} = {parameter.default}"
                seen.add(name)
    assert seen == set(DEFAULTS)
