# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/image_cost.py``: twins as wide as the flow, and memory that grows as theirs does."""

from __future__ import annotations

import pytest
import torch
from escnn import gspaces

from tests.test_amortized import benchmark

image_cost = benchmark("image_cost")
SMALL = image_cost.Setting(batch=8, width=16, side=8)


def kept(setting, space, torchs=False):
    torch.manual_seed(0)
    flow = image_cost.make(setting, space, "cpu", torchs)
    x = torch.randn(setting.batch, 1, setting.side, setting.side)
    return flow, image_cost.kept(image_cost.training_step(flow, x)[1])


def test_twins_have_the_same_widths():
    flows = [kept(SMALL, *twin)[0] for twin in ((gspaces.rot2dOnR2(4),), (gspaces.trivialOnR2(), True))]
    networks = [[m.network for m in flow.modules() if hasattr(m, "network")] for flow in flows]
    assert len(networks[0]) == len(networks[1]) == 8
    for ours, torchs in zip(*networks):
        assert [part.in_type.size for part in ours.layers.between] == [16, 16]
        assert [part.in_type.size for part in list(torchs._modules.values())[1::2]] == [16, 16]
    assert [flow.transform[2].transform.field_type.size for flow in flows] == [3, 3]


@pytest.mark.parametrize("kind, name, sizes", [
    ("coupling", "batch", (8, 32)),
    ("coupling", "side", (8, 16)),
    ("coupling", "width", (16, 32)),
    ("iaf", "batch", (8, 32)),
])  # fmt: skip
def test_memory_is_the_twins(kind, name, sizes):
    """What a step keeps for its backward pass, at two sizes of each: as much as the twin's but for some percent."""
    for size in sizes:
        setting = SMALL._replace(kind=kind, **{name: size})
        ours, twin = (kept(setting, space)[1].step for space in (gspaces.rot2dOnR2(4), gspaces.trivialOnR2()))
        assert 0.95 * twin < ours < 1.05 * twin, (size, ours, twin)
