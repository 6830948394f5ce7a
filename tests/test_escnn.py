# SPDX-License-Identifier: Apache-2.0
"""escnn as the package makes it: the same bases everywhere, silent, no folder in site-packages.

Most of it is about fresh processes with empty caches, so these run in subprocesses.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

# Every kind of basis that escnn takes from chance, and two filters built from them.
BASES = """
import sys
import numpy as np
np.random.seed(int(sys.argv[2]))
state = np.random.get_state()[1].copy()
import pyro_equiflow._escnn
import torch
from escnn import group, gspaces, nn as enn

out = {}

def clebsch_gordan(G, *ids):
    out["-".join(["cg", G.name, *map(str, ids)])] = G._clebsh_gordan_coeff(*ids)

def restricted(G, psi, subgroup):
    out["-".join(["restricted", G.name, str(psi.id), str(subgroup)])] = psi.restrict(subgroup).change_of_basis

def tensor(psi, phi):
    out["-".join(["tensor", psi.group.name, str(psi.id), str(phi.id)])] = psi.tensor(phi).change_of_basis

O2, D8 = group.o2_group(6), group.dihedral_group(8)
for f in range(4):
    for h in range(3):
        tensor(O2.irrep(1, f) , O2.irrep(1, h))
SO3, O3 = group.so3_group(4), group.o3_group(4)
for m, n, j in [(0, 1, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 3), (2, 1, 1)]:
    clebsch_gordan(SO3, (m,), (n,), (j,))
clebsch_gordan(O3, (1, 1), (0, 2), (1, 2))
tensor(SO3.irrep(1), SO3.irrep(2))
octa, ico = group.octa_group(), group.ico_group()
restricted(SO3, SO3.irrep(3), "octa")
restricted(SO3, SO3.irrep(3), "ico")
restricted(O3, O3.irrep(1, 2), (True, "octa"))
restricted(SO3, SO3.irrep(2), (True, 3))
tensor(octa.irrep(1), octa.irrep(2))
tensor(octa.irrep(-1), octa.irrep(1))
tensor(ico.irrep(3), ico.irrep(1))
for psi in octa.irreps() + ico.irreps():
    out[f"irrep-{psi.group.name}-{psi.id}"] = np.stack([psi(g) for g in psi.group.elements])
tensor(D8.irrep(1, 1), D8.irrep(1, 2))
tensor(D8.irrep(1, 3), D8.irrep(1, 3))
out["quotient-D8"] = D8.quotient_representation((None, 4)).change_of_basis
permutations = {g: np.kron(D8.irrep(1, 1)(g), D8.irrep(1, 3)(g)) for g in D8.elements}
out["decomposed-D8"] = group.representation.build_from_discrete_group_representation(
    permutations, "kron", D8, []
).change_of_basis
cylinder = group.full_cylinder_group(2)
tensor(cylinder.irrep((1,), (1, 1)), cylinder.irrep((0,), (1, 1)))
out["numpy-state"] = np.array(np.array_equal(np.random.get_state()[1], state))

def filters(conv):
    with torch.no_grad():
        conv.weights.copy_(torch.linspace(-1, 1, conv.weights.numel()))
    return conv.expand_parameters()[0].detach().numpy()

