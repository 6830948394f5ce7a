# SPDX-License-Identifier: Apache-2.0
"""What README and CONTRIBUTING show runs as it stands."""

from __future__ import annotations

import doctest
import re
import textwrap
from pathlib import Path

import torch
from escnn import nn as enn

from pyro_equiflow import EquivariantTransform
from pyro_equiflow.testing import assert_equivariant, assert_inverse, assert_log_det
from tests.cases import field_type

ROOT = Path(__file__).resolve().parent.parent


def test_readmes_examples_run() -> None:
    """Every ``>>>`` line of the README, in order, in one namespace."""
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 14
    assert results.failed == 0


def test_pictures_exist() -> None:
    """The pictures that the README shows are in the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert names
    for name in names:
        assert (ROOT / name).is_file(), name


def test_walk_through_makes_a_transform() -> None:
    """The class of "Add a transform" works as it is printed, and so does its own example."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {"EquivariantTransform": EquivariantTransform, "__name__": "walk_through"}
    exec(textwrap.dedent(source), names)
    made = names["EquivariantFlip"]
    kind: enn.FieldType = field_type("O2")
    transform, x = made(kind), torch.randn(2, kind.size, dtype=torch.float64)
    for check in (assert_equivariant, assert_inverse, assert_log_det):
        check(transform, x)
    example = doctest.DocTestFinder().find(made, "EquivariantFlip", globs=names)
    runner = doctest.DocTestRunner()
    assert sum(runner.run(test).attempted for test in example) >= 4
    assert runner.failures == 0
