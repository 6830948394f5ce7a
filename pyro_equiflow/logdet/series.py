# SPDX-License-Identifier: Apache-2.0
"""Log-dets by the power series of the logarithm: truncated, and unbiased by Russian roulette."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_equiflow.logdet.base import (
    LogDet,
    Pass,
    check_call,
    forward_pass,
    power_series_remainder,
    range_error,
    rounding_allowance,
)
from pyro_equiflow.logdet.probes import DISTRIBUTIONS, geometric, probe_vectors
from pyro_equiflow.ops.arguments import check_choice, check_integer, check_number, set_fields
from pyro_equiflow.ops.tracing import full_precision
from pyro_equiflow.ops.warning import warn_caller

__all__ = ["PowerSeries", "RussianRoulette"]


# A dense Jacobian takes over where its entries' rows are at most this many for each sample of the batch.
_DENSE = 4


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "second derivatives of a log-det estimated with random probes are not available: the gradient itself is "
            "an estimate, and its derivative would be wrong; use logdet.Exact(), or PowerSeries(probes=None)"
        )


class _Frozen(torch.autograd.Function):
    """``left`` as a constant to the first derivative, and an error to the second.

    It depends on all that ``fn`` does, so differentiating the gradient once more with it held fixed would be
    silently wrong. The zeros added to every gradient lead a second derivative here, to the error.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return left.view_as(left)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (None,) * (1 + len(inputs))
        return (None, *_Refused.apply(*inputs))


