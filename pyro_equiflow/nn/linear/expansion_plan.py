# SPDX-License-Identifier: Apache-2.0
"""How the free weights of a steerable layer become its filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from escnn import nn as enn
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.nn.linear.gather import Gather, block_gather, is_disjoint
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import split

__all__ = ["ExpansionPlan", "JointExpansion"]


@dataclass(frozen=True)
class _Pair:
    """The blocks of a filter between all fields of one representation and all of another.

    :ivar seen: which field may see which, ``(fields out, fields in)``.
    :ivar start: where the weights start, those of all pairs in a row; they are ``(number seen, len(basis))``.
    :ivar where: rows and columns of the filter.
    """

    seen: np.ndarray
    start: int
    basis: np.ndarray
    where: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.seen.sum()), len(self.basis)


class ExpansionPlan:
    """How a flat vector of weights becomes a filter, decided once from the bases of pairs of representations.

    If every entry of the filter hangs on one weight at most (bases of disjoint support: irreps, permutation
    representations on a point), expansion is one gather and one product. Else each pair of representations
    costs one product of matrices. Between fields that a mask keeps apart there is no weight.
    """

    def __init__(
        self,
        in_type: enn.FieldType,
        out_type: enn.FieldType,
        pair_basis: Callable[[Representation, Representation], np.ndarray],
        kernel_shape: tuple[int, ...],
        mask: np.ndarray | None,
    ) -> None:
        self.shape = (out_type.size, in_type.size, *kernel_shape)
        in_fields, out_fields = _fields_by_representation(in_type), _fields_by_representation(out_type)
        if mask is None:
            mask = np.ones((len(out_type.representations), len(in_type.representations)), dtype=bool)
        self.pairs: list[_Pair] = []
        self.num_weights = 0
        std = [np.zeros(0)]
        for out_rep, (out_index, out_starts) in out_fields.items():
            bases = {rep: _sparse(pair_basis(rep, out_rep)) for rep in in_fields}
            seen = {rep: mask[np.ix_(out_index, index)] for rep, (index, _) in in_fields.items()}
            # With weights of variance 1 over the basis elements' squared norms, a field's output variance is the
            # number of weights that it sums.
            fan = sum(len(bases[rep]) * seen[rep].sum(axis=1) for rep in in_fields)
            for in_rep, (_, in_starts) in in_fields.items():
                rows = np.add.outer(out_starts, np.arange(out_rep.size)).ravel()
                columns = np.add.outer(in_starts, np.arange(in_rep.size)).ravel()
                pair = _Pair(seen[in_rep], self.num_weights, bases[in_rep], np.ix_(rows, columns))
                count = math.prod(pair.shape)
                if count:
                    self.pairs.append(pair)
                    norm = np.linalg.norm(bases[in_rep][0])
                    fans = np.repeat(fan, len(pair.basis) * pair.seen.sum(axis=1))
                    std.append(np.sqrt(out_rep.size / fans) / norm)
                    self.num_weights += count
        self.init_std = np.concatenate(std)
        # Found once: numpy's sums cost more than the products at every expansion.
        self._counts = [math.prod(pair.shape) for pair in self.pairs]
        self.disjoint = all(is_disjoint(pair.basis) for pair in self.pairs)
        # One pair whose fields stand in order: the expanded block is the filter.
        self.in_order = (
            len(self.pairs) == 1
            and self.pairs[0].seen.all()
            and all(
                (np.diff(axis.ravel()) == 1).all() and axis.size == size
                for axis, size in zip(self.pairs[0].where, self.shape)
            )
        )

    def arrays(self) -> dict[str, np.ndarray | None]:
        """The constant arrays that :meth:`expand` takes."""
        if self.disjoint:
            index = np.zeros(self.shape, dtype=np.int64)
            factor = np.zeros(self.shape)
            for pair in self.pairs:
                entries, factors = block_gather(pair.basis, pair.seen)
                index[pair.where], factor[pair.where] = pair.start + entries, factors
            # The trivial group's weights are the filter.
            as_it_is = index.size == self.num_weights and (index.ravel() == np.arange(index.size)).all()
            as_it_is = as_it_is and (factor == 1).all()
            return {"index": None if as_it_is else index.ravel(), "factor": factor}
        # Where fields see none of another, a row of zeros after those of all blocks stands.
        zero = sum(pair.shape[0] * math.prod(pair.basis.shape[1:3]) for pair in self.pairs)
        order = np.full(self.shape[:2], zero)
        offset = 0
        for pair in self.pairs:
            (fields_out, fields_in), (size_out, size_in) = pair.seen.shape, pair.basis.shape[1:3]
            rows = np.full((fields_out, fields_in, size_out, size_in), zero)
            count = pair.shape[0] * size_out * size_in
            rows[pair.seen] = offset + np.arange(count).reshape(-1, size_out, size_in)
            order[pair.where] = rows.swapaxes(1, 2).reshape(fields_out * size_out, -1)
            offset += count
        bases = {f"basis{i}": pair.basis.reshape(len(pair.basis), -1) for i, pair in enumerate(self.pairs)}
        zeros = np.zeros((1, math.prod(self.shape[2:]))) if (order == zero).any() else None
        return {"order": order.ravel(), "zeros": zeros, **bases}

    def expand(self, weight: Tensor, constants: dict[str, Any]) -> Tensor:
        """The filter of shape ``(out, in, *kernel_shape)``, differentiable in ``weight``."""
        if not self.num_weights:
            return weight.new_zeros(self.shape)
        if self.disjoint:
            if constants["index"] is None:
                return weight.view(self.shape)
            return weight.index_select(0, constants["index"]).view(self.shape) * constants["factor"]
        bases = [constants[f"basis{i}"] for i in range(len(self._counts))]
        parts = [own.view(-1, len(basis)) @ basis for own, basis in zip(split(weight, self._counts), bases)]
        if self.in_order:
            fields, size = self.pairs[0].seen.shape, self.pairs[0].basis.shape[1]
            return parts[0].view(*fields, size, -1).transpose(1, 2).reshape(self.shape)
        points = math.prod(self.shape[2:])
        rows = [part.view(-1, points) for part in parts]
        if constants["zeros"] is not None:
            rows.append(constants["zeros"])
        joined = rows[0] if len(rows) == 1 else torch.cat(rows)
        return joined.index_select(0, constants["order"]).view(self.shape)


def _sparse(basis: np.ndarray) -> np.ndarray:
    """The basis with zeros for what is zero but for rounding: cos(pi/2) must not make a sparse basis a dense one."""
    return np.where(np.abs(basis) < 1e-14 * np.abs(basis).max(initial=0.0), 0.0, basis)


class JointExpansion:
    """Filters and biases of several layers from one vector of weights and one of biases.

    An optimizer's cost, and that of an expansion, goes by the number of tensors: where the bases allow it, one gather
    and one product serve all filters, and one more all biases.

    :param plans: the layers' plans.
    :param invariants: the bases of the invariant subspaces of their outputs, ``(channels, number)``.
    """

    def __init__(self, plans: Sequence[ExpansionPlan], invariants: Sequence[np.ndarray]) -> None:
        self._plans = plans
        self._weights = [plan.num_weights for plan in plans]
        self._entries = [math.prod(plan.shape) for plan in plans]
        self._channels = [len(basis) for basis in invariants]
        joint = all(plan.disjoint for plan in plans) and sum(self._weights) > 0
        arrays = [plan.arrays() for plan in plans]
        self._gather = _joined(arrays, self._weights) if joint else None
        self._constants = [] if joint else [Constants(**found) for found in arrays]
        self._bias_constants = Constants(**_bias_arrays(invariants))

    def filters(self, weight: Tensor) -> list[Tensor]:
        """The filters ``(out, in, *kernel_shape)``, differentiable in ``weight``."""
        if self._gather is None:
            parts = split(weight, self._weights)
            return [plan.expand(w, c.like(w)) for plan, w, c in zip(self._plans, parts, self._constants)]
        filters = split(self._gather(weight), self._entries)
        return [f.view(plan.shape) for f, plan in zip(filters, self._plans)]

    def biases(self, bias: Tensor) -> Sequence[Tensor | None]:
        """The biases of all output channels, differentiable in ``bias``; ``None`` where no output has invariants."""
        if not len(bias):
            return len(self._plans) * [None]
        constants = self._bias_constants.like(bias)
        if constants["matrix"] is None:
            return split(bias.index_select(0, constants["index"]) * constants["factor"], self._channels)
        return split(constants["matrix"] @ bias, self._channels)


def _joined(arrays: Sequence[dict[str, Any]], weights: Sequence[int]) -> Gather:
    """The gathers of several filters as one."""
    index, factor = [], []
    for found, own, start in zip(arrays, weights, np.cumsum([0, *weights[:-1]])):
        entries = np.arange(own) if found["index"] is None else found["index"]
        # A layer without weights reads some number, times zero.
        index.append(np.minimum(start + entries, sum(weights) - 1))
        factor.append(found["factor"].ravel())
    return Gather(np.concatenate(index), np.concatenate(factor))


def _bias_arrays(invariants: Sequence[np.ndarray]) -> dict[str, np.ndarray | None]:
    """What takes free biases to all channels: a gather, if no channel hangs on two of them, else a matrix."""
    matrix = torch.block_diag(*[torch.tensor(basis, device="cpu") for basis in invariants]).numpy()
    if not matrix.size or ((matrix != 0).sum(axis=1) > 1).any():
        return {"matrix": matrix}
    return {"matrix": None, "index": (matrix != 0).argmax(axis=1), "factor": matrix.sum(axis=1)}


def _fields_by_representation(field_type: enn.FieldType) -> dict[Representation, tuple[np.ndarray, np.ndarray]]:
    """For every representation its fields' indices and first channels."""
    starts = np.cumsum([0, *(r.size for r in field_type.representations)])
    fields: dict[Representation, list[int]] = {}
    for index, representation in enumerate(field_type.representations):
        fields.setdefault(representation, []).append(index)
    return {representation: (np.array(index), starts[index]) for representation, index in fields.items()}
