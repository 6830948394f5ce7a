# SPDX-License-Identifier: Apache-2.0
"""escnn's numerical routines, computed by bases that depend on the space they span and on nothing else.

escnn finds Clebsch-Gordan coefficients and the irreps inside a representation by random elements
of the group, a randomised SVD and an optimiser's random start. The bases so found differ from one
cold cache to the next, and with them the function that given weights stand for. Here each basis is
a function of its subspace alone (:mod:`~pyro_equiflow._escnn.intertwiners`), hence the same on every machine.

Imported by ``_escnn`` once escnn is there.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import escnn.group
import numpy as np
from escnn.group import _clebsh_gordan, _numerical, directproduct, irrep, representation
from escnn.group.groups import ico, o3group, octa, so3group

from pyro_equiflow._escnn.elements import candidate_irreps, group_key, kept_by, probe_elements, walk
from pyro_equiflow._escnn.intertwiners import TIE, embeddings, mean_projector, null_projector
from pyro_equiflow._escnn.patching import expected, replace

__all__ = ["install"]

Irreps = list[tuple[tuple, int]]


# ---- embeddings of irreps ---------------------------------------------------------------------

# The average over a finite group holds all matrices at once; no more than so many numbers.
_MOST = 50_000_000


@kept_by(group_key)
def _products(group: Any) -> list[Any]:
    """Products of two generators each."""
    generators = probe_elements(group)
    return [g @ h for g, h in zip(generators, [*generators[1:], generators[0]])]


def _at_generators(rho: Callable[[Any], np.ndarray], group: Any) -> tuple[list, list]:
    """Matrices at elements that generate the group (a dense part of it), and at products of them to check against."""
    return [np.asarray(rho(g)) for g in probe_elements(group)], [np.asarray(rho(g)) for g in _products(group)]


def _irrep_key(psi: Any) -> tuple:
    return (*group_key(psi.group), psi.id)


@kept_by(_irrep_key)
def _irrep_matrices(psi: Any) -> tuple[list, list]:
    return _at_generators(psi, psi.group)


@kept_by(_irrep_key)
def _everywhere(psi: Any) -> np.ndarray:
    """The irrep's matrices at all elements of a finite group, in the order of the walk."""
    return walk(psi.group, probe_elements(psi.group)).matrices(_irrep_matrices(psi)[0])


def _embeddings_of(psi: Any, rho: tuple[list, list]) -> np.ndarray:
    """The embeddings of an irrep in a representation given by :func:`_at_generators`.

    :raises ValueError: matrices that are no representation of the group.
    """
    group, (generating, products) = psi.group, _irrep_matrices(psi)
    size = rho[0][0].shape[0]
    orthogonal = all(np.abs(a @ a.T - np.eye(size)).max() < TIE for a in rho[0])
    if orthogonal and 0 < group.order() * size * size <= _MOST:
        everywhere = walk(group, probe_elements(group)).matrices(rho[0]), _everywhere(psi)
        # Most irreps do not occur, and their characters tell.
        if abs(np.mean(np.prod([np.trace(m, axis1=1, axis2=2) for m in everywhere], axis=0))) < TIE:
            return np.zeros((size, psi.size, 0))
        projector = mean_projector(*everywhere)
    else:
        projector = null_projector(rho[0], generating, orthogonal)
    w = embeddings(projector, psi.endomorphism_basis())
    for a, b in zip([*rho[0], *rho[1]], [*generating, *products]):
        if not np.allclose(np.einsum("rs,sim->rim", a, w), np.einsum("rjm,ji->rim", w, b)):
            raise ValueError(
                f"expected the matrices of a representation of {group}, found others: not every product of two "
                "elements has the product of their matrices"
            )
    return w


# ---- escnn's functions, computed by the canonical basis ---------------------------------------


def _decompose(rho: Callable[[Any], np.ndarray], group: Any, irreps: Sequence[Any]) -> tuple[np.ndarray, Irreps]:
    matrices = _at_generators(rho, group)
    size, found = matrices[0][0].shape[0], 0
    columns, multiplicities = [np.zeros((size, 0))], []
    for psi in irreps:
        w = _embeddings_of(psi, matrices) if found < size else np.zeros((size, psi.size, 0))
        multiplicities.append((psi.id, w.shape[2]))
        columns.append(w.transpose(0, 2, 1).reshape(size, -1))
        found += columns[-1].shape[1]
    if found < size:
        raise ValueError(
            f"expected the matrices of a representation of {group}, found {size - found} of {size} dimensions that "
            f"hold none of its irreps {[psi.id for psi in irreps]}; where these were given, give all that occur"
        )
    return np.concatenate(columns, axis=1), multiplicities


