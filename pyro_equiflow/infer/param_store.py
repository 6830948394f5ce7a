# SPDX-License-Identifier: Apache-2.0
"""What Pyro's parameter store holds under a guide's names."""

from __future__ import annotations

import pyro
import torch
from pyro.params.param_store import param_with_module_name

__all__ = ["take_stored_parameters"]


def take_stored_parameters(name: str, module: torch.nn.Module, owner: str) -> None:
    """Follows the parameter store where it holds other tensors under a module's names, as PyroParams do.

    :param name: the module's full name in the store.
    :raises ValueError: the store holds a tensor of another shape or dtype.
    """
    store = pyro.get_param_store()
    keys = {param_with_module_name(name, key): value for key, value in module.named_parameters()}
    first = next(iter(keys), None)
    if first is None or first not in store or store[first] is keys[first]:
        return  # the store holds all of a module's parameters or none
    for key, parameter in keys.items():
        if key not in store:
            continue
        stored = store[key]
        if (stored.shape, stored.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{owner}: expected {key!r} of shape {tuple(parameter.shape)} and {parameter.dtype} in Pyro's "
                f"parameter store, found {tuple(stored.shape)} and {stored.dtype}, of another guide; call "
                "pyro.clear_param_store() before a new fit"
            )
    pyro.module(name, module, update_module_params=True)
