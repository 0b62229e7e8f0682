"""Fused batch normalisation, ReLU and residual addition, as functions and as `torch.ops.fastres.*`.

Two floors. The kernel ops (`bn_act_forward`, `bn_act_backward`, `add_relu_forward`, `add_relu_backward`) are compiled;
here they get their fake kernels and their derivatives. The public functions (`batch_norm`, `bn_relu`,
`bn_add_relu`, `add_relu`, `conv_bn_relu`) call them wherever they cover the case, and the same composition of
torch.nn.functional wherever they do not: mixed dtypes, strided memory, other devices, tensor subclasses,
torch.func transforms, forward-mode AD. The public functions are registered as ops too, as compositions of the
kernel ops, so torch.compile sees one node for each.
"""

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastres import _C, composed

__all__ = ["add_relu", "batch_norm", "bn_add_relu", "bn_relu", "conv_bn_relu"]

_CUDA = bool(_C.build_info()["cuda"])
_kernels = torch.ops.fastres
_library = torch.library.Library("fastres", "FRAGMENT")

# ---------------------------------------------------------------------------------------------------------
# kernel ops: fake kernels and derivatives


@torch.library.register_fake("fastres::bn_act_forward")
def _(input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu):
    channels = input.size(1)
    saved = input.new_empty(2, channels, dtype=_accumulation_dtype(input.dtype))
    return torch.empty_like(input), saved[0].clone(), saved[1].clone()


@torch.library.register_fake("fastres::bn_act_backward")
def _(grad, input, output, weight, bias, save_mean, save_rstd, training, relu):
    grad_residual = input.new_empty(0) if output is None else torch.empty_like(input)
    return torch.empty_like(input), grad_residual, torch.empty_like(save_mean), torch.empty_like(save_mean)


@torch.library.register_fake("fastres::add_relu_forward")
def _(input, other):
    return torch.empty_like(input)


