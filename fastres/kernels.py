"""The kernel ops `torch.ops.fastres.bn_act_*` and `add_relu_*`: their fake kernels and their derivatives.

The kernels themselves are compiled (csrc/bindings). They are strict about what they take; fastres.ops
decides which cases go to them.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, library
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from fastres import _C, composed, recompute  # _C registers the ops

# Up to so many values of an output on the CPU, calling the ops takes the time and not what they compute: a
# layer of bn_act takes 0.8x stock PyTorch's speed at 2^11 values, 0.9x at 2^15 and 1.0 to 1.2x at 2^17.
few_values = 2**16

_BATCHED = torch._C._dispatch_key_parse("Batched")

CUDA = bool(_C.build_info()["cuda"])
_CUDA_ARCHS = _C.build_info()["cuda_archs"].split()  # native code for each, and PTX for the last
fragment = library.Library("fastres", "FRAGMENT")
_bn_act_forward = torch.ops.fastres.bn_act_forward.default
_bn_act_eval = torch.ops.fastres.bn_act_eval.default
_bn_act_backward = torch.ops.fastres.bn_act_backward.default
_add_relu_backward = torch.ops.fastres.add_relu_backward.default


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which takes seconds, as it imports the compiler."""
    function._dynamo_marked_constant = True
    return function


