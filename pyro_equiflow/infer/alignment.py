# SPDX-License-Identifier: Apache-2.0
"""Draws laid on top of each other: each moved by the group element that brings it nearest to a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow.distributions.orbit import check_orthogonal
from pyro_equiflow.infer.nearest import Kind, Listed, Orthogonal, Permutations, matrices_of, rows_along
from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer, found
from pyro_equiflow.ops.named_groups import named_vector, split_name
from pyro_equiflow.ops.representations import validate_field_type

__all__ = ["align"]

_ROUNDS = 100
_SETTLED = 1e-6  # the mean's change, as a part of its length

#: What moves one site, see :func:`align`.
Action: TypeAlias = FieldType | str | tuple[str, int] | Sequence[Tensor] | Tensor


@torch.no_grad()
def align(
    draws: Tensor | Mapping[str, Tensor],
    reference: Tensor | Mapping[str, Tensor] | None,
    action: Action | Mapping[str, Action],
    *,
    centre: bool = False,
    return_elements: bool = False,
) -> Any:
    r"""Each draw moved by the group element that brings it nearest to a reference.

    .. math:: x \mapsto g^\ast \cdot x, \qquad g^\ast = \arg\min_{g \in G} |g \cdot x - x^\ast|^2 ,

    the exact minimum: by singular values for rotations and reflections (Procrustes), by linear assignment for
    permutations, by trying all elements of any other finite group. What a symmetry leaves undecided is decided by the
    reference, so that means, medians and pictures of the aligned draws say something. What they say of single
    coordinates hangs on the reference; functions that the group leaves unchanged need no alignment.

    Draws of several sites, as guides and ``Predictive`` give them, are moved by one element all together: the sum of
    squares goes over all sites named in ``action``, each in its own units. The other sites stay as they are.

    An action is one of these:

    - ``"SO(d)"`` or ``"O(d)"``, any ``d``: the last dimension of a value holds vectors of ``d`` entries;
    - ``"S_n"``, any ``n``: the first dimension of a value holds ``n`` things, which are exchanged;
    - another group that :func:`~pyro_equiflow.field_type` knows by name, ``"D_5"``, say, on the last dimension;
    - any of these names with the dimension, ``("S_50", 1)``, counted without those of the batch;
    - a field type of the flattened value, as the guide has it: of any finite group, or of vectors, pseudovectors,
      scalars and pseudoscalars under SO(2), O(2), SO(3) or O(3);
    - a sequence of orthogonal matrices, which act on the flattened value.

    Guides' field types act on unconstrained values. Where a group does more than permute, give ``align`` sites without
    constraints.

    Without a reference (generalized Procrustes) the draws are aligned to the first of them, then to the mean of what
    came out, until that mean stays as it is (to 1e-6 of its length, after 100 rounds at most). That is a local minimum
    of the spread about the mean; another first draw may find another.

    Example::

        >>> import torch
        >>> from pyro_equiflow import align
        >>> truth = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])
        >>> angle = 6.28 * torch.rand(500)
        >>> turns = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
        >>> draws = (truth + 0.01 * torch.randn(500, 3, 2)) @ turns
        >>> aligned = align(draws, truth, "SO(2)")
        >>> (aligned.median(0).values - truth).abs().max() < 0.01
        tensor(True)

        Exchangeable components of a mixture, all sites by one order:

        >>> draws = {"mu": torch.tensor([[1.0, 5.0], [5.1, 0.9]]), "weight": torch.tensor([[0.3, 0.7], [0.6, 0.4]])}
        >>> align(draws, None, {"mu": "S_2", "weight": "S_2"})["weight"]
        tensor([[0.3000, 0.7000],
                [0.4000, 0.6000]])

    :param draws: a tensor ``(*batch, *event)``, or tensors by site of one batch shape. No gradients are kept.
    :param reference: one draw, ``(*event)`` or by site; or ``None``, with one batch dimension.
    :param action: how the group acts; for draws by site a mapping with the sites that it moves.
    :param centre: whether translations are taken out as well: draws are moved so that the mean of their vectors is the
        reference's (without a reference 0). For ``"SO(d)"`` and ``"O(d)"``.
    :param return_elements: whether the group elements are returned as well.
    :return: the aligned draws, as ``draws`` came; with ``return_elements`` a pair of them and the elements: for
        rotations and reflections matrices ``(*batch, d, d)``; for ``"S_n"`` which entry came to each place,
        ``(*batch, n)``; for other groups numbers ``(*batch,)``, into ``list(field_type.fibergroup.elements)`` or the
        matrices.
    :raises TypeError: an argument of another kind.
    :raises ValueError: unknown sites or actions, shapes that do not fit, values that are not finite, unlike groups.

    References: Schönemann, *A generalized solution of the orthogonal Procrustes problem* (Psychometrika 1966); Kabsch,
    *A solution for the best rotation to relate two sets of vectors* (Acta Crystallographica 1976); Gower, *Generalized
    Procrustes analysis* (Psychometrika 1975); Stephens, *Dealing with label switching in mixture models* (JRSS B 2000).
    """
    centre, return_elements = check_flag("centre", centre), check_flag("return_elements", return_elements)
    single = isinstance(draws, Tensor)
    values = _by_site("draws", draws, single)
    fixed = None if reference is None else _by_site("reference", reference, single)
    actions = {"": action} if single else action
    if not isinstance(actions, Mapping) or not actions:
        raise TypeError(
            "action: expected a mapping of the sites that the group moves, at least one, as draws are by site, found "
            f"{found(action)}"
        )
    for name in actions:
        if name not in values or (fixed is not None and name not in fixed):
            known = sorted(values if name not in values else fixed or ())
            raise ValueError(f"action: expected names of sites among {known}, found {name!r}")
    sites = _Sites(actions, values, fixed, centre)
    target = sites.mean_of_aligned() if fixed is None else sites.reference
    aligned, elements = sites.aligned(target)
    result: Any = aligned[""] if single else {**values, **aligned}
    return (result, elements) if return_elements else result


def _by_site(argument: str, values: Any, single: bool) -> dict[str, Tensor]:
    if single:
        check_instance(argument, values, Tensor, "a torch.Tensor, as draws are one")
        values = {"": values}
    check_instance(argument, values, Mapping, "a torch.Tensor, or a mapping of site names and tensors")
    for name, value in values.items():
        check_instance(argument, value, Tensor, f"a torch.Tensor{f' at {name!r}' if name else ''}")
    return dict(values)


class _Sites:
    """What is moved, flattened to ``(*batch, size)`` and centred if asked for, and how."""

    def __init__(
        self, actions: Mapping[str, Any], values: dict[str, Tensor], fixed: dict[str, Tensor] | None, centre: bool
    ) -> None:
        self.kinds: dict[str, Kind] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.draws: dict[str, Tensor] = {}
        self.reference: dict[str, Tensor] = {}
        batches = {}
        for name, action in actions.items():
            x, like = values[name], None if fixed is None else fixed[name]
            event = _event_shape(name, x, like)
            batches[name] = x.shape[: x.dim() - len(event)]
            self.shapes[name] = x.shape
            self.draws[name] = x.reshape(*batches[name], event.numel())
            if like is not None:
                self.reference[name] = like.reshape(-1).to(x)
            self.kinds[name] = _kind(action, event, centre)
        if len(set(batches.values())) > 1:
            raise ValueError(f"draws: expected sites of one batch shape, found {_shown(batches)}")
        if len({kind.key for kind in self.kinds.values()}) > 1:
            keys = {name: kind.key for name, kind in self.kinds.items()}
            raise ValueError(
                f"action: expected one group at all sites, found {keys}; of groups that act independently align by "
                "one after the other"
            )
        if fixed is None and not all(len(batch) == 1 and batch[0] for batch in batches.values()):
            raise ValueError(f"draws: expected one draw at least, to start from, found {_shown(batches)}")
        # Where centred vectors stand: only kinds of names are centred, see _kind.
        self.vectors = {name: kind.vectors for name, kind in self.kinds.items() if isinstance(kind, Orthogonal)}
        self.shift: Tensor | None = None
        if centre:
            self.draws = self._shifted(self.draws, -self._centre(self.draws))
            self.shift = self._centre(self.reference) if self.reference else None
            self.reference = self._shifted(self.reference, -self.shift) if self.shift is not None else {}

    def _centre(self, values: Mapping[str, Tensor]) -> Tensor:
        """The mean of the vectors of all sites, ``(*batch, d)``."""
        rows = [value[..., self.vectors[name]] for name, value in values.items()]
        return torch.cat(rows, -2).mean(-2)

    def _shifted(self, values: Mapping[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
        moved = {name: value.clone() for name, value in values.items()}
        for name, value in moved.items():
            value[..., self.vectors[name]] += shift[..., None, :]
        return moved

    def _elements(self, target: Mapping[str, Tensor]) -> Tensor:
        overlaps = [kind.overlap(self.draws[name], target[name]) for name, kind in self.kinds.items()]
        return next(iter(self.kinds.values())).nearest(torch.stack(overlaps).sum(0))

    def _moved(self, elements: Tensor) -> dict[str, Tensor]:
        return {name: kind.move(self.draws[name], elements) for name, kind in self.kinds.items()}

    def aligned(self, target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The draws at their nearest to a target, in their own shapes, and the elements."""
        elements = self._elements(target)
        moved = self._moved(elements)
        if self.shift is not None:
            moved = self._shifted(moved, self.shift)
        if elements.is_floating_point():
            elements = elements.to(next(iter(self.draws.values())))
        return {name: value.reshape(self.shapes[name]) for name, value in moved.items()}, elements

    def mean_of_aligned(self) -> dict[str, Tensor]:
        """The mean of draws aligned to it, found from the first."""
        mean = {name: x[0] for name, x in self.draws.items()}
        for _ in range(_ROUNDS):
            before, moved = mean, self._moved(self._elements(mean))
            mean = {name: value.mean(0) for name, value in moved.items()}
            change = sum(float((mean[name] - before[name]).square().sum()) for name in mean)
            if change <= _SETTLED**2 * sum(float(value.square().sum()) for value in mean.values()):
                break
        return mean


