# SPDX-License-Identifier: Apache-2.0
"""Zachary's karate club, embedded in the plane: an equivariant guide beside Pyro's own guides.

Hoff's latent-space model puts each member ``i`` of a social network at a point ``z_i`` of the plane and lets ties fall
off with distance. Only distances matter, so the posterior is the same after every rotation and reflection of all points
together. ``AutoEquivariantFlow`` keeps that symmetry exactly: its flow commutes with rotations, and what it draws and
scores is the average over a reflection. The other guides have to break it. Every guide is fitted several times, from
seeds of its own, and the table shows means with standard errors over these fits.

Run it with ``make demo``, or ``python tutorials/karate.py --steps 300 --fits 1`` for a quick look.

References: Hoff, Raftery and Handcock, *Latent space approaches to social network analysis* (JASA 2002); Zachary, *An
information flow model for conflict and fission in small groups* (Journal of Anthropological Research, 1977).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor
from tqdm import tqdm

from pyro_equiflow import align, field_type
from pyro_equiflow.infer import AutoEquivariantFlow, diagnose, importance_weighted_bound
from pyro_equiflow.testing import invariance_error

BOUND_PARTICLES = 1000
# Seconds on one core of a server, of all guides together: per step of 128 draws, and for the table's figures.
STEP_SECONDS, MEASURE_SECONDS = 0.14, 13.0


class Network(NamedTuple):
    """A network as pairs of nodes: all of them, and which are tied."""

    graph: nx.Graph
    pairs: Tensor
    tied: Tensor


def load_network() -> Network:
    graph = nx.karate_club_graph()
    pairs = torch.triu_indices(len(graph), len(graph), 1)
    tied = torch.tensor([float(graph.has_edge(i, j)) for i, j in pairs.T.tolist()])
    return Network(graph, pairs, tied)


def model(network: Network) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([len(network.graph), 2]).to_event(2))
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    first, second = network.pairs
    # The square root has no gradient where two points meet: a constant far below any distance gives it one.
    distance = (z[..., first, :] - z[..., second, :]).square().sum(-1).add(1e-12).sqrt()
    pyro.sample("ties", dist.Bernoulli(logits=a[..., None] - distance).to_event(1), obs=network.tied)


# ---- guides ----------------------------------------------------------------------------------------------------


def plain_flow(latent_dim: int) -> T.ComposeTransformModule:
    """Affine couplings with random permutations between."""
    parts = []
    for _ in range(8):
        coupling = T.affine_coupling(latent_dim, hidden_dims=[54, 54])
        torch.nn.init.zeros_(coupling.nn.layers[-1].weight)  # starts as the identity, as the equivariant flow does
        torch.nn.init.zeros_(coupling.nn.layers[-1].bias)
        parts += [coupling, T.permute(latent_dim)]
    return T.ComposeTransformModule(parts)


def guides(network: Network) -> dict[str, tuple[Callable[[], Callable], float]]:
    """What makes each guide, and a learning rate that suits it: the best of those in the comment."""
    points = field_type("O(2)", vectors=len(network.graph))
    return {
        "AutoEquivariantFlow": (lambda: AutoEquivariantFlow(model, {"z": points}), 5e-3),  # as in any other model
        "AutoNormal": (lambda: AutoNormal(model), 3e-2),  # 1e-2, 3e-2
        "AutoMultivariateNormal": (lambda: AutoMultivariateNormal(model), 1e-2),  # 3e-3, 1e-2, 3e-2
        "AutoNormalizingFlow": (lambda: AutoNormalizingFlow(model, plain_flow), 3e-3),  # 1e-3, 3e-3, 5e-3, 1e-2
    }


def fit(name: str, guide: Callable, learning_rate: float, network: Network, steps: int, particles: int) -> float:
    """Stochastic variational inference with a cosine learning rate; returns seconds."""
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)(model, guide)
    elbo(network)  # guides make their parameters at the first call
    parameters = list(guide.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start, mean = time.perf_counter(), math.nan
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds between looks; a log file wants few
    with tqdm(range(steps), desc=f"{name:28}", unit="step", mininterval=interval) as bar:
        for step in bar:
            optimizer.zero_grad()
            loss = elbo(network)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            scheduler.step()
            mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
            if step % 50 == 0:
                bar.set_postfix_str(f"ELBO {-mean:.1f}", refresh=False)
    return time.perf_counter() - start


# ---- measures --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the table."""

    guide: str
    elbo: float
    elbo_stderr: float
    bound: float
    bound_stderr: float
    ess: float
    pareto_k: float
    rotations: float
    reflections: float
    parameters: int
    seconds: float


