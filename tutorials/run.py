# SPDX-License-Identifier: Apache-2.0
"""Executes the tutorials and keeps what they print and draw: from each ``NN_name.py``, the notebook ``NN_name.ipynb``.

The text is what one edits and reviews; the notebook is made from it. ``make tutorials`` runs all of them in full and
writes the notebooks. ``--smoke`` sets ``CI`` in the notebook's environment, by which they shorten their runs, as Pyro's
own do, and leaves the notebooks alone. Names choose some: ``make tutorials ARGS="01 phi4"``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
SMOKE_LIMIT = 60.0


def texts(names: list[str]) -> list[Path]:
    """The tutorials' texts, in order; with names, those that hold one of them."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not names or any(name in path.stem for name in names)]


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook of a text, without outputs, the same for the same text."""
    notebook = jupytext.read(path)
    # The licence line belongs to the text.
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("# SPDX-")]
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    }
    for number, cell in enumerate(notebook.cells):
        # nbformat draws random names, which would make every build a change.
        cell.id = f"cell-{number}"
        cell.metadata = {}
    return notebook


def execute(notebook: nbformat.NotebookNode, smoke: bool) -> None:
    """Runs a notebook in place, in a process of its own."""
    # Pictures go into the notebook, whatever backend the shell asks for.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ.pop("CI", None)
    if smoke:
        os.environ["CI"] = "1"
    client = NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    failed = [o.evalue for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    if failed:
        # An inline picture is drawn after its cell, whose own reply is then "ok".
        raise CellExecutionError(failed[0], "", failed[0])
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        # Progress bars go to stderr: worth seeing while one waits, not afterwards.
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> int:
    """Runs the tutorials asked for and returns 1 if any failed or was too slow, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of those to run; all by default")
    parser.add_argument("--smoke", action="store_true", help="short runs, at most a minute each, nothing written")
    arguments = parser.parse_args()
    paths = texts(arguments.names)
    if not paths:
        print(f"expected names of tutorials in {FOLDER.name}/, found {arguments.names}", file=sys.stderr)
        return 1
    failed = 0
    for path in paths:
        notebook, start = read(path), time.perf_counter()
        try:
            execute(notebook, arguments.smoke)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            failed += 1
            continue
        seconds = time.perf_counter() - start
        late = arguments.smoke and seconds > SMOKE_LIMIT
        failed += late
        print(f"{path.name}: {seconds:.0f} s" + (f", more than {SMOKE_LIMIT:.0f}" if late else ""), flush=True)
        if not arguments.smoke:
            nbformat.write(notebook, path.with_suffix(".ipynb"))
    print(f"{len(paths) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
