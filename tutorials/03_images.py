# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Images with no up
#
# Seen through a microscope or from a satellite an image has no preferred direction: turned by a quarter it is as likely
# as before. A density model can learn that from many examples, or it can be built that way. Here we build it, and count
# what that is worth in bits and in images.
#
# The data are scikit-learn's handwritten digits, $8 \times 8$ pixels of 17 gray levels, each turned once by a random
# quarter turn.

# %%
import copy
import math
import os

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from escnn import gspaces
from escnn import nn as enn
from sklearn.datasets import load_digits
from tqdm import tqdm

from pyro_equiflow import LogitTransform, MultiScale, bits_per_dim, dequantize, equivariant_squeeze, image_flow, testing
from pyro_equiflow.plots import plot_rotations, plot_training

torch.manual_seed(0)
smoke_test = "CI" in os.environ
levels = 17


# %%
def turn(images, number):
    """Each image by its own number of quarter turns."""
    orbit = torch.stack([images.rot90(k, (-2, -1)) for k in range(4)])
    return orbit[number, torch.arange(len(images))]


digits = torch.tensor(load_digits().images).long()[:, None]
digits = digits[torch.randperm(len(digits))]
digits = turn(digits, torch.randint(4, (len(digits),)))
train_images, validation_images, test_images = digits.split([1097, 200, 500])


def show(images, columns=15, title=None):
    rows = images[:, 0].double().unflatten(0, (-1, columns))
    padded = torch.nn.functional.pad(rows, (0, 1, 0, 1), value=0.3 * float(images.max()))
    _, axis = plt.subplots(figsize=(10, 0.25 + 10 / columns * len(rows)), layout="constrained")
    axis.imshow(padded.transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1], cmap="gray_r")
    axis.axis("off")
    axis.set_title(title, fontsize=10)
    plt.show()


show(train_images[:30], title="turned digits")

# %% [markdown]
# ## How the group acts, and what a squeeze does
#
# The group $C_4$ of quarter turns moves pixels and leaves gray values alone: one trivial field over the plane. A
# coupling needs two fields at least, one to look at and one to change. A *squeeze* makes them: cells of $2 \times 2$
# pixels become four channels on a grid of half the side. Where the group moves pixels inside a cell, the channels are
# not invariant any more; the squeeze says which type they really have.

# %%
C4 = gspaces.rot2dOnR2(4)
gray = enn.FieldType(C4, [C4.trivial_repr])
squeeze, haar = equivariant_squeeze(gray), equivariant_squeeze(gray, haar=True)
print("pixels of a cell:           ", [str(r.name) for r in squeeze.out_type.representations])
print("averages and differences:   ", [str(r.name) for r in haar.out_type.representations])

# %% [markdown]
# Pixels of a cell are one field of the regular representation, four channels that a turn permutes. In the basis of
# averages and differences (Haar's wavelets) these are three fields: the average, which is invariant, the two first
# differences, which form a vector, and the mixed one, which changes its sign. These can be split. The picture has a
# digit in four turns, under it the length of the vector of differences: it turns along, $f(g \cdot x) = g \cdot f(x)$.


# %%
def edges(images):
    """The two first differences of every cell."""
    return haar(images)[..., 1:3, :, :]


vectors = enn.FieldType(C4, [C4.irrep(1)])
figure = plt.figure(figsize=(8, 4.2), layout="constrained")
plot_rotations(train_images[:1].float(), gray, function=edges, out_type=vectors, figure=figure)
plt.show()

# %% [markdown]
# ## From integers to a density and back
#
# A density over pixels that are integers can grow without bound. The honest way is uniform noise: $x = (k + u) / L$
# fills the bins (`dequantize`), a logit carries $(0, 1)$ to the line, a flow carries normal noise there, and
#
# $$P(k) = \int_{[0, 1)^D} p\left(\tfrac{k + u}{L}\right) L^{-D}\, du$$
#
# is the probability of the integers. `bits_per_dim` gives $-\frac{1}{D} \log_2 P(k)$, every Jacobian counted: an upper
# bound on average, since the integral is a mean over a few draws of $u$.
#
# `image_flow` is a multi-scale stack: squeeze, couplings with steerable CNNs, a part of the channels stops, the others
# go one level deeper. `kept` says which squeezed fields go on: here average and first differences, for every group
# alike.


