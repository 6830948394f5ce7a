# SPDX-License-Identifier: Apache-2.0
"""escnn's numerical routines, computed by bases that depend on the space they span and on nothing else.

escnn finds Clebsch-Gordan coefficients and the irreps inside a representation by random elements
of the group, a randomised SVD and an optimiser's random start. The bases so found differ from one
cold cache to the next, and with them the function that given weights stand for. Here each basis is
a function of its subspace alone (:func:`_embeddings`), hence the same on every machine.

Imported by ``_escnn`` once escnn is there.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import escnn.group
import numpy as np
from escnn.group import _clebsh_gordan, _numerical, irrep, representation
from escnn.group.groups import ico, o3group, octa, so3group

__all__ = ["install"]

Irreps = list[tuple[tuple, int]]


# ---- the canonical basis --------------------------------------------------------------------

# Constraints from this many generic elements, and a check on as many others: two generic elements
# already generate a dense subgroup of a connected compact group, the rest meet its components.
_GENERIC = 4
# Singular values of the constraint below this are zero. The smallest of the others is about
# 2 sin(pi / N) for a cyclic group of order N.
_ZERO = 1e-8
# Candidates for a pivot whose projections' squared lengths differ by less count as equal, so that
# rounding never decides between them.
_TIE = 1e-6


def _embeddings(
    rho: Sequence[np.ndarray], psi: Sequence[np.ndarray], endomorphisms: np.ndarray, size: int
) -> np.ndarray:
    r"""A basis of the intertwiners :math:`W \psi(g) = \rho(g) W` that depends on their space alone.

    The null space of the constraint is known only up to a rotation, which differs from one linear
    algebra library to another; its orthogonal projector is unique. Of the projections of unit
    matrices the longest (the first of equals) is taken, with all its images under the irrep's
    endomorphisms removed, and again, until nothing is left.

    :param rho: matrices of elements that generate the group, ``(size, size)`` each.
    :param psi: the irrep's matrices at the same elements, ``(d, d)`` each.
    :param endomorphisms: a basis of what commutes with the irrep, ``(1, 2 or 4, d, d)``.
    :returns: ``(size, d, m)`` with ``m`` the multiplicity; the ``m`` embeddings are isometries with
        orthogonal images where ``rho`` is orthogonal.
    """
    d = endomorphisms.shape[-1]
    null = np.eye(size * d)
    if rho:
        constraint = np.concatenate([np.kron(a, np.eye(d)) - np.kron(np.eye(size), b.T) for a, b in zip(rho, psi)])
        _, singular_values, vh = np.linalg.svd(constraint, full_matrices=False)
        null = vh[singular_values < _ZERO]
    copies, rest = divmod(null.shape[0], endomorphisms.shape[0])
    if rest:
        raise np.linalg.LinAlgError("the constraint does not determine the intertwiners")
    projector = null.T @ null
    chosen = np.zeros((size, d, copies))
    for copy in range(copies):
        lengths = projector.diagonal()
        pivot = np.flatnonzero(lengths > lengths.max() - _TIE)[0]
        w = (projector[:, pivot] / np.sqrt(lengths[pivot])).reshape(size, d)
        chosen[:, :, copy] = w * np.sqrt(d)
        orbit = (w @ endomorphisms).reshape(endomorphisms.shape[0], -1)
        q, _ = np.linalg.qr(orbit.T)
        projector = projector - q @ q.T
    return chosen


_elements: dict[tuple, tuple[list, list]] = {}
_matrices: dict[tuple, tuple[list, list]] = {}


def _key(group: Any) -> tuple:
    # escnn's groups compare by value and have no hash.
    return type(group).__name__, repr(sorted(group._keys.items()))


def _constraining(group: Any) -> tuple[list, list]:
    """Elements that generate the group (a dense part of it), and others to check against."""
    key = _key(group)
    if key not in _elements:
        try:
            _elements[key] = list(group.generators), []
        except ValueError:  # a continuous group
            state = np.random.get_state()
            np.random.seed(0)
            try:
                sample = [group.sample() for _ in range(2 * _GENERIC)]
            finally:
                np.random.set_state(state)
            _elements[key] = sample[:_GENERIC], sample[_GENERIC:]
    return _elements[key]


def _irrep_matrices(psi: Any) -> tuple[list, list]:
    key = (*_key(psi.group), psi.id)
    if key not in _matrices:
        generating, others = _constraining(psi.group)
        _matrices[key] = [psi(g) for g in generating], [psi(g) for g in others]
    return _matrices[key]


def _embeddings_of(psi: Any, rho: tuple[list, list], size: int) -> np.ndarray:
    """The embeddings of an irrep in a representation given on :func:`_constraining` elements."""
    generating, others = _irrep_matrices(psi)
    w = _embeddings(rho[0], generating, psi.endomorphism_basis(), size)
    for a, b in zip(rho[1], others):
        if not np.allclose(np.einsum("rs,sim->rim", a, w), np.einsum("rjm,ji->rim", w, b)):
            raise _numerical.UnderconstrainedIrrepDecompositionSystem(psi.group, psi.id, _GENERIC)
    return w


# ---- escnn's functions, computed by the canonical basis ---------------------------------------


def _decompose(rho: Callable[[Any], np.ndarray], group: Any, irreps: Sequence[Any]) -> tuple[np.ndarray, Irreps]:
    generating, others = _constraining(group)
    size = rho(group.identity).shape[0]
    matrices = [rho(g) for g in generating], [rho(g) for g in others]
    columns, multiplicities = [], []
    for psi in irreps:
        w = _embeddings_of(psi, matrices, size)
        multiplicities.append((psi.id, w.shape[2]))
        columns.append(w.transpose(0, 2, 1).reshape(size, -1))
    change_of_basis = np.concatenate(columns, axis=1)
    if change_of_basis.shape[1] < size:
        raise _numerical.InsufficientIrrepsException(group)
    return change_of_basis, multiplicities


def decompose_representation_finitegroup(
    representation: dict[Any, np.ndarray], group: Any
) -> tuple[np.ndarray, Irreps]:
    """As escnn's function of that name: irreps by their ids, those that do not occur included."""
    irreps = sorted(group.irreps(), key=lambda psi: psi.id)
    return _decompose(lambda g: representation[g], group, irreps)


