"""Batch normalisation, ReLU, the residual addition and the convolution before them, fused.

The functions run the kernel ops (fastres.kernels) wherever these cover the case, and the same composition
of torch.nn.functional wherever they do not: mixed dtypes, strided memory, few values, other devices, tensor
subclasses, torch.func transforms, forward-mode AD. Each is also an op, `torch.ops.fastres.<name>`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres import cases, choice, composed, convolution, kernels, max_pool
from fastres import conv_bias as biases
from fastres.kernels import bn_act, fragment, same_layout
from fastres.recompute import call_without_keeping, call_without_keeping_values
from fastres.recording import Record, current

__all__ = ["add_relu", "batch_norm", "bn_add_relu", "bn_relu", "conv_bn_relu"]

_kernels = torch.ops.fastres


def _record() -> Record | None:
    return None if torch.compiler.is_dynamo_compiling() else current()


def _tell_composed(reason: str) -> None:
    if (record := _record()) is not None:
        record.composed(reason)


def _check_residual(op: str, argument: str, residual: Tensor, input: Tensor) -> None:
    if residual.shape == input.shape:
        return
    try:
        torch.broadcast_shapes(residual.shape, input.shape)
    except RuntimeError:
        raise ValueError(
            f"fastres::{op}: {argument} has shape {list(residual.shape)}, expected {list(input.shape)} "
            "(the shape of input) or one that broadcasts with it"
        ) from None


def _bn_act(
    op, input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu, pool=None
) -> Tensor:
    """act(batch_norm(input) [+ residual]), and the maximum over windows of that where there is a `pool`."""
    if residual is not None:
        _check_residual(op, "residual", residual, input)
    channel_vectors = (running_mean, running_var, weight, bias)
    reason = (
        cases.why_no_kernel(input, residual, *channel_vectors)
        or cases.why_not_residual(residual, input)
        or cases.why_not_channels(input.size(1), input.dtype, input.device, *channel_vectors)
        or cases.why_not_statistics(input, running_mean, running_var, training, momentum, eps)
    )
    if reason is not None:
        _tell_composed(reason)
        output = composed.bn_act(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
        return _pooled(pool, output)
    if (
        pool is not None
        and relu
        and residual is None
        and not cases.is_traced()
        and max_pool.covers(pool, input)
    ):
        return max_pool.bn_relu_max_pool(pool, input, *channel_vectors, training, momentum, eps)
    if residual is not None and not same_layout(residual, input):
        residual = torch.empty_like(input).copy_(residual)
    arguments = (input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu)
    if cases.is_traced():
        if training:
            output, *_ = _kernels.bn_act_forward(*arguments)
        else:
            output, *_ = _kernels.bn_act_eval(input, residual, *channel_vectors, eps, relu)
        return _pooled(pool, output)
    return _pooled(pool, bn_act(*arguments)[0])


def _pooled(pool: max_pool.MaxPool | None, output: Tensor) -> Tensor:
    """The maximum over windows by PyTorch, which keeps no input for backward that can be made again."""
    if pool is None:
        return output
    if (record := _record()) is not None:
        record.pool_apart()
    return call_without_keeping(lambda values: max_pool.max_pool(pool, values), output)


# ---------------------------------------------------------------------------------------------------------
# public functions


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation in one fused pass over each tensor, forward and backward.

    Args: as of :func:`bn_relu`.
    Returns: batch_norm(input), of input's shape, dtype and layout.
    Reference: torch.nn.functional.batch_norm.
    """
    return _bn_act(
        "batch_norm", input, None, running_mean, running_var, weight, bias, training, momentum, eps, False
    )


