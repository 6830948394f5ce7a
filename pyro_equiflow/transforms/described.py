# SPDX-License-Identifier: Apache-2.0
"""Modules whose checkpoints say what they compute besides their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_equiflow.ops.architecture import decode, described, differences, encode

__all__ = ["Described"]

_DESCRIPTION = "_extra_state"  # torch's name for what get_extra_state() gives
_NAMED = 5  # how many differences an error names


class Described(torch.nn.Module):
    """A module whose ``state_dict()`` tells what it computes besides its parameters: classes, splits, orders, bounds.

    ``load_state_dict`` compares before anything of it is loaded; with ``strict=False`` it does not (inside another
    module: leave out the keys that end in ``_extra_state``).
    """

    def _architecture(self) -> dict[str, Any]:
        """What decides, besides the parameters, which map this is: by path of each part its class and settings."""
        return described(self, Described)

    def get_extra_state(self) -> Tensor:
        """What the transform computes besides its parameters, as bytes of JSON."""
        return encode(self._architecture())

    def set_extra_state(self, state: Any) -> None:
        """Nothing: what a checkpoint says of the transform is compared before anything is loaded."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a checkpoint of a transform that computes something else is refused, unless not ``strict``.

        :raises ValueError: another architecture; nothing is loaded then.
        """
        if not strict:
            state_dict = {name: value for name, value in state_dict.items() if not name.endswith(_DESCRIPTION)}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._check_architecture(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_architecture(self, state_dict: dict[str, Any], prefix: str) -> None:
        lines = []
        for name, part in self.named_modules(prefix=prefix.removesuffix(".")):
            if isinstance(part, Described):
                at = f"{name}." if name else ""
                saved = decode(state_dict.get(at + _DESCRIPTION))
                if saved is not None:
                    own = decode(part.get_extra_state()) or {}
                    lines += [f"{at}{line}" for line in differences(own, saved)]
        if lines:
            more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
            raise ValueError(
                f"{type(self).__name__}: expected the checkpoint of a transform that computes the same from its "
                f"parameters, found another architecture: {'; '.join(lines[:_NAMED])}{more}. Build the transform as "
                "the one that was saved, or load all the same with load_state_dict(..., strict=False)"
            )
