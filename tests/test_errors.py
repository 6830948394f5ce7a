# SPDX-License-Identifier: Apache-2.0
"""Errors users meet: expected and found, what to change, and nothing half done."""

import numpy as np
import pyro
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.nn import (
    GatedNonLinearity,
    PointwiseNonLinearity,
    SteerableConv,
    SteerableLinear,
    lipschitz_net,
    steerable_net,
)
from tests.cases import CASES, ONE_OF_EACH, events, field_type, make, point

every_kind = pytest.mark.parametrize("case", ONE_OF_EACH)
# What calls a transform with an event in any way.
CALLS = {
    "call": lambda transform, x: transform(x),
    "inverse": lambda transform, x: transform.inv(x),
    "log-det": lambda transform, x: transform.log_abs_det_jacobian(x, x),
}
every_call = pytest.mark.parametrize("call", CALLS)


def unchanged(transform, before):
    after = transform.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


def state(transform):
    return {k: v.clone() for k, v in transform.state_dict().items()}


# ---- events -------------------------------------------------------------------------------------------------


@every_kind
@every_call
def test_wrong_number_of_channels(case, call):
    transform = CASES[case]()
    x = events(case, (3,))
    wrong = torch.cat([x, x], 1)
    with pytest.raises(ValueError, match=rf"expected an input of shape \(\*batch, {x.shape[1]}.*found \(3, "):
        CALLS[call](transform, wrong)


@every_kind
@every_call
def test_too_few_dimensions(case, call):
    transform = CASES[case]()
    x = events(case)
    with pytest.raises(ValueError, match=r"expected an input of shape \(\*batch"):
        CALLS[call](transform, x[0])


@every_kind
@every_call
def test_not_a_tensor(case, call):
    with pytest.raises(TypeError, match="expected a torch.Tensor, found ndarray"):
        CALLS[call](CASES[case](), np.zeros(8, dtype=np.float32))


@every_kind
@every_call
def test_integers(case, call):
    x = torch.ones(events(case).shape, dtype=torch.long)
    with pytest.raises(TypeError, match="expected a floating-point input, found torch.int64; convert it with .to"):
        CALLS[call](CASES[case](), x)


@every_kind
@every_call
def test_another_dtype(case, call):
    with pytest.raises(
        TypeError, match="expected the parameters' dtype torch.float32, found an input of torch.float64"
    ):
        CALLS[call](CASES[case](), events(case).double())


@every_kind
@every_call
def test_another_device(case, call):
    x = events(case).to("meta")
    with pytest.raises(TypeError, match="expected the parameters' device cpu, found an input on meta"):
        CALLS[call](CASES[case](), x)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", ["call", "inverse"])
def test_values_that_are_not_finite(case, value, call):
    transform = CASES[case]()
    x = events(case, (4,))
    x[2].view(-1)[0] = value
    with pytest.raises(ValueError, match="expected finite values, found NaN or infinity in 1 of 4 samples"):
        CALLS[call](transform, x)
    with pyro.validation_enabled(False):
        if case.startswith("implicit") or (case.startswith("residual") and call == "inverse"):
            # A solver looks for itself.
            with pytest.raises(ValueError, match="expected finite values"):
                CALLS[call](transform, x)
        else:
            assert not CALLS[call](transform, x)[2].isfinite().all()


@every_call
def test_a_grid_that_is_not_square(call):
    transform = make("coupling", "C4-plane")
    x = torch.randn(2, transform.field_type.size, 3, 4)
    with pytest.raises(ValueError, match=r"expected a grid that .* maps to itself, found \(3, 4\); use equal side"):
        CALLS[call](transform, x)
    assert make("coupling", "flips-plane")(torch.randn(2, field_type("flips-plane").size, 3, 4)).shape[-1] == 4


@every_kind
def test_a_failed_call_changes_nothing(case):
    """Not the parameters, not the running state, not what the cache answers."""
    transform = CASES[case]()
    x = events(case, (20,))
    y = transform(x)
    before = state(transform)
    for bad in (x.double(), x[..., :-1], torch.full_like(x, float("nan"))):
        with pytest.raises((TypeError, ValueError)):
            transform(bad)
    assert unchanged(transform, before)
    torch.testing.assert_close(transform.inv(y), x, rtol=1e-4, atol=1e-4)