def bn_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input)): two reads and one write of the input in training, one of each in evaluation.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, bfloat16, float16 or, on the
            CPU, float64; channels_last and contiguous memory run as they are.
        running_mean, running_var: (C,), updated in place in training. Both may be None in training.
        weight, bias: (C,) or None for 1 and 0; float32 beside a low-precision input, or input's dtype.
        training: use the batch's statistics, else the running ones.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        Tensor of input's shape, dtype and memory layout.

    Raises:
        ValueError: one value a channel in training.
        RuntimeError: a per-channel tensor that is not of C elements; no running statistics in evaluation.

    Reference: Ioffe and Szegedy 2015; F.relu(F.batch_norm(...)).
    """
    return _bn_act(
        "bn_relu", input, None, running_mean, running_var, weight, bias, training, momentum, eps, True
    )


def bn_add_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input) + residual), the end of a residual block.

    Args:
        residual: of input's shape; another dtype or a broadcast shape runs unfused.
        others: as of :func:`bn_relu`.

    Returns:
        Tensor of input's shape and memory layout; of the broadcast shape.

    Raises:
        ValueError: residual and input do not broadcast; as of :func:`bn_relu`.

    Reference: He et al. 2015 (arXiv:1512.03385), equation 1; F.relu(F.batch_norm(...) + residual).
    """
    return _bn_act(
        "bn_add_relu",
        input,
        residual,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        True,
    )


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """relu(input + other), both read once, the sum never written.

    Args:
        input: any shape; float32, bfloat16, float16 or, on the CPU, float64.
        other: of input's shape, dtype and device to run fused; else anything that torch.add takes.

    Returns:
        Tensor as of torch.relu(input + other).

    Reference: torch.relu(input + other).
    """
    reason = cases.why_no_kernel(input, other) or cases.why_not_residual(other, input)
    if reason is None and not same_layout(other, input):
        reason = "what is added has another memory layout"
    if reason is None:
        return _kernels.add_relu_forward(input, other)
    _tell_composed(reason)
    return torch.relu(input + other)


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    conv_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """activation(batch_norm(conv2d(input)) [+ residual]).

    The convolution is fastres's own on the CPU, where it covers the case and is faster, else PyTorch's;
    autocast casts either. What follows is fused.

    Args:
        input: (N, C_in, H, W).
        weight, conv_bias, stride, padding, dilation, groups: as of torch.nn.functional.conv2d. In training
            the bias, which the batch norm subtracts again, has a gradient of zero.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps: as of :func:`bn_relu`.
        residual: of the convolution's output shape, added before the activation; None: nothing is.
        activation: "relu" or None.

    Returns:
        (N, C_out, H_out, W_out).

    Raises:
        ValueError: an activation of another name; as of :func:`bn_add_relu`.

    Reference: He et al. 2015, section 3.4; F.conv2d, F.batch_norm, F.relu.
    """
    if activation not in ("relu", None):
        raise ValueError(f"fastres::conv_bn_relu: activation is {activation!r}, expected 'relu' or None")
    arguments = (input, weight, running_mean, running_var, bn_weight, bn_bias, residual, conv_bias)
    geometry = (stride, padding, dilation, groups)
    return conv_bn_act(*arguments, *geometry, training, momentum, eps, activation == "relu", None)


