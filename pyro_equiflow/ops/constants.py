# SPDX-License-Identifier: Apache-2.0
"""Constant arrays, exact in float64, given in whatever dtype and device a tensor has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_equiflow.ops.tracing import is_traced

__all__ = ["Constants"]


class Constants:
    """Named arrays as tensors like another tensor: floating ones in its dtype, integer ones as indices.

    They stay out of modules' parameters, buffers and ``state_dict``; each owner has its own, and a cast never
    starts from a rounded copy.

    :param arrays: float or integer arrays; ``None`` stays ``None``.
    """

    def __init__(self, **arrays: np.ndarray | None) -> None:
        self._arrays = arrays
        self._cast: dict[tuple[torch.dtype, torch.device], dict[str, Any]] = {}

    def like(self, x: Tensor) -> dict[str, Any]:
        """The constants in the dtype and on the device of ``x``."""
        key = (x.dtype, x.device)
        found = self._cast.get(key)
        if found is None:
            found = {name: None if array is None else self._tensor(array, x) for name, array in self._arrays.items()}
            # What is made under torch.func, or recorded, belongs to that call.
            if not is_traced():
                self._cast[key] = found
        return found

    @staticmethod
    def _tensor(array: np.ndarray, x: Tensor) -> Tensor:
        dtype = x.dtype if np.issubdtype(array.dtype, np.floating) else torch.long
        # A copy: an inference-mode or shared-memory tensor must not become the constant.
        with torch.inference_mode(False):
            return torch.tensor(array, dtype=dtype, device=x.device)

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": self._arrays, "_cast": {}}
