"""What the convolution kernels do while they load and store: epilogues, statistics, prologues."""

import math

import pytest
import torch
from convolving import EPILOGUE_SHAPES, KERNELS, UNIT_ROUNDOFF, Reference, Shape, poisoned, references
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")  # small tasks take longer on two of a busy machine


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_epilogue_equals_its_parts(unit, bias, residual, relu, way):
    for shape in EPILOGUE_SHAPES:
        input, weight, other = shape.tensors(unit)
        vector = torch.randn(shape.out_channels) if bias else None
        with poisoned():
            output = KERNELS.conv_forward(
                input, weight, vector, other if residual else None, *shape.by, relu
            )
        # All in float32 and rounded once: for float32 that is the composition to the bit.
        exact = references(shape, unit)[0]
        products = exact.value
        if unit == torch.float32:
            products = KERNELS.conv_forward(input, weight, None, None, *shape.by, False)
        parts = products if vector is None else products + vector.view(-1, 1, 1)
        parts = parts + other if residual else parts
        parts = F.relu(parts) if relu else parts
        if unit == torch.float32:
            assert torch.equal(output, parts), shape
            continue
        magnitude = exact.magnitude + (0 if vector is None else vector.view(-1, 1, 1).abs())
        magnitude = magnitude + other.abs() if residual else magnitude
        bound = Reference(parts, magnitude, 0, 0).bound(shape.terms[0] + 2, unit)
        assert ((output.double() - parts).abs() <= bound).all(), shape


@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "far_from_zero"])
def test_statistics_of_the_output(unit, threads, mean, way):
    """Those of what was stored, summed about a value of the box: the spread counts, not the mean."""
    for shape in [
        Shape(2, 16, 65, (9, 7), (1, 1)),
        Shape(2, 130, 64, (12, 21), (1, 1)),
        Shape(5, 16, 16, (21, 21), (3, 3), (2, 2)),
        Shape(1, 16, 70, (2, 300), (1, 3)),
        *([] if mean else way.some(6 * threads)),
    ]:
        if shape.terms[2] < 2:
            continue
        input, weight, _ = shape.tensors(unit)
        if mean:  # of an output that hardly varies
            input, weight = 1 + input / 1024, weight + mean / shape.terms[0]
        _, conv_output, save_mean, save_rstd = KERNELS.conv_bn_act_forward(
            input, weight, None, None, None, None, None, *shape.by, 0.1, 1e-5, False
        )
        assert torch.equal(conv_output, KERNELS.conv_forward(input, weight, None, None, *shape.by, False))
        exact = conv_output.double()
        # Of the values about the first, which is taken before it is rounded.
        spread = exact.amax((0, 2, 3)) - exact.amin((0, 2, 3))
        spread += torch.finfo(unit).eps * exact.abs().amax((0, 2, 3))
        # Higham 2002, (3.5), of the sums of a box, which are merged in double.
        relative = UNIT_ROUNDOFF * (min(shape.terms[2], way.most_pixels_of_a_box) + 1)
        error = (save_mean - exact.mean((0, 2, 3))).abs()
        assert (error <= relative * spread).all(), shape
        error = (save_rstd.pow(-2) - 1e-5 - exact.var((0, 2, 3), unbiased=False)).abs()
        assert (error <= 3 * relative * spread.square() + 1e-15).all(), shape


def test_the_activation_before_is_made_in_the_loads(unit, threads, way):
    """As where it is read from memory, to the bit."""
    for shape in way.some(7 * threads):
        if shape.terms[2] < 2 or shape.batch * math.prod(shape.image) < 2:
            continue
        before, conv_weight, grad = shape.tensors(unit)
        vectors = [torch.rand(shape.in_channels) + 0.5, torch.randn(shape.in_channels)]
        for relu in (False, True):
            input, mean, rstd = KERNELS.bn_act_forward(
                before, None, None, None, *vectors, True, 0.1, 1e-5, relu
            )
            _, conv_output, *norm = KERNELS.conv_bn_act_forward(
                input, conv_weight, None, None, None, None, None, *shape.by, 0.1, 1e-5, True
            )
            front = (grad, conv_output, None, None, None, *norm, True)
            back = (conv_weight, *shape.by, None, True, True)
            read = KERNELS.conv_bn_act_backward(*front, input, None, None, None, None, False, *back)
            made = KERNELS.conv_bn_act_backward(*front, before, *vectors, mean, rstd, relu, *back)
            for a, b in zip(read, made, strict=True):
                assert torch.equal(a, b), shape


def test_the_gradient_of_the_input_is_added_to_another(unit, threads, way):
    """In the store, rounded once: for float32 that is the sum of both to the bit."""
    for shape in [*way.some(8 * threads), Shape(2, 16, 20, (9, 8), (1, 1), (2, 2))]:
        if shape.terms[2] < 2 or shape.batch * math.prod(shape.image) < 2:
            continue
        input, conv_weight, grad = shape.tensors(unit)
        _, conv_output, *norm = KERNELS.conv_bn_act_forward(
            input, conv_weight, None, None, None, None, None, *shape.by, 0.1, 1e-5, True
        )
        other = torch.randn_like(input)
        front = (grad, conv_output, None, None, None, *norm, True, input, None, None, None, None, False)
        alone, *others = KERNELS.conv_bn_act_backward(*front, conv_weight, *shape.by, None, True, True)
        total = other.clone()
        nothing, *same = KERNELS.conv_bn_act_backward(*front, conv_weight, *shape.by, total, True, True)
        assert nothing.numel() == 0
        for a, b in zip(others, same, strict=True):
            assert torch.equal(a, b), shape
        if unit == torch.float32:
            assert torch.equal(total, alone + other), shape
        exact, roundoff = alone.double() + other.double(), torch.finfo(unit).eps / 2
        bound = roundoff * (exact.abs() + 1.01 * alone.double().abs()) * 1.01
        assert ((total.double() - exact).abs() <= bound).all(), shape
