# SPDX-License-Identifier: Apache-2.0
"""Whether torch is looking at a computation instead of making it, and what else hangs over a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "forward_mode",
    "full_precision",
    "in_torch_func",
    "is_legacy_batched",
    "is_of_torch_func",
    "is_traced",
    "outside_torch_func",
    "refuse_dual_numbers",
    "refuse_records",
    "vjp",
]

# What of torch has no public name, or is asked too often for the public one, is here, with what serves where a release
# has it no more: that way of looking is then taken for absent, and torch's own error comes where a value is looked at.
_functorch = getattr(torch._C, "_functorch", None)
_interpreter: Callable[[], Any] = getattr(_functorch, "peek_interpreter_stack", lambda: None)
#: Whether a tensor is a batch of gradients of ``torch.autograd.grad(..., is_grads_batched=True)``.
is_legacy_batched: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda tensor: False)
#: Whether a tensor is one of a transformation of ``torch.func``.
is_of_torch_func: Callable[[Tensor], bool] = getattr(_functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
_is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_mode: Callable[[Any], Any] = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_keys = getattr(torch._C, "_TorchDispatchModeKey", None)
# Those of make_fx and torch.export, and of tensors that are shapes only.
_RECORDING = [getattr(_keys, name) for name in ("PROXY", "FAKE") if hasattr(_keys, name)]
#: Within it torch sees no transformation of ``torch.func``: for numbers that are the same for all of a batch.
outside_torch_func: Callable[[], AbstractContextManager[Any]] = getattr(torch._C, "_DisableFuncTorch", nullcontext)
#: Turns forward mode on: what torch's own functions do for themselves in nested transformations.
forward_mode: Callable[[], AbstractContextManager[Any]] = functools.partial(forward_ad._set_fwd_grad_enabled, True)
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def vjp(function: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """:func:`torch.func.vjp` without auxiliary outputs, as its types do not say."""
    return cast("tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]", torch.func.vjp(function, *primals))


def in_torch_func() -> bool:
    """Whether a transformation of ``torch.func`` is under way."""
    return _interpreter() is not None


def _is_recorded() -> bool:
    """Whether ``make_fx`` or ``torch.export`` writes down what is computed, or tensors are shapes only."""
    return any(_mode(key) is not None for key in _RECORDING)


def is_traced(*tensors: Tensor) -> bool:
    """Whether no value can be looked at, or what follows from one would be recorded as if it held for all.

    So under ``torch.func``, ``torch.compile``, ``torch.export``, ``make_fx``, ``torch.jit.trace``, and of tensors on
    the device ``meta``.
    """
    # One call, since every pass asks several times.
    if _interpreter() is not None or torch.compiler.is_compiling() or _is_jit_tracing():
        return True
    for tensor in tensors:
        if tensor.is_meta:
            return True
    return _modes() > 0 and _is_recorded()


def refuse_records(owner: str, *tensors: Tensor) -> None:
    """Raises where a computation is recorded, or has shapes and no values.

    :raises NotImplementedError: naming what was called, and what to do in place of it.
    """
    if _is_jit_tracing():
        raise NotImplementedError(
            f"{owner}: expected a call outside torch.jit, found one that torch.jit.trace records: it follows the "
            "values of weights and events, and a trace would keep those of its time; take Trace_ELBO in place of "
            "JitTrace_ELBO, and so on, or jit_compile=False"
        )
    if torch.compiler.is_compiling() and not _is_exporting():
        return
    recorded = _modes() > 0 and _is_recorded()
    if recorded or any(tensor.is_meta for tensor in tensors):
        where = "of torch.export, make_fx or the like" if recorded else "on the device meta"
        raise NotImplementedError(
            f"{owner}: expected tensors with values, found some {where}: it follows the values of weights and events, "
            "which these do not show; call it outside, on a device that holds numbers"
        )


def refuse_dual_numbers(owner: str) -> None:
    """Raises within ``torch.autograd.forward_ad.dual_level()``, where a detached tensor has lost its tangent.

    :raises NotImplementedError: naming what was called, and what to do in place of it.
    """
    if forward_ad._current_level >= 0 and not in_torch_func():
        raise NotImplementedError(
            f"{owner}: expected forward mode by torch.func.jvp or jacfwd, found that of forward_ad.dual_level(), whose "
            "tangents would be lost on the way: write torch.func.jvp(transform, (x,), (tangent,))"
        )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def full_precision(function: _Function) -> _Function:
    """Runs a function outside ``torch.autocast``, with arguments that autocast has shortened in float32.

    Determinants, certificates and inverses of eight bits are worth nothing.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _any_autocast():
            return function(*args, **kwargs)
        devices = {argument.device.type for argument in args if isinstance(argument, Tensor)} or {"cpu", "cuda"}
        on = [device for device in devices if device != "meta" and torch.is_autocast_enabled(device)]
        if not on:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in on:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*map(_lengthened, args), **kwargs)

    return cast("_Function", run)


def _lengthened(argument: Any) -> Any:
    short = isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
    return argument.float() if short else argument
