# SPDX-License-Identifier: Apache-2.0
"""The package's metadata, changelog, licence lines, and what an installation holds."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_equiflow.version import __version__

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("pyro_equiflow", "tests", "stand_ins", "tutorials", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if "build" not in path.relative_to(ROOT).parts
)


def test_top_of_the_changelog_is_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert versions[0] == __version__
    assert len(versions) == len(set(versions))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_licence_line(path):
    assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_licence_and_metadata():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: pyro_equiflow.version.__version__"
    required = config["options"]["install_requires"].split()
    assert {re.split("[<>=]", one)[0] for one in required} == {"escnn", "joblib", "numpy", "pyro-ppl", "scipy", "torch"}


def test_stand_ins_satisfy_escnn():
    from importlib.metadata import requires, version

    assert {"lie-learn", "py3nj"} <= {re.split(r"[\s;(<>=]", one)[0] for one in requires("escnn")}
    for name in ("lie_learn", "py3nj"):
        text = (ROOT / "stand_ins" / name / "pyproject.toml").read_text(encoding="utf-8")
        declared = re.search(r'^version = "(.+)"', text, flags=re.MULTILINE).group(1)
        # Whoever has the real package has its version; the stand-in's is the same, with .post.
        assert version(name).split(".post")[0] == declared.split(".post")[0]
        assert '"numpy>=1.23"' in text, "no upper bound on numpy"


def test_pip_finds_no_broken_requirement():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_types_are_declared():
    assert (ROOT / "pyro_equiflow" / "py.typed").exists()
