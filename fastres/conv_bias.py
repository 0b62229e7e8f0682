"""The bias of a convolution in front of a batch norm in training, which subtracts every constant again.

It is left out of the convolution: no pass over the output adds it, and none sums the output's gradient for
it. Its gradient is zero, where PyTorch's is what rounding leaves of that; only the running mean has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from fastres import cases


def can_be_left_out(weight: Tensor, bias: Tensor) -> bool:
    """Whether this is a bias that F.conv2d takes, and nobody is to see it used."""
    if cases.is_traced() or cases.is_special(weight, bias):
        return False
    fits = bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device
    return fits and bias.is_floating_point()


def weight_with(bias: Tensor, weight: Tensor) -> Tensor:
    """The weight, through which the bias gets its gradient."""
    if torch.is_grad_enabled() and bias.requires_grad:
        return _WeightWith.apply(weight, bias)
    return weight


class _WeightWith(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight, bias):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, bias = inputs
        ctx.size, ctx.kind = bias.shape, {"dtype": bias.dtype, "device": bias.device}

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros(ctx.size, **ctx.kind) if ctx.needs_input_grad[1] else None


@contextmanager
def averaged_in(running_mean: Tensor | None, bias: Tensor, momentum: float) -> Iterator[None]:
    """Around the op that averages the mean of the convolution's output in: the bias is added behind it."""
    try:
        yield
    except _StopRecomputationError:  # activation checkpointing ends a second forward within its last op
        add_to(running_mean, bias, momentum)
        raise
    add_to(running_mean, bias, momentum)


@torch.no_grad()
def add_to(running_mean: Tensor | None, bias: Tensor, momentum: float) -> None:
    """What the bias adds to the mean of the convolution's output, after that has been averaged in."""
    if running_mean is None:
        return
    if running_mean.is_inference():
        running_mean.add_(bias, alpha=momentum)
        return
    # F.batch_norm saves the running mean, which its backward pass has no use for, and changes it unseen.
    with torch.autograd._unsafe_preserve_version_counter(running_mean):
        running_mean.add_(bias, alpha=momentum)
