# SPDX-License-Identifier: Apache-2.0
"""Tensor products of irreps: against the cross product and complex numbers, and what they add to a network."""

import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

from pyro_equiflow.nn import InvariantGateNet, expand
from pyro_equiflow.nn.irreps.products import IrrepProducts
from pyro_equiflow.testing import assert_equivariant, equivariance_error


def fields(g, *irreps):
    return enn.FieldType(gspaces.no_base_space(g), [g.irrep(*i) for i in irreps])


def net(in_type, out_type, **options):
    torch.manual_seed(0)
    return InvariantGateNet(in_type, out_type, (32, 32), **options).double()


def test_vectors_of_space_multiply_to_the_cross_product():
    vector = group.so3_group().irrep(1)
    products = IrrepProducts([(vector, 3)], [vector])
    v = torch.randn(3, 3, 5, dtype=torch.float64)
    (found,) = products.apply([v])
    shortened = v / (1 + (v * v).sum(1, keepdim=True)).sqrt()
    # The irrep's axes are a cyclic permutation of x, y, z, which keeps cross products; eps / sqrt(2) is of unit norm.
    cross = 1.5**0.5 * torch.linalg.cross(v, shortened.roll(1, 0), dim=1)
    sign = torch.sign((found * cross).sum())
    torch.testing.assert_close(found, sign * cross, rtol=1e-12, atol=1e-12)


def test_vectors_of_the_plane_multiply_as_complex_numbers():
    so2 = group.so2_group()
    products = IrrepProducts([(so2.irrep(1), 2)], [so2.irrep(2)])
    v = torch.randn(2, 2, 7, dtype=torch.float64)
    (found,) = products.apply([v])
    w = (v / (1 + (v * v).sum(1, keepdim=True)).sqrt()).roll(1, 0)
    expected = torch.complex(v[:, 0], v[:, 1]) * torch.complex(w[:, 0], w[:, 1])
    found = torch.complex(found[:, 0], found[:, 1])
    # Equal up to one complex constant of modulus one: the embedding's phase.
    constant = (found / expected).flatten()
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=1e-10, atol=1e-10)
    assert float(constant[0].abs()) == pytest.approx(1.0, abs=1e-10)


def test_products_tell_left_from_right():
    """Under SO(3) the handedness of three vectors is an invariant; their lengths and angles do not show it."""
    so3 = group.so3_group()
    vectors = fields(so3, (1,), (1,), (1,))
    scalar = fields(so3, (0,))
    x = torch.randn(4, 9, dtype=torch.float64)
    with_products, without = net(vectors, scalar), net(vectors, scalar, tensor_products=False)
    torch.testing.assert_close(expand(without)(-x), expand(without)(x), rtol=1e-12, atol=1e-12)
    assert (expand(with_products)(-x) - expand(with_products)(x)).abs().max() > 1e-3
    assert_equivariant(lambda e: expand(with_products)(e), x, vectors, out_type=scalar)


@pytest.mark.parametrize(
    ("g", "given", "wanted"),
    [
        (group.so2_group(), (1,), (2,)),
        (group.o2_group(), (1, 1), (1, 2)),
        (group.so3_group(), (1,), (2,)),
        (group.o3_group(), (1, 1), (0, 2)),
        (group.full_cylinder_group(3), ((0,), (1, 1)), ((0,), (1, 2))),
        (group.ico_group(), (1,), (2,)),
    ],
    ids=["SO2", "O2", "SO3", "O3", "cylinder", "icosahedral"],
)
def test_products_make_irreps_that_the_input_lacks(g, given, wanted):
    in_type, out_type = fields(g, given, given), fields(g, wanted)
    x = torch.randn(5, in_type.size, dtype=torch.float64)
    made = expand(net(in_type, out_type))
    assert made(x).abs().max() > 1e-2
    assert equivariance_error(made, x, in_type, out_type=out_type) < 1e-12
    assert (expand(net(in_type, out_type, tensor_products=False))(x) == 0).all()


def test_vectors_alone_need_no_products():
    for g, irrep in ((group.so2_group(), (1,)), (group.o2_group(), (1, 1)), (group.o3_group(), (1, 1))):
        vectors = fields(g, irrep, irrep)
        assert net(vectors, vectors).weight.numel() == net(vectors, vectors, tensor_products=False).weight.numel()


def test_coefficients_of_o3_where_parities_do_not_fit():
    o3 = group.o3_group()
    found = o3._clebsh_gordan_coeff(o3.irrep(1, 1), o3.irrep(1, 1), o3.irrep(1, 1))
    assert found.shape == (3, 3, 0, 3)
