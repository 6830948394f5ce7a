# SPDX-License-Identifier: Apache-2.0
"""Gates on irreps in few passes over memory and few calls, for one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_equiflow.ops.tracing import is_legacy_batched, is_traced

__all__ = ["Gates"]


class Gates:
    r"""The map :math:`(s, u_i, v_i) \mapsto (s\, \sigma(s), \sqrt{1 + |v_i|^2}, \sigma(u_i)\, v_i)`.

    Differentiable to any order. Autograd would keep every intermediate result and join the gradients of all parts; here
    input, output and sigmoids are kept, and every part is written where it belongs.

    :param scalars: number of scalars :math:`s`.
    :param runs: number and size of equal irreps in turn; there is one gate :math:`u_i` for each field :math:`v_i`.
    :param dim: the dimension of channels.
    """

    def __init__(self, scalars: int, runs: Sequence[tuple[int, int]], dim: int) -> None:
        counts = [count for count, _ in runs]
        self._dim = dim
        self._runs = list(runs)
        self._invariants = [scalars, *counts]
        self._joined = [scalars, sum(counts)]
        self._sizes = [*self._joined, *(count * size for count, size in runs)]

    def __call__(self, x: Tensor) -> Tensor:
        """The map of ``x``, scalars, gates and fields along the dimension of channels, to the same shape."""
        if is_traced():
            return self.plain(x)
        if x.requires_grad and torch.is_grad_enabled():
            return _Gated.apply(x, self)
        return self.value(x)[0]

    def plain(self, x: Tensor) -> Tensor:
        """The map as torch differentiates it."""
        dim = self._dim
        s, u, fields = self._split(x)
        lengths = torch.cat([(v * v).sum(dim + 1) for v in fields], dim).add(1.0).sqrt()
        gates = torch.sigmoid(u).split(self._invariants[1:], dim)
        gated = [(v * gate.unsqueeze(dim + 1)).flatten(dim, dim + 1) for v, gate in zip(fields, gates)]
        return torch.cat([s * torch.sigmoid(s), lengths, *gated], dim)

    def value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map without a graph, and the sigmoids of scalars and gates."""
        dim, out = self._dim, torch.empty_like(x)
        s, _, fields = self._split(x)
        s_out, lengths, fields_out = self._split(out)
        sigmoids = torch.sigmoid(x.narrow(dim, 0, sum(self._joined)))
        s_sigmoids, *gates = torch.split_with_sizes(sigmoids, self._invariants, dim)
        torch.mul(s, s_sigmoids, out=s_out)
        for v, gate, length, v_out in zip(fields, gates, self._by_run(lengths), fields_out):
            torch.sum(v * v, dim + 1, out=length)
            torch.mul(v, gate.unsqueeze(dim + 1), out=v_out)
        lengths.add_(1.0).sqrt_()
        return out, sigmoids

    def gradient(self, upstream: Tensor, x: Tensor, out: Tensor, sigmoids: Tensor) -> Tensor:
        """The gradient by ``x``, without a graph, from what :meth:`value` found."""
        dim, grad = self._dim, torch.empty_like(x)
        _, _, fields = self._split(x)
        s_out, lengths, _ = self._split(out)
        s_up, lengths_up, fields_up = self._split(upstream)
        s_grad, u_grad, fields_grad = self._split(grad)
        s_sigmoids, u_sigmoids = torch.split_with_sizes(sigmoids, self._joined, dim)
        s_rest, u_rest = torch.split_with_sizes(1 - sigmoids, self._joined, dim)
        torch.mul(s_up, torch.addcmul(s_sigmoids, s_out, s_rest), out=s_grad)
        shares = [self._by_run(t) for t in (u_sigmoids, u_grad, lengths_up / lengths)]
        for v, v_up, v_grad, gate, gate_grad, pull in zip(fields, fields_up, fields_grad, *shares):
            torch.sum(v_up * v, dim + 1, out=gate_grad)
            torch.mul(v_up, gate.unsqueeze(dim + 1), out=v_grad).addcmul_(v, pull.unsqueeze(dim + 1))
        u_grad.mul_(u_sigmoids).mul_(u_rest)
        return grad

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Scalars, what stands in the gates' places, and the fields ``(..., number, size, ...)`` of each run."""
        dim, shape = self._dim, x.shape
        s, u, *fields = torch.split_with_sizes(x, self._sizes, dim)
        return s, u, [v.view(*shape[:dim], *run, *shape[dim + 1 :]) for v, run in zip(fields, self._runs)]

    def _by_run(self, x: Tensor) -> Sequence[Tensor]:
        return [x] if len(self._runs) == 1 else torch.split_with_sizes(x, self._invariants[1:], self._dim)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Gates) -> Tensor:
        out, sigmoids = gates.value(x)
        ctx.save_for_backward(x, out, sigmoids)
        ctx.gates = gates
        return out

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor, None]:
        (upstream,) = upstreams
        x, out, sigmoids = ctx.saved_tensors
        graph = torch.is_grad_enabled()
        # A graph of the gradient is wanted, or there is a batch of gradients, whose parts cannot be written in place.
        if graph or is_traced() or is_legacy_batched(upstream):
            with torch.enable_grad():
                value = ctx.gates.plain(x)
            return torch.autograd.grad(value, x, upstream, create_graph=graph)[0], None
        return ctx.gates.gradient(upstream, x, out, sigmoids), None
