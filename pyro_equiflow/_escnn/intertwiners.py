# SPDX-License-Identifier: Apache-2.0
"""Bases of intertwiners that depend on the space they span and on nothing else: matrices alone, nothing of groups."""

from collections.abc import Sequence

import numpy as np
from scipy import linalg

__all__ = ["TIE", "embeddings", "mean_projector", "null_projector"]

# Singular values of the constraint below this are zero. The smallest of the others is about 2 sin(pi / N) for a cyclic
# group of order N, 3 over the difference of frequencies for the circle.
_ZERO = 1e-8
# Candidates for a pivot whose projections' squared lengths differ by less count as equal, so that
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

    The null space of the constraint is known only up to a rotation, which differs from one linear
    algebra library to another; its orthogonal projector is unique. Of the projections of unit
    matrices the longest (the first of equals) is taken, with all its images under the irrep's
    endomorphisms removed, and again, until nothing is left.

    :param projector: onto the intertwiners, ``(size d, size d)``.
    :param endomorphisms: a basis of what commutes with the irrep, ``(1, 2 or 4, d, d)``.
    :returns: ``(size, d, m)`` with ``m`` the multiplicity; the ``m`` embeddings are isometries with
        orthogonal images where ``rho`` is orthogonal.
    """
    d = endomorphisms.shape[-1]
    size = projector.shape[0] // d
    rank = projector.trace() / endomorphisms.shape[0]
    copies = round(rank)
    if abs(rank - copies) > TIE:
        raise np.linalg.LinAlgError("the constraint does not determine the intertwiners")
    chosen = np.zeros((size, d, copies))
    for copy in range(copies):
        lengths = projector.diagonal()
        pivot = np.flatnonzero(lengths > lengths.max() - TIE)[0]
        w = (projector[:, pivot] / np.sqrt(lengths[pivot])).reshape(size, d)
        chosen[:, :, copy] = w * np.sqrt(d)
        orbit = (w @ endomorphisms).reshape(endomorphisms.shape[0], -1)
        q, _ = np.linalg.qr(orbit.T)
        projector = projector - q @ q.T
    return chosen