def decompose_representation_general(
    representation: Callable[[Any], np.ndarray], group: Any, irreps: list | None = None
) -> tuple[np.ndarray, Irreps]:
    """As escnn's function of that name: irreps in the group's order, only those that occur."""
    irreps = group.irreps() if irreps is None else irreps
    change_of_basis, multiplicities = _decompose(representation, group, irreps)
    return change_of_basis, [(id, m) for id, m in multiplicities if m]


def compute_irrep_embeddings_general(representation: Callable[[Any], np.ndarray], irrep: Any) -> np.ndarray:
    """As escnn's function of that name: ``(size, d, m)``."""
    generating, others = _constraining(irrep.group)
    matrices = [representation(g) for g in generating], [representation(g) for g in others]
    return _embeddings_of(irrep, matrices, representation(irrep.group.identity).shape[0])


_tensors: dict[tuple, np.ndarray] = {}
_decompositions: dict[tuple, Irreps] = {}


def clebsch_gordan_tensor(J: tuple, l: tuple, j: tuple, group_class: str, **group_keys: Any) -> np.ndarray:
    """As escnn's ``_clebsh_gordan_tensor``: ``(dim J, dim l, multiplicity, dim j)``."""
    group = escnn.group.groups_dict[group_class]._generator(**group_keys)
    key = (*_key(group), J, l, j)
    if key not in _tensors:
        first, second, target = (group.irrep(*id) for id in (J, l, j))
        left, right = _irrep_matrices(first), _irrep_matrices(second)
        products = (
            [np.kron(a, b) for a, b in zip(left[0], right[0])],
            [np.kron(a, b) for a, b in zip(left[1], right[1])],
        )
        w = _embeddings_of(target, products, first.size * second.size)
        shape = first.size, second.size, target.size, w.shape[2]
        _tensors[key] = w.reshape(shape).transpose(0, 1, 3, 2)
    return _tensors[key].copy()


