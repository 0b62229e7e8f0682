"""A residual block as one autograd node, where the CPU has kernels for all of its convolutions.

The kernels are those of its layers one by one (fastres.convolution). What is spared is what lies between
them: of three or four nodes, each with its decisions, the memory that it keeps and its way through
autograd, there is one; and the gradients of the block's input meet within it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres import cases, choice, convolution, kernels, recompute
from fastres.convolution import Geometry, activation_as_loaded, groups_of, input_as_loaded
from fastres.recording import Record

_forward = torch.ops.fastres.conv_bn_act_forward.default
_backward = torch.ops.fastres.conv_bn_act_backward.default

# A layer's op, of the share of the batch in its running statistics.
Op = Callable[[float], tuple[Tensor, ...]]
# Calls the op of the layer of that number; gives what it gives, and who is told of the layer, if anyone is.
Call = Callable[[int, Op], tuple[tuple[Tensor, ...], Record | None]]


class Layer(NamedTuple):
    """A convolution, without its bias, and the batch norm behind it, in training."""

    conv_weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    geometry: tuple  # stride, padding, dilation, groups, as of F.conv2d
    momentum: float | None  # as of nn.BatchNorm2d
    eps: float

    @property
    def channel_vectors(self) -> tuple[Tensor | None, ...]:
        return self.running_mean, self.running_var, self.weight, self.bias

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        return self.conv_weight, self.weight, self.bias


class Block(NamedTuple):
    """relu(F(x) + shortcut(x)).

    Attributes:
        layers: those of F, two or more, with a ReLU between each and the next; then the projection.
        projected: whether there is a projection; if not, the shortcut is the identity.
    """

    layers: list[Layer]
    projected: bool

    @property
    def last(self) -> int:
        """The number of the last layer of F."""
        return len(self.layers) - 1 - self.projected


# ---------------------------------------------------------------------------------------------------------
# which blocks


_known: dict[tuple, bool] = {}
_MOST_KNOWN = 1024


def fitting(block: Block, input: Tensor) -> tuple[Geometry, ...] | None:
    """The layers' geometries, if our convolutions run all of them on this input and are the faster ones.

    Nobody is to record the layers' ops.
    """
    tensors = [tensor for layer in block.layers for tensor in (layer.conv_weight, *layer.channel_vectors)]
    if cases.is_special(input, *tensors):
        return None
    dtype = convolution.compute_dtype(input)
    if not input.is_cpu or input.dtype != dtype or not kernels.is_channels_last(input):
        return None
    # A layer that is not differentiated keeps nothing, by itself.
    firsts = [block.layers[0], *block.layers[block.last + 1 :]]
    if not input.requires_grad and not all(_learns(layer) for layer in firsts):
        return None
    by = tuple(convolution.geometry_of(*layer.geometry[:3]) for layer in block.layers)
    if None in by:
        return None
    weights = []
    for layer in block.layers:
        weight, vectors = layer.conv_weight, layer.channel_vectors
        if cases.why_pytorch_refuses(*vectors[:2], True, layer.momentum or 0.0, layer.eps) is not None:
            return None
        if cases.why_not_channels(weight.size(0), dtype, input.device, *vectors) is not None:
            return None
        weights.append((weight.shape, weight.dtype, weight.device, layer.geometry[3]))
    kind = input.shape, dtype, input.requires_grad, block.projected, by, *weights, choice.state()
    fits = _known.get(kind)  # which another thread may clear
    if fits is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        fits = _known[kind] = _fits(block, input)
    return by if fits else None


def _learns(layer: Layer) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in layer.learned)


def _fits(block: Block, input: Tensor) -> bool:
    """Asks of each layer, of empty values in the place of those that will flow between them."""
    values, sum = input, None
    for at, layer in enumerate(block.layers):
        source = values if at <= block.last else input
        by = convolution.covered(source, layer.conv_weight, None, *layer.geometry)
        if by is None:
            return False
        size = by.output_size(source, layer.conv_weight)
        values = torch.empty(size, dtype=input.dtype, memory_format=torch.channels_last, requires_grad=True)
        rest = None, layer.channel_vectors, layer.geometry, True, True
        residual = values if at == block.last else None
        if choice.for_ours(source, layer.conv_weight, residual, *rest) is None:
            return False
        sum = residual if at == block.last else sum
    return (values if block.projected else input).shape == sum.shape


# ---------------------------------------------------------------------------------------------------------
# the node


class _Norm(NamedTuple):
    """What a layer's batch norm saves."""

    conv_output: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_node, input, block, by, call, *learned):
        """`learned` are Layer.learned of each layer."""
        norms: dict[int, _Norm] = {}
        records: dict[int, Record | None] = {}

        def run(at: int, values: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
            layer = block.layers[at]

            def op(momentum: float) -> tuple[Tensor, ...]:
                rest = *layer.channel_vectors, *by[at], momentum, layer.eps, relu
                with torch._C._AutoDispatchBelowAutograd():
                    return _forward(values, layer.conv_weight, residual, *rest)

            (output, conv_output, mean, rstd), records[at] = call(at, op)
            # Others than the block itself make the last activation again, or the shortcut's.
            weight = layer.weight if at < block.last else kernels.kept_copy(layer.weight)
            norms[at] = _Norm(conv_output, weight, kernels.kept_copy(layer.bias), mean, rstd)
            return output

        last, values, residual = block.last, input, input
        for at in range(last):
            values = run(at, values, None, relu=True)
        if block.projected:
            residual = run(last + 1, input, None, relu=False)
        output = run(last, values, residual, relu=True)
        ctx.set_materialize_grads(False)
        ctx.last, ctx.projected, ctx.input_node = last, block.projected, input_node
        ctx.by, ctx.eps, ctx.records = by, [layer.eps for layer in block.layers], records
        ctx.biases = [layer.bias for layer in block.layers]
        # The last layer's come first, as recompute.output_of unpacks them; a projection's are at the end.
        conv_output, *rest = norms.pop(last)
        others = [tensor for at in sorted(norms) for tensor in norms[at]]
        begins = 6 + len(others) - len(_Norm._fields)
        projection = slice(begins, begins + len(_Norm._fields)) if block.projected else None
        mask = recompute.keep_for_mask(ctx, output, residual, True, projection)
        weights = [weight for layer in block.layers for weight in (layer.conv_weight, layer.weight)]
        ctx.save_for_backward(conv_output, mask, *rest, *others, input, *weights)
        return output

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        _tell_backward(ctx, ctx.last)
        saved = _Saved.of(ctx, recompute.take(ctx))
        differentiate = _differentiably if convolution.asks_for_torchs_ops(grad) else _by_kernel
        grad_input, *grads = differentiate(ctx, grad, saved)
        return None, grad_input, None, None, None, *grads


recompute.register_node(_ResidualBlock)


class _Saved(NamedTuple):
    """What a node saved: of each layer, in the order of Block.layers, and the block's own."""

    norms: list[_Norm]
    conv_weights: list[Tensor]
    weights: list[Tensor | None]
    output: Tensor
    input: Tensor

    def learned(self) -> list[tuple[Tensor | None, ...]]:
        """Layer.learned of each."""
        biases = [norm.bias for norm in self.norms]
        return list(zip(self.conv_weights, self.weights, biases, strict=True))

    @classmethod
    def of(cls, ctx, saved: tuple) -> _Saved:
        conv_output, output, *rest = saved
        size, layers = len(_Norm._fields), len(ctx.by)
        kept = [conv_output, *rest[: size * layers - 1]]
        norms = [_Norm(*kept[size * i : size * (i + 1)]) for i in range(layers)]
        norms.insert(ctx.last, norms.pop(0))
        input, *weights = rest[size * layers - 1 :]
        return cls(norms, weights[::2], weights[1::2], output, input)


def _tell_backward(ctx, at: int) -> None:
    record = ctx.records[at]
    if record is not None and record.at_backward is not None:
        record.at_backward()


def _by_kernel(ctx, grad: Tensor, saved: _Saved) -> list[Tensor | None]:
    """The gradients of the input and of what was learned."""
    _, needs_input, _, _, _, *needs = ctx.needs_input_grad
    needs = [needs[i : i + 3] for i in range(0, len(needs), 3)]
    last, grads = ctx.last, [(None, None, None)] * len(needs)

    def through(at: int, grad: Tensor, needs_source: bool, add_to: Tensor | None = None):
        """The gradient of what the layer takes, and of what is added to it; its own go into `grads`."""
        _tell_backward(ctx, at)
        (conv_output, *norm), conv_weight = saved.norms[at], saved.conv_weights[at]
        if 0 < at <= last:
            source, before = activation_as_loaded(*saved.norms[at - 1], True, conv_weight)
        else:
            source, before = input_as_loaded(ctx.input_node, saved.input, conv_weight)
        with torch._C._AutoDispatchBelowAutograd():
            grad_source, grad_conv_weight, grad_residual, *of_norm = _backward(
                grad,
                conv_output,
                saved.output if at == last else None,
                *norm,
                at <= last,
                source,
                *before,
                conv_weight,
                *ctx.by[at],
                add_to,
                needs_source,
                needs[at][0],
            )
        grads[at] = grad_conv_weight, *of_norm
        return grad_source if add_to is None else add_to, grad_residual

    # Whether what each layer of the branch takes needs a gradient.
    passes_on = [needs_input]
    for at in range(last):
        passes_on.append(passes_on[at] or any(needs[at]))
    grad, of_shortcut = through(last, kernels.in_layout_of(grad, saved.output), passes_on[last])
    if ctx.projected and (needs_input or any(needs[-1])):
        of_shortcut, _ = through(last + 1, of_shortcut, needs_input)
    for at in reversed(range(last)):
        if passes_on[at + 1]:
            add_to = of_shortcut if at == 0 and needs_input else None
            grad, _ = through(at, grad, passes_on[at], add_to)
    return [
        grad if needs_input else None,
        *(
            gradient.to(tensor.dtype) if needed else None
            for of_layer in zip(grads, saved.learned(), needs, strict=True)
            for gradient, tensor, needed in zip(*of_layer, strict=True)
        ),
    ]


@torch.autocast("cpu", enabled=False)  # the one around may be another than the forward's
def _differentiably(ctx, grad: Tensor, saved: _Saved) -> list[Tensor | None]:
    """The same by PyTorch's ops, for a second derivative."""
    _, needs_input, _, _, _, *needs = ctx.needs_input_grad
    input, last, differentiable = saved.input, ctx.last, torch.is_grad_enabled()
    if ctx.input_node is not None:
        input = convolution.InPlaceOf.apply(input, recompute.output_of(ctx.input_node))
    wanted: list[Tensor] = []

    def alias(tensor: Tensor | None, needed: bool) -> Tensor | None:
        # So that only the block is differentiated, and not what its arguments were made of.
        if not needed:
            return tensor if tensor is None else tensor.detach()
        wanted.append(tensor.view_as(tensor))
        return wanted[-1]

    with torch.enable_grad():
        input = alias(input, needs_input)
        learned, needed = [], iter(needs)
        for (*weights, kept_bias), bias in zip(saved.learned(), ctx.biases, strict=True):
            bias = None if bias is None else convolution.InPlaceOf.apply(bias, kept_bias)
            learned.append([alias(tensor, next(needed)) for tensor in (*weights, bias)])

        def layer(at: int, values: Tensor) -> Tensor:
            conv_weight, *factors = learned[at]
            conv_weight = conv_weight.to(values.dtype)
            groups = groups_of(values, conv_weight)
            output = F.conv2d(values, conv_weight, None, *ctx.by[at], groups)
            return F.batch_norm(output, None, None, *factors, training=True, eps=ctx.eps[at])

        values = input
        for at in range(last):
            values = torch.relu(layer(at, values))
        addends = [layer(last, values)]
        if ctx.projected:
            addends.append(layer(last + 1, input))
        elif needs_input:
            addends.append(input)
        grad = torch.where(saved.output <= 0, 0, grad.to(input.dtype))
        addends = [addend for addend in addends if addend.requires_grad]
        made = torch.autograd.grad(
            addends, wanted, [grad] * len(addends), create_graph=differentiable, allow_unused=True
        )
    made = iter(made)
    grad_input = next(made) if needs_input else None
    return [grad_input, *(next(made) if n else None for n in needs)]


# ---------------------------------------------------------------------------------------------------------
# the call


def residual_block(block: Block, by: tuple[Geometry, ...], call: Call, input: Tensor) -> Tensor:
    """relu(F(input) + shortcut(input)), as one node.

    Args:
        block, input: which fitting() found fit.
        by: what it gave.
        call: runs each layer.
    """
    learned = [tensor for layer in block.layers for tensor in layer.learned]
    rest = block, by, call, *learned
    return recompute.call_without_keeping_values(_ResidualBlock.apply, input, *rest)
