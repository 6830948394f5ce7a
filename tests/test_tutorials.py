# SPDX-License-Identifier: Apache-2.0
"""The notebooks are those of their texts, and hold what they printed and drew."""

from __future__ import annotations

import runpy
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "tutorials"
RUN = runpy.run_path(str(FOLDER / "run.py"))
TEXTS = RUN["texts"]([])


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebook_is_made_from_its_text(text: Path) -> None:
    """Cell by cell the same source: a changed text wants ``make tutorials``."""
    notebook, source = nbformat.read(text.with_suffix(".ipynb"), as_version=4), RUN["read"](text)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    nbformat.validate(notebook)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebook_was_executed(text: Path) -> None:
    """Every code cell ran, in order, none failed; something was printed and something drawn."""
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for output in outputs)
    assert any(output.output_type == "stream" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_has_a_text() -> None:
    """No notebook is edited by hand."""
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in TEXTS}
