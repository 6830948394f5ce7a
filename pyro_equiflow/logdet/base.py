# SPDX-License-Identifier: Apache-2.0
"""What every log-det estimator takes and gives, and the bounds that hold for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance, check_number
from pyro_equiflow.ops.dense import dense_jacobian, pulled_jacobian
from pyro_equiflow.ops.tracing import in_torch_func, refuse_dual_numbers, vjp

__all__ = [
    "Estimator",
    "LogDet",
    "Pass",
    "check_call",
    "forward_pass",
    "power_series_remainder",
    "range_error",
    "rounding_allowance",
]


class LogDet(NamedTuple):
    r"""What an estimator found, a sample; shape ``(B,)`` but for the last two.

    Example::

        >>> import torch
        >>> from pyro_equiflow.logdet import Exact
        >>> found = Exact()(lambda x: 0.5 * x, torch.zeros(3, 2), (), lipschitz=0.5, training=True)
        >>> bool(((found.value - 2 * torch.tensor(1.5).log()).abs() <= found.error).all())
        True

    :ivar value: :math:`\log|\det(I + J_f(x))|` or its estimate, with gradients to ``x`` and ``tensors``.
    :ivar error: a bound on ``|value - exact|`` that always holds as long as ``lipschitz`` does; no gradient. Where
        probes are random it is as wide as the range of values that the Lipschitz constant allows: see ``stderr``.
    :ivar stderr: standard error over the probes, of an estimate's random part; 0 where nothing is random, NaN for a
        single probe; no gradient.
    :ivar output: ``fn(x, *tensors)``, from the same pass.
    :ivar jacobian: the Jacobians :math:`J_f(x)`, shape ``(B, D, D)``, without a graph, where they were found.
    """

    value: Tensor
    error: Tensor
    stderr: Tensor
    output: Tensor
    jacobian: Tensor | None = None


class Estimator(Protocol):
    r"""Anything that estimates :math:`\log|\det(I + J_f(x))|` a sample.

    Example::

        >>> import torch
        >>> from pyro_equiflow.logdet import Estimator, LogDet
        >>> def of_scaling(fn, x, tensors, *, lipschitz, training) -> LogDet:
        ...     y = fn(x, *tensors)  # of the form a x
        ...     value = x.shape[1] * (1 + (y / x)[:, 0]).log()
        ...     return LogDet(value, torch.zeros_like(value), torch.zeros_like(value), y)
        >>> estimator: Estimator = of_scaling
        >>> estimator(lambda x: 0.5 * x, torch.ones(3, 2), (), lipschitz=0.5, training=True).value.exp()
        tensor([2.2500, 2.2500, 2.2500])

    :param fn: a map on plain tensors, ``fn(x, *tensors)``, from ``(B, *event)`` to ``(B, *event)``; the samples of a
        batch do not see each other.
    :param x: shape ``(B, *event)``, float32 or float64.
    :param tensors: what else ``fn`` takes. Gradients reach these, ``x``, and parameters that ``fn`` closes over.
    :param lipschitz: a bound below 1 on the Lipschitz constant of ``fn`` in ``x``.
    :param training: whether random numbers come from torch's global generator; otherwise they are the same at
        every call and the global generator is left alone.
    :return: :class:`LogDet`.
    :raises ValueError: ``lipschitz`` outside (0, 1), ``x`` without an event dimension, or another shape out of
        ``fn`` than into it.
    :raises TypeError: ``x`` is not floating-point.
    """

    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet: ...


def check_call(x: Tensor, lipschitz: float) -> None:
    """Raises unless ``x`` is a batch of floating-point events and ``lipschitz`` lies in (0, 1)."""
    check_number("lipschitz", lipschitz, "(0, 1)", remedy="I + J need not be invertible otherwise: scale fn down")
    check_instance("x", x, Tensor, "a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, found {x.dtype}; convert it with .to()")
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, *event), found {tuple(x.shape)}; add a batch dimension")


class Pass(NamedTuple):
    r"""One forward pass of ``fn`` to differentiate.

    :ivar x: the input, which requires grad.
    :ivar y: ``fn(x, *tensors)``.
    :ivar sources: all that the caller may differentiate by: ``x``, ``tensors`` and leaves that ``fn`` closes over.
    :ivar keep: whether the caller's graph goes on through the result.
    :ivar pull: takes :math:`p` to :math:`p^\top J_f(x)`, without a graph.
    :ivar narrowed: gives ``pull`` for some samples, by their indices; ``None`` where that cannot be had.
    :ivar functional: whether ``y`` and ``pull`` are those of :func:`torch.func.vjp`, which torch differentiates by
        itself.
    """

    x: Tensor
    y: Tensor
    sources: tuple[Tensor, ...]
    keep: bool
    pull: Callable[[Tensor], Tensor]
    narrowed: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    functional: bool = False

    def jacobian(self, rows: int) -> Tensor:
        """The dense Jacobians ``(B, D, D)``, ``rows`` rows at a time, with a graph where the caller's goes on."""
        if self.functional:
            return pulled_jacobian(self.pull, self.x, rows)
        return dense_jacobian(self.y, self.x, rows, create_graph=self.keep)


