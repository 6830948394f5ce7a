# SPDX-License-Identifier: Apache-2.0
"""Whether torch is looking at a computation instead of making it."""

from __future__ import annotations

import torch

__all__ = ["is_traced"]


def is_traced() -> bool:
    """Whether values are symbolic, so that none can be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
