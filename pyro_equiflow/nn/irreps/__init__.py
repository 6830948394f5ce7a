# SPDX-License-Identifier: Apache-2.0
"""Features held irrep by irrep: intertwiners, tensor products, gates by invariants."""