def test_a_failed_first_batch_leaves_actnorm_waiting():
    transform = pe.equivariant_actnorm(field_type("O2"))
    before = state(transform)
    bad = torch.randn(30, 8)
    bad[3, 1] = float("nan")
    with pytest.raises(ValueError, match="expected finite values"):
        transform(bad)
    assert unchanged(transform, before) and not transform.initialized


@every_kind
def test_shapes_that_hold_no_event(case):
    transform = CASES[case]()
    with pytest.raises(ValueError, match=r"expected a shape \(\*batch, .*found \(\)"):
        transform.forward_shape(torch.Size(()))
    with pytest.raises(ValueError, match=r"expected a shape \(\*batch, "):
        transform.inverse_shape(torch.Size((3, 99, 4, 4)))


# ---- types --------------------------------------------------------------------------------------------------

BUILDERS = {
    "coupling": pe.equivariant_coupling,
    "iaf": pe.equivariant_iaf,
    "linear": pe.equivariant_linear,
    "actnorm": pe.equivariant_actnorm,
    "residual": pe.equivariant_residual,
    "implicit": pe.equivariant_implicit,
    "flow": pe.equivariant_flow,
    "normal": pe.InvariantNormal,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_not_a_field_type(name):
    with pytest.raises(TypeError, match=r"field_type: expected an escnn.nn.FieldType, found int; build one with"):
        BUILDERS[name](8)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_representation_that_is_not_orthogonal(name):
    c4 = group.cyclic_group(4)
    skew = group.Representation(c4, "skew", [(0,), (1,)], np.array([[1.0, 0, 0.5], [0, 1, 0], [0, 0, 2]]), [])
    kind = point(c4, skew, c4.irrep(1))
    with pytest.raises(ValueError, match="field_type: expected orthogonal representations, found .*orthogonal change"):
        BUILDERS[name](kind)


def test_one_irrep_cannot_be_split():
    so3 = group.so3_group()
    with pytest.raises(ValueError, match="at least two irreps, found .* with 1: .*Add fields .*equivariant_residual or "
                       "equivariant_implicit.* OrbitMixture"):  # fmt: skip
        pe.equivariant_coupling(point(so3, so3.irrep(1)))
    c4 = group.cyclic_group(4)
    with pytest.raises(ValueError, match="at least two fields, found"):
        pe.equivariant_coupling(point(c4, c4.regular_representation), split_by="fields")


@pytest.mark.parametrize("split", [[], [0, 1, 2, 3, 4], [5], [-1], [0, 0]])
def test_wrong_splits(split):
    with pytest.raises(
        ValueError, match=r"split: expected distinct indices of some but not all of the 5 blocks, found"
    ):
        pe.equivariant_coupling(field_type("O2"), split=split)


@pytest.mark.parametrize("arguments, error, message", [
    ({"split_by": "channels"}, ValueError, "split_by: expected .* found 'channels'"),
    ({"log_scale_bound": 0.0}, ValueError, "log_scale_bound: expected a positive finite number, found 0.0"),
    ({"log_scale_bound": -1.0}, ValueError, "log_scale_bound: expected a positive finite number, found -1.0"),
    ({"log_scale_bound": float("nan")}, ValueError, "log_scale_bound: expected a positive finite number, found nan"),
    ({"hidden_dims": (8, 0)}, ValueError, r"hidden_dims: expected positive integers, found \(8, 0\)"),
    ({"nonlinearity": "fourier"}, ValueError, "nonlinearity: expected .* found 'fourier'"),
    ({"nonlinearity": "pointwise"}, ValueError, "nonlinearity: expected .gated. for the continuous group"),
    ({"function": "swish"}, ValueError, "function: expected one of .*found 'swish'"),
    ({"hiden_dims": (8,)}, TypeError, "hiden_dims"),
])  # fmt: skip
def test_wrong_arguments_of_coupling(arguments, error, message):
    with pytest.raises(error, match=message):
        pe.equivariant_coupling(field_type("O2"), **arguments)


def test_an_infinite_bound_of_the_scale():
    """bound * tanh(s / bound) is NaN there."""
    with pytest.raises(ValueError, match="log_scale_bound: expected a positive finite number, found inf"):
        pe.equivariant_coupling(field_type("O2"), log_scale_bound=float("inf"))


def test_wrong_conditioners():
    kind = field_type("O2")
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
    with pytest.raises(TypeError, match="conditioner: expected an escnn.nn.EquivariantModule, found Linear"):
        pe.EquivariantCoupling(kind, torch.nn.Linear(3, 8))
    with pytest.raises(ValueError, match="conditioner: expected in_type .* found"):
        pe.EquivariantCoupling(kind, SteerableLinear(out_type, out_type))
    with pytest.raises(ValueError, match="conditioner: expected out_type .* found"):
        pe.EquivariantCoupling(kind, SteerableLinear(in_type, in_type))
    # The types of another split are not those of this one: a wrong split is refused before it can break a law.
    net = steerable_net(*pe.EquivariantCoupling.conditioner_types(kind, split=[1]))
    with pytest.raises(ValueError, match="conditioner: expected in_type"):
        pe.EquivariantCoupling(kind, net, split=[0, 1])


SOLVED = {"residual": pe.equivariant_residual, "implicit": pe.equivariant_implicit}
every_solved = pytest.mark.parametrize("kind", SOLVED)


@pytest.mark.parametrize("arguments, error, message", [
    ({"lipschitz": 1.0}, ValueError, r"lipschitz: expected a number inside \(0, 1\), found 1.0; .* invertible"),
    ({"lipschitz": 0}, ValueError, r"lipschitz: expected a number inside \(0, 1\), found 0"),
    ({"lipschitz": -0.5}, ValueError, "lipschitz: expected .* found -0.5"),
    ({"lipschitz": float("nan")}, ValueError, "lipschitz: expected .* found nan"),
    ({"hidden_dims": (8, 0)}, ValueError, r"hidden_dims: expected positive integers, found \(8, 0\)"),
    ({"function": "silu"}, ValueError, "function: expected one of .* found 'silu'; only these"),
    ({"nonlinearity": "fourier"}, ValueError, "nonlinearity: expected .* found 'fourier'"),
    ({"cache_size": 2}, ValueError, "cache_size"),
    ({"max_steps": 0}, ValueError, "max_steps: expected a positive integer or None, found 0"),
    ({"tolerance": -1.0}, ValueError, "tolerance: expected a positive finite number or None, found -1.0"),
    ({"on_failure": "panic"}, ValueError, 'on_failure: expected one of "raise", "warn", "ignore", found .panic.'),
    ({"lipshitz": 0.5}, TypeError, "lipshitz"),
    ({"split": [0]}, TypeError, "split"),
])  # fmt: skip
@every_solved
def test_wrong_arguments_of_solved_transforms(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        SOLVED[kind](field_type("O2"), **arguments)


def solved_of(kind, type_, net, **kwargs):
    if kind == "residual":
        return pe.EquivariantResidual(type_, net, **kwargs)
    return pe.EquivariantImplicit(type_, lipschitz_net(type_, type_, hidden_dims=(8,)), net, **kwargs)


@every_solved
def test_wrong_conditioners_of_solved_transforms(kind):
    type_, other = field_type("O2"), enn.FieldType(field_type("O2").gspace, [field_type("O2").gspace.trivial_repr])
    with pytest.raises(TypeError, match="conditioner: expected an escnn.nn.EquivariantModule, found Linear"):
        solved_of(kind, type_, torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="conditioner: expected in_type .* found"):
        solved_of(kind, type_, SteerableLinear(other, type_))
    with pytest.raises(ValueError, match="conditioner: expected out_type .* found"):
        solved_of(kind, type_, SteerableLinear(type_, other))
    gate = GatedNonLinearity(type_.gspace, 2, [type_.gspace.irrep(1, 1)])
    layers = SteerableLinear(type_, gate.in_type), gate, SteerableLinear(gate.out_type, type_)
    with pytest.raises(TypeError, match="with a Lipschitz rule, found GatedNonLinearity; build .*lipschitz_net, or"):
        solved_of(kind, type_, enn.SequentialModule(*layers))
    with pytest.raises(ValueError, match="at least one linear layer"):
        solved_of(kind, type_, enn.IdentityModule(type_))
    plane = field_type("C4-plane")
    with pytest.raises(ValueError, match="expected a convolution with .* found"):
        solved_of(kind, plane, enn.R2Conv(plane, plane, 3, padding=0))


@every_solved
def test_wrong_contexts_of_solved_transforms(kind):
    factory = {"residual": pe.conditional_equivariant_residual, "implicit": pe.conditional_equivariant_implicit}[kind]
    plane = field_type("C4-plane")
    context_type = enn.FieldType(plane.gspace, [plane.gspace.trivial_repr])
    transform = factory(plane, context_type, hidden_dims=(8,))
    x = torch.randn(2, plane.size, 3, 3)
    with pytest.raises(ValueError, match="expected a context of type .* found none; call condition"):
        transform.transform(x)
    with pytest.raises(ValueError, match=r"context: expected the event's grid \(3, 3\), found \(4, 4\)"):
        transform.condition(torch.randn(2, 1, 4, 4)).inv(x)
    with pytest.raises(ValueError, match=r"context: expected a batch shape .* the event's \(2,\), found \(5,\)"):
        transform.condition(torch.randn(5, 1, 3, 3)).inverse_solution(x)
    with pytest.raises(ValueError, match="context_type: expected a type over .* found one over"):
        factory(plane, field_type("SO2"))


@pytest.mark.parametrize("build, error, message", [
    (lambda: pe.Inverse(torch.nn.Identity()), TypeError, "transform: expected an EquivariantTransform, found Identity"),
    (lambda: pe.Compose([]), ValueError, "transforms: expected at least one part, found none"),
    (lambda: pe.Compose([torch.distributions.ExpTransform()]), TypeError, "found ExpTransform"),
    (lambda: pe.Compose([make("linear", "O2"), make("linear", "SO2")]), ValueError, "parts that fit, with .* found"),
    (lambda: pe.equivariant_linear(field_type("O2"), bias=True), TypeError, "bias"),
    (lambda: pe.EquivariantActNorm(field_type("O2"), cache_size=2), ValueError, "cache_size"),
])  # fmt: skip
def test_wrong_parts(build, error, message):
    with pytest.raises(error, match=message):
        build()


# ---- layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build, message", [
    (lambda a, b: SteerableLinear(a, a), "expected a base space of dimension 0, found 2: .*SteerableConv for a grid"),
    (lambda a, b: SteerableConv(b, b), "expected a base space of dimension 2 or 3, found 0"),
    (lambda a, b: SteerableConv(a, a, 4), "kernel_size: expected an odd positive integer, found 4"),
    (lambda a, b: SteerableConv(a, a, padding_mode="reflect"), "padding_mode: expected .* found 'reflect'"),
    (lambda a, b: SteerableConv(a, field_type("D4-plane")), "out_type: expected a type over .* found one over"),
    (lambda a, b: steerable_net(a, b), "out_type: expected a type over .* found one over"),
    (lambda a, b: PointwiseNonLinearity(field_type("O2")), "expected fields that permute their channels"),
    (lambda a, b: GatedNonLinearity(b.gspace, 3, []), "irreps: expected at least one"),
])  # fmt: skip
def test_wrong_layers(build, message):
    with pytest.raises(ValueError, match=message):
        build(field_type("C4-plane"), field_type("C4"))


