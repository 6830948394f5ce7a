# SPDX-License-Identifier: Apache-2.0
"""On a GPU the transforms are those of the CPU; where there is none these tests are left out."""

import pytest
import torch

import pyro_equiflow as pe
from tests.cases import CASES, ONE_OF_EACH, events

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_cpus_numbers(case):
    transform, x = CASES[case]().double(), events(case, (2, 3), torch.float64)
    expected, expected_ladj = transform.call_and_ladj(x)
    transform.cuda()
    y, ladj = transform.call_and_ladj(x.cuda())
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ladj.cpu(), expected_ladj, rtol=1e-9, atol=1e-9)
    back = transform.inv(y.clone())
    torch.testing.assert_close(back.cpu(), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_gradients_reach_parameters_on_a_gpu(case):
    transform = CASES[case]().cuda()
    y, ladj = transform.call_and_ladj(events(case, (4,)).cuda())
    (y.square().sum() + ladj.sum()).backward()
    assert all(p.grad is not None and p.grad.is_cuda and torch.isfinite(p.grad).all() for p in transform.parameters())


def test_samples_on_a_gpu():
    flow = CASES["flow-O2"]().cuda()
    base = pe.InvariantNormal(flow.field_type, scale=torch.ones(5, device="cuda"))
    with pytest.raises(TypeError, match="device"):
        flow(events("flow-O2", (3,)))
    assert base.rsample((7,)).is_cuda
