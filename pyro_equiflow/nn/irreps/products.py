# SPDX-License-Identifier: Apache-2.0
"""Tensor products of irreps, projected to irreps: the equivariant way from one irrep to another on a point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from escnn.group import IrreducibleRepresentation
from torch import Tensor

from pyro_equiflow.nn.irreps.isotypic import IrrepMap
from pyro_equiflow.nn.linear.entrywise import EntrywiseExpansion
from pyro_equiflow.ops.constants import Constants

__all__ = ["IrrepMixture", "IrrepProducts"]


class IrrepProducts:
    r"""Clebsch-Gordan products of irrep fields, channel by channel.

    .. math:: p = C_{ab}^{c} \Bigl(u \otimes \frac{w}{\sqrt{1 + |w|^2}}\Bigr)

    for every pair of irreps :math:`a, b` among the fields and every target :math:`c` in their product. The second
    factor is shortened into the unit ball, so that products grow no faster than the fields. Two fields of one irrep are
    neighbours, so that antisymmetric products (the cross product of vectors) do not vanish.

    :param fields: irreps and their multiplicities.
    :param targets: the irreps wanted.
    :ivar outputs: irreps found and how many fields of each.

    Reference: Thomas et al., *Tensor field networks* (arXiv 1802.08219), section 4.1.3.
    """

    def __init__(
        self,
        fields: Sequence[tuple[IrreducibleRepresentation, int]],
        targets: Sequence[IrreducibleRepresentation],
    ) -> None:
        self._steps: list[tuple[int, int, int, int]] = []  # first field, second, number of fields, target
        arrays: dict[str, np.ndarray] = {}
        counts = [0] * len(targets)
        for i, (a, count_a) in enumerate(fields):
            for j, (b, count_b) in enumerate(fields[i:], i):
                for k, c in enumerate(targets):
                    coefficients = np.asarray(a.group._clebsh_gordan_coeff(a, b, c))
                    for s in range(coefficients.shape[2]):
                        count = min(count_a, count_b)
                        # Orthonormal embeddings of c: times the root of the size, entries are of order one.
                        matrix = coefficients[:, :, s].reshape(-1, c.size).T * np.sqrt(c.size)
                        arrays[f"product{len(self._steps)}"] = matrix
                        self._steps.append((i, j, count, k))
                        counts[k] += count
        self._constants = Constants(**arrays)
        self._kept = [k for k, count in enumerate(counts) if count]
        self.outputs = [(targets[k], counts[k]) for k in self._kept]

    def __len__(self) -> int:
        return len(self._steps)

    def prepare(self, x: Tensor) -> None:
        """Makes the constants for the dtype and device of ``x``: ``torch.compile`` cannot, while it traces."""
        self._constants.like(x)

    def apply(self, fields: Sequence[Tensor]) -> list[Tensor]:
        """The products, one tensor ``(count, size, batch)`` per output irrep, of fields ``(count, size, batch)``."""
        constants = self._constants.like(fields[0])
        shortened = [w / (1 + (w * w).sum(1, keepdim=True)).sqrt() for w in fields]
        found: dict[int, list[Tensor]] = {k: [] for k in self._kept}
        for index, (i, j, count, k) in enumerate(self._steps):
            u, w = fields[i][:count], shortened[j][:count]
            if i == j:
                w = w.roll(1, 0)
            outer = (u.unsqueeze(2) * w.unsqueeze(1)).flatten(1, 2)
            found[k].append(constants[f"product{index}"] @ outer)
        return [torch.cat(found[k]) if len(found[k]) > 1 else found[k][0] for k in self._kept]


class IrrepMixture:
    """Mixtures of irreps, with products between two of them where products add something.

    :param inputs: irreps and their multiplicities; trivial ones are not read.
    :param outputs: irreps and their multiplicities that are wanted in the end.
    :param width: channels aimed at; each irrep has at least its multiplicity.
    :param tensor_products: whether products may be taken.
    :ivar fields: irreps of the mixture and their multiplicities.
    :ivar expansion: from ``num_weights`` weights to the entries of all matrices.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[IrreducibleRepresentation, int]],
        outputs: Sequence[tuple[IrreducibleRepresentation, int]],
        width: int,
        tensor_products: bool,
    ) -> None:
        moving = [(irrep, count) for irrep, count in inputs if not irrep.is_trivial()]
        wanted = {irrep.id: (irrep, count) for irrep, count in [*outputs, *moving] if not irrep.is_trivial()}
        share = width // max(1, sum(irrep.size for irrep, _ in wanted.values()))
        self.fields = [(irrep, max(count, share)) for irrep, count in moving]
        self._products: IrrepProducts | None = None
        if tensor_products:
            pairs = [(irrep, max(count, 2)) for irrep, count in self.fields]  # a field has to have a neighbour
            products = IrrepProducts(pairs, [irrep for irrep, _ in wanted.values()])
            if len(products):
                self._products = products
                self.fields = pairs
        self._first = IrrepMap(inputs, self.fields)
        self._shapes = [(count, irrep.size) for irrep, count in self.fields]
        self._second: IrrepMap | None = None
        if self._products is not None:
            # Fields and products of one irrep stand together: the fields first.
            self._order = [irrep.id for irrep, _ in self.fields]
            gathered = {irrep.id: (irrep, count) for irrep, count in self.fields}
            for irrep, count in self._products.outputs:
                gathered[irrep.id] = (irrep, count + gathered.get(irrep.id, (irrep, 0))[1])
            self._gathered = list(gathered)
            self.fields = [(irrep, max(share, wanted[irrep.id][1])) for irrep, _ in gathered.values()]
            self._second = IrrepMap(list(gathered.values()), self.fields)
        maps = [m for m in (self._first, self._second) if m is not None]
        self.init_std = np.concatenate([m.init_std for m in maps])
        self.num_weights = len(self.init_std)
        self.expansion = EntrywiseExpansion.joined([m.expansion for m in maps], [m.num_weights for m in maps])

    def matrices(self, entries: Tensor) -> tuple[Tensor, ...]:
        """The matrices of one mixture or of both, from all of their entries in the order of :attr:`expansion`."""
        if self._products is None or self._second is None:
            return self._first.matrices(entries)
        self._products.prepare(entries)
        first, second = entries.split([len(self._first.expansion), len(self._second.expansion)])
        return (*self._first.matrices(first), *self._second.matrices(second))

    def apply(self, components: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
        """The mixture, one tensor ``(count * size, batch)`` per irrep, of those of the input likewise."""
        mixed = self._first.apply(components, matrices[: len(self._shapes)])
        if self._products is None or self._second is None:
            return mixed
        fields = [v.unflatten(0, shape) for v, shape in zip(mixed, self._shapes)]
        together: dict[tuple, list[Tensor]] = {name: [] for name in self._gathered}
        products = zip((irrep.id for irrep, _ in self._products.outputs), self._products.apply(fields))
        for name, field in (*zip(self._order, fields), *products):
            together[name].append(field.flatten(0, 1))
        gathered = [torch.cat(group) if len(group) > 1 else group[0] for group in together.values()]
        return self._second.apply(gathered, matrices[len(self._shapes) :])
