# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark, each in a process of its own: timings in full, experiments at the size of a smoke test.

``--full`` runs the experiments in full as well, for an hour or so; other arguments are passed on. RESULTS.md keeps what
full runs found.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TIMINGS = ("coupling_step.py", "iaf_step.py", "lipschitz_bound.py", "residual_step.py")
EXPERIMENTS = (
    "checkerboard.py",
    "symmetric_toys.py",
    "ring.py",
    "transformers.py",
    "amortized.py",
    "image_bits.py",
    "image_cost.py",
    "classification.py",
    "karate.py",
    "phi4.py",
    "particles.py",
    "posteriors.py",
)
TABLES = ("evidence_coverage.py", "path_gradient.py")  # experiments that draw nothing


def main() -> int:
    """Runs the scripts and returns 1 if any failed, else 0."""
    folder = Path(__file__).parent
    arguments = [a for a in sys.argv[1:] if a != "--full"]
    smoke = [] if "--full" in sys.argv or "--smoke" in arguments else ["--smoke"]
    failed = 0
    for script in (*TIMINGS, *EXPERIMENTS, *TABLES):
        own = [*arguments, *(smoke if script not in TIMINGS else [])]
        print(f"\n== {' '.join([script, *own])}", flush=True)
        failed |= subprocess.run([sys.executable, str(folder / script), *own], check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
