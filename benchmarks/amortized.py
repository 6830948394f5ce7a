# SPDX-License-Identifier: Apache-2.0
r"""Amortised inference: an autoencoder of turned digits whose posterior turns with the image, and its plain twin.

Data: scikit-learn's digits, 8x8 pixels of 0 to 16, each turned by a random quarter turn (``images.py``). A pixel counts
the dark dots of 16, so the likelihood is Binomial(16, p), exact on integers:

.. math:: z \sim N(0, 1), \quad x_i \sim \mathrm{Binomial}(16, \sigma(d(z)_i)), \qquad
    q(z \mid x) = T(\cdot \mid e(x))_* N(0, 1)

Under C_4 the pixels are 16 regular fields (each orbit of pixels is one), the latents 4, which are 16 numbers. Encoder e
and decoder d are steerable networks, T is a stack of conditional couplings or IAFs, hence :math:`q(g \cdot z \mid g
\cdot x) = q(z \mid x)`. The plain twin is the same code under the trivial group, narrower, so that the numbers of
parameters agree within 2%. "augmented" is the twin with every batch turned at random, "wide" the same at the widths
of the equivariant arm, with four times its parameters.

Each run is SVI with ClippedAdam on batches of 100, the learning rate decayed by a factor of 20; the parameters that
score best on the validation part are kept. Bounds are means over the test images with K = 100 draws each: the ELBO,
and the importance-weighted bound of K draws (Burda, Grosse and Salakhutdinov, arXiv 1509.00519, eq. 8). Standard errors
are over the seeds; a seed decides parts, turns, weights and batches, the same for all arms. Seconds are the process's.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from escnn import gspaces
from escnn import nn as enn
from escnn.group import Group, cyclic_group, trivial_group
from images import as_fields, as_images, load, turn_fields
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_equiflow import conditional_equivariant_coupling, conditional_equivariant_iaf
from pyro_equiflow.nn import steerable_net
from pyro_equiflow.nn.conditioner import Conditioner

SIDE, LATENTS, LEVELS, BATCH = 8, 16, 16, 100


class Arm(NamedTuple):
    """A symmetry, the channels of context and hidden layers, and how it is trained."""

    symmetry: Group
    width: int
    flow_width: int
    lr: float
    augmented: bool = False


def arms(smoke: bool) -> dict[str, Arm]:
    """What is compared. The learning rates are the best on the validation part; RESULTS.md has those tried."""
    c4, trivial = cyclic_group(4), trivial_group()
    wide, narrow = ((256, 128), (117, 58)) if not smoke else ((16, 16), (6, 6))
    return {
        "equivariant": Arm(c4, *wide, lr=4e-3),
        "plain": Arm(trivial, *narrow, lr=4e-3),
        "augmented": Arm(trivial, *narrow, lr=8e-3, augmented=True),
        "wide": Arm(trivial, *wide, lr=4e-3, augmented=True),
    }


class Autoencoder(torch.nn.Module):
    """The model, its amortised guide, and their networks under one group.

    :param arm: its symmetry, C_4 or trivial, and widths.
    :param posterior: ``"coupling"``, four of them taking turns, or ``"iaf"``, two in opposite orders.
    """

    def __init__(self, arm: Arm, posterior: str) -> None:
        super().__init__()
        space = gspaces.no_base_space(arm.symmetry)

        def fields(channels: int) -> enn.FieldType:
            return enn.FieldType(space, channels // arm.symmetry.order() * [space.regular_repr])

        pixels, latents, context = fields(SIDE * SIDE), fields(LATENTS), fields(arm.width)
        width = (arm.width,)
        self.encoder = Conditioner(steerable_net(pixels, context, hidden_dims=width), pixels, context)
        self.decoder = Conditioner(steerable_net(latents, pixels, hidden_dims=2 * width), latents, pixels)
        order = range(len(latents))
        half = len(order) // 2
        kwargs = {"hidden_dims": (arm.flow_width,)}
        if posterior == "coupling":
            splits = 2 * [order[:half], order[half:]]
            steps = [conditional_equivariant_coupling(latents, context, split=split, **kwargs) for split in splits]
        else:
            orders = [order, order[::-1]]
            steps = [conditional_equivariant_iaf(latents, context, order=order, **kwargs) for order in orders]
        self.steps = torch.nn.ModuleList(steps)

    def prior(self, like: Tensor) -> dist.Distribution:
        """A standard normal, which the group leaves unchanged."""
        return dist.Normal(like.new_zeros(LATENTS), 1.0).to_event(1)

    def likelihood(self, z: Tensor) -> dist.Distribution:
        """The pixels given latents ``(*batch, 16)``."""
        return dist.Binomial(LEVELS, logits=self.decoder(z)).to_event(1)

    def posterior(self, x: Tensor) -> dist.TransformedDistribution:
        """The latents given pixels ``(*batch, 64)``."""
        family = dist.ConditionalTransformedDistribution(self.prior(x), list(self.steps))
        return family.condition(self.encoder(2 * x / LEVELS - 1))

    def model(self, x: Tensor) -> None:
        """Latents and pixels of a batch ``(images, 64)``."""
        pyro.module("autoencoder", self)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """Latents given pixels."""
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.posterior(x))


@torch.no_grad()
def log_weights(vae: Autoencoder, x: Tensor, draws: int) -> Tensor:
    """Log importance weights of draws for every image, ``(draws, images)``."""
    plate = pyro.plate("draws", draws, dim=-2)
    guide = poutine.trace(plate(vae.guide)).get_trace(x)
    model = poutine.trace(poutine.replay(plate(vae.model), trace=guide)).get_trace(x)
    for trace in (guide, model):
        trace.compute_log_prob()
    return model.nodes["z"]["log_prob"] + model.nodes["x"]["log_prob"] - guide.nodes["z"]["log_prob"]


@torch.no_grad()
def turning_errors(vae: Autoencoder, x: Tensor, draws: int) -> tuple[float, float]:
    """The largest changes in nats, over images and quarter turns, of log q(z | x) and of an image's ELBO.

    Draws turn with the image, and so does the noise that they are made of.
    """

    def elbo(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.posterior(x)
        z = noise
        for part in posterior.transforms:
            z = part(z)
        log_q = posterior.log_prob(z)
        return z, log_q, (vae.prior(x).log_prob(z) + vae.likelihood(z).log_prob(x) - log_q).mean(0)

    noise = vae.prior(x).expand((draws, len(x))).sample()
    z, log_q, bound = elbo(x, noise)
    density, change = 0.0, 0.0
    for number in (1, 2, 3):
        turned = turn_fields(x, number)
        density = max(density, float((vae.posterior(turned).log_prob(turn_fields(z, number)) - log_q).abs().max()))
        change = max(change, float((elbo(turned, turn_fields(noise, number))[2] - bound).abs().max()))
    return density, change


class Run(NamedTuple):
    """One run: bounds in nats per image on validation and test part, how it went, and the parameters kept."""

    validation: float
    elbo: float
    bound: float
    elbo_noise: float
    turned_density: float
    turned_elbo: float
    parameters: int
    seconds: float
    best_step: int
    curve: list[tuple[int, float]]
    state: dict[str, Tensor]


def train(name: str, arm: Arm, seed: int, args: argparse.Namespace) -> Run:
    """Fits one arm by SVI and scores it."""
    parts = load("digits", seed)
    data, held_back, test = (as_fields(part).to(args.device) for part in parts[:3])
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = Autoencoder(arm, args.posterior).to(args.device)
    batches, turns = (torch.Generator().manual_seed(seed) for _ in range(2))
    svi = SVI(
        poutine.scale(vae.model, 1 / BATCH),
        poutine.scale(vae.guide, 1 / BATCH),
        pyro.optim.ClippedAdam({"lr": args.lr or arm.lr, "lrd": 0.05 ** (1 / args.steps)}),
        Trace_ELBO(),
    )
    best, curve = (-math.inf, 0, vae.state_dict()), []
    start = time.process_time()
    every = max(1, args.steps // 50)
    for step in range(1, args.steps + 1):
        x = data[torch.randperm(len(data), generator=batches)[:BATCH].to(args.device)]
        if arm.augmented:
            turned = torch.stack([turn_fields(x, number) for number in range(4)])
            x = turned[torch.randint(4, (len(x),), generator=turns), torch.arange(len(x))]
        svi.step(x)
        if step % every == 0 or step == args.steps:
            score = float(log_weights(vae, held_back, args.draws // 5).mean())
            curve.append((step, score))
            if score > best[0]:
                best = (score, step, copy.deepcopy(vae.state_dict()))
            if len(curve) % 10 == 0:
                print(f"  {name}, seed {seed}, step {step}: validation ELBO {score:.2f}", flush=True)
    seconds = time.process_time() - start
    vae.load_state_dict(best[2])
    pyro.set_rng_seed(1000 + seed)
    weights = log_weights(vae, test, args.draws).double()
    elbo, bound = weights.mean(0), weights.logsumexp(0) - math.log(args.draws)
    validation = float(log_weights(vae, held_back, args.draws).mean())
    errors = turning_errors(vae.double(), test[:100].double(), 5)
    return Run(
        validation,
        float(elbo.mean()),
        float(bound.mean()),
        float(elbo.std()) / len(elbo) ** 0.5,
        *errors,
        sum(p.numel() for p in vae.parameters()),
        seconds,
        best[1],
        curve,
        best[2],
    )


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ({error:.2f})"


def table(runs: dict[tuple[str, int], Run], args: argparse.Namespace) -> None:
    """Bounds of every arm, differences from the equivariant one paired by seed, and what turning changes."""
    print("\n| arm | parameters | ELBO | bound | ELBO less equivariant's | change of log q | of the ELBO | CPU s |")
    print(8 * "|---" + "|")
    seeds = sorted({seed for _, seed in runs})
    for name in dict.fromkeys(arm for arm, _ in runs):
        mine = [runs[name, seed] for seed in seeds]
        less = ""
        if name != "equivariant" and ("equivariant", seeds[0]) in runs:
            less = spread([run.elbo - runs["equivariant", seed].elbo for run, seed in zip(mine, seeds)])
        cells = (
            name,
            mine[0].parameters,
            spread([run.elbo for run in mine]),
            spread([run.bound for run in mine]),
            less,
            f"{max(run.turned_density for run in mine):.1e}",
            f"{max(run.turned_elbo for run in mine):.1e}",
            f"{statistics.mean(run.seconds for run in mine):.0f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |")
    total = sum(run.seconds for run in runs.values())
    print(f"\n{args.posterior}, {args.steps} steps, K = {args.draws}; training of all: {total:.0f} CPU seconds")


def draw(runs: dict[tuple[str, int], Run], args: argparse.Namespace) -> None:
    """Test images at four turns, their reconstructions turned back, draws from the priors, and learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    test = as_fields(load("digits", args.seed).test)
    orbits = torch.stack([turn_fields(test[i], number) for i in range(4) for number in range(4)])
    pyro.set_rng_seed(args.seed)
    noise = torch.randn(36, LATENTS)
    galleries = [("test images, each at four turns", orbits, 4)]
    for name in ("equivariant", "plain"):
        vae = Autoencoder(arms(args.smoke)[name], args.posterior)
        vae.load_state_dict(runs[name, args.seed].state)
        with torch.no_grad():
            z = torch.zeros(len(orbits), LATENTS)
            for part in vae.posterior(orbits).transforms:
                z = part(z)
            mean = vae.likelihood(z).mean
            back = torch.stack([turn_fields(x, -i % 4) for i, x in enumerate(mean)])
            galleries.append((f"{name}: reconstructions, turned back", back, 4))
            galleries.append((f"{name}: draws from the prior", vae.likelihood(noise).mean, 6))

    figure, axes = plt.subplots(2, 3, figsize=(11.4, 7.7), layout="constrained", dpi=110)
    places = (axes[0, 0], axes[0, 1], axes[1, 1], axes[0, 2], axes[1, 2])
    for axis, (title, x, columns) in zip(places, galleries):
        pixels = torch.nn.functional.pad(as_images(x)[:, 0], (0, 1, 0, 1), value=0.3 * LEVELS)
        rows = pixels.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
        axis.imshow(rows[:-1, :-1], cmap="gray_r", vmin=0, vmax=LEVELS)
        axis.set(xticks=(), yticks=())
        axis.set_title(title, fontsize=11)
    curve_axis = axes[1, 0]
    styles = {
        "equivariant": ("-", "black", "equivariant"),
        "plain": ("--", "#d55e00", "plain"),
        "augmented": (":", "#0072b2", "plain, turned at random"),
        "wide": ("-.", "#009e73", "the same, 4 times the parameters"),
    }
    for name in dict.fromkeys(arm for arm, _ in runs):
        line, color, label = styles[name]
        curves = [run.curve for (arm, _), run in runs.items() if arm == name]
        steps = [step for step, _ in curves[0]]
        scores = torch.tensor([[score for _, score in curve] for curve in curves])
        curve_axis.fill_between(steps, scores.min(0).values, scores.max(0).values, color=color, alpha=0.2, linewidth=0)
        curve_axis.plot(steps, scores.mean(0), line, color=color, label=label, linewidth=1.8)
    best = max(score for run in runs.values() for _, score in run.curve)
    curve_axis.set(ylim=(best - 40, best + 3), xlabel="step", ylabel="ELBO, nats per image")
    curve_axis.set_title("validation images: mean, range of seeds", fontsize=11)
    curve_axis.legend(fontsize=9, loc="lower right")
    figure.savefig(args.picture)