@contextmanager
def forward_pass(
    fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, pulled: bool = False
) -> Iterator[Pass]:
    """Runs ``fn``; inside the context gradients are on.

    A function with a method ``linearize(x, *tensors)``, which gives its value and ``pull`` (or ``None``), is linearized
    by it where ``pulled`` asks for that. One with an attribute ``per_sample``, how many of its tensors, the first ones,
    have a row for each sample, can be linearized for some of them.

    Jacobians are needed under ``torch.no_grad()`` and ``torch.inference_mode()`` as well.
    """
    if in_torch_func():
        y, pull_back = vjp(lambda x: fn(x, *tensors), x)
        _check_output(x, y)
        yield Pass(x, y, (), True, lambda p: pull_back(p)[0], functional=True)
        return
    refuse_dual_numbers("logdet")
    enabled, given = torch.is_grad_enabled(), x
    with torch.inference_mode(False), torch.enable_grad():
        # Autograd saves no inference tensor; a clone made here is an ordinary one.
        x = x.clone() if x.is_inference() else x
        tensors = [t.clone() if t.is_inference() else t for t in tensors]
        if not enabled:
            tensors = [t.detach() for t in tensors]
        if not (enabled and x.requires_grad):
            x = x.detach().requires_grad_()
        y, pull = _linearized(fn, x, tensors) if pulled else (fn(x, *tensors), None)
        _check_output(x, y)
        leaves = _closed_over(y, (x, *tensors)) if enabled else ()
        keep = enabled and (given.requires_grad or bool(leaves) or any(t.requires_grad for t in tensors))

        def narrowed(rows: Tensor) -> Callable[[Tensor], Tensor]:
            count = fn.per_sample  # type: ignore[attr-defined]
            x, *own = (t.detach().index_select(0, rows) for t in (run.x, *tensors[:count]))
            with torch.enable_grad():
                x.requires_grad_()
                y, pull = _linearized(fn, x, [*own, *(t.detach() for t in tensors[count:])])
            return pull or _by_autograd(y, x)

        sources = (x, *tensors, *leaves)
        known = pulled and hasattr(fn, "per_sample")
        run = Pass(x, y, sources, keep, pull or _by_autograd(y, x), narrowed if known else None)
        yield run


def _check_output(x: Tensor, y: Tensor) -> None:
    if y.shape != x.shape:
        raise ValueError(f"fn: expected an output of shape {tuple(x.shape)} as its input, found {tuple(y.shape)}")


def _linearized(
    fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """The value, and ``pull`` if the function has a way of its own."""
    linearize = getattr(fn, "linearize", None)
    return (linearize and linearize(x, *tensors)) or (fn(x, *tensors), None)


def _by_autograd(y: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: torch.autograd.grad(y, x, p, retain_graph=True, materialize_grads=True)[0]


def _closed_over(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Leaves of ``y``'s graph not reached through ``inputs``: a module that is not expanded holds its parameters."""
    given: set[int] = set()
    seen: set[torch.autograd.graph.Node | None] = set()
    leaves, open_nodes = [], [y.grad_fn]
    for tensor in inputs:
        given.add(id(tensor))
        seen.add(tensor.grad_fn)
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in given:
            leaves.append(leaf)
        for following, _ in node.next_functions:
            open_nodes.append(following)
    return tuple(leaves)


def power_series_remainder(event_size: int, lipschitz: float, terms: int) -> float:
    r"""Bound on what a power series of the log-det leaves out after ``terms`` terms.

    .. math:: \Big|\sum_{k>n} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k\Big| \le \frac{D c^{n+1}}{(n+1)(1-c)}

    :param event_size: :math:`D`, number of entries of an event.
    :param lipschitz: :math:`c`.
    :param terms: :math:`n`.
    """
    return event_size * lipschitz ** (terms + 1) / ((terms + 1) * (1 - lipschitz))


def range_error(value: Tensor, event_size: int, lipschitz: float) -> Tensor:
    """Largest distance from ``value`` to what the exact log-det can be.

    The singular values of ``I + J`` lie between ``1 - c`` and ``1 + c``.
    """
    low, high = event_size * math.log1p(-lipschitz), event_size * math.log1p(lipschitz)
    return torch.maximum(value.detach() - low, high - value.detach())


def rounding_allowance(x: Tensor, lipschitz: float) -> Tensor:
    r"""Allowance for rounding per sample, :math:`\epsilon D (32 + 4 |x|) / (1 - c)`, shape ``(B,)``.

    By :math:`|d \log\det(I + J)| \le D |dJ| / (1 - c)`: entries of :math:`J` are wrong by some ulp, and, where events
    are long, by what :math:`J` changes over the rounding of what a network adds to them. That is a model, for maps
    that turn on the scale of 1 and add nothing much longer than :math:`x`; never more than the range of log-dets.
    """
    size = x.shape[1:].numel()
    length = torch.linalg.vector_norm(x.detach().flatten(1), dim=1)
    allowance = torch.finfo(x.dtype).eps * size / (1 - lipschitz) * (32 + 4 * length)
    return allowance.clamp(max=size * (math.log1p(lipschitz) - math.log1p(-lipschitz)))
