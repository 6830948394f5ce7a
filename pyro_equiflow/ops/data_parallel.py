# SPDX-License-Identifier: Apache-2.0
"""What must be done before torch's DistributedDataParallel wraps a module."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

__all__ = ["refuse_within_data_parallel"]


def refuse_within_data_parallel(what: str) -> None:
    """Raises where parameters would be made or set inside the forward pass of ``DistributedDataParallel``.

    DDP hands out the first rank's parameters when it wraps a module and averages the gradients of those that it found
    then. What a rank makes or sets by itself afterwards stays its own: the ranks would part, and nothing would show it.

    Example::

        >>> refuse_within_data_parallel("actnorm")  # nothing is wrapped here

    :param what: who makes or sets parameters.
    :raises ValueError: a forward pass of DDP is running.
    """
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise ValueError(
            f"{what}: expected parameters that were set before DistributedDataParallel wrapped the module, found a "
            "first call within it, which would leave each rank with its own; call the module once, then wrap it"
        )
