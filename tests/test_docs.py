# SPDX-License-Identifier: Apache-2.0
"""Every public name is documented, every page is found, every link leads somewhere, every example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import pyro_equiflow

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

INTERNAL = {"ops", "registration", "version"}
PUBLIC = [
    "pyro_equiflow",
    *(
        f"pyro_equiflow.{module.name}"
        for module in pkgutil.iter_modules(pyro_equiflow.__path__)
        if module.name not in INTERNAL and not module.name.startswith("_")
    ),
]


def module(name: str) -> ModuleType:
    """A public module; that of pictures wants an extra."""
    if name.endswith(".plots"):
        pytest.importorskip("matplotlib")
    return importlib.import_module(name)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    """A docstring each, and what is called has an example and names its parameters."""
    found = module(name)
    assert inspect.getdoc(found)
    faults = {}
    for public in found.__all__:
        thing = getattr(found, public)
        if isinstance(thing, ModuleType) or not callable(thing):
            continue
        lacking = [*lacks(thing), *(f"a docstring of {member}" for member in undocumented_members(thing))]
        if lacking:
            faults[public] = lacking
    assert not faults


def lacks(thing: Any) -> Iterator[str]:
    """What the docstring of a class or function does not have."""
    text = inspect.getdoc(thing) or ""
    if not thing.__doc__:
        yield "a docstring"
    if ">>>" not in text:
        yield "an example"
    # The constructors of protocols and exceptions say nothing.
    if not getattr(thing, "_is_protocol", False) and not (inspect.isclass(thing) and issubclass(thing, Exception)):
        for parameter in inspect.signature(thing).parameters:
            if not re.search(rf":(param|ivar) {parameter}:", text):
                yield f":param {parameter}:"


def undocumented_members(thing: Any) -> Iterator[str]:
    """Public methods and properties of a class without a docstring, their own or a base's."""
    kinds = (property, classmethod, staticmethod, FunctionType)
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        if not name.startswith("_") and isinstance(member, kinds) and not inspect.getdoc(getattr(thing, name)):
            yield name


def listed() -> list[Any]:
    """What the pages of the API list, as objects."""
    found = []
    for page in sorted((DOCS / "api").glob("*.rst")):
        scope = ""
        for directive, target in re.findall(r"^ *\.\. (\w+):: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            if directive == "currentmodule":
                scope = target
            elif directive == "automodule":
                found.append(module(target))
            elif directive in ("autoclass", "autofunction", "autoexception", "autodata"):
                found.append(resolve(target if target.startswith("pyro_equiflow.") else f"{scope}.{target}"))
    return found


def resolve(path: str) -> Any:
    owner, name = path.rsplit(".", 1)
    return getattr(module(owner), name)


@pytest.mark.parametrize("name", PUBLIC)
def test_api_pages_list_public_names(name: str) -> None:
    """By directives of their own, whose text is the docstring."""
    found, pages = module(name), listed()
    names = [public for public in found.__all__ if not public.startswith("__")]
    assert [public for public in names if not any(getattr(found, public) is thing for thing in pages)] == []


def test_no_name_is_listed_twice() -> None:
    """Links to it would be ambiguous."""
    counts = Counter(id(thing) for thing in listed())
    assert max(counts.values()) == 1


# ---- pages ---------------------------------------------------------------------------------------------------------

# Made when the pages are built, from tutorials/.
GENERATED = "tutorials/index"


def pages() -> dict[str, str]:
    """The text of every page by its name, such as ``api/nn``."""
    found = {}
    for path in DOCS.rglob("*"):
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        if path.suffix in (".md", ".rst") and not name.startswith(("_build/", "tutorials/")):
            found[name] = path.read_text(encoding="utf-8")
    return found


def entries(text: str) -> Iterator[str]:
    """What the tables of contents of a page list."""
    for block in re.findall(r"```\{toctree\}\n(.*?)```|\.\. toctree::\n((?:   .*\n|\n)+)", text, re.DOTALL):
        for line in "".join(block).splitlines():
            if line.strip() and not line.strip().startswith(":"):
                yield line.strip()


def test_every_page_is_reached_from_the_index() -> None:
    texts, reached, new = pages(), set(), {"index"}
    while new:
        name = new.pop()
        reached.add(name)
        folder = os.path.dirname(name)
        for entry in entries(texts.get(name, "")):
            if entry == "*":
                matching = {page for page in texts if os.path.dirname(page) == folder}
            else:
                matching = {os.path.normpath(os.path.join(folder, entry))}
                assert matching <= {*texts, GENERATED}, f"{name}: no page {entry}"
            new |= matching - reached
    assert reached == {*texts, GENERATED}


# ---- links ---------------------------------------------------------------------------------------------------------

MARKDOWN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")),
    ROOT / "tutorials/README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "tutorials").glob("*.ipynb")),
]


