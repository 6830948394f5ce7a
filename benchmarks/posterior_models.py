# SPDX-License-Identifier: Apache-2.0
"""Ten posteriors that a group leaves unchanged: Pyro models with their data, field types and, where known, evidence.

Data are drawn by numpy with fixed seeds, so they are the same on every machine. Every model broadcasts over a plate on
its left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from escnn import group, gspaces
from escnn.group import Representation
from escnn.nn import FieldType
from torch import Tensor


class Posterior(NamedTuple):
    """A model with its data, and what is known of it.

    :ivar model: the Pyro model.
    :ivar args: its arguments in training.
    :ivar data: its arguments for the score: all the data.
    :ivar representations: how the group acts on the latent sites.
    :ivar dimension: the number of latent values.
    :ivar modes: into how many pieces the group takes a mode apart from what a continuous motion reaches: a density that
        sits on one of them loses the logarithm of this number.
    """

    model: Callable[..., Any]
    args: tuple
    data: tuple
    representations: Mapping[str, FieldType]
    dimension: int
    modes: int


class Evidence(NamedTuple):
    """The log evidence and its standard error; 0 where it is exact."""

    value: float
    stderr: float


def tensor(values: Any) -> Tensor:
    """Numbers in torch's default dtype and on its default device."""
    return torch.as_tensor(values, dtype=torch.get_default_dtype(), device=torch.get_default_device())


def fields(representation: Representation, number: int = 1) -> FieldType:
    """As many fields of a kind as asked for."""
    return FieldType(gspaces.no_base_space(representation.group), number * [representation])


def vectors(number: int) -> FieldType:
    """Points of the plane under O(2)."""
    return fields(group.o2_group().irrep(1, 1), number)


def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    """A latent site, independent normal."""
    return pyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))


def distances(x: Tensor, pairs: Tensor) -> Tensor:
    """Distances of the pairs of points; a constant far below any of them gives the root a gradient at 0."""
    first, second = pairs
    return (x[..., first, :] - x[..., second, :]).square().sum(-1).add(1e-12).sqrt()


# ---- the plane -------------------------------------------------------------------------------------------------


def power_model(order: int, y: Tensor, scale: float) -> None:
    z = normal("z", 2)
    re, im = z.unbind(-1)
    real, imaginary = re, im
    for _ in range(order - 1):
        real, imaginary = real * re - imaginary * im, real * im + imaginary * re
    pyro.sample("y", dist.Normal(real, scale), obs=y)


def power(order: int = 5, y: float = 1.0, scale: float = 0.2) -> Posterior:
    """The real part of the fifth power of a complex number, observed: five bent modes under D_5."""
    data = (order, tensor(y), scale)
    kind = fields(group.dihedral_group(order).irrep(1, 1))
    return Posterior(power_model, data, data, {"z": kind}, 2, order)


def cities_model(pairs: Tensor, observed: Tensor, scale: float) -> None:
    x = normal("x", 4, 2)
    pyro.sample("d", dist.Normal(distances(x, pairs), scale).to_event(1), obs=observed)


def cities(scale: float = 0.1) -> Posterior:
    """Where are London, Paris, Berlin and Madrid, given their distances in units of 1000 km?"""
    observed = tensor([0.344, 0.932, 1.263, 0.877, 1.053, 1.869])
    data = (torch.triu_indices(4, 4, 1), observed, scale)
    return Posterior(cities_model, data, data, {"x": vectors(4)}, 8, 2)


def signs_model(y: Tensor, scale: float) -> None:
    z = normal("z", 2)
    pyro.sample("y", dist.Normal(z.abs(), scale).to_event(1), obs=y)


def signs(y: tuple[float, float] = (1.0, 0.3), scale: float = 0.2) -> Posterior:
    """Two numbers known up to their signs: four modes, of which two and two run into each other."""
    first, second = (group.dihedral_group(2).irrep(1, k) for k in (0, 1))
    kind = FieldType(gspaces.no_base_space(first.group), [first, second])
    data = (tensor(y), scale)
    return Posterior(signs_model, data, data, {"z": kind}, 2, 4)