@torch.library.register_fake("fastres::add_relu_backward")
def _(grad, output):
    return torch.empty_like(output)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_layout_of(grad: Tensor, input: Tensor) -> Tensor:
    """`grad` in the dtype and memory layout of `input`, which is how the kernels take it."""
    if grad.dtype == input.dtype and _same_layout(grad, input):
        return grad
    return torch.empty_like(input).copy_(grad)


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, keyset, input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
    ):
        with torch._C._AutoDispatchBelowAutograd():
            output, mean, rstd = _kernels.bn_act_forward.default.redispatch(
                keyset & torch._C._after_autograd_keyset,
                input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        # The mask of an output with a residual cannot be recomputed from input; the output itself is at hand, as
        # it is what the next layer keeps.
        needs_output = relu and residual is not None
        ctx.save_for_backward(input, output if needs_output else None, weight, bias, mean, rstd)
        ctx.training, ctx.relu, ctx.has_residual = training, relu, residual is not None
        return output, mean, rstd

    @staticmethod
    def backward(ctx, grad, _mean, _rstd):
        if grad is None:
            return (None,) * 11
        input, output, weight, bias, mean, rstd = ctx.saved_tensors
        grad = _in_layout_of(grad, input)
        grad_input, grad_residual, grad_weight, grad_bias = _kernels.bn_act_backward(
            grad, input, output, weight, bias, mean, rstd, ctx.training, ctx.relu
        )
        needs = ctx.needs_input_grad
        if ctx.has_residual and output is None:
            grad_residual = grad
        return (
            None,
            grad_input if needs[1] else None,
            grad_residual if needs[2] else None,
            None,
            None,
            grad_weight.to(weight.dtype) if needs[5] else None,
            grad_bias.to(bias.dtype) if needs[6] else None,
            *(None,) * 4,
        )


def _bn_act_autograd(
    keyset, input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
):
    if training:
        # What autograd checks when a saved tensor was changed in place afterwards.
        torch.autograd.graph.increment_version([t for t in (running_mean, running_var) if t is not None])
    tensors = (input, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _BnAct.apply(
            keyset, input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _kernels.bn_act_forward.default.redispatch(
            keyset & torch._C._after_autograd_keyset,
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu,
        )  # fmt: skip


# By hand and not by torch.library.register_autograd, which refuses ops that update an argument in place.
_library.impl("bn_act_forward", _bn_act_autograd, "Autograd", with_keyset=True)


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


torch.library.register_autograd(
    "fastres::bn_act_backward", _bn_act_backward_backward, setup_context=_bn_act_backward_setup
)


def _add_relu_setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _add_relu_gradient(ctx, grad):
    (output,) = ctx.saved_tensors
    grad_sum = _kernels.add_relu_backward(_in_layout_of(grad, output), output)
    return grad_sum, grad_sum


torch.library.register_autograd(
    "fastres::add_relu_forward", _add_relu_gradient, setup_context=_add_relu_setup
)


def _add_relu_backward_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _add_relu_double_gradient(ctx, grad):
    # The mask is a constant: the derivative of a masked product is the same mask again.
    (output,) = ctx.saved_tensors
    return _kernels.add_relu_backward(_in_layout_of(grad, output), output), None


torch.library.register_autograd(
    "fastres::add_relu_backward", _add_relu_double_gradient, setup_context=_add_relu_backward_setup
)

# ---------------------------------------------------------------------------------------------------------
# which cases the kernels cover

_ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def _same_layout(tensor: Tensor, input: Tensor) -> bool:
    return (tensor.is_contiguous() and input.is_contiguous()) or (
        _is_channels_last(tensor) and _is_channels_last(input)
    )


def _is_special(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether only PyTorch's own operations know what to do with these: subclasses, torch.func, forward-mode AD."""
    if torch.compiler.is_dynamo_compiling():
        return False
    if peek_interpreter_stack() is not None or has_torch_function(tensors):
        return True
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return True
    return any(
        type(t) is not Tensor and t is not None and is_traceable_wrapper_subclass(t) for t in tensors
    )


def _covers_activation(input: Tensor) -> bool:
    device = input.device.type
    if not (device == "cpu" or (device == "cuda" and _CUDA)):
        return False
    return (
        input.dtype in _ACTIVATION_DTYPES
        and (device == "cpu" or input.dtype != torch.float64)
        and input.layout == torch.strided
        and 2 <= input.dim() <= 5
        and input.numel() > 0
        and (input.is_contiguous() or _is_channels_last(input))
    )


def _covers_channels(vector: Tensor | None, input: Tensor) -> bool:
    return vector is None or (
        vector.dim() == 1
        and vector.size(0) == input.size(1)
        and vector.device == input.device
        and (vector.dtype == input.dtype or vector.dtype == _accumulation_dtype(input.dtype))
        and vector.is_contiguous()
    )


def _covers_residual(residual: Tensor, input: Tensor) -> bool:
    return (
        residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device
    )


def _check_residual(op: str, argument: str, residual: Tensor, input: Tensor) -> None:
    try:
        matches = torch.broadcast_shapes(residual.shape, input.shape) == input.shape
    except RuntimeError:
        matches = False
    if not matches:
        raise ValueError(
            f"fastres::{op}: {argument} has shape {list(residual.shape)}, expected {list(input.shape)} "
            "(the shape of input) or one that broadcasts to it"
        )


def _bn_act(
    op, input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
) -> Tensor:
    if residual is not None:
        _check_residual(op, "residual", residual, input)
    covered = (
        not _is_special((input, residual, running_mean, running_var, weight, bias))
        and _covers_activation(input)
        and (residual is None or _covers_residual(residual, input))
        and _covers_channels(running_mean, input)
        and _covers_channels(running_var, input)
        and _covers_channels(weight, input)
        and _covers_channels(bias, input)
        and (
            input.numel() > input.size(1)
            if training
            else running_mean is not None and running_var is not None
        )
        and isinstance(momentum, (int, float))
    )
    if not covered:
        return composed.bn_act(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
    if residual is not None and not _same_layout(residual, input):
        residual = torch.empty_like(input).copy_(residual)
    return _kernels.bn_act_forward(
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
    )[0]


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
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, bfloat16, float16 or, on the CPU,
            float64; channels_last and contiguous memory run as they are.
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
        Tensor of input's shape and memory layout.

    Raises:
        ValueError: residual does not broadcast to input's shape; as of :func:`bn_relu`.

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
    if (
        not _is_special((input, other))
        and _covers_activation(input)
        and _covers_residual(other, input)
        and _same_layout(other, input)
    ):
        return _kernels.add_relu_forward(input, other)
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

    The convolution is PyTorch's, so autocast casts it; what follows is fused. In evaluation, where no gradient is
    asked for, the normalisation is folded into the convolution's weights.

    Args:
        input: (N, C_in, H, W).
        weight, conv_bias, stride, padding, dilation, groups: as of torch.nn.functional.conv2d.
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
    relu = activation == "relu"
    if not training and running_mean is not None and running_var is not None:
        learned = (input, weight, conv_bias, bn_weight, bn_bias, residual)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)):
            folded_weight, folded_bias = composed.fold_batch_norm(
                weight, conv_bias, running_mean, running_var, bn_weight, bn_bias, eps
            )
            output = F.conv2d(input, folded_weight, folded_bias, stride, padding, dilation, groups)
            if residual is not None:
                _check_residual("conv_bn_relu", "residual", residual, output)
                return add_relu(output, residual) if relu else output + residual
            return output.relu_() if relu else output
    output = F.conv2d(input, weight, conv_bias, stride, padding, dilation, groups)
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
    )


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
    conv_bn_relu: f"Tensor input, Tensor weight, {_STATISTICS}, {_FACTORS.format('bn_')}, *, Tensor? residual=None, "
    f'Tensor? conv_bias=None, {_CONV}, {_NORM}, str? activation="relu"',
}.items():
    _library.define(f"{_function.__name__}({_arguments}) -> Tensor")
    _library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
