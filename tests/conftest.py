# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: one torch thread, a fresh seed, an empty param store."""

import pyro
import pytest
import torch

import pyro_equiflow._escnn  # noqa: F401  before a test builds a group of escnn

# pytest-xdist runs one process a core; more threads than cores slow small tensor work manyfold.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_pyro():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
