"""Sums that a forward writes in place (`out += identity`), run at the sites.

What is written to keeps its dtype: a bfloat16 `out` stays bfloat16 when a float32 `identity` is added to
it, whereas `out + identity` is float32. Where both have one dtype, as they nearly always do, the two mean
the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres import kernels, sites

__all__ = ["add_act", "bn_act", "conv_bn_act", "residual_block"]


@kernels.constant_when_compiled
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    act: nn.Module | None,
    input: Tensor,
    residual: Tensor,
    *,
    relu: bool,
    into_residual: bool,
) -> Tensor:
    """`sites.conv_bn_act` of a sum that is written into the batch norm's output, or `into_residual`."""
    device = input.device.type
    dtype = input.dtype
    if _has_autocast(device) and torch.is_autocast_enabled(device) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    add = _into_residual if into_residual else Tensor.add_
    if residual.dtype is dtype:
        return sites.conv_bn_act(conv, bn, act, input, residual, relu=relu, add=add)
    return sites.activate(act, add(sites.conv_bn_act(conv, bn, None, input, relu=False), residual), relu)


def residual_block(
    branch: Sequence[tuple[nn.Module, nn.Module, nn.Module | None]],
    shortcut: sites.Shortcut,
    input: Tensor,
    *,
    shortcut_first: bool,
    into_residual: bool,
) -> Tensor:
    """`sites.residual_block` of such a sum. What runs all at once has but one dtype."""
    end = functools.partial(conv_bn_act, into_residual=into_residual)
    return sites.residual_block(branch, shortcut, input, shortcut_first=shortcut_first, end=end)


def bn_act(
    bn: nn.Module,
    act: nn.Module | None,
    input: Tensor,
    residual: Tensor,
    *,
    relu: bool,
    into_residual: bool,
) -> Tensor:
    """`sites.bn_act` of a sum that is written into the batch norm's output, or `into_residual`."""
    add = _into_residual if into_residual else Tensor.add_
    if residual.dtype is input.dtype:
        return sites.bn_act(bn, act, input, residual, relu=relu, add=add)
    return sites.activate(act, add(sites.bn_act(bn, None, input, relu=False), residual), relu)


def add_act(act: nn.Module | None, input: Tensor, other: Tensor) -> Tensor:
    """`sites.add_act` of a sum that is written into `input`."""
    if input.dtype is other.dtype:
        return sites.add_act(act, input, other, add=Tensor.add_)
    return sites.activate(act, input.add_(other), relu=True)


def _into_residual(output: Tensor, residual: Tensor) -> Tensor:
    return residual.add_(output)