def conv_bn_act(
    input,
    weight,
    running_mean,
    running_var,
    bn_weight,
    bn_bias,
    residual,
    conv_bias,
    stride,
    padding,
    dilation,
    groups,
    training,
    momentum,
    eps,
    relu,
    pool: max_pool.MaxPool | None,
) -> Tensor:
    """conv_bn_relu, and the maximum over windows of that where there is a `pool`."""
    if training and conv_bias is not None and biases.can_be_left_out(weight, conv_bias):
        weight = biases.weight_with(conv_bias, weight)
        arguments = input, weight, running_mean, running_var, bn_weight, bn_bias, residual, None
        rest = stride, padding, dilation, groups, training, momentum, eps, relu, pool
        with biases.averaged_in(running_mean, conv_bias, momentum):
            return conv_bn_act(*arguments, *rest)
    channel_vectors = (running_mean, running_var, bn_weight, bn_bias)
    learned = (input, weight, conv_bias, bn_weight, bn_bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    fits = cases.why_pytorch_refuses(running_mean, running_var, training, momentum, eps) is None
    has_statistics = running_mean is not None and running_var is not None
    at_once = fits and not training and has_statistics and not needs_grad
    by, record = None, _record()
    if at_once or (fits and training and conv_bias is None):
        geometry = (stride, padding, dilation, groups)
        others = conv_bias, channel_vectors, geometry, training, needs_grad
        by = choice.for_ours(input, weight, residual, *others)
        if by is None and record is not None and _may_be_moved(input):
            elsewhere = torch.empty_like(input, memory_format=torch.channels_last)
            record.own_in_channels_last = choice.for_ours(elsewhere, weight, None, *others) is not None
    if by is not None:
        if record is not None:
            record.convolved()
        input = input.to(convolution.compute_dtype(input))
        traced = torch.compiler.is_dynamo_compiling()
        if training:
            arguments = (input, weight, residual, *channel_vectors, *by, momentum, eps, relu)
            if traced:
                output, *_ = _kernels.conv_bn_act_forward(*arguments)
            else:
                output, *_ = call_without_keeping_values(convolution.conv_bn_act, *arguments)
        else:
            infer = _kernels.conv_bn_act_infer if traced else convolution.conv_bn_act_eval
            windows = None
            if pool is not None and residual is None:
                windows = pool.of_size(by.output_size(input, weight)[2:])
            output = infer(input, weight, conv_bias, residual, *channel_vectors, *by, eps, relu, windows)
            pool = None if windows else pool
        return _pooled(pool, output)
    of_channels = weight.size(0), weight.dtype, weight.device, *channel_vectors
    if (
        at_once
        and not (relu or residual is not None or cases.why_not_channels(*of_channels))
        and _pays_folding(input, weight)
    ):
        folded = composed.fold_batch_norm(
            weight, conv_bias, running_mean, running_var, bn_weight, bn_bias, eps
        )
        return _pooled(pool, F.conv2d(input, *folded, stride, padding, dilation, groups))
    output = None
    if needs_grad:  # without, ours was the faster one above, or was measured not to be
        output = _of_images(input, weight, conv_bias, stride, padding, dilation, groups)
    if output is None:
        output = call_without_keeping(F.conv2d, input, weight, conv_bias, stride, padding, dilation, groups)
    elif record is not None:
        record.convolved()
    return _bn_act(
        "conv_bn_relu",
        output,
        residual,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        momentum,
        eps,
        relu,
        pool,
    )


def _may_be_moved(input: Tensor) -> bool:
    """Whether there may be the same in channels_last memory."""
    return input.dim() == 4 and input.layout == torch.strided and not cases.is_special(input)


def _of_images(input, weight, *rest) -> Tensor | None:
    if cases.is_traced() or cases.is_special(input, weight):
        return None
    return convolution.of_images(input, weight, *rest)


def _pays_folding(input: Tensor, weight: Tensor) -> bool:
    # With a ReLU or a sum behind it there is one pass over the output in any case.
    # Low-precision weights are not folded: rounding them once more would cost more digits than stock loses.
    # And folding passes over the weights, at each call, where normalising passes over the output.
    # Of few values that takes 12 us, the batch norm 7.
    exact = weight.dtype in (torch.float32, torch.float64)
    least = max(2 * weight.numel(), kernels.few_values if input.is_cpu else 0)
    return exact and cases.surely(input.numel() > least)


# ---------------------------------------------------------------------------------------------------------
# the public functions as torch.ops.fastres.*

_STATISTICS = "Tensor(a!)? running_mean, Tensor(b!)? running_var"
_FACTORS = "Tensor? {0}weight=None, Tensor? {0}bias=None"
_NORM = "bool training=False, float momentum=0.1, float eps=1e-05"
_CONV = "SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1"

for _function, _arguments in {
    batch_norm: f"Tensor input, {_STATISTICS}, {_FACTORS.format('')}, {_NORM}",
    bn_relu: f"Tensor input, {_STATISTICS}, {_FACTORS.format('')}, {_NORM}",
    bn_add_relu: f"Tensor input, Tensor residual, {_STATISTICS}, {_FACTORS.format('')}, {_NORM}",
    add_relu: "Tensor input, Tensor other",
    conv_bn_relu: f"Tensor input, Tensor weight, {_STATISTICS}, {_FACTORS.format('bn_')}, *, "
    f'Tensor? residual=None, Tensor? conv_bias=None, {_CONV}, {_NORM}, str? activation="relu"',
}.items():
    fragment.define(f"{_function.__name__}({_arguments}) -> Tensor")
    fragment.impl(_function.__name__, _function, "CompositeImplicitAutograd")
