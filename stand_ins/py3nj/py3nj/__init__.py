# SPDX-License-Identifier: Apache-2.0
"""Clebsch-Gordan coefficients and Wigner 3j symbols from Racah's formula, in exact arithmetic.

A stand-in for the package of the same name, which needs a Fortran compiler. Every argument is
*twice* a quantum number, so that half-integers are integers.
"""

from fractions import Fraction
from functools import lru_cache
from math import factorial, sqrt

import numpy as np

__all__ = ["clebsch_gordan", "wigner3j"]
__version__ = "0.2.1.post0"


@lru_cache(maxsize=1 << 16)
def _clebsch_gordan(a: int, b: int, c: int, alpha: int, beta: int, gamma: int) -> float:
    """``<a/2 alpha/2 b/2 beta/2 | c/2 gamma/2>``, correctly rounded but for the square root."""
    if alpha + beta != gamma or not abs(a - b) <= c <= a + b or (a + b + c) % 2:
        return 0.0
    # Racah (1942), Theory of Complex Spectra II, eq. (16); every factorial's argument is whole.
    f = factorial
    ab_c, ac_b, bc_a = (a + b - c) // 2, (a + c - b) // 2, (b + c - a) // 2
    a_minus, a_plus = (a - alpha) // 2, (a + alpha) // 2
    b_minus, b_plus = (b - beta) // 2, (b + beta) // 2
    c_minus, c_plus = (c - gamma) // 2, (c + gamma) // 2
    u, v = (c - b + alpha) // 2, (c - a - beta) // 2
    total = sum(
        Fraction(
            (-1) ** k,
            f(k) * f(ab_c - k) * f(a_minus - k) * f(b_plus - k) * f(u + k) * f(v + k),
        )
        for k in range(max(0, -u, -v), min(ab_c, a_minus, b_plus) + 1)
    )
    square = Fraction((c + 1) * f(ab_c) * f(ac_b) * f(bc_a), f((a + b + c) // 2 + 1)) * Fraction(
        f(a_minus) * f(a_plus) * f(b_minus) * f(b_plus) * f(c_minus) * f(c_plus)
    )
    root = sqrt(square * total * total)
    return -root if total < 0 else root


def _integers(*arguments):
    arrays = np.broadcast_arrays(*arguments)
    for array in arrays:
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"expected integers (twice the quantum numbers), found dtype {array.dtype}")
    return arrays


def clebsch_gordan(two_j1, two_j2, two_j3, two_m1, two_m2, two_m3, ignore_invalid=False):
    r"""Clebsch-Gordan coefficients :math:`\langle j_1 m_1 j_2 m_2 | j_3 m_3 \rangle`.

    :param two_j1, two_j2, two_j3: twice the angular momenta, integers or arrays of them, ``>= 0``.
    :param two_m1, two_m2, two_m3: twice their projections, broadcast against the former.
    :param ignore_invalid: accepted for compatibility; arguments that no state has give 0 anyway.
    :returns: an array of the broadcast shape (a scalar for scalars); 0 where the selection rules
        forbid the coefficient.
    """
    arguments = _integers(two_j1, two_j2, two_j3, two_m1, two_m2, two_m3)
    a, b, c, alpha, beta, gamma = (np.atleast_1d(x) for x in arguments)
    valid = alpha + beta == gamma
    for j, m in ((a, alpha), (b, beta), (c, gamma)):
        valid &= (np.abs(m) <= j) & ((j + m) % 2 == 0)
    # Only the entries with m1 + m2 = m3 are computed: one in 2 j3 + 1 of a full table.
    rows = np.stack([x[valid] for x in (a, b, c, alpha, beta, gamma)], axis=-1)
    result = np.zeros(valid.shape)
    result[valid] = [_clebsch_gordan(*row) for row in rows.tolist()]
    return result.reshape(arguments[0].shape)[()]


def wigner3j(two_l1, two_l2, two_l3, two_m1, two_m2, two_m3, ignore_invalid=False):
    r"""Wigner 3j symbols :math:`\begin{pmatrix} l_1 & l_2 & l_3 \\ m_1 & m_2 & m_3 \end{pmatrix}`.

    The parameters are those of :func:`clebsch_gordan`, from which the symbols come:
    :math:`(-1)^{l_1 - l_2 - m_3} \langle l_1 m_1 l_2 m_2 | l_3, -m_3 \rangle / \sqrt{2 l_3 + 1}`.
    """
    l1, l2, l3, m1, m2, m3 = _integers(two_l1, two_l2, two_l3, two_m1, two_m2, two_m3)
    coefficient = clebsch_gordan(l1, l2, l3, m1, m2, -m3, ignore_invalid=ignore_invalid)
    # Where the exponent is not whole the coefficient is 0 by the selection rules.
    sign = 1.0 - 2.0 * (((l1 - l2 - m3) // 2) % 2)
    return sign * coefficient / np.sqrt(l3 + 1.0)