def log_density(guide: Callable) -> Callable[[Tensor], Tensor]:
    """The guide's log-density of all latent values in one vector."""
    if isinstance(guide, AutoNormal):
        loc, scale = (torch.cat([part.z.flatten(), part.a.flatten()]) for part in (guide.locs, guide.scales))
        return dist.Normal(loc, scale).to_event(1).log_prob
    return guide.get_posterior().log_prob


@torch.no_grad()
def draw(guide: Callable, network: Network, number: int) -> tuple[Tensor, Tensor]:
    """Draws of the positions, shape ``(number, nodes, 2)``, and of ``a``."""
    with pyro.plate("draws", number, dim=-1):
        values = guide(network)
    return values["z"], values["a"]


@torch.no_grad()
def invariance_errors(guide: Callable, network: Network) -> tuple[float, float]:
    """The largest change of the guide's log-density, in nats, under rotations, and under rotated reflections."""
    z, a = draw(guide, network, 50)
    latent = torch.cat([z.flatten(1), a[:, None]], 1).double()
    latent_type = field_type("O(2)", vectors=len(network.graph), scalars=1)
    elements = list(latent_type.testing_elements)
    kinds = [[g for g in elements if g.value[0] == flipped] for flipped in (0, 1)]
    guide.double()
    rotations, reflections = (invariance_error(log_density(guide), latent, latent_type, elements=k) for k in kinds)
    guide.float()
    return rotations, reflections


@torch.no_grad()
def measure(name: str, guide: Callable, network: Network, draws: int, seconds: float) -> Row:
    report = diagnose(guide, model, network, num_samples=draws, max_plate_nesting=0)
    found, (bound, bound_stderr) = report.estimate, importance_weighted_bound(report.log_weights, BOUND_PARTICLES)
    parameters = sum(parameter.numel() for parameter in guide.parameters())
    return Row(
        name,
        found.elbo,
        found.elbo_stderr,
        bound,
        bound_stderr,
        100 * found.efficiency,
        found.pareto_k,
        *invariance_errors(guide, network),
        parameters,
        seconds,
    )