def decompose_representation_finitegroup(
    representation: dict[Any, np.ndarray], group: Any
) -> tuple[np.ndarray, Irreps]:
    """As escnn's function of that name: irreps by their ids, those that do not occur included."""
    irreps = sorted(group.irreps(), key=lambda psi: psi.id)
    return _decompose(lambda g: representation[g], group, irreps)


def decompose_representation_general(
    representation: Callable[[Any], np.ndarray], group: Any, irreps: list | None = None
) -> tuple[np.ndarray, Irreps]:
    """As escnn's function of that name: only irreps that occur, whether built before or not."""
    irreps = candidate_irreps(group, representation) if irreps is None else irreps
    change_of_basis, multiplicities = _decompose(representation, group, irreps)
    return change_of_basis, [(id, m) for id, m in multiplicities if m]


def compute_irrep_embeddings_general(representation: Callable[[Any], np.ndarray], irrep: Any) -> np.ndarray:
    """As escnn's function of that name: ``(size, d, m)``."""
    return _embeddings_of(irrep, _at_generators(representation, irrep.group))


def build_regular_representation(group: Any) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """As escnn's function of that name, which multiplies and looks up every pair of elements."""
    reached = walk(group, probe_elements(group))
    numbers = {element: number for number, element in enumerate(reached.elements)}
    order = [numbers[element] for element in group.elements]
    irreps, columns = [], []
    for psi in group.irreps():
        matrices = _everywhere(psi)[order]
        for copy in range(psi.size // psi.sum_of_squares_constituents):
            irreps.append(psi)
            columns.append(matrices[:, :, copy] * np.sqrt(psi.size / group.order()))
    change_of_basis = np.concatenate(columns, axis=1)
    return irreps, change_of_basis, change_of_basis.T


def build_induced_representation(
    group: Any, subgroup_id: Any, repr: Any, representatives: list[Any] | None = None
) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """As escnn's function of that name, which looks among the irreps that happen to be built."""
    if group.order() < 0:
        # A subgroup of finite index holds all small rotations, at which the induced representation has the same
        # frequencies.
        restricted = group.subgroup(subgroup_id)[2]
        candidate_irreps(group, lambda g: repr(restricted(g)))
    return _build_induced_representation(group, subgroup_id, repr, representatives)


_build_induced_representation = expected(representation, "build_induced_representation")


def _sorted_irreps(self: Any) -> list[Any]:
    """As the method ``irreps`` of groups; those of a continuous group by their ids, not as they came to be built."""
    found = list(self._irreps.values())
    return sorted(found, key=lambda psi: psi.id) if self.continuous else found


_tensors: dict[tuple, np.ndarray] = {}
_decompositions: dict[tuple, Irreps] = {}


def clebsch_gordan_tensor(J: tuple, l: tuple, j: tuple, group_class: str, **group_keys: Any) -> np.ndarray:
    """As escnn's ``_clebsh_gordan_tensor``: ``(dim J, dim l, multiplicity, dim j)``."""
    group = escnn.group.groups_dict[group_class]._generator(**group_keys)
    key = (*group_key(group), J, l, j)
    if key not in _tensors:
        first, second, target = (group.irrep(*id) for id in (J, l, j))
        products = [np.kron(a, b) for a, b in zip(*(sum(_irrep_matrices(psi), []) for psi in (first, second)))]
        number = len(products) // 2
        w = _embeddings_of(target, (products[:number], products[number:]))
        shape = first.size, second.size, target.size, w.shape[2]
        _tensors[key] = w.reshape(shape).transpose(0, 1, 3, 2)
    return _tensors[key].copy()


def tensor_decomposition(J: tuple, l: tuple, group_class: str, **group_keys: Any) -> Irreps:
    """As escnn's ``_find_tensor_decomposition``, kept in memory; irreps need not have been built before."""
    key = J, l, group_class, repr(sorted(group_keys.items()))
    if key not in _decompositions:
        group = escnn.group.groups_dict[group_class]._generator(**group_keys)
        first, second = group.irrep(*J), group.irrep(*l)
        irreps = candidate_irreps(group, lambda g: np.kron(first(g), second(g)))
        shares = [(psi, group._clebsh_gordan_coeff(first, second, psi).shape[2]) for psi in irreps]
        if sum(psi.size * m for psi, m in shares) != first.size * second.size:
            raise ValueError(f"expected all irreps of {group} in {first} x {second}, found {shares}")
        _decompositions[key] = [(psi.id, m) for psi, m in shares if m]
    return list(_decompositions[key])


@cache
def _clebsch_gordan_so3(m: int, n: int, j: int) -> np.ndarray:
    tensor = clebsch_gordan_tensor((m,), (n,), (j,), "SO3")
    if tensor.shape[2]:
        # One real number a triple is left to choose, its sign: Condon and Shortley's, which
        # py3nj follows, has <m m n (j - m) | j j> > 0.
        to_complex = [so3group._change_of_basis_real2complex(l) for l in (m, n, j)]
        standard = np.einsum(
            "abc,ia,kb,lc->ikl",
            tensor[:, :, 0] * (1 if (m + n + j) % 2 == 0 else 1j),
            to_complex[0].conj(),
            to_complex[1].conj(),
            to_complex[2],
        )
        tensor = tensor * np.sign(standard[2 * m, n + j - m, 2 * j].real)
    tensor.flags.writeable = False
    return tensor


def clebsch_gordan_tensor_so3(m: int, n: int, j: int) -> np.ndarray:
    """As escnn's ``_clebsh_gordan_tensor_so3`` with ``py3nj``, for when that is not installed."""
    return _clebsch_gordan_so3(int(m), int(n), int(j)).copy()


def _clebsch_gordan_coefficients_o3(self: Any, m: Any, n: Any, j: Any) -> np.ndarray:
    """As O(3)'s ``_clebsh_gordan_coeff``, which calls ``np.zeros`` wrongly where parities do not fit."""
    first, second, target = (self.irrep(*self.get_irrep_id(i)) for i in (m, n, j))
    if (first.id[0] + second.id[0]) % 2 != target.id[0]:
        return np.zeros((first.size, second.size, 0, target.size))
    return o3group._clebsh_gordan_tensor_so3(first.id[1], second.id[1], target.id[1])


def irrep_matrices_from_generators(group: Any, generators: list) -> dict[Any, np.ndarray]:
    """As escnn's ``generate_irrep_matrices_from_generators``, breadth first in a fixed order.

    Its check of every product of two elements, seconds for 60 of them, is left out: the generators
    that escnn passes are constants.
    """
    reached = walk(group, [g for g, _ in generators])
    return dict(zip(reached.elements, reached.matrices([matrix for _, matrix in generators])))


_elements_of_product = expected(directproduct.DirectProductGroup, "elements").fget


def _elements_once(self: Any) -> list[Any] | None:
    """As the property ``elements`` of a direct product, which multiplies them out for every question, its order too."""
    if "_elements_once" not in vars(self):
        self._elements_once = _elements_of_product(self)
    found: list[Any] | None = self._elements_once
    return found


# ---- put in place -----------------------------------------------------------------------------


def install() -> None:
    """Puts the functions above in the places of escnn's.

    :raises ImportError: escnn lacks one of these places.
    """
    # No basis is kept on disk: computing it takes about as long as reading it, and what is not kept
    # cannot go stale.
    for module, name in (
        (irrep, "_restrict_irrep"),
        (ico, "_build_ico_irrep_picklable"),
        (octa, "_build_octa_irrep_picklable"),
    ):
        kept = expected(module, name)
        replace(module, name, getattr(kept, "func", kept))
    for module in (irrep, ico, octa):
        replace(module, "generate_irrep_matrices_from_generators", irrep_matrices_from_generators)
    replace(_clebsh_gordan, "_clebsh_gordan_tensor", clebsch_gordan_tensor)
    replace(_clebsh_gordan, "_find_tensor_decomposition", tensor_decomposition)
    for module in (_numerical, irrep, representation):
        replace(module, "decompose_representation_finitegroup", decompose_representation_finitegroup)
    for module in (_numerical, irrep):
        replace(module, "decompose_representation_general", decompose_representation_general)
    replace(_numerical, "compute_irrep_embeddings_general", compute_irrep_embeddings_general)
    replace(representation, "build_induced_representation", build_induced_representation)
    replace(escnn.group.Group, "irreps", _sorted_irreps)
    replace(directproduct.DirectProductGroup, "elements", property(_elements_once))
    replace(representation, "build_regular_representation", build_regular_representation)
    # What is left of escnn's own routines stays off scikit-learn's SVD: it is seeded by nothing,
    # and from scikit-learn 1.9 on it refuses escnn's matrices.
    replace(_numerical, "randomized_svd", None)
    replace(o3group.O3, "_clebsh_gordan_coeff", _clebsch_gordan_coefficients_o3)
    if expected(so3group, "py3nj") is None:
        for module in (so3group, o3group):
            replace(module, "_clebsh_gordan_tensor_so3", clebsch_gordan_tensor_so3)
