# SPDX-License-Identifier: Apache-2.0
"""How the free weights of a steerable layer become its filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from escnn import nn as enn
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.nn.linear.entrywise import EntrywiseExpansion, block_entries, is_disjoint
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
    representations on a point), expansion is one look-up and one product. Else each pair of representations
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

        self._entrywise = self._by_entries() if self.disjoint else None
        self._constants = Constants(**({} if self.disjoint else self._by_products()))

    def _by_entries(self) -> EntrywiseExpansion:
        """The filter as a look-up of its weights."""
        index = np.zeros(self.shape, dtype=np.int64)
        factor = np.zeros(self.shape)
        for pair in self.pairs:
            entries, factors = block_entries(pair.basis, pair.seen)
            index[pair.where], factor[pair.where] = pair.start + entries, factors
        return EntrywiseExpansion(index.ravel(), factor.ravel())

    def _by_products(self) -> dict[str, np.ndarray | None]:
        """The bases of all pairs, and where the rows that they give stand in the filter."""
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

    def expand(self, weight: Tensor) -> Tensor:
        """The filter of shape ``(out, in, *kernel_shape)``, differentiable in ``weight``."""
        if self._entrywise is not None:
            return self._entrywise(weight).view(self.shape)
        constants = self._constants.like(weight)
        bases = [constants[f"basis{i}"] for i in range(len(self._counts))]
        blocks = [own.view(-1, len(basis)) @ basis for own, basis in zip(split(weight, self._counts), bases)]
        if self.in_order:
            fields, size = self.pairs[0].seen.shape, self.pairs[0].basis.shape[1]
            return blocks[0].view(*fields, size, -1).transpose(1, 2).reshape(self.shape)
        points = math.prod(self.shape[2:])
        rows = [block.view(-1, points) for block in blocks]
        if constants["zeros"] is not None:
            rows.append(constants["zeros"])
        joined = rows[0] if len(rows) == 1 else torch.cat(rows)
        return joined.index_select(0, constants["order"]).view(self.shape)

    @staticmethod
    def joined(plans: Sequence[ExpansionPlan]) -> EntrywiseExpansion | None:
        """The filters of several plans one after the other as one look-up; ``None`` where one needs products."""
        entrywise = [plan._entrywise for plan in plans if plan._entrywise is not None]
        complete = len(entrywise) == len(plans)
        return EntrywiseExpansion.joined(entrywise, [plan.num_weights for plan in plans]) if complete else None


def _sparse(basis: np.ndarray) -> np.ndarray:
    """The basis with zeros for what is zero but for rounding: cos(pi/2) must not make a sparse basis a dense one."""
    return np.where(np.abs(basis) < 1e-14 * np.abs(basis).max(initial=0.0), 0.0, basis)


class JointExpansion:
    """Filters and biases of several layers from one vector of weights and one of biases.

    An optimizer's cost, and that of an expansion, goes by the number of tensors: where the bases allow it, one look-up
    serves all filters, and one more all biases.

    :param plans: the layers' plans.
    :param invariants: the bases of the invariant subspaces of their outputs, ``(channels, number)``.
    """

    def __init__(self, plans: Sequence[ExpansionPlan], invariants: Sequence[np.ndarray]) -> None:
        self._plans = plans
        self._weights = [plan.num_weights for plan in plans]
        self._entries = [math.prod(plan.shape) for plan in plans]
        self._channels = [len(basis) for basis in invariants]
        self._joint = ExpansionPlan.joined(plans)
        matrix = torch.block_diag(*[torch.tensor(basis, device="cpu") for basis in invariants]).numpy()
        entrywise = matrix.size and ((matrix != 0).sum(axis=1) <= 1).all()
        self._bias = EntrywiseExpansion((matrix != 0).argmax(axis=1), matrix.sum(axis=1)) if entrywise else None
        self._bias_matrix = Constants(matrix=matrix)

    def filters(self, weight: Tensor) -> list[Tensor]:
        """The filters ``(out, in, *kernel_shape)``, differentiable in ``weight``."""
        if self._joint is None:
            return [plan.expand(own) for plan, own in zip(self._plans, split(weight, self._weights))]
        filters = split(self._joint(weight), self._entries)
        return [f.view(plan.shape) for f, plan in zip(filters, self._plans)]

    def biases(self, bias: Tensor) -> Sequence[Tensor | None]:
        """The biases of all output channels, differentiable in ``bias``; ``None`` where no output has invariants."""
        if not len(bias):
            return len(self._plans) * [None]
        channels = self._bias_matrix.like(bias)["matrix"] @ bias if self._bias is None else self._bias(bias)
        return split(channels, self._channels)


def _fields_by_representation(field_type: enn.FieldType) -> dict[Representation, tuple[np.ndarray, np.ndarray]]:
    """For every representation its fields' indices and first channels."""
    starts = np.cumsum([0, *(r.size for r in field_type.representations)])
    fields: dict[Representation, list[int]] = {}
    for index, representation in enumerate(field_type.representations):
        fields.setdefault(representation, []).append(index)
    return {representation: (np.array(index), starts[index]) for representation, index in fields.items()}