def test_a_geometric_tensor_of_another_type():
    layer = SteerableLinear(field_type("O2"), field_type("O2"))
    other = point(group.o2_group(), *4 * [group.o2_group().irrep(1, 1)])
    with pytest.raises(ValueError, match="expected a GeometricTensor of type .* found"):
        layer(enn.GeometricTensor(torch.randn(2, 8), other))


# ---- contexts -----------------------------------------------------------------------------------------------


def conditional(name):
    kind = field_type(name)
    context_type = enn.FieldType(kind.gspace, 2 * [kind.gspace.trivial_repr])
    return pe.conditional_equivariant_coupling(kind, context_type, hidden_dims=(8,)), context_type


@pytest.mark.parametrize("context, error, message", [
    (torch.zeros(3), ValueError, r"condition: expected an input of shape \(\*batch, 2\) .* found \(3,\)"),
    (torch.zeros(()), ValueError, r"condition: expected an input of shape \(\*batch, 2\)"),
    (torch.zeros(2, dtype=torch.float64), TypeError, "condition: expected the parameters' dtype torch.float32"),
    (torch.zeros(2, dtype=torch.long), TypeError, "condition: expected a floating-point input, found torch.int64"),
    (None, TypeError, "condition: expected a torch.Tensor, found NoneType"),
    (torch.tensor([0.0, float("nan")]), ValueError, "condition: expected finite values, found NaN"),
])  # fmt: skip
def test_wrong_contexts(context, error, message):
    transform, _ = conditional("O2")
    with pytest.raises(error, match=message):
        transform.condition(context)


