# SPDX-License-Identifier: Apache-2.0
"""Bases of intertwiners that depend on the space they span and on nothing else: matrices alone, nothing of groups."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import linalg

__all__ = ["TIE", "canonical_basis", "embeddings", "mean_projector", "null_projector"]

# Singular values of the constraint below this are zero. The smallest of the others is about 2 sin(pi / N) for a cyclic
# group of order N, 3 over the difference of frequencies for the circle.
_ZERO = 1e-8
# Candidates for a pivot whose projections' squared lengths differ by less, relatively, count as equal, so that
# rounding never decides between them.
TIE = 1e-6


def null_projector(rho: Sequence[np.ndarray], psi: Sequence[np.ndarray], orthogonal: bool) -> np.ndarray:
    r"""The orthogonal projector onto the intertwiners, the null space of :math:`\rho(g) W - W \psi(g)`.

    One element after the other: each leaves less for the next.

    :param rho: matrices of elements that generate the group, ``(size, size)`` each.
    :param psi: the irrep's matrices at the same elements, ``(d, d)`` each.
    :param orthogonal: whether all of ``rho`` are.
    """
    size, d = len(rho[0]), len(psi[0])
    null = _common_eigenspaces(rho[0], psi[0]) if orthogonal else np.eye(size * d)
    for a, b in zip(rho[orthogonal:], psi[orthogonal:]):
        w = null.reshape(size, d, -1)
        constraint = np.einsum("rs,sim->rim", a, w) - np.einsum("rjm,ji->rim", w, b)
        _, singular_values, vh = np.linalg.svd(constraint.reshape(size * d, -1), full_matrices=False)
        null = null @ vh[singular_values < _ZERO].conj().T
    projector: np.ndarray = (null @ null.conj().T).real
    return projector


def _common_eigenspaces(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A unitary basis, ``(size d, number)``, of all ``W`` with ``a W = W b``, of orthogonal matrices.

    Eigenvectors of the one times those of the other, of equal eigenvalues: no system of all entries has to be solved.
    """
    (of_a, u), (of_b, v) = (linalg.schur(matrix, output="complex") for matrix in (a, b))
    rows, columns = np.nonzero(np.abs(np.subtract.outer(of_a.diagonal(), of_b.diagonal())) < _ZERO)
    return np.einsum("rm,im->rim", u[:, rows], v[:, columns].conj()).reshape(len(a) * len(b), -1)


def mean_projector(rho: np.ndarray, psi: np.ndarray) -> np.ndarray:
    r"""The same where the group is finite and ``rho`` orthogonal: the mean of :math:`\rho(g) \otimes \psi(g)`.

    :param rho: at all elements, ``(order, size, size)``.
    :param psi: at all elements, ``(order, d, d)``.
    """
    order, size, d = len(rho), rho.shape[1], psi.shape[1]
    mean = (rho.reshape(order, -1).T @ psi.reshape(order, -1)) / order
    return mean.reshape(size, size, d, d).transpose(0, 2, 1, 3).reshape(size * d, size * d)


def embeddings(projector: np.ndarray, endomorphisms: np.ndarray) -> np.ndarray:
    r"""A basis of the intertwiners :math:`W \psi(g) = \rho(g) W` that depends on their space alone.

    :param projector: onto the intertwiners, ``(size d, size d)``.
    :param endomorphisms: a basis of what commutes with the irrep, ``(1, 2 or 4, d, d)``: images under them go
        together.
    :returns: ``(size, d, m)`` with ``m`` the multiplicity; the ``m`` embeddings are isometries with
        orthogonal images where ``rho`` is orthogonal.
    """
    number, d = endomorphisms.shape[0], endomorphisms.shape[-1]
    copies = round(projector.trace() / number)
    if abs(projector.trace() / number - copies) > TIE:
        raise np.linalg.LinAlgError("the constraint does not determine the intertwiners")
    chosen = canonical_basis(projector, copies, lambda w: (w.reshape(-1, d) @ endomorphisms).reshape(number, -1))
    return np.sqrt(d) * chosen.reshape(copies, len(projector) // d, d).transpose(1, 2, 0)


def canonical_basis(
    spanning: np.ndarray, number: int, orbit: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    r"""A basis of a space that depends on the space alone: pivoted Gram-Schmidt on the columns of its projector.

    What a solver returns for a null space is known only up to a rotation, which differs from one linear algebra library
    to another; its orthogonal projector :math:`P = S^T S` is unique. Of the projections of unit vectors the longest
    (the first of equals) is taken, its images are removed, and again.

    :param spanning: :math:`S`, ``(coordinates, entries)``: orthonormal rows, or the projector itself; of all entries at
        least those from which the others follow.
    :param number: how many vectors are taken.
    :param orbit: coordinates of the images of a vector that are removed with it, ``(images, coordinates)``; by default
        the vector alone.
    :returns: ``(number, entries)``, each vector of length 1 over all entries.
    """
    removed = np.zeros((0, len(spanning)))
    chosen = np.empty((number, spanning.shape[1]))
    lengths = np.einsum("ij,ij->j", spanning, spanning)  # the projector's diagonal, less what is removed
    for k in range(number):
        pivot = int(np.argmax(lengths > lengths.max() * (1 - TIE)))
        vector = spanning[:, pivot] - removed.T @ (removed @ spanning[:, pivot])
        vector /= np.linalg.norm(vector)
        images = vector[None] if orbit is None else np.linalg.qr(orbit(vector).T)[0].T
        chosen[k] = vector @ spanning
        lengths -= np.square(chosen[k : k + 1] if orbit is None else images @ spanning).sum(0)
        removed = np.concatenate([removed, images])
    return chosen
