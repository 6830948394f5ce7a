# SPDX-License-Identifier: Apache-2.0
"""What a module computes besides its parameters, in words that travel with a ``state_dict``."""

from __future__ import annotations

import json
from typing import Any

import torch
from escnn.nn import FieldType
from torch import Tensor

__all__ = ["decode", "described", "differences", "encode", "settings"]


def described(module: torch.nn.Module, apart: type[torch.nn.Module]) -> dict[str, Any]:
    """The classes of a module and of its parts by their paths, each with its public settings.

    :param module: the module.
    :param apart: parts of this class are left out: they describe themselves.
    :return: by path, a dictionary of plain values; the module itself has the path ``""``.
    """
    found = {"": settings(module)}
    for name, part in module.named_children():
        if not isinstance(part, apart):
            found |= {f"{name}.{path}" if path else name: own for path, own in described(part, apart).items()}
    return found


def settings(module: torch.nn.Module) -> dict[str, Any]:
    """A module's class and public attributes, those that are plain values or tell their ``architecture()``."""
    found: dict[str, Any] = {"class": type(module).__name__}
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            plain = _plain(value)
            if plain is not None:
                found[name] = plain
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it; ``None`` for what is no plain value."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, FieldType):
        return f"{value.gspace}: {[f'{r.name} of {r.size}' for r in value.representations]}"
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return None if any(part is None for part in parts) else parts
    tell = getattr(value, "architecture", None)
    return tell() if callable(tell) else None


def encode(description: dict[str, Any]) -> Tensor:
    """A description as a tensor of bytes, which passes wherever a ``state_dict`` of tensors does."""
    text = json.dumps(description, sort_keys=True, default=str)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode(found: Any) -> dict[str, Any] | None:
    """The description of :func:`encode`; ``None`` for anything else."""
    try:
        description = json.loads(bytes(found.cpu().tolist()).decode())
    except (AttributeError, TypeError, ValueError):
        return None
    return description if isinstance(description, dict) else None


def differences(expected: Any, found: Any, at: str = "") -> list[str]:
    """Where two descriptions differ, a line each."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = [*expected, *(name for name in found if name not in expected)]
        pairs = [(name, expected.get(name), found.get(name)) for name in names]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found) and _nested(expected):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(expected, found))]
    else:
        return [] if expected == found else [f"{at}: expected {expected!r}, found {found!r}"]
    return [line for name, a, b in pairs for line in differences(a, b, ".".join(part for part in (at, name) if part))]


def _nested(values: list) -> bool:
    return any(isinstance(value, (dict, list)) for value in values)
