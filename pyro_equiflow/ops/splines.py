# SPDX-License-Identifier: Apache-2.0
r"""Monotone rational-quadratic splines of the unit interval, and radial maps made of them.

On a bin of width :math:`w` and height :math:`h`, with :math:`\delta = h / w`, slopes :math:`d, e` at its ends and
:math:`\xi \in [0, 1]` the place in it, the spline rises by

.. math:: h\, \frac{\delta \xi^2 + d\, \xi (1 - \xi)}{\delta + (d + e - 2 \delta)\, \xi (1 - \xi)}.

All of :math:`\delta, d, e` are positive, so it is monotone and has one derivative at the knots. Places, log-slopes and
radial factors are sums of positive terms: nothing cancels, forth or back, in either precision. On the interval what is
given is :math:`f(x) - x`, made of differences from the identity that are exactly 0 for raw zeros: :math:`x` may be
known better than its distance from an end of the interval, and what is added to it is as small as the spline is near
the identity.

References: Gregory and Delbourgo, *Piecewise Rational Quadratic Interpolation to Monotonic Data* (IMA Journal of
Numerical Analysis 2, 1982); Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows* (arXiv 1906.04032),
section 3.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_BIN", "UnitSpline", "num_spline_parameters"]

#: The least width and height of a bin and the least slope of a knot.
MIN_BIN = 1e-2

# Beyond it a softplus is its argument, in either precision.
_LINEAR = 40.0


def num_spline_parameters(num_bins: int) -> int:
    """Raw numbers that a spline takes: a width and a height a bin, a slope an inner knot."""
    return 3 * num_bins - 1


class _Piece(NamedTuple):
    """Of the bin where a value lies: its number, left ends, width, height, slopes at both ends; all that once more as
    differences from the identity, right to their own last digits: bottom - left, height - width, slopes - 1.
    """

    number: Tensor
    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    slope: Tensor
    next_slope: Tensor
    lift: Tensor
    excess: Tensor
    bend: Tensor
    next_bend: Tensor


class UnitSpline:
    r"""Increasing maps :math:`f` of :math:`[0, 1]` onto itself, one for each entry of a tensor.

    Widths and heights of the bins are softmaxes of raw numbers, slopes at the inner knots softpluses, each held above
    :data:`MIN_BIN`. At the right end the slope is 1, at the left end 1 as well (:meth:`forward`, :meth:`inverse`), or
    what makes the radial map smooth (:meth:`radial`, :meth:`radial_inverse`). Raw zeros give the identity.

    :param raw: shape ``(*batch, 3 * num_bins - 1, *shape)``: widths, heights, slopes.
    :param num_bins: number of bins.
    :param dim: the dimension of the raw numbers, negative.
    """

    def __init__(self, raw: Tensor, num_bins: int, dim: int) -> None:
        self.num_bins = num_bins
        lengths, self._slopes = raw.movedim(dim, 0).split([2 * num_bins, num_bins - 1])
        lengths = lengths.unflatten(0, (2, num_bins))
        # Of softmaxes their differences from the mean, by exponentials less one: right to the last digit where all are
        # nearly equal. Divided by totals last, when only what belongs to one bin is left.
        mean = lengths.detach().logsumexp(1, keepdim=True) - math.log(num_bins)
        self._growths = (lengths - mean).expm1()
        sums = self._growths.sum(1)
        self._means, self._scales = sums / num_bins, (1 - num_bins * MIN_BIN) / (num_bins + sums)

    def _piece(self, values: Tensor, by: int) -> _Piece:
        """The bins of some values among widths (0) or heights (1)."""
        count = self.num_bins
        with torch.no_grad():
            number = torch.arange(count, dtype=values.dtype, device=values.device).view(-1, *values.dim() * (1,))
            before = number[:-1] + 1
            sums = self._growths[by].cumsum(0)[:-1] - before * self._means[by]
            index = (values >= before / count + self._scales[by] * sums).sum(0, keepdim=True)
            below = (number < index).to(values.dtype)
        own = self._growths.gather(1, index.expand(2, *index.shape))[:, 0]
        index = index[0]
        before = index.to(values.dtype)
        shares = self._scales * (own - self._means)
        starts = self._scales * ((self._growths * below).sum(1) - before * self._means)
        (left, bottom), (width, height) = before / count + starts, 1 / count + shares
        bend, next_bend = self._bend(index - 1), self._bend(index)
        lift, excess = starts[1] - starts[0], shares[1] - shares[0]
        return _Piece(index, left, bottom, width, height, 1 + bend, 1 + next_bend, lift, excess, bend, next_bend)

    def _bend(self, knot: Tensor) -> Tensor:
        """The slope at an inner knot, counted from 0, less 1; 0 at the ends."""
        inner = knot.clamp(0, self.num_bins - 2)
        raw = torch.where(knot == inner, self._slopes.gather(0, inner.unsqueeze(0))[0], 0.0)
        # softplus(raw + log(e - 1)) - 1, which loses no digits near 0
        bend = ((1 - 1 / math.e) * raw.clamp(max=_LINEAR).expm1()).log1p() + (raw - _LINEAR).clamp(min=0)
        return (1 - MIN_BIN) * bend

    # ---- on the interval --------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`f(x) - x` and :math:`\log f'(x)`; both 0 outside of the unit interval."""
        inside = (x >= 0) & (x <= 1)
        # A value in the interval stands for one outside: derivatives of what is thrown away have to be finite too.
        x = torch.where(inside, x, 0.5)
        piece = self._piece(x, 0)
        place = (x - piece.left) / piece.width
        change, log_slope = _change(place, 1 - place, piece)
        return torch.where(inside, change, 0.0), torch.where(inside, log_slope, 0.0)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`f^{-1}(y) - y` and :math:`\log (f^{-1})'(y)`; both 0 outside of the unit interval."""
        inside = (y >= 0) & (y <= 1)
        y = torch.where(inside, y, 0.5)
        piece = self._piece(y, 1)
        change, log_slope = _change(*_place(y, piece), piece)
        return torch.where(inside, -change, 0.0), torch.where(inside, -log_slope, 0.0)

    # ---- along a radius -----------------------------------------------------------------------------------------

    def radial(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        r"""The factor :math:`q(r) = f(r) / r` of the map :math:`x \mapsto q(|x|)\, x`, and :math:`\log f'(r)`.

        In the first bin :math:`f` gets the one slope at 0 for which :math:`f''(0) = 0`, so that map and log-det have
        two derivatives at the origin. It is :math:`d = \delta / (1 + a)`, :math:`a = \exp(\operatorname{arsinh}((e -
        \delta) / 2 \delta)) - 1`, and there

        .. math:: q = d \Bigl(1 + \frac{a \xi^2}{E}\Bigr), \qquad
            f' = d \Bigl(1 + \frac{a \xi^2 (3 + 2 a \xi - a \xi^2)}{E^2}\Bigr), \qquad E = 1 + a \xi (1 - \xi):

        nothing is divided by :math:`r`, and :math:`\xi^2` comes from squares, not from a root that has no derivative
        at 0.

        :param squares: :math:`r^2`.
        :return: both of the shape of ``squares``; 1 and 0 where :math:`r > 1`.
        """
        inside = squares <= 1
        squares = torch.where(inside, squares, 0.25)
        radius = _root(squares)
        piece = self._piece(radius, 0)
        first = piece.number == 0
        a, slope = _smooth_origin(piece)
        place = torch.where(first, radius / piece.width, 0.0)
        square = torch.where(first, squares / piece.width.square(), 0.0)
        near, near_log_slope = _near_origin(a, slope, place, square)
        beyond = (radius - piece.left) / piece.width
        numerator, denominator, log_slope = _rational(beyond, 1 - beyond, piece)
        far = (piece.bottom + piece.height * numerator / denominator) / torch.where(first, 1.0, radius)
        factor, log_slope = torch.where(first, near, far), torch.where(first, near_log_slope, log_slope)
        return torch.where(inside, factor, 1.0), torch.where(inside, log_slope, 0.0)

    def radial_inverse(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        r"""The factor :math:`f^{-1}(r) / r` of the inverse map, and :math:`\log (f^{-1})'(r)`.

        :param squares: :math:`r^2` of the images.
        :return: both of the shape of ``squares``; 1 and 0 where :math:`r > 1`.
        """
        inside = squares <= 1
        squares = torch.where(inside, squares, 0.25)
        radius = _root(squares)
        piece = self._piece(radius, 1)
        first = piece.number == 0
        a, slope = _smooth_origin(piece)
        unit = piece.width * slope
        t, t2 = torch.where(first, radius / unit, 0.0), torch.where(first, squares / unit.square(), 0.0)
        share = torch.where(first, radius / piece.height, 0.5)
        u = 1 - share - (1 + a * (3 + a)) * share
        root = (u * u + 4 * (1 + a).square() * share * (1 - share)).sqrt()
        shrink = 1 / (1 + 2 * a * t2 / (root + 1 + a * t))
        near, near_log_slope = _near_origin(a, slope, t * shrink, t2 * shrink.square())
        place, complement = _place(radius, piece)
        *_, log_slope = _rational(place, complement, piece)
        far = (piece.left + piece.width * place) / torch.where(first, 1.0, radius)
        factor, log_slope = torch.where(first, 1 / near, far), torch.where(first, -near_log_slope, -log_slope)
        return torch.where(inside, factor, 1.0), torch.where(inside, log_slope, 0.0)


def _rational(place: Tensor, complement: Tensor, piece: _Piece) -> tuple[Tensor, Tensor, Tensor]:
    """The rise as a share of the bin's height is the quotient of the first two; and the log-slope."""
    delta, start, end = piece.height / piece.width, piece.slope, piece.next_slope
    square, cross, rest = place * place, place * complement, complement * complement
    denominator = delta * (square + rest) + (start + end) * cross
    slope = end * square + 2 * delta * cross + start * rest
    log_slope = (slope * (delta / denominator).square()).log()
    return place * (delta * place + start * complement), denominator, log_slope


