"""Convolution, batch norm, residual addition and ReLU as one autograd node, where the CPU has kernels.

What the batch norm would read and write beside the convolution's own reading and writing is taken in there:
its sums where the convolution's output is stored, its gradient and the activation before where the
convolution's gradients load them.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, library
from torch.nn import functional as F

from fastres import _C, composed, joining, kernels, recompute
from fastres.cases import surely
from fastres.packing import packed

_forward = torch.ops.fastres.conv_forward.default
_backward_weight = torch.ops.fastres.conv_backward_weight.default
_bn_act_forward = torch.ops.fastres.conv_bn_act_forward.default
_bn_act_backward = torch.ops.fastres.conv_bn_act_backward.default
_bn_act_eval = torch.ops.fastres.conv_bn_act_eval.default

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# With fewer channels PyTorch's convolutions are the faster ones, by 1.3 to 2 times at 16, even at 32; but
# not of few values, for which it matters that ours is one call for all that follows it as well.
_LEAST_CHANNELS = 32
# Of images alone, at batch 16 of 224x224, ours takes 23 ms of a step in float32, PyTorch's 65, and
# in bf16 19 for 21; not so the gradient of its weight, which takes 16 and 16, with AVX2 25 and 18. Beside
# that gradient it takes many values to gain; without it ours takes as long at worst.
_MOST_IMAGE_CHANNELS, _MANY_VALUES = 4, 2**22
# With matrix instructions, which want more channels than images have, it is the other way round: of
# the same images ours takes 3.9 ms for the output, PyTorch's 3.2, for the gradient of the weight 4.2 and 8.
_OF_MATRICES = ("avx512_amx", torch.bfloat16)
# A weight that is not kept is packed at each call, which takes as long as some 160 pixels of the output do:
# a forward of ResNet-50 at batch 1 takes 0.86x of the time without convolutions of so few, of ResNet-18
# 0.79x.
_FEWEST_PIXELS_TO_PACK, _MANY_WEIGHTS = 256, 2**16
# In training all are packed, twice. Of several images ours is the faster one all the same, as it is of one
# at stride 2 (1.7 to 1.9 times); but of one at stride 1 it takes 1.04 to 1.7 times as long up to 64 pixels.
_FEWEST_PIXELS_OF_AN_IMAGE = 128
# In training the batch norm of one value is an error, and of a few leaves little but rounding errors; in
# evaluation PyTorch's sums for fewer pixels have half of our rounding errors.
_LEAST_PIXELS = 8


class Geometry(NamedTuple):
    """Of a convolution: two integers each. How many groups there are, input and weight tell together."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def output_size(self, input: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        # Without a loop: this is asked at every call.
        batch, _, height, width = input.shape
        channels, _, kernel_h, kernel_w = weight.shape
        (stride_h, stride_w), (padding_h, padding_w), (dilation_h, dilation_w) = self
        height = (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
        width = (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
        return batch, channels, height, width


def groups_of(input: Tensor, weight: Tensor) -> int:
    return input.size(1) // max(1, weight.size(1))


@kernels.constant_when_compiled
def _has_kernels(dtype: torch.dtype, in_channels: int, out_channels: int, groups: int) -> bool:
    return _C.convolves(_DTYPES[dtype], in_channels, out_channels, groups)


@kernels.constant_when_compiled
def _is_of_matrices(dtype: torch.dtype) -> bool:
    return (_C.cpu_isa(), dtype) == _OF_MATRICES


def compute_dtype(input: Tensor) -> torch.dtype:
    """What F.conv2d would compute in now."""
    casts = torch.is_autocast_enabled("cpu") and input.is_floating_point() and input.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if casts else input.dtype


def covered(
    input: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
) -> Geometry | None:
    """The geometry, if the kernels run this convolution."""
    if input.device.type != "cpu" or weight.device.type != "cpu":
        return None
    if input.dim() != 4 or weight.dim() != 4:
        return None
    by, dtype = geometry_of(stride, padding, dilation), compute_dtype(input)
    if by is None:
        return None
    if not kernels.is_channels_last(input) or input.size(1) != groups * weight.size(1):
        return None
    channels = (input.size(1), weight.size(0))
    if dtype not in _DTYPES or not _has_kernels(dtype, *channels, groups):
        return None
    same_dtype = input.dtype == weight.dtype == dtype
    if not (same_dtype or (torch.is_autocast_enabled("cpu") and weight.dtype in (dtype, torch.float32))):
        return None
    batch, channels, height, width = by.output_size(input, weight)
    no_kernel = surely(0 in weight.shape[2:])  # which F.conv2d refuses
    if no_kernel or surely(height < 1) or surely(batch * height * width < _LEAST_PIXELS):
        return None
    fits = residual is None or (
        residual.shape == (batch, channels, height, width)
        and residual.dtype == dtype
        and residual.device == input.device
        and kernels.is_channels_last(residual)
    )
    return by if fits else None


def expected_faster(by: Geometry, input: Tensor, weight: Tensor, needs_grad: bool) -> bool:
    """Whether our convolution is as a rule faster than PyTorch's."""
    batch, channels, height, width = by.output_size(input, weight)
    if needs_grad and by.stride == (1, 1):
        if surely(batch == 1) and surely(height * width < _FEWEST_PIXELS_OF_AN_IMAGE):
            return False
    values, in_channels = batch * channels * height * width, input.size(1)
    if min(channels, in_channels) >= _LEAST_CHANNELS or surely(values <= kernels.few_values):
        return True
    return _is_of_images(input, weight) and not needs_grad


def pays_packing(by: Geometry, input: Tensor, weight: Tensor) -> bool:
    """Whether ours may be the faster one in evaluation where the weight is packed for this call alone."""
    if weight.numel() < _MANY_WEIGHTS:
        return True
    batch, _, height, width = by.output_size(input, weight)
    return batch * height * width >= _FEWEST_PIXELS_TO_PACK


def _is_of_images(input: Tensor, weight: Tensor) -> bool:
    return input.size(1) <= _MOST_IMAGE_CHANNELS and weight.size(0) >= _LEAST_CHANNELS


def geometry_of(stride, padding, dilation) -> Geometry | None:
    """None where the padding is a name, or where F.conv2d would take offence."""
    pairs = [pair(value, least) for value, least in ((stride, 1), (padding, 0), (dilation, 1))]
    return None if None in pairs else Geometry(*pairs)


def pair(value, least: int) -> tuple[int, int] | None:
    """Of an argument that takes one integer or two, of at least `least`; None if it is not that."""
    if type(value) is tuple and len(value) == 2:  # nn.Conv2d's own, at every call
        first, second = value
        fit = type(first) is int and type(second) is int and first >= least and second >= least
        return value if fit else None
    values = (value,) if type(value) is int else tuple(value) if isinstance(value, (tuple, list)) else ()
    values = values * 2 if len(values) == 1 else values
    fit = len(values) == 2 and all(type(v) is int and v >= least for v in values)
    return values if fit else None


def conv_bn_act_eval(
    input: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride,
    padding,
    dilation,
    eps: float,
    relu: bool,
    pool: Sequence[int] | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(input)) [+ residual]) by running statistics, without a gradient.

    Or the maximum over windows of that, where there is a `pool`, which is what MaxPool.of_size() gives.
    """
    kept = packed(weight, input, tuple(stride), tuple(dilation), groups_of(input, weight))
    rest = (conv_bias, residual, running_mean, running_var, bn_weight, bn_bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _bn_act_eval(input, weight, kept, *rest, stride, padding, dilation, eps, relu, pool)


# As an op too: whether a weight is kept packed is found out when a compiled graph runs.
kernels.fragment.define(
    "conv_bn_act_infer(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? residual, "
    "Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, float eps, bool relu, SymInt[]? pool=None) -> Tensor"
)
kernels.fragment.impl("conv_bn_act_infer", conv_bn_act_eval, "CPU")


@library.register_fake("fastres::conv_bn_act_infer")
def _(input, conv_weight, conv_bias, residual, mean, var, weight, bias, *rest):
    return _empty_evaluation(input, conv_weight, *rest)


@library.register_fake("fastres::conv_forward")
def _(input, weight, bias, residual, stride, padding, dilation, relu):
    return _empty_output(input, weight, stride, padding, dilation)


@library.register_fake("fastres::conv_bn_act_eval")
def _(input, conv_weight, packed, conv_bias, residual, running_mean, running_var, weight, bias, *rest):
    return _empty_evaluation(input, conv_weight, *rest)


@library.register_fake("fastres::conv_bn_act_sequence")
def _(inputs, tensors, steps, eps, outputs, timed=False):
    values = list(inputs)
    for i in range(len(eps)):
        source, _, *by = steps[9 * i : 9 * i + 8]
        pairs = zip(by[::2], by[1::2], strict=True)
        values.append(_empty_output(values[source], tensors[7 * i], *pairs))
    times = [inputs[0].new_empty(len(eps) + 2, dtype=torch.float64)] if timed else []
    return [values[output] for output in outputs] + times


@library.register_fake("fastres::conv_backward_input")
def _(grad, weight, input_size, stride, padding, dilation):
    return _empty(grad, input_size)


@library.register_fake("fastres::conv_backward_weight")
def _(grad, input, weight, stride, padding, dilation):
    return torch.empty_like(weight)


@library.register_fake("fastres::conv_bn_act_forward")
def _(input, conv_weight, residual, running_mean, running_var, weight, bias, *rest):
    stride, padding, dilation, _momentum, _eps, _relu = rest
    output = _empty_output(input, conv_weight, stride, padding, dilation)
    mean = input.new_empty(conv_weight.size(0), dtype=torch.float64)
    return output, torch.empty_like(output), mean, torch.empty_like(mean)


@library.register_fake("fastres::conv_bn_act_backward")
def _(grad, conv_output, output, weight, bias, save_mean, save_rstd, relu, input, *rest):
    *_, conv_weight, _stride, _padding, _dilation, add_to, needs_input, needs_conv_weight = rest
    grad_weight = conv_output.new_empty(conv_output.size(1), dtype=torch.float32)
    return (
        torch.empty_like(input) if needs_input and add_to is None else input.new_empty(0),
        torch.empty_like(conv_weight) if needs_conv_weight else input.new_empty(0),
        input.new_empty(0) if output is None else torch.empty_like(conv_output),
        grad_weight,
        torch.empty_like(grad_weight),
    )


def _empty_evaluation(input, weight, stride, padding, dilation, eps, relu, pool=None) -> Tensor:
    if pool:
        return _empty(input, (input.size(0), weight.size(0), *pool[:2]))
    return _empty_output(input, weight, stride, padding, dilation)


def _empty_output(input: Tensor, weight: Tensor, *by) -> Tensor:
    return _empty(input, Geometry(*by).output_size(input, weight))


def _empty(like: Tensor, size) -> Tensor:
    return like.new_empty(size).to(memory_format=torch.channels_last)


def asks_for_torchs_ops(grad: Tensor) -> bool:
    """Whether this gradient may be differentiated again, or is more than its values."""
    return torch.is_grad_enabled() or kernels.is_more_than_values(grad)


class _Conv2d(torch.autograd.Function):
    """Our output and PyTorch's gradients; or with matrix instructions ours of the weight, and no more."""

    @staticmethod
    def forward(ctx, input, weight, *by):
        ctx.by = by
        ctx.save_for_backward(input, weight)
        with torch._C._AutoDispatchBelowAutograd():
            if _is_of_matrices(input.dtype):
                return F.conv2d(input, weight, None, *by)
            return _forward(input, weight, None, None, *by, False)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        grad_input = grad_weight = None
        if needs_weight and _is_of_matrices(input.dtype) and not asks_for_torchs_ops(grad):
            grad = grad.to(input.dtype).contiguous(memory_format=torch.channels_last)
            grad_weight, needs_weight = _backward_weight(grad, input, weight, *ctx.by), False
        if needs_input or needs_weight:
            grad_input, theirs, _ = torch.ops.aten.convolution_backward(
                grad, input, weight, None, *ctx.by, False, [0, 0], 1, [needs_input, needs_weight, False]
            )
            grad_weight = theirs if needs_weight else grad_weight
        return grad_input, grad_weight, None, None, None


def of_images(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> Tensor | None:
    """F.conv2d where our convolution is the faster one in one direction, but not in both; else None."""
    if input.dim() != 4 or not _is_of_images(input, weight) or bias is not None:
        return None
    by, dtype = covered(input, weight, None, *geometry), compute_dtype(input)
    if by is None or math.prod(by.output_size(input, weight)) < _MANY_VALUES:
        return None
    return _Conv2d.apply(input.to(dtype), weight.to(dtype), *by)


class _ConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_node, input, conv_weight, residual, running_mean, running_var, *rest):
        weight, bias, *rest, others = rest
        *by, momentum, eps, relu = rest
        with torch._C._AutoDispatchBelowAutograd():
            output, *others[:] = _bn_act_forward(
                input, conv_weight, residual, running_mean, running_var, weight, bias, *rest
            )
        conv_output, mean, rstd = others
        ctx.set_materialize_grads(False)
        ctx.by, ctx.input_node, ctx.meetings = by, input_node, {}
        joins = relu and residual is not None
        ctx.meet = joining.nodes_that_meet(_ConvBnAct._backward_cls, input, residual) if joins else ()
        kept = recompute.keep_for_mask(ctx, output, residual, relu)
        vectors = kernels.kept_copy(weight), kernels.kept_copy(bias), mean, rstd
        ctx.save_for_backward(conv_output, kept, *vectors, input, conv_weight, weight)
        return output

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, joining.leave(ctx, joining.waiting_for(ctx)), *(None,) * 13
        conv_output, output, _, bias, *saved, weight = recompute.take(ctx)
        saved = conv_output, output, weight, bias, *saved
        differentiate = _differentiably if asks_for_torchs_ops(grad) else _by_kernel
        grad_input, grad_conv_weight, grad_residual, grad_weight, grad_bias = differentiate(
            ctx, grad, *saved
        )
        _, needs_input, needs_conv_weight, needs_residual, _, _, needs_weight, needs_bias, *_ = (
            ctx.needs_input_grad
        )
        return (
            None,
            grad_input if needs_input else None,
            grad_conv_weight if needs_conv_weight else None,
            grad_residual if needs_residual else None,
            None,
            None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
            *(None,) * 7,
        )


def input_as_loaded(node, input: Tensor, conv_weight: Tensor) -> tuple[Tensor, tuple]:
    """What the convolution's gradients load for its input, which `node` makes again where there is one.

    Returns:
        A tensor, and the batch norm and ReLU that the input is made of it by as it is loaded: weight, bias,
        mean, rstd and whether there is a ReLU.
    """
    if node is None:
        return input, _AS_IT_IS
    if node.has_residual:
        return recompute.output_of(node), _AS_IT_IS
    conv_output, _, *norm = recompute.unpack(node)[:6]
    return activation_as_loaded(conv_output, *norm, node.relu, conv_weight)


_AS_IT_IS = (None, None, None, None, False)


def activation_as_loaded(values: Tensor, weight, bias, mean, rstd, relu: bool, conv_weight: Tensor):
    """input_as_loaded of an input that is act(batch_norm(values))."""
    # A wide kernel loads each value several times. In float32 making it once is then the faster way: a
    # step of ResNet-50 takes 0.95x the time, in bf16 1.03x.
    if values.dtype == torch.float32 and conv_weight.size(3) > 1:
        with torch._C._AutoDispatchBelowAutograd():
            return recompute.bn_act_again(values, None, weight, bias, mean, rstd, relu), _AS_IT_IS
    return values, (weight, bias, mean, rstd, relu)


def _by_kernel(ctx, grad, conv_output, output, weight, bias, mean, rstd, input, conv_weight):
    input, before = input_as_loaded(ctx.input_node, input, conv_weight)
    grad = kernels.in_layout_of(grad, conv_output)
    add_to, needs_input = joining.waiting_for(ctx), ctx.needs_input_grad[1]
    with torch._C._AutoDispatchBelowAutograd():
        grad_input, grad_conv_weight, grad_residual, *grad_norm = _bn_act_backward(
            grad,
            conv_output,
            output,
            weight,
            bias,
            mean,
            rstd,
            ctx.relu,
            input,
            *before,
            conv_weight,
            *ctx.by,
            add_to,
            needs_input,
            ctx.needs_input_grad[2],
        )
    grad_input = grad_input if add_to is None else add_to
    grad_input = joining.leave(ctx, grad_input if needs_input else None)
    grad_residual = grad if output is None else grad_residual
    grad_residual = joining.arrange(ctx.meet, grad_residual if ctx.needs_input_grad[3] else None)
    return grad_input, grad_conv_weight, grad_residual, *grad_norm


@torch.autocast("cpu", enabled=False)  # the one around may be another than the forward's
def _differentiably(ctx, grad, conv_output, output, weight, bias, mean, rstd, input, conv_weight):
    """The same by PyTorch's ops, for a second derivative; what has been waiting for it is added by them."""
    add_to = joining.waiting_for(ctx)
    joining.leave(ctx, None)
    if ctx.input_node is not None:
        input = InPlaceOf.apply(input, recompute.output_of(ctx.input_node))
    cast_weight = conv_weight.to(input.dtype)
    groups = groups_of(input, cast_weight)
    conv_output = F.conv2d(input, cast_weight, None, *ctx.by, groups)
    grad_conv_output, grad_residual, *grad_norm = composed.bn_act_backward(
        grad.to(conv_output.dtype), conv_output, output, weight, bias, mean, rstd, True, ctx.relu
    )
    grad_input, grad_conv_weight, _ = torch.ops.aten.convolution_backward(
        grad_conv_output, input, cast_weight, None, *ctx.by, False, [0, 0], groups, [True, True, False]
    )
    grad_input = grad_input if add_to is None else grad_input + add_to
    grad_residual = grad if output is None else grad_residual
    return grad_input, grad_conv_weight.to(conv_weight.dtype), grad_residual, *grad_norm


class InPlaceOf(torch.autograd.Function):
    """`values`, with the place that `stand_in` has in the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stand_in, values):
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


recompute.register_node(_ConvBnAct)


def conv_bn_act(
    input_node, input, conv_weight, residual, running_mean, running_var, weight, bias, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """act(batch_norm(conv2d(input)) [+ residual]) in training.

    Args:
        input_node: bn_act's or conv_bn_act's autograd node whose output `input` is and which makes it again
            in the backward pass; None: `input` is kept.
        rest: stride, padding, dilation, momentum, eps, relu.

    Returns:
        That; and conv2d(input), its mean and 1 / its standard deviation, which are not differentiable.
    """
    arguments = (input, conv_weight, residual, running_mean, running_var, weight, bias, *rest)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, conv_weight, residual, weight, bias):
        others: list[Tensor] = []
        return _ConvBnAct.apply(input_node, *arguments, others), *others
    with torch._C._AutoDispatchBelowAutograd():
        return _bn_act_forward(*arguments)


# By hand, as fastres::bn_act_forward is.
kernels.fragment.impl(
    "conv_bn_act_forward", functools.partial(recompute.call_without_keeping_values, conv_bn_act), "Autograd"
)
