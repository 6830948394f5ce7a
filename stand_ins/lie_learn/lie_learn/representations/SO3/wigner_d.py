# SPDX-License-Identifier: Apache-2.0
"""Wigner D-matrices of SO(3), from one exact quarter turn a degree."""

from functools import cache
from math import comb, factorial, sqrt

import numpy as np

__all__ = ["wigner_D_matrix"]


def _quarter_turn(l: int, row: int, column: int) -> float:
    r"""The entry :math:`d^l_{row, column}(\pi / 2)`, from a sum of integers."""
    # Wigner's sum at beta = pi/2, where every power of cos and sin is 2^(-1/2): the binomials
    # leave one integer, so that nothing cancels in floating point.
    total = sum(
        (-1) ** k * comb(l + column, l + row - k) * comb(l - column, k)
        for k in range(max(0, row - column), min(l - column, l + row) + 1)
    )
    numerator = factorial(l + row) * factorial(l - row) * total * total
    denominator = factorial(l + column) * factorial(l - column) * 4**l
    root = sqrt(numerator / denominator)
    return -root if total < 0 else root


@cache
def _real_to_complex(l: int) -> np.ndarray:
    """Unitary ``B`` with ``D = B R B^H``: complex harmonics from real ones."""
    basis = np.zeros((2 * l + 1, 2 * l + 1), dtype=complex)
    basis[l, l] = 1.0
    for m in range(1, l + 1):
        sign = (-1) ** m
        basis[l - m, l - m], basis[l + m, l - m] = -1j * sqrt(0.5), 1j * sign * sqrt(0.5)
        basis[l - m, l + m], basis[l + m, l + m] = sqrt(0.5), sign * sqrt(0.5)
    basis.flags.writeable = False
    return basis


@cache
def _pole_to_y(l: int) -> np.ndarray:
    """The rotation that takes the z axis to the y axis, in the real basis."""
    quarter = np.array([[_quarter_turn(l, row, column) for column in range(-l, l + 1)] for row in range(-l, l + 1)])
    basis = _real_to_complex(l)
    matrix = _about_z(l, np.pi / 2) @ (basis.conj().T @ quarter @ basis).real
    matrix.flags.writeable = False
    return matrix


def _about_z(l: int, angle: float) -> np.ndarray:
    m = np.arange(-l, l + 1)
    matrix = np.diag(np.cos(m * angle))
    matrix[m + l, l - m] += np.sin(-m * angle)
    return matrix


def wigner_D_matrix(
    l,
    alpha,
    beta,
    gamma,
    field="real",
    normalization="quantum",
    order="centered",
    condon_shortley="cs",
):
    r"""The matrix of the rotation ``Rz(alpha) Ry(beta) Rz(gamma)`` on harmonics of degree ``l``.

    :param int l: the degree, ``>= 0``.
    :param alpha, beta, gamma: Euler angles in radians, scalars.
    :param str field: ``"real"`` or ``"complex"`` spherical harmonics.
    :param str normalization, order, condon_shortley: the defaults only.
    :returns: an array ``(2 l + 1, 2 l + 1)``, orthogonal or unitary; rows and columns run over
        ``m = -l, ..., l``.
    :raises NotImplementedError: for any other convention.
    """
    if (normalization, order, condon_shortley) != ("quantum", "centered", "cs"):
        raise NotImplementedError(
            "this stand-in for lie_learn has normalization='quantum', order='centered', "
            f"condon_shortley='cs' only; found {normalization!r}, {order!r}, {condon_shortley!r}"
        )
    if field not in ("real", "complex"):
        raise NotImplementedError(f"expected field 'real' or 'complex', found {field!r}")
    l = int(l)
    tilt = _pole_to_y(l)
    matrix = _about_z(l, alpha) @ tilt @ _about_z(l, beta) @ tilt.T @ _about_z(l, gamma)
    if field == "complex":
        basis = _real_to_complex(l)
        return basis @ matrix @ basis.conj().T
    return matrix