def _change(place: Tensor, complement: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
    r""":math:`f(x) - x` at a place in the bin, and the log-slope.

    The bin's lift, and :math:`w \xi` times what :math:`\delta (\delta \xi + d (1 - \xi))` is more than the denominator,
    as a share of it. Where the two are close that is made of differences from the identity, with :math:`\epsilon =
    \delta - 1`: :math:`\delta (\epsilon \xi + (d - 1)(1 - \xi)) - ((d - 1) + (e - 1) - 2 \epsilon)\, \xi (1 - \xi)`.
    """
    numerator, denominator, log_slope = _rational(place, complement, piece)
    delta, stretch, start, end = piece.height / piece.width, piece.excess / piece.width, piece.bend, piece.next_bend
    near = delta * (stretch * place + start * complement) - (start + end - 2 * stretch) * (place * complement)
    whole = delta * numerator - place * denominator
    close = whole.abs() < 0.25 * place * denominator
    return piece.lift + piece.width * torch.where(close, place * near, whole) / denominator, log_slope


def _place(y: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
    r"""The place in the bin where the spline is ``y``, and its complement.

    The quadratic equation's root, its discriminant as a sum of squares: with :math:`\eta` the share of the height and
    :math:`u = d (1 - \eta) - e \eta` it is :math:`u^2 + 4 \delta^2 \eta (1 - \eta)`.
    """
    delta = piece.height / piece.width
    share = (y - piece.bottom) / piece.height
    rest = 1 - share
    u = piece.slope * rest - piece.next_slope * share
    lower = u >= 0
    root = (u * u + 4 * delta * delta * share * rest).sqrt() + torch.where(lower, u, -u)
    numerator = torch.where(lower, 2 * delta * share, root)
    denominator = torch.where(lower, root, 2 * delta * rest)
    return numerator / (numerator + denominator), denominator / (numerator + denominator)


def _root(squares: Tensor) -> Tensor:
    """The square root; at 0 with derivative 0, since all that it goes into is even there."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _smooth_origin(piece: _Piece) -> tuple[Tensor, Tensor]:
    """What of a first bin makes the radial map smooth: the number a and the slope at 0."""
    delta = piece.height / piece.width
    exponent = torch.asinh((piece.next_slope - delta) / (2 * delta))
    return exponent.expm1(), delta * (-exponent).exp()


def _near_origin(a: Tensor, slope: Tensor, place: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The factor f(r) / r and the log of f'(r) in the first piece."""
    bend = a * square / (1 + a * (place - square))
    stretch = bend * (3 + a * (2 * place - square)) / (1 + a * (place - square))
    return slope * (1 + bend), slope.log() + stretch.log1p()