plane = gspaces.flipRot2dOnR2(8)
inputs = enn.FieldType(plane, [plane.irrep(1, 1), plane.quotient_repr((None, 4))])
out["filter-R2"] = filters(enn.R2Conv(inputs, enn.FieldType(plane, [plane.regular_repr]), 3, initialize=False))
plane = gspaces.flipRot2dOnR2(-1, 3)
vectors = enn.FieldType(plane, [plane.irrep(1, 1), plane.irrep(1, 2)])
out["filter-R2-O2"] = filters(enn.R2Conv(vectors, vectors, 5, initialize=False))
space = gspaces.octaOnR3()
vectors = enn.FieldType(space, [space.irrep(1), space.irrep(2)])
out["filter-R3"] = filters(enn.R3Conv(vectors, vectors, 3, initialize=False))
np.savez(sys.argv[1], **out)
"""


def python(code, *arguments, options=(), cache=None, path=(), **environment):
    """What a fresh interpreter prints, the package importable and the caches empty."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])),
        **environment,
    }
    environment.pop("PYRO_EQUIFLOW_CACHE", None)
    if cache is not None:
        environment["PYRO_EQUIFLOW_CACHE"] = str(cache)
    done = subprocess.run(
        [sys.executable, *options, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The bases of three processes that have nothing in common but the code."""
    folder = tmp_path_factory.mktemp("bases")
    # scikit-learn from 1.9 on refuses matrices, which is what escnn 1.0.11 gives it.
    extmath = folder / "path" / "sklearn" / "utils" / "extmath.py"
    extmath.parent.mkdir(parents=True)
    (extmath.parent / "__init__.py").touch()
    (extmath.parents[1] / "__init__.py").touch()
    extmath.write_text("def randomized_svd(*args, **kwargs):\n    raise TypeError('np.matrix is not supported')\n")
    no_py3nj = "import sys; sys.modules['py3nj'] = None\n"
    results = {}
    for name, code, environment in [
        ("plain", BASES, {}),
        ("no py3nj", no_py3nj + BASES, {"PYTHONHASHSEED": "1"}),
        ("scikit-learn 1.9, two threads", BASES, {"path": [folder / "path"], "OMP_NUM_THREADS": "2"}),
    ]:
        saved = folder / f"{len(results)}.npz"
        printed = python(code, saved, len(results), cache=folder / f"cache{len(results)}", **environment)
        assert printed == ""
        results[name] = dict(np.load(saved))
    return results


@pytest.mark.parametrize("other", ["no py3nj", "scikit-learn 1.9, two threads"])
def test_bases_are_equal_in_processes_with_cold_caches(bases, other):
    assert bases["plain"].keys() == bases[other].keys()
    for name, basis in bases["plain"].items():
        # Filters are sampled in float32; the rest is float64, and each projector is unique.
        tolerance = 1e-6 if name.startswith("filter") else 1e-12
        np.testing.assert_allclose(bases[other][name], basis, rtol=0, atol=tolerance, err_msg=name)


def test_numpys_random_state_is_left_alone(bases):
    assert all(result["numpy-state"] for result in bases.values())


def test_bases_are_orthogonal(bases):
    for name, basis in bases["plain"].items():
        if name.startswith(("tensor", "restricted", "quotient", "decomposed")):
            np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12, err_msg=name)


def products_of_groups():
    """Products whose factors have several components each: elements drawn at random may miss some."""
    from escnn import group

    D3, D6, O2, SO2 = group.dihedral_group(3), group.dihedral_group(6), group.o2_group(), group.so2_group()
    octa, C2, C3 = group.octa_group(), group.cyclic_group(2), group.cyclic_group(3)
    return [
        (group.direct_product(D3, O2), ((1, 1), (1, 2))),
        (group.direct_product(D6, O2), ((1, 2), (1, 3))),
        (group.direct_product(octa, SO2), ((3,), (3,))),
        (group.direct_product(SO2, SO2), ((1,), (2,))),
        (group.direct_product(SO2, SO2), ((1,), (2,), 1)),
        (group.direct_product(C3, SO2), ((1,), (1,))),
        (group.direct_product(O2, O2), ((1, 1), (1, 2))),
        (group.direct_product(group.o3_group(), C2), ((1, 1), (1,))),
        (group.direct_product(C2, group.so3_group()), ((1,), (2,))),
        (group.direct_product(group.direct_product(C2, C2), O2), (((1,), (1,), 0), (1, 1))),
        (group.double_group(group.so3_group()), ((1,), (1,))),
        (group.full_ico_group(), ((1,), (4,))),
    ]


def test_tensor_products_are_decomposed():
    from escnn import group

    import pyro_equiflow._escnn  # noqa: F401

    for G, J, l in [
        (group.o2_group(6), (1, 2), (1, 3)),
        (group.so3_group(4), (2,), (1,)),
        (group.cyclic_group(8), (1,), (2,)),
        (group.dihedral_group(5), (1, 1), (1, 2)),
        (group.ico_group(), (4,), (1,)),
        (group.full_octa_group(), ((1,), (2,)), ((0,), (1,))),
        (group.cylinder_group(2), ((1,), (1,)), ((0,), (1,))),
        *((G, psi, psi) for G, psi in products_of_groups()),
    ]:
        first, second = G.irrep(*J), G.irrep(*l)
        product = first.tensor(second)
        state = np.random.get_state()
        np.random.seed(0)
        elements = [G.sample() for _ in range(8)]
        np.random.set_state(state)
        for g in elements:
            expected = np.kron(first(g), second(g))
            # Representations multiply to 1e-14, escnn's own elements to about 1e-8 (quaternions).
            np.testing.assert_allclose(product(g), expected, atol=1e-7, err_msg=f"{G} {J} {l}")


def test_irreps_of_products_are_restricted():
    for G, id in products_of_groups():
        if "hedral" in G.name:
            continue  # of these groups escnn names no subgroup that is the whole
        psi = G.irrep(*id)
        state = np.random.get_state()
        np.random.seed(0)
        for subgroup_id in (G.subgroup1_id, G.subgroup2_id):
            subgroup, include, _ = G.subgroup(subgroup_id)
            restricted = psi.restrict(subgroup_id)
            for g in [subgroup.sample() for _ in range(10)]:
                np.testing.assert_allclose(restricted(g), psi(include(g)), atol=1e-7, err_msg=f"{G} {id}")
        np.random.set_state(state)


def test_probes_tell_all_irreps_apart():
    """Intertwiners between unlike irreps vanish already at the probes, far above rounding; of equal ones all remain."""
    from escnn import group

    from pyro_equiflow._escnn.bases import _at_generators, _embeddings_of

    cases = [
        (group.so2_group(), [(k,) for k in (0, 1, 2, 54, 55, 143, 144)]),
        (group.o2_group(), [(0, 0), (1, 0), (1, 1), (1, 88), (1, 89), (1, 144)]),
        (group.so3_group(), [(l,) for l in range(5)]),
        (group.o3_group(), [(f, l) for f in range(2) for l in range(4)]),
        *((G, [psi.id for psi in G.irreps()[:7]]) for G, _ in products_of_groups()),
    ]
    for G, ids in cases:
        for one in ids:
            rho = _at_generators(G.irrep(*one), G)
            for other in ids:
                found = _embeddings_of(G.irrep(*other), rho).shape[2]
                assert found == (G.irrep(*one).id == G.irrep(*other).id), (G, one, other)


def test_regular_representations_multiply_few_elements(monkeypatch):
    """One product an element and generator; a table of the group would take 14,400 here, half a minute."""
    from escnn import group

    from pyro_equiflow._escnn import bases
    from pyro_equiflow._escnn.elements import kept_by

    G = group.full_ico_group()
    products = []
    original = group.GroupElement.__matmul__
    monkeypatch.setattr(bases, "walk", kept_by(lambda *_: ())(bases.walk.__wrapped__))  # nothing known yet
    monkeypatch.setattr(group.GroupElement, "__matmul__", lambda g, h: products.append(1) or original(g, h))
    _, change_of_basis, _ = bases.build_regular_representation(G)
    assert len(products) <= 3 * 120 + 3
    monkeypatch.undo()
    np.testing.assert_allclose(change_of_basis @ change_of_basis.T, np.eye(120), atol=1e-12)
    numbers = {g: i for i, g in enumerate(G.elements)}
    for g in G.testing_elements():
        image = [numbers[g @ h] for h in G.elements]
        # escnn's own elements are right to about 1e-8 (quaternions).
        np.testing.assert_allclose(G.regular_representation(g)[image], np.eye(120), atol=1e-7)
        if g != G.identity:
            break


def test_representations_that_are_not_orthogonal_are_decomposed():
    from escnn import group

    import pyro_equiflow._escnn  # noqa: F401

    D3 = group.dihedral_group(3)
    skew = np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.2, 0.0, 1.0]])
    sheared = {g: skew @ (D3.irrep(1, 1) + D3.irrep(1, 0))(g) @ np.linalg.inv(skew) for g in D3.elements}
    found = group.representation.build_from_discrete_group_representation(sheared, "sheared", D3, [])
    for g in D3.elements:
        blocks = np.linalg.inv(found.change_of_basis) @ sheared[g] @ found.change_of_basis
        expected = sum((D3.irrep(*id) for id in found.irreps[1:]), D3.irrep(*found.irreps[0]))(g)
        np.testing.assert_allclose(blocks, expected, atol=1e-12)


def test_what_is_no_representation_is_refused():
    from escnn import group

    O2 = group.o2_group()
    with pytest.raises(ValueError, match="expected the matrices of a representation"):
        _fit().decompose_representation_general(lambda g: O2.irrep(1, 1)(g) @ np.diag([1.0, -1.0]), O2)
    D3 = group.dihedral_group(3)
    wrong = {g: D3.irrep(1, 1)(g) @ np.diag([1.0, -1.0]) for g in D3.elements}
    with pytest.raises(ValueError, match="expected the matrices of a representation"):
        group.representation.build_from_discrete_group_representation(wrong, "wrong", D3, [])


def _fit():
    from pyro_equiflow._escnn import bases

    return bases


# Each line of its own would fail, or find irreps in another order, where fewer had been built before.
ROOM = """
import sys
import numpy as np
import pyro_equiflow._escnn
from escnn import group, gspaces, nn as enn
import torch
from pyro_equiflow.nn import SteerableConv, expand

if sys.argv[1] == "before":
    group.so2_group(9), group.o2_group(9), group.so3_group(5), group.o3_group(5), group.full_cylinder_group(9)
    group.o2_group().irrep(1, 11)
if sys.argv[1] == "out of order":
    group.o2_group(1).irrep(1, 8), group.o3_group(1).irrep(0, 6), group.so2_group(0).irrep(7)
out = []
plane = gspaces.flipRot2dOnR2(-1, 2)
vectors = enn.FieldType(plane, [plane.irrep(1, 2), plane.irrep(1, 1)])
conv = SteerableConv(vectors, vectors)
torch.nn.init.ones_(conv.weight)
out.append(expand(conv).tensors[0].detach().numpy())
O2, SO3, O3 = group.o2_group(1), group.so3_group(1), group.o3_group(1)
for rho in (
    O2.irrep(1, 4).tensor(O2.irrep(1, 3)),
    group.full_cylinder_group(1).irrep((1,), (1, 4)).tensor(group.full_cylinder_group(1).irrep((0,), (1, 3))),
    SO3.irrep(4).restrict((False, -1)),
    SO3.irrep(4).restrict((True, -1)),
    O3.irrep(1, 4).restrict(("cone", -1)),
    O2.induced_representation((None, -1), group.so2_group(0).irrep(6)),
):
    out.append(rho.change_of_basis)
    out.append(np.array(repr(rho.irreps)))
np.savez(sys.argv[2], *out)
"""


def test_nothing_hangs_on_irreps_built_before(tmp_path):
    results = []
    for name in ("nothing", "before", "out of order"):
        saved = tmp_path / f"{len(results)}.npz"
        assert python(ROOM, name, saved, cache=tmp_path / "cache") == ""
        results.append(dict(np.load(saved)))
    for other in results[1:]:
        for name, expected in results[0].items():
            if expected.dtype.kind == "U":
                assert other[name] == expected
            else:
                np.testing.assert_allclose(other[name], expected, atol=1e-12)


def test_the_pivot_is_not_rounding():
    """The embedding does not hang on the basis of the null space that the SVD happens to return."""
    from escnn import group

    from pyro_equiflow._escnn.intertwiners import embeddings, mean_projector, null_projector

    G = group.dihedral_group(6)
    rho, psi = G.regular_representation, G.irrep(1, 1)
    matrices = [rho(g) for g in G.generators], [psi(g) for g in G.generators]

    def by_constraint():
        return embeddings(null_projector(*matrices, True), psi.endomorphism_basis())

    expected = by_constraint()
    everywhere = [np.stack([matrix(g) for g in G.elements]) for matrix in (rho, psi)]
    mean = embeddings(mean_projector(*everywhere), psi.endomorphism_basis())
    np.testing.assert_allclose(mean, expected, atol=1e-13)
    rng = np.random.default_rng(0)
    svd = np.linalg.svd

    def rotated_svd(a, **kwargs):
        u, s, vh = svd(a, **kwargs)
        null = s < 1e-8
        rotation, _ = np.linalg.qr(rng.normal(size=(null.sum(), null.sum())))
        vh[null] = rotation @ vh[null]
        return u, s, vh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "svd", rotated_svd)
        found = by_constraint()
    np.testing.assert_allclose(found, expected, atol=1e-13)
    assert found.shape == (12, 2, 2)


def test_import_and_polyhedral_groups_are_silent(tmp_path):
    code = """
import pyro.distributions  # what Pyro itself warns of is not ours
import warnings
warnings.simplefilter("error")
import pyro_equiflow._escnn
from escnn import group, gspaces, nn
group.ico_group(), group.octa_group(), group.full_ico_group(), group.full_octa_group()
group.so3_group(2).irrep(2).restrict("ico")
space = gspaces.octaOnR3()
fields = nn.FieldType(space, [space.irrep(1)])
nn.R3Conv(fields, fields, 3)
"""
    for hidden in ("", "import sys; sys.modules['py3nj'] = None\n"):
        assert python(hidden + code, cache=tmp_path / "cache") == ""


# escnn's folder cannot be written, root or not: whatever makes a folder below it is refused.
READ_ONLY = """
import importlib.util, os
site = os.path.dirname(importlib.util.find_spec("escnn").origin)
refused = []
class guard:  # no function: Python 3.10's pathlib would bind it as a method
    def __init__(self, original):
        self.original = original
    def __call__(self, path, *args, **kwargs):
        if os.path.abspath(os.fspath(path)).startswith((site, "/nowhere")):
            refused.append(path)
            raise PermissionError(13, "read-only", path)
        return self.original(path, *args, **kwargs)
os.mkdir, os.makedirs = guard(os.mkdir), guard(os.makedirs)
"""
USE_CACHE = """
import pyro_equiflow._escnn as fit
from escnn import group
group.ico_group()
print(fit._memory.location, len(group.so3_group(2).sphere_grid("thomson", N=2)))
assert not [path for path in refused if str(path).startswith(site)], refused
"""


def test_read_only_site_packages(tmp_path):
    printed = python(READ_ONLY + USE_CACHE, cache=tmp_path / "cache")
    assert printed.split() == [str(next((tmp_path / "cache").iterdir())), "2"]
    assert any((tmp_path / "cache").rglob("output.pkl"))


def test_no_folder_can_be_written_at_all():
    assert python(READ_ONLY + USE_CACHE, cache="/nowhere/cache").split() == ["None", "2"]


def test_escnn_imported_first(tmp_path):
    code = """
import escnn.gspaces
before = escnn.group.groups.so3_utils.thomson_sphere.store_backend.location
import pyro_equiflow._escnn as fit
after = escnn.group.groups.so3_utils.thomson_sphere.store_backend.location
assert before != after and after.startswith(fit._memory.location), (before, after)
assert escnn.group.irrep.decompose_representation_general is fit.bases.decompose_representation_general
"""
    assert python(code, cache=tmp_path, options=["-W", "error::UserWarning"]) == ""


def test_groups_built_first_are_warned_of(tmp_path):
    code = "import escnn.group; escnn.group.dihedral_group(4); import pyro_equiflow._escnn"
    assert "Import pyro_equiflow first" in python(code, cache=tmp_path)


_computed = []


def squares(n):
    _computed.append(n)
    return [i * i for i in range(n)]


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: b"", lambda content: b"garbage"])
def test_a_damaged_file_of_the_cache_is_said_in_one_line(tmp_path, damage, caplog):
    _computed.clear()
    for run in range(4):
        memory = _fit_module()._Memory(tmp_path, verbose=0)
        if run == 2:
            for file in tmp_path.rglob("output.pkl"):
                file.write_bytes(damage(file.read_bytes()))
        function = memory.cache(squares)
        assert function(3) == [0, 1, 4] and function(4) == [0, 1, 4, 9]
        assert _computed == [[3, 4], [3, 4], [3, 4, 3, 4], [3, 4, 3, 4]][run]
    (message,) = caplog.messages
    assert "\n" not in message and f"cache in {tmp_path} cannot be read: it is computed anew" in message


# ---- what of escnn is replaced is there ---------------------------------------------------------


def test_every_patch_misses_loudly():
    """Each name that is replaced, taken away in turn."""
    from pyro_equiflow._escnn import _install, bases
    from pyro_equiflow._escnn import patching as _patching

    replaced = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "replace", lambda owner, name, new: replaced.append((owner, name)))
        patch.setattr(_fit_module(), "replace", lambda owner, name, new: replaced.append((owner, name)))
        patch.setattr(_fit_module(), "_imported_before", False)
        _install()
    assert len(replaced) > 20
    for owner, name in replaced:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(owner, name)
            if hasattr(owner, name):
                continue  # inherited: there all the same
            with pytest.raises(ImportError, match=rf"expected .*{name}.*found none in escnn [\d.]+.*escnn>=1.0.11"):
                _patching.replace(owner, name, None)


def _fit_module():
    import pyro_equiflow._escnn as fit

    return fit


@pytest.mark.parametrize(
    "change",
    [
        "del escnn.group._numerical.decompose_representation_general",
        "escnn.group._numerical.compute_irrep_embeddings_general = lambda irrep, representation, samples: None",
    ],
)
def test_another_escnn_stops_the_import(tmp_path, change):
    code = f"""
import escnn.nn
{change}
try:
    import pyro_equiflow
except ImportError as error:
    print(error)
"""
    printed = python(code, cache=tmp_path)
    assert "in escnn 1." in printed and 'pip install "escnn>=1.0.11,<1.1"' in printed


def test_an_escnn_distributed_under_another_name(tmp_path):
    code = """
import importlib.metadata as metadata
original = metadata.version
def version(name):
    if name == "escnn":
        raise metadata.PackageNotFoundError(name)
    return original("escnn") + "+fork" if name == "escnn-fork" else original(name)
metadata.version = version
metadata.packages_distributions = lambda: {'escnn': ['escnn-fork']}
import pyro_equiflow._escnn as fit
print(fit._memory.location)
"""
    assert python(code, cache=tmp_path).strip().endswith("+fork")


def test_an_escnn_of_no_distribution(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from pyro_equiflow._escnn import patching as _patching

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_patching, "version", version)
    monkeypatch.setattr(_patching, "packages_distributions", dict)
    assert _patching.escnn_version() == "unknown"


def test_lie_learn_missing(tmp_path):
    code = """
import sys
sys.modules["lie_learn"] = None
try:
    import pyro_equiflow._escnn
except ImportError as error:
    print(error)
"""
    assert "pip install ./stand_ins/py3nj ./stand_ins/lie_learn ." in python(code, cache=tmp_path)


def test_import_adds_little(tmp_path):
    """At most a tenth of the processor time of importing Pyro and escnn; a twentieth was seen.

    Both are measured in the same processes, and the least of each counts, so that a busy machine slows both alike.
    """
    code = """
import time
start = time.process_time()
import pyro, pyro.infer, escnn.nn, escnn.gspaces
middle = time.process_time()
import pyro_equiflow
print(middle - start, time.process_time() - middle)
"""
    theirs, ours = np.array([python(code, cache=tmp_path).split() for _ in range(2)], dtype=float).min(0)
    assert ours < 0.1 * theirs, (ours, theirs)


# ---- the stand-ins against independent facts ---------------------------------------------------


def test_clebsch_gordan_known_values():
    from py3nj import clebsch_gordan, wigner3j

    # py3nj 0.2.1, the Fortran package
    assert clebsch_gordan(4, 6, 8, 2, -4, -2) == pytest.approx(0.5916079783099616, abs=1e-14)
    assert clebsch_gordan(12, 10, 8, 2, 4, 6) == pytest.approx(0.37022011974356156, abs=1e-14)
    assert wigner3j(4, 6, 8, 2, -4, 2) == pytest.approx(0.19720265943665385, abs=1e-14)
    # the singlet of two spins 1/2, and Condon and Shortley's sign
    assert clebsch_gordan(1, 1, 0, [1, -1], [-1, 1], 0) == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert clebsch_gordan(1, 2, 3, 1, 0, 1) == pytest.approx((2 / 3) ** 0.5, abs=1e-15)
    assert clebsch_gordan(2, 2, 2, 4, 0, 4) == 0.0


@pytest.mark.parametrize("j1, j2", [(1, 2), (2, 2), (3, 4), (12, 11)])
def test_clebsch_gordan_is_orthogonal(j1, j2):
    """Twice the momenta; the coefficients of all totals together are an orthogonal matrix."""
    from py3nj import clebsch_gordan

    m1, m2 = np.meshgrid(np.arange(-j1, j1 + 1, 2), np.arange(-j2, j2 + 1, 2), indexing="ij")
    rows = [
        clebsch_gordan(j1, j2, j, m1.ravel(), m2.ravel(), m)
        for j in range(abs(j1 - j2), j1 + j2 + 1, 2)
        for m in range(-j, j + 1, 2)
    ]
    np.testing.assert_allclose(np.array(rows) @ np.array(rows).T, np.eye(len(rows)), atol=1e-14)


def test_clebsch_gordan_needs_integers():
    from py3nj import clebsch_gordan

    with pytest.raises(TypeError, match="float64"):
        clebsch_gordan(2.0, 2, 2, 0, 0, 0)


def _zyz(rotation):
    return rotation.as_euler("ZYZ")


@pytest.mark.parametrize("degree", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("field", ["real", "complex"])
def test_wigner_d_is_a_homomorphism(degree, field):
    from lie_learn.representations.SO3.wigner_d import wigner_D_matrix
    from scipy.spatial.transform import Rotation

    g, h = Rotation.from_euler("ZYZ", [0.3, 0.7, -1.1]), Rotation.from_euler("ZYZ", [-2.0, 2.3, 0.4])
    of_g, of_h, of_gh = (wigner_D_matrix(degree, *_zyz(r), field=field) for r in (g, h, g * h))
    np.testing.assert_allclose(of_g @ of_h, of_gh, atol=1e-13)
    np.testing.assert_allclose(of_g @ of_g.conj().T, np.eye(2 * degree + 1), atol=1e-13)
    angle = (g.inv() * h).magnitude()
    character = np.sin((degree + 0.5) * angle) / np.sin(0.5 * angle)
    assert np.trace(of_g.conj().T @ of_h) == pytest.approx(character, abs=1e-12)


def test_wigner_d_of_degree_1_is_the_rotation():
    from lie_learn.representations.SO3.wigner_d import wigner_D_matrix
    from scipy.spatial.transform import Rotation

    # Harmonics of degree 1 are y, z, x.
    order = [1, 2, 0]
    for angles in ([0.3, 0.7, -1.1], [2.0, -1.0, 0.5], [0.0, 0.0, 1.0]):
        rotation = Rotation.from_euler("ZYZ", angles).as_matrix()
        found = wigner_D_matrix(1, *angles)
        np.testing.assert_allclose(found, rotation[np.ix_(order, order)], atol=1e-15)


def test_wigner_d_known_values():
    from lie_learn.representations.SO3.wigner_d import wigner_D_matrix

    # lie_learn 0.0.2, built for numpy 1
    expected = [
        [-0.00971066935711158, 0.4891209708192538, 0.20294084477079571, -0.3476546981603986, -0.773703821352968],
        [0.24446458630063966, 0.3761985719883376, 0.25220418470516215, -0.6284053093515244, 0.5832765355085116],
        [0.2905855491152654, -0.7605781959441846, 0.37747535717518077, -0.3871100432758574, -0.2115159937690353],
        [-0.492612301364108, 0.04218585748619449, 0.8153075658718929, 0.2750893603116931, 0.1230970789591044],
        [0.7829661091871287, 0.19742459730542744, 0.29663781029807834, 0.5086399868906143, -0.03576273871833557],
    ]
    np.testing.assert_allclose(wigner_D_matrix(2, 0.3, 0.7, -1.1), expected, atol=1e-14)
    complex_entry = wigner_D_matrix(3, 0.3, 0.7, -1.1, field="complex")[1, 2]
    assert complex_entry == pytest.approx(0.5105608207673176 + 0.27892064760187496j, abs=1e-14)


def test_wigner_d_refuses_other_conventions():
    from lie_learn.representations.SO3.wigner_d import wigner_D_matrix

    with pytest.raises(NotImplementedError, match="nfft"):
        wigner_D_matrix(1, 0.0, 0.0, 0.0, normalization="nfft")
    with pytest.raises(NotImplementedError, match="quaternionic"):
        wigner_D_matrix(1, 0.0, 0.0, 0.0, field="quaternionic")
