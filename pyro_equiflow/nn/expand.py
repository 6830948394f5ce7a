# SPDX-License-Identifier: Apache-2.0
"""Expand once, iterate many: a steerable module as a plain-tensor function and its expanded tensors.

The only file of the package that knows escnn's ``GeometricTensor``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.linear.periodic import pad_periodic
from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.representations import validate_field_type, validate_over

__all__ = ["Chain", "Expanded", "SteerableModule", "WithPullback", "chained", "expand"]


class Expanded(NamedTuple):
    r"""A module expanded: ``fn(x, *tensors)`` is the module's map on plain tensors ``(batch, C, *spatial)``.

    ``fn`` holds no learnable state of its own, so it goes through ``torch.func`` and ``torch.compile``;
    ``tensors`` keep the autograd graph back to the module's parameters.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import SteerableLinear, expand
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> expanded = expand(SteerableLinear(vectors, vectors))
        >>> expanded(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :ivar fn: the map, a function of a plain tensor and ``tensors``.
    :ivar tensors: the expanded weights.
    """

    fn: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output at ``x``, by the tensors expanded earlier."""
        return self.fn(x, *self.tensors)


def chained(maps: Sequence[Expanded]) -> Expanded:
    """Expanded maps one after the other."""
    tensors = itertools.chain.from_iterable([one.tensors for one in maps])
    return Expanded(Chain([(one.fn, len(one.tensors)) for one in maps]), tuple(tensors))


class Chain:
    """Functions one after the other, as one of all their tensors.

    :param functions: each with the number of its tensors.

    :ivar per_sample: how many tensors have a row for each sample: weights have none.
    """

    per_sample = 0

    def __init__(self, functions: Sequence[tuple[Callable[..., Tensor], int]]) -> None:
        self._functions = functions

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        start = 0
        for function, count in self._functions:
            x = function(x, *tensors[start : start + count])
            start += count
        return x

    def linearize(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """The value with its graph, and the function ``p -> p^T J`` without one; ``None`` if one has no pullback."""
        pulls, start = [], 0
        for function, count in self._functions:
            if not isinstance(function, WithPullback):
                return None
            own = tensors[start : start + count]
            pulls.append(function.pullback(x.detach(), *(t.detach() for t in own)))
            x = function(x, *own)
            start += count

        def pull(p: Tensor) -> Tensor:
            p = p.clone()
            for one in reversed(pulls):
                p = one(p)
            return p

        return x, pull


class WithPullback:
    r"""A function ``fn(x, *tensors)`` that spares autograd's work.

    :param fn: the function.
    :param pullback: ``pullback(x, *tensors)`` gives the function that takes :math:`p` to :math:`p^\top J`,
        :math:`J` the Jacobian of ``fn`` at ``x``, without a graph; it may overwrite :math:`p`.
    """

    def __init__(self, fn: Callable[..., Tensor], pullback: Callable[..., Callable[[Tensor], Tensor]]) -> None:
        self.fn = fn
        self.pullback = pullback

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The function at ``x``."""
        return self.fn(x, *tensors)


@functools.singledispatch
def expand(module: enn.EquivariantModule) -> Expanded:
    """Expands a steerable module's weights and gives its map on plain tensors.

    Dispatches on the module's class; register a rule for a class of your own with
    ``@expand.register(MyModule)``. The rules for escnn's own layers hold for exactly these classes: a subclass may
    compute something else. Whatever has no rule runs as it is through ``GeometricTensor``, weights expanded at every
    call, with no tensors to differentiate by ``torch.func``.

    Example::

        >>> from escnn import gspaces, nn as enn
        >>> import torch
        >>> from pyro_equiflow.nn import expand, steerable_net
        >>> space = gspaces.no_base_space(gspaces.rot2dOnR2(4).fibergroup)
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> fn, tensors = expand(steerable_net(vectors, vectors))
        >>> fn(torch.randn(5, 6), *tensors).shape
        torch.Size([5, 6])

    :param module: an escnn ``EquivariantModule``.
    :return: :class:`Expanded`, a pair ``(fn, tensors)``.
    :raises TypeError: not an ``EquivariantModule``.
    """
    check_instance("module", module, enn.EquivariantModule, "an escnn.nn.EquivariantModule")
    return _ESCNN_RULES.get(type(module), _as_it_is)(module)


def _as_it_is(module: enn.EquivariantModule) -> Expanded:
    in_type = module.in_type

    def fn(x: Tensor) -> Tensor:
        return module(enn.GeometricTensor(x, in_type)).tensor

    return Expanded(fn, ())


class SteerableModule(enn.EquivariantModule):
    """An escnn module defined by its expansion: subclasses say :meth:`expanded`, this class the rest.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import Expanded, SteerableModule
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> class Negative(SteerableModule):
        ...     def expanded(self):
        ...         return Expanded(torch.neg, ())
        >>> Negative(vectors, vectors)(enn.GeometricTensor(torch.ones(1, 6), vectors)).tensor
        tensor([[-1., -1., -1., -1., -1., -1.]])

    :param in_type: input field type.
    :param out_type: output field type.
    """

    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType) -> None:
        super().__init__()
        validate_field_type(in_type, "in_type")
        validate_over(in_type.gspace, out_type, "out_type")
        self.in_type = in_type
        self.out_type = out_type

    def expanded(self) -> Expanded:
        """The map on plain tensors, weights expanded from the present parameters."""
        raise NotImplementedError

    def forward(self, x: enn.GeometricTensor) -> enn.GeometricTensor:
        """Applies the module to a ``GeometricTensor`` of type ``in_type``."""
        if x.type != self.in_type:
            raise ValueError(f"expected a GeometricTensor of type {self.in_type}, found {x.type}")
        return enn.GeometricTensor(self.expanded()(x.tensor), self.out_type)

    def evaluate_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The output's shape: the input's with ``out_type.size`` channels."""
        return (input_shape[0], self.out_type.size, *input_shape[2:])


@expand.register
def _(module: SteerableModule) -> Expanded:
    return module.expanded()


# ---- escnn's own layers -------------------------------------------------------------------------------------------


def _expand_sequence(module: enn.SequentialModule) -> Expanded:
    # Not children(): it leaves out a module that stands in the sequence twice.
    return chained([expand(child) for child in module._modules.values()])


def _expand_linear(module: enn.Linear) -> Expanded:
    matrix, bias = module.expand_parameters()
    return Expanded(F.linear, (matrix,) if bias is None else (matrix, bias))


def _expand_conv(module: Any) -> Expanded:
    weight, bias = module.expand_parameters()
    dimensions = module.d
    convolve: Callable[..., Tensor] = F.conv2d if dimensions == 2 else F.conv3d
    mode = module.padding_mode
    options = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if mode == "zeros":
        options["padding"] = module.padding
    pads = module._reversed_padding_repeated_twice[: 2 * dimensions]
    widths = pads[::-2]

    def fn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if mode == "circular":
            x = pad_periodic(x, widths)
        elif mode != "zeros" and any(pads):
            x = F.pad(x, pads, mode=mode)
        return convolve(x, weight, bias, **options)

    return Expanded(fn, (weight,) if bias is None else (weight, bias))


# By exact class: what a subclass computes its parent's rule does not know.
_ESCNN_RULES: dict[type, Callable[[Any], Expanded]] = {
    enn.SequentialModule: _expand_sequence,
    enn.IdentityModule: lambda module: Expanded(lambda x: x, ()),
    enn.Linear: _expand_linear,
    enn.R2Conv: _expand_conv,
    enn.R3Conv: _expand_conv,
    enn.ReLU: lambda module: Expanded(F.relu, ()),
    enn.ELU: lambda module: Expanded(functools.partial(F.elu, alpha=module.alpha), ()),
}