# %%
def flow_under(space, widths):
    gray = enn.FieldType(space, [space.trivial_repr])
    kept = range(len(MultiScale.types(gray, haar=True)[0]) - 1)
    return image_flow(gray, (8, 8), hidden_dims=widths, kept=kept)


def density_of(flow, dtype=torch.float32):
    noise = dist.Normal(torch.zeros(1, 8, 8, dtype=dtype), 1.0).to_event(3)
    return dist.TransformedDistribution(noise, [flow, LogitTransform(0.05).inv])


@torch.no_grad()
def bits(flow, images, draws=1):
    dtype = next(flow.parameters()).dtype
    density = density_of(flow, dtype)
    return float(bits_per_dim(density, images, num_levels=levels, num_samples=draws, dtype=dtype).mean())


histogram = torch.stack([(train_images[:1000, 0] == k).double().mean(0) for k in range(levels)]) + 1e-3
independent = -(histogram / histogram.sum(0)).gather(0, test_images[:, 0]).log2().mean()
print(f"all gray levels equally likely: {math.log2(levels):.2f} bits a dimension")
print(f"every pixel by its own histogram of 1000 images: {float(independent):.2f}")

# %% [markdown]
# ## What the symmetry is worth
#
# Three arms, for 100 and for 300 training images: the flow under $C_4$; the same under the trivial group, with as many
# parameters; and the second with every batch turned at random, the usual augmentation. All keep the parameters that
# score best on 200 validation images, and are scored on 500 test images in float64.

# %%
spaces = {
    "C4": (C4, (64, 64), False),
    "plain": (gspaces.trivialOnR2(), (29, 29), False),
    "plain, turned": (gspaces.trivialOnR2(), (29, 29), True),
}


def fit(name, count, steps, every=10, batch=50):
    torch.manual_seed(1)
    space, widths, turned = spaces[name]
    flow = flow_under(space, (8, 8) if smoke_test else widths)
    bits(flow, train_images[:count])  # the first batch sets the actnorms
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, curve = (math.inf, None), []
    for step in tqdm(range(1, steps + 1), desc=f"{name}, {count} images"):
        images = train_images[torch.randperm(count)[:batch]]
        if turned:
            images = turn(images, torch.randint(4, (len(images),)))
        loss = bits_per_dim(density_of(flow), images, num_levels=levels).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            curve.append(bits(flow.eval(), validation_images))
            flow.train()
            if curve[-1] < best[0]:
                best = (curve[-1], copy.deepcopy(flow.state_dict()))
    flow.load_state_dict(best[1])
    return flow.double().eval(), curve


flows, curves = {}, {}
for count in (100, 300):
    for name in spaces:
        flow, curve = fit(name, count, steps=10 if smoke_test else 200)
        flows[name, count], curves[name, count] = flow, curve
        parameters = sum(p.numel() for p in flow.parameters())
        print(f"{count} images, {name:14s} {parameters} parameters, test {bits(flow, test_images, draws=4):.3f} bits")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
for axis, count in zip(axes, (100, 300)):
    plot_training({name: curves[name, count] for name in spaces}, ylabel="validation bits a dimension", ax=axis)
    axis.set(xlabel="step / 10", title=f"{count} training images", ylim=None if smoke_test else (2.2, 3.4))
plt.show()

