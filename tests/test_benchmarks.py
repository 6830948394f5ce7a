# SPDX-License-Identifier: Apache-2.0
"""The scripts of ``benchmarks/`` are alike: which there are, the options that each takes, the clock of a device."""

from __future__ import annotations

import ast
import runpy
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
RUN = runpy.run_path(str(FOLDER / "run.py"))
ALL = {"--smoke", "--device", "--seed"}


def options(script: str) -> dict[str, dict[str, ast.expr]]:
    """The options of a script with their keywords, read from its source: ``--help`` would load torch for each."""
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {
        ast.literal_eval(call.args[0]): {keyword.arg: keyword.value for keyword in call.keywords}
        for call in calls
        if call.func.attr == "add_argument"
    }


@pytest.mark.parametrize("script", RUN["TIMINGS"] + RUN["EXPERIMENTS"] + RUN["TABLES"])
def test_options(script: str) -> None:
    """Experiments draw as well; without ``--device`` a script stays on the CPU."""
    found = options(script)
    assert (ALL | ({"--picture"} if script in RUN["EXPERIMENTS"] else set())) - found.keys() == set()
    assert ast.literal_eval(found["--device"]["default"]) == "cpu"


def test_every_script_is_run() -> None:
    """Each once, and nothing that is not there."""
    scripts = {path.name for path in FOLDER.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text("utf-8")}
    assert sorted(RUN["TIMINGS"] + RUN["EXPERIMENTS"] + RUN["TABLES"]) == sorted(scripts - {"run.py"})


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process time on the CPU, which never touches CUDA; there, every reading waits for the device."""
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = runpy.run_path(str(FOLDER / "timing.py"))["clock"]
    assert clock("cpu") is time.process_time
    assert waited == []
    wall = clock("cuda:1")
    start = wall()
    assert wall() >= start
    assert waited == ["cuda:1", "cuda:1"]
