# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds these pages. Nothing is fetched: ``make docs`` works without a network."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import pyro_equiflow  # noqa: E402

project = "pyro_equiflow"
copyright = "the authors of pyro_equiflow, Apache-2.0"
version = release = pyro_equiflow.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
root_doc = "index"

html_theme = "furo"
html_title = f"pyro_equiflow {pyro_equiflow.__version__}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
# Notebooks come with what they printed and drew: make tutorials executes them.
nb_execution_mode = "off"
nb_merge_streams = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# Of members, those that say something of their own.
autodoc_default_options = {"members": True, "show-inheritance": True}

nitpicky = True
# Names of other packages are set as code: linking them would need their inventories from the network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|pyro|escnn|numpy|matplotlib|collections|typing|abc)\..*"),
    ("py:class", "Tensor|FieldType|Distribution|Representation"),
    ("py:class", r"Action|Orbit|pyro_equiflow\.infer\.actions\.Numbered"),  # types that users need not name
]

PUBLIC = {
    getattr(module, name)
    for module in (pyro_equiflow, pyro_equiflow.maps, pyro_equiflow.nn, pyro_equiflow.solvers, pyro_equiflow.logdet)
    for name in module.__all__
    if isinstance(getattr(module, name), type)
}


def show_public_bases(app: Any, name: str, obj: type, options: Any, bases: list[type]) -> None:
    """Replaces bases that are the package's own business by what of theirs users know."""

    def known(base: Any) -> Any:
        own = (c for c in getattr(base, "__mro__", ()) if c in PUBLIC or not c.__module__.startswith("pyro_equiflow"))
        return next(own, base)

    found = list(dict.fromkeys(map(known, bases)))
    bases[:] = [base for base in found if base is not object] or found


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-bases", show_public_bases)


def copy_tutorials() -> None:
    """Copies notebooks and their list to where Sphinx sees them, with links that hold there."""
    source, target = ROOT / "tutorials", HERE / "tutorials"
    pages = {"index.md": relinked((source / "README.md").read_text(encoding="utf-8"))}
    notebooks = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["metadata"].setdefault("language_info", {"name": "python", "pygments_lexer": "ipython3"})
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = relinked("".join(cell["source"]))
        pages[path.name] = json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
    if notebooks:
        names = "\n".join(path.stem for path in notebooks)
        pages["index.md"] += f"\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        if old.is_file() and old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        page = target / name
        # What is written anew, Sphinx reads anew.
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


# Files that are pages here, by where they lie in the repository.
PAGES = {
    "benchmarks/RESULTS.md": "docs/results.md",
    "CHANGELOG.md": "docs/changelog.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "README.md": "docs/index.md",
}


def relinked(text: str) -> str:
    """A text of ``tutorials/`` with its links as they read in ``docs/tutorials/``."""

    def moved(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        path = os.path.normpath(f"tutorials/{link}")
        if "://" in link or (os.path.dirname(path) == "tutorials" and path.endswith(".ipynb")):
            return match.group(0)
        return f"]({os.path.relpath(PAGES.get(path, path), 'docs/tutorials')}{anchor or ''})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", moved, text)


copy_tutorials()
