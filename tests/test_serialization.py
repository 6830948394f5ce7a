# SPDX-License-Identifier: Apache-2.0
"""What is saved means the same elsewhere: other processes, empty caches, other defaults."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from escnn import nn as enn

import pyro_equiflow as pe
from tests.cases import CASES, KINDS, TYPES, events, field_type

ROOT = Path(__file__).parents[1]

# Bases that escnn leaves to chance in every cold cache (O(2), SO(3), quotients), and some that it does not.
SAVED = [
    "coupling-O2", "linear-O2", "flow-O2", "coupling-SO3", "coupling-O3", "coupling-D4", "coupling-octahedral",
    "coupling-by-irreps-C4", "coupling-by-irreps-D3", "coupling-cylinder", "coupling-O2-plane", "coupling-SO2-plane",
    "coupling-D4-plane", "coupling-C8-plane", "coupling-octahedral-space", "coupling-SO3-space", "residual-O2",
    "residual-C4-plane", "implicit-SO3", "implicit-O2-plane", "iaf-O2", "iaf-C4-plane",
]  # fmt: skip

# The user's own layers have escnn's bases, made the same everywhere when the package is imported.
USERS_TRANSFORM = """
def users_transform():
    import pyro_equiflow as pe
    from escnn import nn as enn
    from tests.cases import field_type
    kind = field_type("O2-plane")
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
    net = enn.R2Conv(in_type, out_type, 3, padding=1)
    return pe.EquivariantCoupling(kind, net, log_scale_bound=1.0)
"""

SAVE = (
    USERS_TRANSFORM
    + """
import pickle, sys
import numpy as np
import torch
np.random.seed(int(sys.argv[2]))
torch.manual_seed(int(sys.argv[2]))
from tests.cases import CASES, events
saved = {}
for case in sys.argv[3:]:
    transform = CASES[case]()
    x = events(case, (3,))
    saved[case] = transform.state_dict(), x, transform(x).detach(), pickle.dumps(transform)
transform = users_transform()
with torch.no_grad():
    for parameter in transform.parameters():
        parameter.normal_(std=0.3)
x = events("coupling-O2-plane", (3,))
saved["users"] = transform.state_dict(), x, transform(x).detach(), b""
torch.save(saved, sys.argv[1])
"""
)

COMPARE = (
    USERS_TRANSFORM
    + """
import pickle, sys
import numpy as np
import torch
np.random.seed(int(sys.argv[2]))
torch.manual_seed(int(sys.argv[2]))
import pyro_equiflow
saved = torch.load(sys.argv[1], weights_only=False)
# Whole transforms first: unpickling has to build their groups by itself.
for case, (state, x, y, whole) in saved.items():
    if whole:
        found = pickle.loads(whole)(x)
        print("pickle", case, float((found - y).norm().detach() / y.norm()))
from tests.cases import CASES
for case, (state, x, y, whole) in saved.items():
    transform = users_transform() if case == "users" else CASES[case]()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.zero_()
    transform.load_state_dict(state)
    print("state", case, float((transform.eval()(x) - y).norm().detach() / y.norm()))
