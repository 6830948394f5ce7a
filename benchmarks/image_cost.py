# SPDX-License-Identifier: Apache-2.0
r"""What a symmetry costs an image flow: time and memory of a training step against those of its plain twin.

The flow is :func:`pyro_equiflow.image_flow` of gray images, two levels of four steps, hidden layers of equal width. Its
twin is the same flow under the trivial group: the same events, the same number of channels in every hidden layer and
in what goes to the second level. "With torch's layers" the twin's convolutions are torch's, full kernels held as they
are, two tensors a layer. A step is ``log_prob`` of a batch, its backward pass, and Adam.

One table for each of batch, hidden width, side of the grid and order of the group (C_2, C_4, D_4), all else at a base
point; the other kinds of flow at the base point. Times are medians of calls that take turns in one process, of the
process's own time on a CPU (one thread), and of the wall clock on a GPU, with synchronisation. Memory of a step is what
autograd keeps for its backward pass, each storage once, on a GPU the peak; what lasts from step to step is apart from
it. "Growth" is the exponent :math:`\log(t_1 / t_0) / \log(n_1 / n_0)` between the two largest sizes of a table, ours
against the twin's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyro.distributions as dist
import torch
from escnn import gspaces
from escnn import nn as enn
from timing import clock, ratio
from torch import Tensor

from pyro_equiflow import Inverse, MultiScale, image_flow
from pyro_equiflow.nn import Expanded, SteerableConv, SteerableModule
from pyro_equiflow.nn.packed import PackedNet

SPACES: dict[str, Callable[[], gspaces.GSpace]] = {
    "C_2": lambda: gspaces.rot2dOnR2(2),
    "C_4": lambda: gspaces.rot2dOnR2(4),
    "D_4": lambda: gspaces.flipRot2dOnR2(4),
}
ORDERS = {"C_2": 2, "C_4": 4, "D_4": 8}
LIMIT = 1.15


class Setting(NamedTuple):
    """What a flow is trained on and how wide it is."""

    batch: int = 16
    width: int = 32
    side: int = 16
    group: str = "C_4"
    kind: str = "coupling"
    padding_mode: str = "zeros"


class Memory(NamedTuple):
    """Megabytes that a step takes, and what it reads that lasts: bases and parameters, on a GPU Adam's moments too."""

    step: float
    lasting: float


class TorchConv(SteerableModule):
    """A convolution by torch, without symmetry."""

    def __init__(self, layer: SteerableConv) -> None:
        super().__init__(layer.in_type, layer.out_type)
        conv = torch.nn.Conv2d(layer.in_type.size, layer.out_type.size, 3, padding=1, padding_mode=layer.padding_mode)
        self.conv = conv

    def expanded(self) -> Expanded:
        """The convolution, on its parameters."""
        conv = self.conv
        return Expanded(lambda x, weight, bias: conv._conv_forward(x, weight, bias), (conv.weight, conv.bias))


def with_torchs_layers(flow: Inverse) -> Inverse:
    """A flow of couplings with torch's convolutions in place of ours."""
    for module in list(flow.modules()):
        network = getattr(module, "network", None)
        if isinstance(network, PackedNet):
            first, *others = map(TorchConv, network.layers.linears)
            pairs = [part for pair in zip(network.layers.between, others) for part in pair]
            module.network = enn.SequentialModule(first, *pairs)
    return flow


class Cost(NamedTuple):
    """Milliseconds of ours and of the twin, the ratios to both twins, and the memory of ours and the twin."""

    ours: float
    twin: float
    ratio: float
    to_torchs: float
    our_memory: Memory
    twin_memory: Memory


def make(setting: Setting, space: gspaces.GSpace, device: str, torchs: bool = False) -> Inverse:
    """A flow in the midst of training: no layer is zero or the identity."""
    gray = enn.FieldType(space, [space.trivial_repr])
    # Averages and both first differences go on, three channels, whichever fields these are.
    kept = range(len(MultiScale.types(gray, haar=True)[0]) - 1)
    flow = image_flow(
        gray,
        (setting.side, setting.side),
        kind=setting.kind,
        hidden_dims=(setting.width, setting.width),
        padding_mode=setting.padding_mode,
        kept=kept,
    )
    flow = (with_torchs_layers(flow) if torchs else flow).to(device)
    with torch.no_grad():
        flow.inverse_and_ladj(torch.randn(64, 1, setting.side, setting.side, device=device))  # sets the actnorms
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return flow