# ---- labels ----------------------------------------------------------------------------------------------------


def mixture_model(y: Tensor) -> None:
    a = normal("a", 3)
    mu = normal("mu", 3, scale=3.0)
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=a), dist.Normal(mu, sigma))
        pyro.sample("y", mixture, obs=y)


def mixture(number: int = 70) -> Posterior:
    """A mixture of three normals that overlap, its labels free to exchange."""
    random = np.random.RandomState(8)
    label = random.choice(3, number, p=(0.3, 0.4, 0.3))
    y = np.array([-2.5, 0.0, 3.0])[label] + np.array([0.7, 0.8, 1.0])[label] * random.randn(number)
    # S_3 is D_3, and its action on three letters that on the corners of a triangle.
    kind = fields(group.dihedral_group(3).quotient_representation((0, 1)))
    data = (tensor(y),)
    return Posterior(mixture_model, data, data, {"a": kind, "mu": kind, "sigma": kind}, 9, 6)


def neurons_model(x: Tensor, y: Tensor, scale: float) -> None:
    w, b, v = (normal(name, 3) for name in ("w", "b", "v"))
    hidden = torch.tanh(w[..., None, :] * x[:, None] + b[..., None, :])
    pyro.sample("y", dist.Normal((hidden * v[..., None, :]).sum(-1), scale).to_event(1), obs=y)


def neurons(number: int = 20, scale: float = 0.2) -> Posterior:
    """A network of three hidden tanh units, which exchange and change signs: the 48 signed permutations."""
    random = np.random.RandomState(0)
    x = np.linspace(-2, 2, number)
    y = np.sin(2 * x) * np.exp(-(x**2) / 4) + scale * random.randn(number)
    # The symmetries of the cube move the axes of space, and turn them round.
    kind = fields(group.full_octa_group().irrep((1,), (1,), 0))
    data = (tensor(x), tensor(y), scale)
    return Posterior(neurons_model, data, data, {"w": kind, "b": kind, "v": kind}, 9, 48)


# ---- factors ---------------------------------------------------------------------------------------------------


def factors_model(y: Tensor) -> None:
    loadings = normal("loadings", y.shape[-1], 2)
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0).expand([y.shape[-1]]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.LowRankMultivariateNormal(torch.zeros_like(noise), loadings, noise), obs=y)


def factors(number: int = 100, size: int = 6) -> Posterior:
    """Factor analysis, the factors integrated out: O(2) turns the loadings."""
    random = np.random.RandomState(0)
    loadings, noise = random.randn(size, 2), np.exp(-1 + 0.5 * random.randn(size))
    y = random.randn(number, 2) @ loadings.T + np.sqrt(noise) * random.randn(number, size)
    data = (tensor(y),)
    return Posterior(factors_model, data, data, {"loadings": vectors(size)}, 3 * size, 2)


def factorization_model(places: Tensor, y: Tensor, rows: int, columns: int, scale: float) -> None:
    u, v = normal("u", rows, 2), normal("v", columns, 2)
    products = (u[..., places[0], :] * v[..., places[1], :]).sum(-1)
    pyro.sample("y", dist.Normal(products, scale).to_event(1), obs=y)


def factorization(rows: int = 8, columns: int = 6, scale: float = 0.3) -> Posterior:
    """A matrix of rank two with a third of its entries missing: O(2) turns the factors on both sides."""
    random = np.random.RandomState(0)
    matrix = random.randn(rows, 2) @ random.randn(2, columns) + scale * random.randn(rows, columns)
    places = np.stack(np.nonzero(random.rand(rows, columns) < 2 / 3))
    where = torch.as_tensor(places, device=torch.get_default_device())
    data = (where, tensor(matrix[places[0], places[1]]), rows, columns, scale)
    kinds = {"u": vectors(rows), "v": vectors(columns)}
    return Posterior(factorization_model, data, data, kinds, 2 * (rows + columns), 2)