def merged(fits: Sequence[Row]) -> Row:
    """The mean of several fits of one guide, with standard errors over them; a single one's are those of its draws."""
    if len(fits) == 1:
        return fits[0]
    values = torch.tensor([[*fit[1:]] for fit in fits], dtype=torch.float64)
    mean = Row(fits[0].guide, *values.mean(0).tolist())
    errors = dict(zip(Row._fields[1:], (values.std(0) / math.sqrt(len(fits))).tolist()))
    return mean._replace(
        elbo_stderr=errors["elbo"],
        bound_stderr=errors["bound"],
        rotations=max(fit.rotations for fit in fits),
        reflections=max(fit.reflections for fit in fits),
        parameters=fits[0].parameters,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text; the columns of invariance are in nats."""
    lines = [
        f"{'':32}{'':>14}  {'':>14}  {'':>6}  {'':>5}  {'invariance error':^22}",
        f"{'guide':32}{'ELBO':>8} {'s.e.':>5}  {'IW bound':>8} {'s.e.':>5}  {'ESS %':>6}  {'k-hat':>5}  "
        f"{'rotations':>9}  {'reflections':>11}  {'parameters':>10}  {'seconds':>7}",
    ]
    for r in rows:
        lines.append(
            f"{r.guide:32}{r.elbo:8.2f} {r.elbo_stderr:5.2f}  {r.bound:8.2f} {r.bound_stderr:5.2f}  {r.ess:6.2f}  "
            f"{r.pareto_k:5.2f}  {r.rotations:9.1e}  {r.reflections:11.1e}  {r.parameters:10d}  {r.seconds:7.0f}"
        )
    return "\n".join(lines)


# ---- picture ---------------------------------------------------------------------------------------------------


def aligned_to_their_mean(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draws aligned to the mean of the aligned draws, its long axis level, and that mean."""
    mean = align(draws, None, "O(2)").mean(0)
    mean = mean @ torch.linalg.svd(mean - mean.mean(0), full_matrices=False)[2].T
    return align(draws, mean, "O(2)"), mean


def save_picture(draws: Tensor, network: Network, path: Path) -> None:
    """Left, draws as the guide gives them; right, the network by one aligned draw, with the posterior's spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Ellipse

    plt.rcParams.update({"font.size": 8, "font.family": "sans-serif"})
    blue, orange, grey = (
        "#0072B2",
        "#E69F00",
        "#9a9a9a",
    )  # Okabe and Ito's; the blue is dark and the orange light in grey
    looks = {"Mr. Hi": (blue, "o", "white"), "Officer": (orange, "s", "black")}
    nodes = [looks[network.graph.nodes[i]["club"]] for i in network.graph]
    leaders = (0, len(network.graph) - 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.9), layout="constrained")

    for node in leaders:
        colour, marker, ink = nodes[node]
        left.scatter(*draws[:1000, node].T, s=3, color=colour, alpha=0.35, linewidths=0, marker=marker, rasterized=True)
        for number, (x, y) in enumerate(draws[:4, node].tolist(), 1):
            left.scatter(x, y, s=62, color=colour, marker=marker, edgecolors="black", linewidths=0.9, zorder=3)
            left.annotate(str(number), (x, y), ha="center", va="center_baseline", fontsize=6.5, color=ink, zorder=4)
    for pair in draws[:4, list(leaders)]:
        left.plot(*pair.T, color="black", linewidth=0.9, zorder=2)
    left.set_title("The two leaders in draws of the guide:\nfour, joined, and a thousand as dots", fontsize=8)

    aligned, mean = aligned_to_their_mean(draws)
    typical = aligned[(aligned - mean).square().sum((1, 2)).argmin()]
    ties = [typical[list(tie)].numpy() for tie in network.graph.edges]
    right.add_collection(LineCollection(ties, colors=grey, linewidths=0.6, zorder=2))
    for node, (colour, marker, _) in enumerate(nodes):
        values, axes = torch.linalg.eigh(torch.cov(aligned[:, node].T))
        angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1]))
        width, height = 2 * values.flip(0).sqrt()
        shape = {"xy": mean[node].tolist(), "width": width, "height": height, "angle": angle}
        right.add_patch(Ellipse(**shape, facecolor=colour, alpha=0.06, linewidth=0))
        right.add_patch(Ellipse(**shape, facecolor="none", edgecolor=colour, alpha=0.5, linewidth=0.5))
        leader = node in leaders
        right.scatter(
            *typical[node],
            s=80 if leader else 26,
            color=colour,
            marker=marker,
            edgecolors="black",
            linewidths=0.9 if leader else 0.5,
            zorder=3,
        )
    right.set_title("All members: one draw, aligned to the mean;\nellipses, one standard deviation", fontsize=8)

    for panel in (left, right):
        panel.set_aspect("equal", adjustable="datalim")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    labels = {"Mr. Hi": "stayed with the instructor", "Officer": "left with the president"}
    for club, (colour, marker, _) in looks.items():
        right.scatter([], [], s=26, color=colour, marker=marker, edgecolors="black", linewidths=0.5, label=labels[club])
    right.scatter([], [], s=80, color="white", edgecolors="black", linewidths=0.9, label="larger: the two themselves")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handletextpad=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


# ---- the whole -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each fit")
    parser.add_argument("--particles", type=int, default=128, help="draws per step")
    parser.add_argument("--draws", type=int, default=20_000, help="draws behind the table, two thousand at least")
    parser.add_argument("--fits", type=int, default=3, help="of each guide")
    parser.add_argument("--seed", type=int, default=0, help="of the first fit")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the table and the picture")
    parser.add_argument("--picture", type=Path, help="where the picture goes instead of the folder")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.particles, arguments.fits) < 1 or arguments.draws < 2 * BOUND_PARTICLES:
        parser.error(f"expected positive --steps, --particles, --fits, and --draws of {2 * BOUND_PARTICLES} at least")

    torch.set_num_threads(1)  # tensors are small: a second thread costs more than it brings
    network = load_network()
    candidates = guides(network)
    minutes = arguments.fits * (arguments.steps * STEP_SECONDS + MEASURE_SECONDS) / 60
    print(
        f"{len(candidates)} guides, {arguments.fits} fits of each, {arguments.steps} steps per fit: about "
        f"{math.ceil(minutes)} min",
        flush=True,
    )
    rows = []
    for name, (make, learning_rate) in candidates.items():
        fits = []
        for seed in range(arguments.seed, arguments.seed + arguments.fits):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = make()
            seconds = fit(f"{name}, seed {seed}", guide, learning_rate, network, arguments.steps, arguments.particles)
            fits.append(measure(name, guide, network, arguments.draws, seconds))
            if name == "AutoEquivariantFlow":
                draws, _ = draw(guide, network, 2000)
        rows.append(merged(fits))
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    if arguments.fits > 1:
        text += f"\nMeans and standard errors of {arguments.fits} fits; invariance errors, in nats, are the largest."
    print(text)
    (arguments.out / "karate.txt").write_text(text + "\n")
    picture = arguments.picture or arguments.out / "karate.png"
    save_picture(draws, network, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