def tensor_decomposition(J: tuple, l: tuple, group_class: str, **group_keys: Any) -> Irreps:
    """As escnn's ``_find_tensor_decomposition``, kept in memory."""
    key = J, l, group_class, repr(sorted(group_keys.items()))
    if key not in _decompositions:
        _decompositions[key] = _find_tensor_decomposition(J, l, group_class, **group_keys)
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


def _clebsch_gordan_coefficients_o3(group: Any, m: Any, n: Any, j: Any) -> np.ndarray:
    """As O(3)'s ``_clebsh_gordan_coeff``, which calls ``np.zeros`` wrongly where parities do not fit."""
    first, second, target = (group.irrep(*group.get_irrep_id(i)) for i in (m, n, j))
    if (first.id[0] + second.id[0]) % 2 != target.id[0]:
        return np.zeros((first.size, second.size, 0, target.size))
    return o3group._clebsh_gordan_tensor_so3(first.id[1], second.id[1], target.id[1])


def irrep_matrices_from_generators(group: Any, generators: list) -> dict[Any, np.ndarray]:
    """As escnn's ``generate_irrep_matrices_from_generators``, breadth first in a fixed order.

    Its check of every product of two elements, seconds for 60 of them, is left out: the generators
    that escnn passes are constants.
    """
    matrices = {group.identity: np.eye(generators[0][1].shape[0])}
    reached = [group.identity]
    for e in reached:  # grows meanwhile
        for g, matrix in generators:
            product = g @ e
            if product not in matrices:
                matrices[product] = matrix @ matrices[e]
                reached.append(product)
    if len(matrices) != group.order():
        raise ValueError(f"expected generators of {group}, found {len(matrices)} elements")
    return matrices


# ---- put in place -----------------------------------------------------------------------------


def _original(function: Any) -> Any:
    return getattr(function, "func", function)


_find_tensor_decomposition = _original(_clebsh_gordan._find_tensor_decomposition)


def install() -> None:
    """Puts the functions above in the places of escnn's."""
    # No basis is kept on disk: computing it takes about as long as reading it, and what is not kept
    # cannot go stale.
    irrep._restrict_irrep = _original(irrep._restrict_irrep)
    ico._build_ico_irrep_picklable = _original(ico._build_ico_irrep_picklable)
    octa._build_octa_irrep_picklable = _original(octa._build_octa_irrep_picklable)
    for module in (irrep, ico, octa):
        module.generate_irrep_matrices_from_generators = irrep_matrices_from_generators
    _clebsh_gordan._clebsh_gordan_tensor = clebsch_gordan_tensor
    _clebsh_gordan._find_tensor_decomposition = tensor_decomposition
    for module in (_numerical, irrep, representation):
        module.decompose_representation_finitegroup = decompose_representation_finitegroup
    for module in (_numerical, irrep):
        module.decompose_representation_general = decompose_representation_general
    _numerical.compute_irrep_embeddings_general = compute_irrep_embeddings_general
    # What is left of escnn's own routines stays off scikit-learn's SVD: it is seeded by nothing,
    # and from scikit-learn 1.9 on it refuses escnn's matrices.
    _numerical.randomized_svd = None
    o3group.O3._clebsh_gordan_coeff = _clebsch_gordan_coefficients_o3
    if so3group.py3nj is None:
        for module in (so3group, o3group):
            module._clebsh_gordan_tensor_so3 = clebsch_gordan_tensor_so3
