# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark, one after the other, each in a process of its own; arguments are passed on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("coupling_step.py", "lipschitz_bound.py", "checkerboard.py", "symmetric_toys.py", "ring.py")


def main() -> int:
    """Runs the scripts and returns 1 if any failed, else 0."""
    folder = Path(__file__).parent
    failed = 0
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        failed |= subprocess.run([sys.executable, str(folder / script), *sys.argv[1:]], check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