def test_a_context_missing():
    transform, _ = conditional("O2")
    with pytest.raises(ValueError, match="expected a context of type .* found none; call condition"):
        transform.transform(torch.randn(3, 8))


def test_a_context_over_another_space():
    so2 = field_type("SO2")
    with pytest.raises(ValueError, match="context_type: expected a type over .* found one over"):
        pe.conditional_equivariant_coupling(field_type("O2"), so2)
    with pytest.raises(TypeError, match="context_type: expected an escnn.nn.FieldType, found int"):
        pe.conditional_equivariant_coupling(field_type("O2"), 2)


def test_a_context_on_another_grid():
    transform, context_type = conditional("C4-plane")
    x = events("coupling-C4-plane", (2,))
    given = transform.condition(torch.randn(2, context_type.size, 4, 4))
    with pytest.raises(ValueError, match=r"context: expected the event's grid \(3, 3\), found \(4, 4\)"):
        given(x)


def test_a_context_of_another_batch():
    transform, context_type = conditional("O2")
    given = transform.condition(torch.randn(4, context_type.size))
    with pytest.raises(ValueError, match=r"context: expected a batch shape .* the event's \(3,\), found \(4,\)"):
        given(torch.randn(3, 8))


# ---- checks ---------------------------------------------------------------------------------------------------


