# SPDX-License-Identifier: Apache-2.0
"""A smooth gate on irreps of Lipschitz constant 1."""

from __future__ import annotations

import math

import torch
from escnn.group import IrreducibleRepresentation
from escnn.gspaces import GSpace
from torch import Tensor

from pyro_equiflow.nn.nonlinearities import FUNCTIONS, FieldGates, require_one_lipschitz
from pyro_equiflow.ops.arguments import check_number

__all__ = ["LipschitzGate"]


class LipschitzGate(FieldGates):
    r"""Gates on irreps and their lengths, of Lipschitz constant 1 on all inputs jointly, and smooth everywhere.

    On a type of scalars :math:`s`, one gate :math:`u_i` an irrep field, and irrep fields :math:`v_i`, the layout of
    :class:`GatedNonLinearity`, with :math:`\rho_i = |v_i| / R`:

    .. math::
        (s,\ u_i,\ v_i) \mapsto \Bigl(f(s),\quad R \bigl(\sqrt{\tfrac13 + \rho_i^2} - \sqrt{\tfrac13}\bigr),\quad
        \sin(u_i / R)\, \frac{v_i}{\sqrt{1 + \rho_i^2}}\Bigr)

    The fields are projected into the ball of radius :math:`R` before they are gated, and as the projection lets less
    of their length through, the scalar beside it takes over.

    *The constant.* The Jacobian is block diagonal over scalars and pairs :math:`(u_i, v_i)`. Of a pair, write
    :math:`r = |v|`, :math:`g(u) = \sin(u / R)`, :math:`h(r) = r (1 + \rho^2)^{-1/2}` and :math:`L` for the length.
    A tangent across :math:`v` is multiplied by :math:`|g| h / r \le 1` and stays orthogonal to the rest. On tangents
    along :math:`(u, r)` the Jacobian is

    .. math:: J = \begin{pmatrix} 0 & L' \\ g' h & g h' \end{pmatrix}, \qquad
        \|J\| \le 1 \iff (1 - L'^2)(1 - g'^2 h^2) \ge g^2 h'^2,

    the determinant of :math:`1 - J^T J`, whose first entry :math:`1 - g'^2 h^2` is positive for :math:`h < R`. As
    :math:`R^2 g'^2 = 1 - g^2`, that entry is at least :math:`g^2`, so :math:`L'^2 + h'^2 \le 1` is enough. Here
    :math:`L'^2 = \rho^2 / (\tfrac13 + \rho^2)` and :math:`h'^2 = (1 + \rho^2)^{-3}`, and the inequality comes to
    :math:`1 + 3 \rho^2 \le (1 + \rho^2)^3`, Bernoulli's. Nothing is given away: 1 is reached by every tangent of
    :math:`v` at :math:`v = 0`, :math:`u = \pi R / 2`, no gate turns faster than a sine, and no number below
    :math:`\tfrac13` would do.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group
        >>> from pyro_equiflow.nn import LipschitzGate, expand
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> gate = LipschitzGate(space, 2, 3 * [space.irrep(1, 1)])
        >>> x, y = torch.randn(2, 100, gate.in_type.size)
        >>> bool(((expand(gate)(x) - expand(gate)(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-5)).all())
        True

    :param gspace: the gspace of the type.
    :param scalars: number of trivial fields :math:`s`.
    :param irreps: the non-trivial irreps :math:`v_i`, equal ones next to each other.
    :param function: the scalars' function :math:`f`, see :class:`PointwiseNonLinearity`, of Lipschitz constant 1.
    :param radius: :math:`R`, in the units of the fields: far inside, fields pass unchanged but for their gates, which
        then turn slowly.
    :ivar lipschitz: 1.
    :raises ValueError: no irreps, a function of constant above 1, or a radius that is not positive.
    """

    lipschitz = 1.0

    def __init__(
        self,
        gspace: GSpace,
        scalars: int,
        irreps: list[IrreducibleRepresentation],
        function: str = "lipswish",
        *,
        radius: float = 1.0,
    ) -> None:
        require_one_lipschitz(function)
        radius = check_number("radius", radius, "(0, inf)")
        super().__init__(gspace, scalars, irreps)
        self.function = function
        self.radius = radius

    @property
    def half_open(self) -> float:
        r"""The gate's input :math:`\pi R / 4`, where it lets pass, and turns, by :math:`1 / \sqrt 2` each."""
        return self.radius * math.pi / 4

    def invariants(self, s: Tensor, u: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scalars through their function, lengths, and the gates over the projection's denominators."""
        # Functions of squared lengths: smooth where a field is zero, with no root of zero.
        radius = self.radius
        lengths = (squares + radius**2 / 3).sqrt() - radius * math.sqrt(1 / 3)
        factors = torch.sin(u / radius) * (radius * (squares + radius**2).rsqrt())
        return FUNCTIONS[self.function](s), lengths, factors