def compiled_for(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether a card of this compute capability runs what was compiled for these architectures."""
    for arch in archs:
        needed = divmod(int(arch.rstrip("af")), 10)
        if arch[-1].isdigit():
            runs = needed[0] == capability[0] and needed <= capability
            runs = runs or (arch == archs[-1] and needed <= capability)
        else:  # with features of that card alone
            runs = needed == capability
        if runs:
            return True
    return False


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@constant_when_compiled
def runs_on_card(index: int) -> bool:
    """Whether the build has kernels for the CUDA device of this index."""
    return CUDA and compiled_for(_capability(index), _CUDA_ARCHS)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and per-channel gradients for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def same_layout(tensor: Tensor, input: Tensor) -> bool:
    return (tensor.is_contiguous() and input.is_contiguous()) or (
        is_channels_last(tensor) and is_channels_last(input)
    )


@library.register_fake("fastres::bn_act_forward")
@library.register_fake("fastres::bn_act_eval")
def _(input, residual, running_mean, running_var, weight, bias, *rest):
    dtype = torch.float64 if input.device.type == "cpu" else torch.float32
    mean = input.new_empty(input.size(1), dtype=dtype)
    return torch.empty_like(input), mean, torch.empty_like(mean)


@library.register_fake("fastres::bn_act_again")
def _(input, residual, weight, bias, save_mean, save_rstd, relu):
    return torch.empty_like(input)


@library.register_fake("fastres::bn_act_backward")
def _(grad, input, output, weight, bias, save_mean, save_rstd, training, relu):
    grad_residual = input.new_empty(0) if output is None else torch.empty_like(input)
    grad_weight = input.new_empty(input.size(1), dtype=accumulation_dtype(input.dtype))
    return torch.empty_like(input), grad_residual, grad_weight, torch.empty_like(grad_weight)


@library.register_fake("fastres::add_relu_forward")
def _(input, other):
    return torch.empty_like(input)


@library.register_fake("fastres::add_relu_backward")
def _(grad, output):
    return torch.empty_like(output)


def is_more_than_values(grad: Tensor) -> bool:
    """Whether a gradient carries a tangent, or stands for a batch of gradients.

    Only PyTorch's own ops know what to do with these, which may begin after the forward: in forward-mode AD
    of a backward pass, in torch.func, and where `is_grads_batched` is set.
    """
    return (
        (forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad).tangent is not None)
        or torch._C._dispatch_keys(grad).has(_BATCHED)  # of is_grads_batched
        or peek_interpreter_stack() is not None
    )


def in_layout_of(grad: Tensor, input: Tensor) -> Tensor:
    """`grad` in the dtype and memory layout of `input`, which is how the kernels take it."""
    if grad.dtype == input.dtype and same_layout(grad, input):
        return grad
    return torch.empty_like(input).copy_(grad)


class _BnAct(torch.autograd.Function):
    """The differentiable output; mean and rstd, which are not differentiable, are put into `statistics`."""

    @staticmethod
    def forward(ctx, statistics, input, residual, running_mean, running_var, weight, bias, training, *rest):
        with torch._C._AutoDispatchBelowAutograd():
            output, mean, rstd = _normalize(
                input, residual, running_mean, running_var, weight, bias, training, *rest
            )
        statistics += mean, rstd
        ctx.set_materialize_grads(False)
        ctx.training = training
        kept = recompute.keep_for_mask(ctx, output, residual, rest[-1])
        vectors = kept_copy(weight), kept_copy(bias), mean, rstd
        ctx.save_for_backward(input, kept, *vectors, weight)
        return output

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 11
        input, output, _, bias, mean, rstd, weight = recompute.take(ctx)
        rest = (input, output, weight, bias, mean, rstd, ctx.training, ctx.relu)
        if is_more_than_values(grad):
            grad = grad.to(input.dtype)
            grads = composed.bn_act_backward(grad, *rest)
        elif torch.is_grad_enabled():  # a second derivative may be asked for
            grad = in_layout_of(grad, input)
            grads = _bn_act_backward(grad, *rest)
        else:
            grad = in_layout_of(grad, input)
            with torch._C._AutoDispatchBelowAutograd():
                grads = _bn_act_backward(grad, *rest)
        grad_input, grad_residual, grad_weight, grad_bias = grads
        _, needs_input, needs_residual, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if ctx.has_residual and output is None:
            grad_residual = grad
        return (
            None,
            grad_input if needs_input else None,
            grad_residual if needs_residual else None,
            None,
            None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
            *(None,) * 4,
        )


recompute.register_node(_BnAct)


def kept_copy(vector: Tensor | None) -> Tensor | None:
    """Of a batch norm's weight or bias, with which a backward pass makes the output or its mask again.

    PyTorch's batch norm keeps no bias, which may change before the backward pass. And where another module
    asks for the output in its own, the memory of these parameters may be elsewhere (FSDP, offloading).
    """
    return None if vector is None else vector.detach().clone()


def _normalize(input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu):
    """Output, mean and rstd."""
    of_input = input, residual, running_mean, running_var, weight, bias
    if training:
        return _bn_act_forward(*of_input, True, momentum, eps, relu)
    return _bn_act_eval(*of_input, eps, relu)


def bn_act(input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu):
    """fastres::bn_act_forward or bn_act_eval from its autograd down, past the dispatcher on the way there.

    Returns output, mean, rstd.
    """
    arguments = (input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, residual, weight, bias):
        statistics = []
        return _BnAct.apply(statistics, *arguments), *statistics
    with torch._C._AutoDispatchBelowAutograd():
        return _normalize(*arguments)


def _bn_act_by_running_statistics(*arguments):
    *of_input, eps, relu = arguments
    return bn_act(*of_input, False, 0.0, eps, relu)


# By hand and not by register_autograd, which refuses ops that update an argument in place.
fragment.impl("bn_act_forward", bn_act, "Autograd")
fragment.impl("bn_act_eval", _bn_act_by_running_statistics, "Autograd")


def _bn_act_backward_setup(ctx, inputs, output):
    grad, input, forward_output, weight, bias, _mean, _rstd, ctx.training, ctx.relu = inputs
    ctx.save_for_backward(grad, input, forward_output, weight, bias, _mean, _rstd)
    ctx.set_materialize_grads(False)


def _bn_act_backward_backward(ctx, *grads):
    """Double backward: differentiates the backward formula, written in differentiable PyTorch."""
    if all(g is None for g in grads):
        return (None,) * 9
    grad, input, output, weight, bias, mean, rstd = ctx.saved_tensors
    with torch.enable_grad():
        # Aliases, so that only the formula is differentiated and not what its arguments were made of.
        alias = {
            name: t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for name, t in (("grad", grad), ("input", input), ("weight", weight))
            if t is not None
        }
        results = composed.bn_act_backward(
            alias["grad"],
            alias["input"],
            output,
            alias.get("weight"),
            bias,
            mean,
            rstd,
            ctx.training,
            ctx.relu,
        )
        pairs = [
            (r, g.to(r.dtype))
            for r, g in zip(results, grads, strict=True)
            if r is not None and g is not None
        ]
        wanted = torch.autograd.grad(
            [r for r, _ in pairs],
            list(alias.values()),
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    by_name = dict(zip(alias, wanted, strict=True))
    return by_name["grad"], by_name["input"], None, by_name.get("weight"), *(None,) * 5


library.register_autograd(
    "fastres::bn_act_backward", _bn_act_backward_backward, setup_context=_bn_act_backward_setup
)


def _add_relu_setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _add_relu_gradient(ctx, grad):
    grad_sum = _masked(grad, *ctx.saved_tensors)
    return grad_sum, grad_sum


def _masked(grad: Tensor, output: Tensor) -> Tensor:
    if is_more_than_values(grad):
        return torch.where(output <= 0, 0, grad.to(output.dtype))
    return _add_relu_backward(in_layout_of(grad, output), output)


library.register_autograd("fastres::add_relu_forward", _add_relu_gradient, setup_context=_add_relu_setup)


def _add_relu_backward_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _add_relu_double_gradient(ctx, grad):
    # The mask is a constant: the derivative of a masked product is the same mask again.
    return _masked(grad, *ctx.saved_tensors), None


library.register_autograd(
    "fastres::add_relu_backward", _add_relu_double_gradient, setup_context=_add_relu_backward_setup
)