def test_checks_need_a_field_type():
    with pytest.raises(ValueError, match="field_type: expected one for function, which does not carry its own"):
        testing.equivariance_error(lambda x: x, torch.randn(2, 8))


def test_checks_see_nan():
    """NaN compares false with everything: it must not pass for a small error."""
    kind = field_type("O2")
    x = torch.randn(3, 8)
    nan = torch.full((3, 8), float("nan"))
    with pytest.raises(AssertionError, match="equivariance error nan"):
        testing.assert_equivariant(lambda x: nan, x, kind)
    with pytest.raises(AssertionError, match="invariance error nan"):
        testing.assert_invariant(lambda x: nan[:, 0], x, kind)


def test_testing_reports_the_size_of_an_error():
    """A known one: half a percent of a rotation's size, added to one channel."""
    so2 = gspaces.no_base_space(group.so2_group())
    kind = enn.FieldType(so2, [so2.irrep(1)])
    x = torch.tensor([[1.0, 0.0]])
    shift = torch.tensor([0.005, 0.0])
    error = testing.equivariance_error(lambda x: x + shift, x, kind)
    # |b - g b| / |x + b|, at most 2 |b| / |x + b|, reached near the half turn.
    assert error == pytest.approx(0.01 / 1.005, rel=1e-3)
    with pytest.raises(AssertionError, match=r"equivariance error 9\.\d+e-03 is above the tolerance 1.0e-05 at the"):
        testing.assert_equivariant(lambda x: x + shift, x, kind)
    testing.assert_equivariant(lambda x: x + shift, x, kind, tolerance=0.011)
