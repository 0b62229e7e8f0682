"""The fused operations composed of PyTorch's own, for what no kernel covers."""

import torch
from torch import Tensor
from torch.nn import functional as F


def bn_act(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        output = output + residual
    return torch.relu(output) if relu else output


def bn_act_backward(grad, input, output, weight, bias, mean, rstd, training, relu):
    """The gradients of bn_act, by the formulas of csrc/core/bn_math.h, themselves differentiable.

    `output` is None where no residual was added. Returns the gradients of
    input, residual (or None), weight and bias.
    """
    dims = [d for d in range(input.dim()) if d != 1]
    shape = [1, -1] + [1] * (input.dim() - 2)
    real = mean.dtype
    x = input.to(real)
    if training:
        # The saved statistics are functions of input, and here their derivatives matter.
        mean_again = x.mean(dims)
        variance = (x - mean_again.view(shape)).square().mean(dims)
        # rstd holds eps, which is not an argument: 1 / rstd^2 - var is it.
        eps = (rstd.pow(-2) - variance).detach()
        mean, rstd = mean_again, (variance + eps).rsqrt()
    normalised = (x - mean.view(shape)) * rstd.view(shape)
    g = grad.to(real)
    if relu:
        with torch.no_grad():
            z = output
            if z is None:
                z = normalised if weight is None else normalised * weight.to(real).view(shape)
                z = z if bias is None else z + bias.to(real).view(shape)
                z = z.to(input.dtype)
            passes = ~(z <= 0)
        g = torch.where(passes, g, 0)
    grad_bias = g.sum(dims)
    grad_weight = (g * normalised).sum(dims)
    centred = g
    if training:
        count = input.numel() // input.size(1)
        centred = g - (grad_bias.view(shape) + normalised * grad_weight.view(shape)) / count
    scale = rstd if weight is None else rstd * weight.to(real)
    grad_input = (centred * scale.view(shape)).to(input.dtype)
    return grad_input, None if output is None else g.to(input.dtype), grad_weight, grad_bias


def fold_batch_norm(
    weight, conv_bias, running_mean, running_var, bn_weight, bn_bias, eps
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals convolution and batch norm in evaluation.

    Reference: torch.nn.utils.fusion.fuse_conv_bn_weights.
    """
    scale = (running_var + eps).rsqrt()
    scale = scale if bn_weight is None else scale * bn_weight
    bias = -running_mean if conv_bias is None else conv_bias - running_mean
    bias = bias * scale if bn_bias is None else bias * scale + bn_bias
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), bias.to(weight.dtype)