def training_step(flow: Inverse, x: Tensor, kind: str = "coupling") -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A step of maximum likelihood, and its loss alone."""
    noise = dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(3)
    density = dist.TransformedDistribution(noise, [flow])
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-5)

    def loss() -> Tensor:
        if kind in ("residual", "implicit"):
            # Estimates of log-dets take as many terms as the draw says: the same for both flows.
            torch.manual_seed(0)
        return -density.log_prob(x).mean()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step, loss


def kept(loss: Callable[[], Tensor]) -> Memory:
    """What autograd keeps for the backward pass of ``loss``, each storage once."""
    passes, values = [], []
    for _ in range(2):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            values.append(loss())  # held, so that the second pass finds no place of the first's free
        passes.append(storages)
    lasting = sum(size for place, size in passes[0].items() if place in passes[1])
    return Memory((sum(passes[0].values()) - lasting) / 1e6, lasting / 1e6)


def peak(step: Callable[[], None]) -> Memory:
    """The most that torch holds on the GPU in a step, beyond what it holds between steps."""
    lasting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return Memory((torch.cuda.max_memory_allocated() - lasting) / 1e6, lasting / 1e6)


def cost(setting: Setting, args: argparse.Namespace) -> Cost:
    """Time and memory of a flow and its twin."""
    on_gpu = args.device != "cpu"
    steps, memory = [], []
    x = torch.randn(setting.batch, 1, setting.side, setting.side).to(args.device)
    plain = gspaces.trivialOnR2()
    for space, torchs in ((SPACES[setting.group](), False), (plain, False), (plain, True)):
        torch.manual_seed(args.seed)
        step, loss = training_step(make(setting, space, args.device, torchs), x, setting.kind)
        step()
        memory.append(peak(step) if on_gpu else kept(loss))
        steps.append(step)
    timer = clock(args.device)
    ours, twin, quotient = ratio(*steps[:2], args.rounds, timer)
    # Networks of other kinds have masks or bounds, which torch's layers have not.
    other = ratio(steps[0], steps[2], args.rounds, timer)[2] if setting.kind == "coupling" else math.nan
    return Cost(1e3 * ours, 1e3 * twin, quotient, other, *memory[:2])


Table = dict[int, Cost]


def growth(table: Table) -> str:
    """The exponents of ours and the twin between the two largest sizes, of time and of memory."""
    (n0, first), (n1, last) = list(table.items())[-2:]
    pairs = {
        "time": ((first.ours, last.ours), (first.twin, last.twin)),
        "memory": (
            (first.our_memory.step, last.our_memory.step),
            (first.twin_memory.step, last.twin_memory.step),
        ),
    }
    found = [
        f"{name} {' against '.join(f'{math.log(b / a) / math.log(n1 / n0):.2f}' for a, b in values)}"
        for name, values in pairs.items()
    ]
    return f"growth: {', '.join(found)}"


def row(label: object, found: Cost) -> str:
    """A line of a table."""
    memory = " | ".join(f"{ours:.1f} | {twin:.1f}" for ours, twin in zip(found.our_memory, found.twin_memory))
    times = f"{found.ours:.1f} | {found.twin:.1f} | {found.ratio:.2f} | {found.to_torchs:.2f}".replace("nan", "")
    return f"| {label} | {times} | {memory} |"


def header(name: str) -> str:
    """The head of a table."""
    columns = f"{name} | ms a step | twin | ratio | with torch's layers | MB per step | twin | lasting MB | twin"
    return f"\n| {columns} |\n" + 9 * "|---" + "|"


def draw(tables: dict[str, Table], path: Path) -> None:
    """Curves of time and memory on log axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(2, len(tables), figsize=(11, 5.2), layout="constrained", dpi=150, sharey="row")
    for index, (column, (name, table)) in enumerate(zip(axes.T, tables.items())):
        sizes = list(table)
        times = [(c.ours, c.twin) for c in table.values()]
        memories = [(c.our_memory.step, c.twin_memory.step) for c in table.values()]
        for axis, values, unit in zip(column, (times, memories), ("ms a step", "MB per step")):
            ours, twin = zip(*values)
            # The twin is drawn wide and underneath: where the curves coincide both are seen.
            axis.plot(sizes, twin, "-s", color="#f0a070", label="plain twin", linewidth=5, markersize=10)
            axis.plot(sizes, ours, "-o", color="black", label="with the symmetry", linewidth=1.6, markersize=4)
            axis.set(xscale="log", yscale="log", xticks=sizes)
            axis.set_xticklabels(map(str, sizes))
            axis.minorticks_off()
            axis.yaxis.set_major_locator(ticker.LogLocator(2.0))
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            if index == 0:
                axis.set_ylabel(unit)
        column[1].set_xlabel(name)
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Prints the tables and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two small sizes of each, few rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20, help="calls of each flow that a median is of")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--picture", type=Path, help="where to draw")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, sizes = Setting(), {"batch": [4, 16, 64, 256], "width": [16, 32, 64, 128], "side": [8, 16, 32, 64]}
    kinds = [("coupling", "circular"), ("iaf", "zeros"), ("residual", "zeros"), ("residual", "circular")]
    if args.smoke:
        base, sizes = Setting(4, 8, 4), {"batch": [2, 4], "width": [8, 16], "side": [4, 8]}
        args.rounds, kinds = 3, kinds[:2]
    tables: dict[str, Table] = {}
    worst = [0.0, 0.0]
    for name, values in sizes.items():
        print(header(name), flush=True)
        tables[name] = {}
        for value in values:
            tables[name][value] = found = cost(base._replace(**{name: value}), args)
            print(row(value, found), flush=True)
            worst = [max(pair) for pair in zip(worst, found[2:4])]
        print(f"\n{growth(tables[name])}")
    print(header("group"), flush=True)
    tables["order of the group"] = {}
    for group, order in ORDERS.items():
        tables["order of the group"][order] = found = cost(base._replace(group=group), args)
        print(row(f"{group}, order {order}", found), flush=True)
        worst = [max(pair) for pair in zip(worst, found[2:4])]
    print(f"\nlargest ratio {worst[0]:.2f}, with torch's layers {worst[1]:.2f}; at most {LIMIT}")
    print(header("kind"), flush=True)
    for kind, padding_mode in kinds:
        print(row(f"{kind}, padding {padding_mode}", cost(base._replace(kind=kind, padding_mode=padding_mode), args)))
    if args.picture:
        draw(tables, args.picture)


if __name__ == "__main__":
    main()