"""
)


def fresh_process(code, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYRO_EQUIFLOW_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parameters_mean_the_same_in_another_process(tmp_path):
    """Two processes with nothing in common but the parameters: different seeds, both caches empty."""
    file = tmp_path / "saved"
    fresh_process(SAVE, file, 1, *SAVED, PYRO_EQUIFLOW_CACHE=str(tmp_path / "one"))
    out = fresh_process(COMPARE, file, 2, XDG_CACHE_HOME=str(tmp_path / "two"))
    errors = {" ".join(line.split()[:2]): float(line.split()[2]) for line in out.splitlines()}
    assert len(errors) == 2 * len(SAVED) + 1
    assert max(errors.values()) < 1e-6, errors


def test_torch_load_of_a_state_with_weights_only():
    """A state_dict is tensors and nothing else."""
    transform = CASES["flow-O2"]()
    buffer = io.BytesIO()
    torch.save(transform.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = pe.equivariant_flow(field_type("O2"), num_transforms=2, hidden_dims=(16,), log_scale_bound=1.0)
    fresh.load_state_dict(state)
    x = events("flow-O2", (3,))
    torch.testing.assert_close(fresh(x), transform(x), rtol=0, atol=0)


def test_param_store_saves_and_loads(tmp_path):
    transform = CASES["coupling-O2"]()
    pyro.module("flow", transform)
    pyro.get_param_store().save(tmp_path / "params")
    x = events("coupling-O2", (3,))
    expected = transform(x)
    pyro.clear_param_store()
    other = KINDS["coupling"](field_type("O2"))
    assert not torch.allclose(other(x), expected)
    pyro.get_param_store().load(tmp_path / "params")
    pyro.module("flow", other, update_module_params=True)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["coupling-O2", "coupling-C4-plane", "flow-C4-plane", "implicit-C4-plane"])
def test_pickles_are_small(case):
    """Types and parameters, no basis."""
    transform = CASES[case]()
    transform(events(case, (3,)))
    size = len(pickle.dumps(transform))
    parameters = sum(4 * p.numel() for p in transform.parameters())
    assert size < 3 * parameters + 60_000


def test_a_failed_load_is_reported():
    transform = CASES["coupling-O2"]()
    state = transform.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    wrong = {k: torch.zeros(v.shape[0] + 1) if v.dim() else v for k, v in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        transform.load_state_dict(wrong)
    assert all(torch.equal(v, before[k]) for k, v in transform.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        transform.load_state_dict({})


DEFAULT_DTYPE = """
import torch
import pyro_equiflow as pe
torch.set_default_dtype(torch.float64)
from tests.cases import CASES, events
for case in [
    "coupling-O2", "linear-C4", "flow-O2", "coupling-C4-plane", "coupling-O2-plane", "coupling-octahedral-space",
    "residual-O2", "implicit-C4-plane", "actnorm-SO3", "iaf-O2",
]:
    transform = CASES[case]()
    assert all(p.dtype == torch.float64 for p in transform.parameters())
    x = torch.randn_like(events(case, (2,), torch.float64))
    pe.testing.assert_equivariant(transform, x)
    pe.testing.assert_inverse(transform, x)
    pe.testing.assert_log_det(transform, x[:1])
    pe.testing.assert_equivariant(transform.float(), x.float())
assert torch.get_default_dtype() == torch.float64
assert pe.InvariantNormal(transform.field_type).sample().dtype == torch.float64
"""


def test_float64_as_the_default_dtype():
    """Factories give transforms of torch's default dtype, as Pyro's do, on bases as exact as ever."""
    fresh_process(DEFAULT_DTYPE)


@pytest.mark.parametrize("name", ["O2", "C4", "C4-plane"])
def test_types_rebuilt_are_taken_for_the_same(name):
    """A conditioner made for a type that went through pickle fits a transform on the original."""
    kind = field_type(name)
    twin = pickle.loads(pickle.dumps(kind))
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(twin)
    assert isinstance(in_type, enn.FieldType)
    net = pe.nn.steerable_net(in_type, out_type, hidden_dims=(8,))
    pe.EquivariantCoupling(kind, net)
    again = TYPES[name][0]()
    pe.EquivariantCoupling(again, net)


def test_pickled_after_svi() -> None:
    """Pyro's parameter store leaves weak references on parameters, which pickle refuses."""
    flow = pe.equivariant_flow(field_type("O2"), num_transforms=1, hidden_dims=(8,))
    base = pe.InvariantNormal(flow.field_type)

    def model() -> None:
        pyro.sample("x", base)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("x", pyro.distributions.TransformedDistribution(base, [flow]))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    svi.step()
    x = torch.randn(3, flow.field_type.size)
    assert torch.equal(pickle.loads(pickle.dumps(flow))(x), flow(x))
    svi.step()