# ---- places by distances ---------------------------------------------------------------------------------------


def landmarks_model(pairs: Tensor, observed: Tensor, subsample_size: int | None) -> None:
    x = normal("x", 4, 3)
    noise = pyro.sample("noise", dist.LogNormal(-2.0, 1.0))
    with pyro.plate("measurements", len(observed), subsample_size=subsample_size) as rows:
        distance = distances(x, pairs[:, rows])
        if distance.dim() > 1:  # the plate's dimension is the pairs' own, and comes once
            distance = distance.squeeze(-2)
        pyro.sample("d", dist.Normal(distance, noise), obs=observed[rows])


def landmarks(number: int = 100, subsample_size: int = 20) -> Posterior:
    """Four points in space and the measurements' error, by a hundred noisy distances, a fifth of them at a step."""
    random = np.random.RandomState(0)
    x = random.randn(4, 3)
    choices = np.stack(np.triu_indices(4, 1))
    pairs = choices[:, random.choice(6, number)]
    observed = np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=-1) + 0.1 * random.randn(number)
    where = torch.as_tensor(pairs, device=torch.get_default_device())
    data = (where, tensor(observed))
    kind = fields(group.o3_group().irrep(1, 1), 4)
    return Posterior(landmarks_model, (*data, subsample_size), (*data, None), {"x": kind}, 13, 2)


def network_model(nodes: int, pairs: Tensor, tied: Tensor) -> None:
    z = normal("z", nodes, 2, scale=2.0)
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    pyro.sample("ties", dist.Bernoulli(logits=a[..., None] - distances(z, pairs)).to_event(1), obs=tied)


def network(nodes: int, pairs: Tensor, tied: Tensor) -> Posterior:
    """Hoff's latent-space model: ties fall off with distance in the plane."""
    data = (nodes, pairs, tied)
    return Posterior(network_model, data, data, {"z": vectors(nodes)}, 2 * nodes + 1, 2)


def miserables() -> Posterior:
    """Who appears with whom in Les Misérables: 77 people."""
    import networkx as nx

    graph = nx.les_miserables_graph()
    names = list(graph)
    pairs = torch.triu_indices(len(names), len(names), 1)
    return network(len(names), pairs, tensor([float(graph.has_edge(names[i], names[j])) for i, j in pairs.T.tolist()]))


def network300(nodes: int = 300) -> Posterior:
    """A network drawn from the model itself."""
    random = np.random.RandomState(0)
    z = 2 * random.randn(nodes, 2)
    first, second = np.triu_indices(nodes, 1)
    logits = 0.5 - np.linalg.norm(z[first] - z[second], axis=-1)
    tied = random.rand(len(first)) < 1 / (1 + np.exp(-logits))
    return network(nodes, torch.triu_indices(nodes, nodes, 1), tensor(tied))


#: By name, as on the command line.
POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "power": power,
    "cities": cities,
    "mixture": mixture,
    "miserables": miserables,
    "landmarks": landmarks,
    "factors": factors,
    "factorization": factorization,
    "neurons": neurons,
    "signs": signs,
    "network300": network300,
}

#: By name: quadrature where the error is 0 (``tests/test_posteriors.py``), else of ``posteriors.py --evidence --only
#: NAME`` with the ``--chains`` and ``--repeats`` given beside it. Of those not here it is not known.
EVIDENCE: dict[str, Evidence] = {
    "power": Evidence(-2.7009194, 0.0),
    "cities": Evidence(-3.538146, 0.0),
    "mixture": Evidence(-154.802, 0.020),  # 1000, 8
    "miserables": Evidence(-689.5, 0.2),  # 64, 3
    "landmarks": Evidence(67.26, 0.23),  # 300, 4
    "factors": Evidence(-959.757, 0.036),  # 1000, 4
    "factorization": Evidence(-58.630, 0.035),  # 1000, 4
    "neurons": Evidence(-10.501, 0.014),  # 2000, 8
    "signs": Evidence(-1.0881262, 0.0),
}
