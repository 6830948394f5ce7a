# SPDX-License-Identifier: Apache-2.0
"""The README's examples run as they stand."""

from __future__ import annotations

import doctest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_examples_run() -> None:
    """Every ``>>>`` line of the README, in order, in one namespace."""
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 14
    assert results.failed == 0


def test_pictures_exist() -> None:
    """The pictures that the README shows are in the repository."""
    text = (ROOT / "README.md").read_text()
    names = [part.split(")")[0] for part in text.split("](")[1:] if part.split(")")[0].endswith(".png")]
    assert names
    for name in names:
        assert (ROOT / name).is_file(), name