# %% [markdown]
# Against plain training the symmetry is worth three times the images and more: $C_4$ with 100 images is ahead of the
# plain flow with 300. It overfits too, from step 50 on at 100 images, which the validation images catch. Augmentation
# ends a little behind here, but that is not the last word: all arms had one learning rate, 0.01, and one seed. The
# benchmark `image_bits.py` chooses the rate of each arm on validation images (0.02 for the plain ones) and has three
# seeds, mean and standard error in bits a dimension:
#
# | training images | $C_4$ | $D_4$ | plain | plain, batches turned |
# |---|---|---|---|---|
# | 100 | 2.451 (0.004) | 2.415 (0.009) | 2.912 (0.026) | 2.430 (0.005) |
# | 300 | 2.258 (0.006) | 2.236 (0.002) | 2.529 (0.004) | 2.264 (0.003) |
# | 1000 | 2.163 (0.006) | 2.192 (0.003) | 2.264 (0.004) | 2.238 (0.006) |
#
# So at 100 and 300 images augmentation does as well as the symmetry; the symmetry's lead comes with more images, 0.075
# bits at 1000. $D_4$ has mirror images built in too, which is not true of digits; with few images it helps all the
# same, with many it costs.
#
# ## The density is invariant, to rounding
#
# Augmentation teaches a symmetry approximately. Below, for 60 test images, how much $\log p$ changes as an image is
# turned.

# %%
pixels = dequantize(test_images[:60], num_levels=levels, dtype=torch.float64)
changes = {}
for name in spaces:
    density = density_of(flows[name, 300], torch.float64)
    with torch.no_grad():
        log_p = torch.stack([density.log_prob(pixels.rot90(k, (-2, -1))) for k in range(4)])
    changes[name] = log_p - log_p.mean(0)
    error = testing.invariance_error(density, pixels, gray)
    mirrored = float((density.log_prob(pixels.flip(-1)) - log_p[0]).abs().max().detach())
    print(f"{name:14s} largest change of log p in nats: {error:.0e} turned, {mirrored:.0f} mirrored")

# %%
figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
for (name, change), shift in zip(changes.items(), (-0.25, 0, 0.25)):
    places = torch.arange(4)[:, None] + shift + 0.15 * torch.rand(4, change.shape[1]) - 0.075
    axis.plot(90 * places.flatten(), change.flatten(), ".", markersize=4, alpha=0.6, label=name)
axis.set(xlabel="turned by (degrees)", ylabel="log p, less the mean\nof four turns (nats)", xticks=[0, 90, 180, 270])
axis.legend()
plt.show()

# %% [markdown]
# Exact are those elements that permute the pixels: quarter turns, for this group. An image turned by 45° is another
# image on the grid, and no network is exactly equivariant there. The mirror images differ, as they should: $C_4$ holds
# no reflection.
#
# ## Draws
#
# For pictures a flow of its own, fitted to all training images. A draw and its four turns come with equal probability,
# so that digits lie in every direction.

# %%
flow, _ = fit("C4", len(train_images), steps=10 if smoke_test else 400)
print(f"{len(train_images)} images: test {bits(flow, test_images, draws=4):.3f} bits")
with torch.no_grad():
    show(density_of(flow, torch.float64).sample((45,)).clamp(0, 1), title="draws")

# %% [markdown]
# Many can be read, if one turns one's head; others are strokes that make no digit. Draws cost one pass of the flow, and
# each comes with its exact density.
#
# ## Where to go next
#
# - [06, amortised and conditional](06_amortised_conditional.ipynb): an autoencoder of the same images whose posterior
#   turns with the image.
# - [04, a lattice field](04_phi4.ipynb): `image_flow` on periodic grids.
# - `image_flow(kind="iaf")`, `"residual"`, `"implicit"`: the other transforms in the same stack; volumes with
#   `SteerableConv` in 3-D.
# - [RESULTS](../benchmarks/RESULTS.md): the tables in full, MNIST, and what was tried on the way.
#
# References: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803); Theis, van den
# Oord and Bethge, *A note on the evaluation of generative models* (arXiv 1511.01844); Bose, Brubaker and Kobyzev,
# *Equivariant Finite Normalizing Flows* (arXiv 2110.08649); Alpaydin and Kaynak, *Optical Recognition of Handwritten
# Digits* (UCI, 1998).