def _shown(batches: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{tuple(batch)}" + (f" at {name!r}" if name else "") for name, batch in batches.items())


def _event_shape(name: str, x: Tensor, reference: Tensor | None) -> torch.Size:
    at = f" at {name!r}" if name else ""
    for argument, value in (("draws", x), ("reference", reference)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{argument}: expected a floating-point dtype{at}, found {value.dtype}")
        if not value.isfinite().all():
            raise ValueError(f"{argument}: expected finite values{at}, found NaN or infinity")
    if reference is None:
        return x.shape[1:]
    if x.shape[x.dim() - reference.dim() :] != reference.shape or x.dim() < reference.dim():
        raise ValueError(
            f"reference: expected one draw of shape {tuple(x.shape[1:])}{at}, or fewer last dimensions of that where "
            f"the batch has several, found {tuple(reference.shape)}"
        )
    return reference.shape


def _kind(action: Any, event: torch.Size, centre: bool) -> Kind:
    name, dim = action if isinstance(action, tuple) and len(action) == 2 else (action, None)
    family, number = split_name(name) if isinstance(name, str) else ("", None)
    if centre and (family not in ("O", "SO")):
        raise ValueError(f'centre: expected False with an action other than "SO(d)" and "O(d)", found {found(action)}')
    if isinstance(name, str):
        return _named(name, family, number, dim, event)
    if isinstance(action, FieldType):
        validate_field_type(action, "action")
        if action.gspace.dimensionality or action.size != event.numel():
            raise ValueError(
                f"action: expected a field type of size {event.numel()} without a base space for values of shape "
                f"{tuple(event)}, found {action}"
            )
        return Listed.of_type(action) if action.fibergroup.order() > 0 else Orthogonal.of_type(action)
    return _of_matrices(action, event.numel())


def _named(name: str, family: str, number: int | None, dim: Any, event: torch.Size) -> Kind:
    vector = None
    if not (number and family in ("O", "SO", "S")):
        vector = named_vector(name, "action")
        number = vector.size
    if not event:
        raise ValueError(f"action: expected values of one dimension at least for {name!r}, found numbers")
    dim = (0 if family == "S" else -1) if dim is None else check_integer("action", dim, -len(event), len(event) - 1)
    if event[dim] != number:
        raise ValueError(
            f"action: expected {number} entries in dimension {dim} of values for {name!r}, found shape {tuple(event)}; "
            "name another dimension, (name, dim), or give a field type"
        )
    places = rows_along(event, dim)
    if vector is not None:
        return Listed(vector.group.name, [(places, matrices_of(vector))])
    return Permutations(places) if family == "S" else Orthogonal(number, family == "SO", places)


def _of_matrices(action: Any, size: int) -> Kind:
    matrices = torch.from_numpy(check_orthogonal(action, "action"))
    if matrices.shape[-1] != size:
        raise ValueError(f"action: expected matrices of size {size} for these values, found {tuple(matrices.shape)}")
    return Listed(f"{len(matrices)} matrices", [(torch.arange(size)[None], matrices)])