def main() -> None:
    """Trains every arm with every seed, prints the table, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of small networks")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--arms", nargs="+", choices=tuple(arms(False)), default=list(arms(False)))
    parser.add_argument("--posterior", choices=("coupling", "iaf"), default="coupling")
    parser.add_argument("--lr", type=float, help="for every arm, in place of its own")
    parser.add_argument("--draws", type=int, default=100, help="draws per image, K")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="a file that keeps finished runs, and gives them back")
    parser.add_argument("--picture", type=Path, help="where to draw")
    args = parser.parse_args()
    if args.picture and not {"equivariant", "plain"} <= {*args.arms}:
        parser.error("--picture: expected the arms equivariant and plain among --arms")
    if args.smoke:
        args.steps, args.repeats, args.draws = 4, 2, 10
    torch.set_num_threads(args.threads)
    runs: dict[tuple[str, int], Run] = {}
    if args.out and args.out.exists():
        runs = {key: Run(**value) for key, value in torch.load(args.out).items()}
    for seed in range(args.seed, args.seed + args.repeats):
        for name in args.arms:
            if (name, seed) not in runs:
                runs[name, seed] = run = train(name, arms(args.smoke)[name], seed, args)
                print(
                    f"{name}, seed {seed}: validation {run.validation:.2f}, test {run.elbo:.2f} ({run.elbo_noise:.2f} "
                    f"over images), step {run.best_step}, {run.parameters} parameters, {run.seconds:.0f} CPU s",
                    flush=True,
                )
        if args.out:  # after each seed
            args.out.parent.mkdir(parents=True, exist_ok=True)
            torch.save({key: value._asdict() for key, value in runs.items()}, args.out)
    table(runs, args)
    if args.picture:
        draw(runs, args)


if __name__ == "__main__":
    main()