def _column(weight: Tensor, like: Tensor) -> Tensor:
    return weight.view(-1, *(1,) * (like.dim() - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _probed_series(run: Pass, probe: Tensor, weights: Tensor) -> Tensor:
    """The sum of ``w_k (-1)^(k+1) v^T J^k v / k`` over ``k = 1 .. n``, ``weights`` of shape ``(n, B)``.

    The gradient is that of ``left^T J v``, where ``left^T``, the sum of ``w_k (-1)^(k+1) v^T J^(k-1)``, is held fixed:
    by ``d tr J^k = k tr(J^(k-1) dJ)`` it has the mean of the value's gradient, and its graph is that of one
    vector-Jacobian product however many terms there are. The graph stays one of samples, so each sample's
    upstream gradient meets its own term.
    """
    x, y, sources, keep, pull, narrowed, functional = run
    if functional:
        return _differentiable_series(run, probe, weights)
    if not y.requires_grad:
        return x.new_zeros(x.shape[0])
    signed = weights.clone()
    signed[1::2].neg_()
    alive = (weights != 0).sum(1).tolist() if narrowed else []
    rows, remaining, power, left, traces = None, signed, probe, torch.zeros_like(probe), []
    # With a graph the last product is that of the surrogate.
    for k in range(len(signed)):
        if narrowed and 2 * alive[k] <= len(power):
            # What has ended is left out, by halves: to linearize anew costs as much as a product or two.
            chosen = remaining[k].nonzero()[:, 0]
            rows = chosen if rows is None else rows[chosen]
            power, remaining = power[chosen], remaining[:, chosen]
            # Of a few samples with many terms to come the dense Jacobian is the cheaper way.
            dense = len(rows) * x[0].numel() <= _DENSE * len(x)
            pull, narrowed = _by_matrices(x, rows, narrowed) if dense else narrowed(rows), None if dense else narrowed
        if keep:
            weight = _column(remaining[k], x)
            left.addcmul_(weight, power) if rows is None else left.index_add_(0, rows, weight * power)
        if k < len(signed) - keep:
            with torch.no_grad():
                power = pull(power)
            products = _dot(power, probe if rows is None else probe[rows])
            traces.append(products if rows is None else products.new_zeros(len(x)).index_copy(0, rows, products))
    orders = torch.arange(1, len(signed) + 1, dtype=x.dtype, device=x.device)[:, None]
    if not keep:
        return (signed / orders * torch.stack(traces)).sum(0)
    (row,) = torch.autograd.grad(y, x, _Frozen.apply(left, *sources), create_graph=True, materialize_grads=True)
    surrogate = _dot(row, probe)
    found = surrogate.detach()
    if traces:
        terms = signed[:-1] * torch.stack(traces)
        # What the surrogate holds beyond the known traces is the last one.
        found = (found - terms.sum(0)) / len(signed) + (terms / orders[:-1]).sum(0)
    return found + (surrogate - surrogate.detach())


def _differentiable_series(run: Pass, probe: Tensor, weights: Tensor) -> Tensor:
    """The same sum with a graph through every term: its gradient, to any order, is that of the sum that was drawn, and
    has the mean of :func:`_probed_series`'s."""
    total, power = run.x.new_zeros(len(run.x)), probe
    for k, weight in enumerate(weights, 1):
        power = run.pull(power)
        total = total + weight * (-1) ** (k + 1) / k * _dot(power, probe)
    return total


def _by_matrices(
    x: Tensor, rows: Tensor, narrowed: Callable[[Tensor], Callable[[Tensor], Tensor]]
) -> Callable[[Tensor], Tensor]:
    """``pull`` of some samples by their Jacobians, which are found in one product of as many rows as these have."""
    size = x[0].numel()
    units = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *x.shape[1:])
    with torch.no_grad():
        rows_of = narrowed(rows.repeat_interleave(size))(units.repeat(len(rows), *(1 for _ in x.shape[1:])))
    jacobian = rows_of.reshape(len(rows), size, size)
    return lambda p: (p.flatten(1)[:, None] @ jacobian).reshape(p.shape)


def _summary(values: list[Tensor], run: Pass, size: int, lipschitz: float) -> LogDet:
    y = run.y
    stacked = torch.stack(values)
    value = stacked.mean(0)
    if len(values) > 1 and value.numel():
        stderr = stacked.detach().std(0) / math.sqrt(len(values))
    else:
        stderr = torch.full_like(value, math.nan, requires_grad=False)
    if not run.keep:
        value, y = value.detach(), y.detach()
    return LogDet(value, range_error(value, size, lipschitz), stderr, y)


@dataclass(frozen=True, kw_only=True)
class PowerSeries:
    r"""The log-determinant by its truncated power series.

    .. math:: \log|\det(I + J)| = \sum_{k=1}^{n} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k + R_n, \qquad
        |R_n| \le \frac{D c^{n+1}}{(n+1)(1-c)}

    With ``probes=None`` the traces are exact, :math:`D` unit probes that share one dense Jacobian: the value is
    deterministic, its error at most the remainder and the allowance for rounding of :class:`Exact`, and its gradient,
    to any order, that of the truncated sum.

    With random probes, :math:`\operatorname{tr} J^k` is estimated by :math:`v^\top J^k v`, a vector-Jacobian product a
    term. The gradient, estimated with the same probes, is right on average for the truncated sum; it is not that of the
    very value drawn. It takes the memory of one product; second derivatives are refused. The ``error`` that always
    holds is then only the range that :math:`c` allows, :math:`D\log(1-c)` to :math:`D\log(1+c)`, as seen from the
    value; ``stderr`` tells the likely error of the probes, without the remainder. Outside training the probes are the
    same at every call and for every sample: the value is deterministic, but its error does not average out over
    samples, and the fixed probes are not symmetric under a group.

    Example::

        >>> import torch
        >>> from pyro_equiflow.logdet import PowerSeries
        >>> estimator = PowerSeries(terms=30, probes=None)
        >>> found = estimator(lambda x: 0.5 * x, torch.randn(4, 2), (), lipschitz=0.5, training=False)
        >>> found.value.exp()  # 1.5 ** 2
        tensor([2.2500, 2.2500, 2.2500, 2.2500])

    :param terms: :math:`n`; ``None`` for the fewest whose remainder is at most ``tolerance`` times :math:`D`.
    :param probes: number of random probes, or ``None`` for exact traces.
    :param distribution: ``"rademacher"`` or ``"gaussian"`` probes.
    :param tolerance: remainder allowed an entry of the event where ``terms`` is ``None``, in nats.
    :param rows: rows of the dense Jacobian found at once, where ``probes`` is ``None``: see :class:`Exact`.
    :raises ValueError: an argument out of range. For what a call raises, see :class:`Estimator`; second derivatives
        with random probes raise ``RuntimeError``.

    References: Behrmann et al., Invertible Residual Networks, arXiv 1811.00995; the gradient: Chen et al., Residual
    Flows for Invertible Generative Modeling, arXiv 1906.02735.
    """

    terms: int | None = None
    probes: int | None = 1
    distribution: str = "rademacher"
    tolerance: float = 1e-3
    rows: int = 64

    def __post_init__(self) -> None:
        for name in ("terms", "probes"):
            if getattr(self, name) is not None:
                set_fields(self, **{name: check_integer(name, getattr(self, name), 1, also="None")})
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        set_fields(
            self,
            rows=check_integer("rows", self.rows, 1),
            tolerance=check_number("tolerance", self.tolerance, "(0, inf)"),
        )

    def terms_for(self, lipschitz: float) -> int:
        """Number of terms used at a Lipschitz bound."""
        check_number("lipschitz", lipschitz, "(0, 1)")
        if self.terms is not None:
            return self.terms
        terms = 1
        while power_series_remainder(1, lipschitz, terms) > self.tolerance:
            terms += 1
        return terms

    @full_precision
    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet:
        """The truncated series at ``x``. See :class:`Estimator`."""
        check_call(x, lipschitz)
        terms = self.terms_for(lipschitz)
        size = x.shape[1:].numel()
        remainder = power_series_remainder(size, lipschitz, terms)
        with forward_pass(fn, x, tensors, pulled=self.probes is not None) as run:
            x, y, keep = run.x, run.y, run.keep
            if self.probes is not None:
                weights = x.new_ones(terms, x.shape[0])
                probes = probe_vectors(self.probes, x, self.distribution, training)
                return _summary([_probed_series(run, probe, weights) for probe in probes], run, size, lipschitz)
            value = _trace_series(run.jacobian(self.rows), terms)
            if not keep:
                value, y = value.detach(), y.detach()
        error = remainder + rounding_allowance(x, lipschitz)
        return LogDet(value, error, torch.zeros_like(error), y)


def _trace_series(jacobian: Tensor, terms: int) -> Tensor:
    power, value = jacobian, jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    for k in range(2, terms + 1):
        # The last power is needed for its trace only, but one product is little among the others.
        power = power @ jacobian
        value = value + (-1) ** (k + 1) / k * power.diagonal(dim1=-2, dim2=-1).sum(-1)
    return value


@dataclass(frozen=True, kw_only=True)
class RussianRoulette:
    r"""An unbiased estimate of the log-determinant, with an unbiased gradient.

    .. math:: \sum_{k=1}^{m+N} \frac{w_k (-1)^{k+1}}{k} v^\top J^k v, \qquad
        w_k = \frac{1}{P(N \ge k - m)} = (1-p)^{-\max(k-m, 0)}

    with :math:`m` terms always, :math:`N \ge 0` more, geometric, drawn per sample, and a random probe :math:`v`. Its
    gradient is estimated by the Neumann series, with the same :math:`N` and :math:`v`:
    :math:`\sum_k w_k (-1)^{k+1} v^\top J^{k-1} (dJ) v`. The terms of both are summed in the forward pass; what is kept
    for the backward pass is the graph of one vector-Jacobian product, whatever :math:`N` is, and each sample is
    weighed by its own upstream gradient. Second derivatives are refused.

    The variance is finite wherever :math:`p < 1 - \rho^2`, :math:`\rho` the spectral radius of :math:`J`, so certainly
    for :math:`p < 1 - c^2`. By default :math:`p = 1 - c`, which spends the terms best where they fall like :math:`c^k`:
    the chance of a term falls as its size does, and tails are light. By default
    :math:`m = \lceil 1 / (1 - c) \rceil`, at least 4. At :math:`J = -c I`, the worst that :math:`c` allows, the
    standard deviation over :math:`N` is then :math:`c^{m - 1/2}` of the gradient, .09 at :math:`c = .5`, .37 at .9 and
    at .99, with :math:`m + c / (1 - c)` terms on average: 5, 19 and 199. (For other :math:`p` and :math:`m` it is
    :math:`c^m \sqrt{p / (1 - c^2 - p)}`.) A ``probability`` for which that is infinite draws a warning and no error:
    :math:`\rho` may be far smaller than :math:`c`, and the estimate is unbiased all the same.

    The ``error`` that always holds is only the range that :math:`c` allows, :math:`D\log(1-c)` to :math:`D\log(1+c)`,
    as seen from the value; see ``stderr``. Outside training the draws are the same at every call and for every sample.

    Example::

        >>> import torch
        >>> from pyro_equiflow.logdet import RussianRoulette
        >>> x = torch.zeros(2000, 2)
        >>> found = RussianRoulette()(lambda x: 0.5 * x, x, (), lipschitz=0.5, training=True)
        >>> abs(found.value.mean().exp() - 1.5**2).item() < 0.01
        True

    :param exact_terms: :math:`m`, terms that are always there; by default by :math:`c`, as above.
    :param probability: :math:`p`, of stopping after each further term, inside (0, 1); by default by :math:`c`.
    :param probes: number of probes, each with its own :math:`N`.
    :param distribution: ``"rademacher"`` or ``"gaussian"`` probes.
    :raises ValueError: an argument out of range. For what a call raises, see :class:`Estimator`; second derivatives
        raise ``RuntimeError``.

    References: Chen et al., Residual Flows for Invertible Generative Modeling, arXiv 1906.02735; Beatson and Adams,
    Efficient Optimization of Loops and Limits with Randomized Telescoping Sums, arXiv 1905.07006, on :math:`p`.
    """

    exact_terms: int | None = None
    probability: float | None = None
    probes: int = 1
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        set_fields(self, probes=check_integer("probes", self.probes, 1))
        if self.exact_terms is not None:
            set_fields(self, exact_terms=check_integer("exact_terms", self.exact_terms, 1, also="None"))
        if self.probability is not None:
            set_fields(self, probability=check_number("probability", self.probability, "(0, 1)", also="None"))

    def terms_for(self, lipschitz: float) -> tuple[int, float]:
        """Number of terms always there, and probability of stopping after each further one, at a Lipschitz bound."""
        check_number("lipschitz", lipschitz, "(0, 1)")
        exact = math.ceil(1 / (1 - lipschitz) - 1e-6) if self.exact_terms is None else self.exact_terms
        probability = min(1 - lipschitz, 1 - 1e-6) if self.probability is None else self.probability
        return exact if self.exact_terms else max(exact, 4), probability

    @full_precision
    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet:
        """An unbiased estimate at ``x``. See :class:`Estimator`."""
        check_call(x, lipschitz)
        size = x.shape[1:].numel()
        exact, probability = self.terms_for(lipschitz)
        if probability >= 1 - lipschitz**2:
            warn_caller(
                f"probability: expected below 1 - lipschitz^2 = {1 - lipschitz**2:.3g} for a variance that is surely "
                f"finite, found {probability:g}: leave it out, and it follows from lipschitz={lipschitz:.3g}",
                RuntimeWarning,
            )
        with forward_pass(fn, x, tensors, pulled=True) as run:
            probes = probe_vectors(self.probes, x, self.distribution, training)
            more = geometric(self.probes, x, probability, training)
            values = [
                _probed_series(run, probe, _roulette_weights(extra, exact, probability, x.dtype))
                for probe, extra in zip(probes, more)
            ]
            return _summary(values, run, size, lipschitz)


def _roulette_weights(extra: Tensor, exact: int, probability: float, dtype: torch.dtype) -> Tensor:
    last = int(extra.max()) if extra.numel() else 0
    beyond = torch.arange(1 - exact, last + 1, device=extra.device)[:, None]
    weights = (1 - probability) ** -beyond.clamp(min=0).double()
    return (weights * (extra >= beyond)).to(dtype)
