"""The kernel ops on host memory, by the CUDA kernels under csrc/emu: what the tests call device "emu"."""

import contextlib
import warnings

import emu
from torch import library

from fastres import cases, convolution
from fastres.max_pool import MaxPool

# Statistics are float32 on CUDA, where the CPU's ops return float64.


def bn_act_forward(input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu):
    output, *saved = emu.batch_norm(
        input, weight, bias, running_mean, running_var, residual=residual, relu=relu, training=training,
        momentum=momentum, eps=eps,
    )  # fmt: skip
    return output, *(tensor.double() for tensor in saved)


def bn_act_eval(input, residual, running_mean, running_var, weight, bias, eps, relu):
    statistics = running_mean, running_var
    return bn_act_forward(input, residual, *statistics, weight, bias, False, 0.0, eps, relu)


def bn_act_again(input, residual, weight, bias, save_mean, save_rstd, relu):
    saved = save_mean.float(), save_rstd.float()
    return emu.batch_norm_again(input, weight, bias, *saved, residual=residual, relu=relu)


def bn_act_backward(grad, input, output, weight, bias, save_mean, save_rstd, training, relu):
    grad_input, grad_residual, *rest = emu.batch_norm_backward(
        grad, input, output, weight, bias, save_mean.float(), save_rstd.float(),
        grad_residual=output is not None, relu=relu, training=training,
    )  # fmt: skip
    return grad_input, input.new_empty(0) if grad_residual is None else grad_residual, *rest


def bn_relu_max_pool_forward(
    input, running_mean, running_var, weight, bias, training, momentum, eps, output_size, *by
):
    arguments = weight, bias, running_mean, running_var
    output, index, *saved = emu.bn_max_pool(
        _pool(by, input.shape[2:], output_size), input, *arguments, training=training, momentum=momentum,
        eps=eps,
    )  # fmt: skip
    return output, index, *(tensor.double() for tensor in saved)


def bn_relu_max_pool_backward(grad, input, index, weight, bias, save_mean, save_rstd, training, *by):
    pool = _pool(by, input.shape[2:], grad.shape[2:])
    saved = save_mean.float(), save_rstd.float()
    return emu.bn_max_pool_backward(pool, grad, input, index, weight, bias, *saved, training=training)


def _pool(by, size, output_size) -> MaxPool:
    pools = (MaxPool(*map(tuple, by), ceil_mode=ceil_mode) for ceil_mode in (False, True))
    return next(pool for pool in pools if tuple(pool.output_size(size)) == tuple(output_size))


_OPS = {
    "bn_act_forward": bn_act_forward,
    "bn_act_eval": bn_act_eval,
    "bn_act_again": bn_act_again,
    "bn_act_backward": bn_act_backward,
    "bn_relu_max_pool_forward": bn_relu_max_pool_forward,
    "bn_relu_max_pool_backward": bn_relu_max_pool_backward,
    "add_relu_forward": emu.add_relu,
    "add_relu_backward": emu.add_relu_backward,
}


@contextlib.contextmanager
def cuda_kernels_on_the_host(monkeypatch):
    """They run in place of the CPU's, on the dtypes that they have; convolutions are PyTorch's."""
    monkeypatch.setattr(cases, "_CPU_DTYPES", cases._CUDA_DTYPES)
    monkeypatch.setattr(convolution, "_DTYPES", {})
    registry = library.Library("fastres", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name, op in _OPS.items():
            registry.impl(name, op, "CPU", allow_override=True)
    try:
        yield
    finally:
        registry._destroy()
