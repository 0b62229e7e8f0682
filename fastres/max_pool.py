"""The maximum over windows behind a batch norm and its ReLU, as one autograd node with them.

What lies between them is never written to memory, and of a window's pixels the largest one's number is
kept, one byte for each result, where PyTorch keeps the activation and eight bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, library, nn
from torch.nn import functional as F

from fastres import composed, kernels
from fastres.convolution import pair

_forward = torch.ops.fastres.bn_relu_max_pool_forward.default
_backward = torch.ops.fastres.bn_relu_max_pool_backward.default

_MOST_PIXELS = 256  # of a window: they are numbered by a byte


class MaxPool(NamedTuple):
    """Of an nn.MaxPool2d: two integers each."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    @classmethod
    def of(cls, module: nn.MaxPool2d) -> "MaxPool | None":
        """None where it is one of those that the kernels do not know."""
        kernel, stride = pair(module.kernel_size, 1), pair(module.stride, 1)
        padding = pair(module.padding, 0)
        if None in (kernel, stride, padding) or pair(module.dilation, 1) != (1, 1) or module.return_indices:
            return None
        fits = all(2 * p <= k for k, p in zip(kernel, padding, strict=True))
        if not fits or kernel[0] * kernel[1] > _MOST_PIXELS:
            return None
        return cls(kernel, stride, padding, bool(module.ceil_mode))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of images of that height and width."""
        axes = zip(size, self.kernel_size, self.stride, self.padding, strict=True)
        return tuple(self._windows(pixels, *axis) for pixels, *axis in axes)

    def of_size(self, size: tuple[int, int]) -> list[int] | None:
        """All that the convolution's op wants to know of it; None where no window meets the image."""
        windows = self.output_size(size)
        return [*windows, *self.kernel_size, *self.stride, *self.padding] if min(windows) > 0 else None

    def _windows(self, size: int, kernel: int, stride: int, padding: int) -> int:
        rest = size + 2 * padding - kernel
        if not self.ceil_mode:
            return rest // stride + 1
        windows = -(-rest // stride) + 1
        # The last one begins within the image or the padding before it.
        return windows - ((windows - 1) * stride >= size + padding)


def max_pool(pool: MaxPool, input: Tensor) -> Tensor:
    """By PyTorch."""
    return F.max_pool2d(input, pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode)


@library.register_fake("fastres::bn_relu_max_pool_forward")
def _(input, running_mean, running_var, weight, bias, training, momentum, eps, output_size, *rest):
    output = input.new_empty((*input.shape[:2], *output_size)).to(memory_format=torch.channels_last)
    dtype = torch.float64 if input.device.type == "cpu" else torch.float32
    mean = input.new_empty(input.size(1), dtype=dtype)
    return output, input.new_empty(output.numel(), dtype=torch.uint8), mean, torch.empty_like(mean)


@library.register_fake("fastres::bn_relu_max_pool_backward")
def _(grad, input, index, weight, bias, save_mean, save_rstd, training, kernel_size, stride, padding):
    grad_weight = input.new_empty(input.size(1), dtype=kernels.accumulation_dtype(input.dtype))
    return torch.empty_like(input), grad_weight, torch.empty_like(grad_weight)


class _BnReluMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pool, input, running_mean, running_var, weight, bias, training, momentum, eps):
        output, index, mean, rstd = _call(
            pool, input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        ctx.set_materialize_grads(False)
        ctx.pool, ctx.training = pool, training
        ctx.save_for_backward(input, index, weight, kernels.kept_copy(bias), mean, rstd)
        return output

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 9
        input, index, weight, bias, mean, rstd = ctx.saved_tensors
        rest = (input, None, weight, bias, mean, rstd, ctx.training, True)
        if kernels.is_more_than_values(grad):
            grad = _before_max_pool(ctx.pool, grad, index, input)
            grad_input, _, grad_weight, grad_bias = composed.bn_act_backward(grad, *rest)
        elif torch.is_grad_enabled():  # a second derivative may be asked for
            grad = _before_max_pool(ctx.pool, grad, index, input)
            grad = grad.contiguous(memory_format=torch.channels_last)
            grad_input, _, grad_weight, grad_bias = torch.ops.fastres.bn_act_backward(grad, *rest)
        else:
            if not kernels.is_channels_last(grad) or grad.dtype != input.dtype:
                grad = grad.to(input.dtype).contiguous(memory_format=torch.channels_last)
            with torch._C._AutoDispatchBelowAutograd():
                grad_input, grad_weight, grad_bias = _backward(
                    grad, input, index, weight, bias, mean, rstd, ctx.training, *ctx.pool[:3]
                )
        _, needs_input, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            None,
            grad_input if needs_input else None,
            None,
            None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
            *(None,) * 3,
        )


def _before_max_pool(pool: MaxPool, grad: Tensor, index: Tensor, input: Tensor) -> Tensor:
    """The gradient of what goes into the maximum, by differentiable operations."""
    height, width = input.shape[2:]
    batch, channels, rows, columns = grad.shape
    tap = index.view(batch, rows, columns, channels).permute(0, 3, 1, 2).long()
    row = torch.arange(rows, device=grad.device)[:, None] * pool.stride[0] - pool.padding[0]
    column = torch.arange(columns, device=grad.device) * pool.stride[1] - pool.padding[1]
    pixel = (row + tap // pool.kernel_size[1]) * width + column + tap % pool.kernel_size[1]
    zeros = grad.new_zeros(batch, channels, height * width)
    spread = zeros.scatter_add(2, pixel.flatten(2), grad.reshape(batch, channels, -1))
    return spread.view(batch, channels, height, width)


def _call(pool, input, running_mean, running_var, weight, bias, training, momentum, eps):
    arguments = (input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*arguments, pool.output_size(input.shape[2:]), *pool[:3])


def covers(pool: MaxPool, input: Tensor) -> bool:
    """Whether the kernels take an activation that bn_act's kernels take."""
    return (
        input.dim() == 4 and kernels.is_channels_last(input) and min(pool.output_size(input.shape[2:])) > 0
    )


def bn_relu_max_pool(
    pool: MaxPool, input, running_mean, running_var, weight, bias, training, momentum, eps
) -> Tensor:
    """max_pool2d(relu(batch_norm(input))) of what the kernels cover."""
    arguments = (pool, input, running_mean, running_var, weight, bias, training, momentum, eps)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, weight, bias):
        return _BnReluMaxPool.apply(*arguments)
    return _call(*arguments)[0]