def markdown(path: Path) -> str:
    """The text of a Markdown file with what it includes, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```\{include\} (\S+)\n.*?```", lambda m: markdown(path.parent / m.group(1)), text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Names of the headings of a Markdown file, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", markdown(path), flags=re.DOTALL | re.MULTILINE)
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    """Relative links lead to files, and anchors to headings in them."""
    text = markdown(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        if target == DOCS / f"{GENERATED}.md":
            target = ROOT / "tutorials/README.md"
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# ---- what pages say of others and of measurements ------------------------------------------------------------------


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The rows of the tables of a page's section, each with the first word of its table's head in front."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", pages()[page], re.DOTALL | re.MULTILINE)
    for head, body in re.findall(r"^(\|.*)\n\|[-|]+\n((?:\|.*\n)+)", section, re.MULTILINE):
        for row in body.splitlines():
            yield [head.split("|")[1].strip(), *(cell.strip() for cell in row.split("|")[1:-1])]


def names(cell: str) -> set[str]:
    """What code in a cell calls, and what stands by itself."""
    found = set()
    for code in re.findall(r"`([^`]+)`", cell):
        code = re.sub(r"\b(flows|nets|utils|distributions|gspaces|nn)\.", "", code)
        found |= set(re.findall(r"(?<![\w.])[A-Za-z_]\w+(?=\()|^[A-Za-z_]\w+$", code))
    return found


def test_names_of_others_exist() -> None:
    """Of Pyro, normflows and escnn, and ours beside them, in "Coming from"."""
    nf = pytest.importorskip("normflows")
    from escnn import gspaces
    from escnn import nn as enn
    from pyro import distributions as dist
    from pyro import infer

    escnn = ("escnn", [gspaces, enn, enn.EquivariantModule])
    ours = ("ours", [pyro_equiflow, pyro_equiflow.nn, pyro_equiflow.testing, dist.transforms, dist])
    sides = {
        "Pyro": [("Pyro", [dist.transforms, dist, infer.autoguide]), ours],
        "normflows": [("normflows", [nf, nf.flows, nf.nets, nf.utils, nf.distributions]), ours],
        "e2cnn": [("e2cnn", None), escnn],
        "e2cnn or escnn code": [escnn, ours],
    }
    seen, missing = 0, []
    for heading in ("From Pyro's own transforms", "From normflows", "From e2cnn"):
        for kind, *cells in rows("coming_from", heading):
            for cell, (side, owners) in zip(cells, sides[kind]):
                if owners is not None:
                    seen += len(names(cell))
                    missing += [(side, n) for n in names(cell) if not any(hasattr(owner, n) for owner in owners)]
    assert seen > 80
    assert missing == []


def test_costs_are_those_of_the_results() -> None:
    """Every figure of the tables, so that a new measurement is not left out here."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    tables = "".join(line for line in pages()["costs"].splitlines(keepends=True) if line.startswith("|"))
    figures = set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"\]\([^)]*\)", "", tables)))
    assert len(figures) > 30
    assert {figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results)} == set()


# ---- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["index", "plates", "questions", "field_types", "training"])
def test_examples_of_pages_run(page: str) -> None:
    """All of a page in one session."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```pycon\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, None, None)
    assert len(examples.examples) == text.count(">>> ") > 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(examples).failed == 0


def test_every_question_has_an_example() -> None:
    """Eleven are listed, and each is answered by one that runs."""
    text = (DOCS / "questions.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == len(re.findall(r"^\d+\. \[", text, re.MULTILINE)) == 11
    assert [section.splitlines()[0] for section in sections if ">>>" not in section] == []


def test_readmes_first_example_runs_from_an_empty_file(tmp_path: Path) -> None:
    """Ten lines, pasted as they are."""
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert ">>>" not in example
    assert len([line for line in example.splitlines() if line]) <= 10
    file = tmp_path / "example.py"
    file.write_text(example, encoding="utf-8")
    run = subprocess.run([sys.executable, "-W", "error", str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = json.loads(run.stdout)
    assert losses[-1] < losses[0]
