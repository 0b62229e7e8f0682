"""The convolution kernels against float64: outputs and gradients."""

import pytest
import torch
from accuracy import FACTOR, rms
from convolving import (
    EPILOGUE_SHAPES,
    KERNELS,
    NAMES,
    SHAPES,
    UNIT_ROUNDOFF,
    Shape,
    failures,
    ours,
    plain_sum_error,
    poisoned,
    resnet50,
    stock,
)
from layers import channels_last
from torch.nn import functional as F

from fastres import _C

pytestmark = pytest.mark.usefixtures("one_thread")  # small tasks take longer on two of a busy machine


LAYOUTS = torch.contiguous_format, torch.channels_last


def test_any_shape(unit, threads, way):
    """In each layout of the weight."""
    found = []
    for index, shape in enumerate(way.some(1 if threads == 1 else 3)):
        input, weight, grad = shape.tensors(unit)
        for layout in LAYOUTS if threads == 1 else LAYOUTS[index % 2 :][:1]:
            with poisoned():
                values = ours(input, weight.contiguous(memory_format=layout), grad, shape)
            assert all(v.is_contiguous(memory_format=torch.channels_last) for v in values[:2])
            assert values[2].is_contiguous(memory_format=layout)
            found += failures(values, shape, unit, least_error=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "shape", resnet50(64), ids=lambda s: f"{s.in_channels}-{s.out_channels}-{s.kernel[0]}-{s.stride[0]}"
)
def test_resnet_is_as_accurate_as_stock(unit, shape):
    found = failures(ours(*shape.tensors(unit), shape), shape, unit, least_error=False)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "shape", resnet50(112), ids=lambda s: f"{s.in_channels}-{s.out_channels}-{s.kernel[0]}-{s.stride[0]}"
)
def test_larger_images_are_as_accurate_as_stock(shape):
    found = failures(ours(*shape.tensors(torch.float32), shape), shape, torch.float32, least_error=False)
    assert not found, "\n".join(found)


def test_a_large_output_is_that_of_its_parts(unit):
    """It is written past the caches, from 32 MiB on at the latest; parts of 2 MiB are not."""
    shape = Shape(1, 8, 64, (512, 520), kernel=(1, 1))
    input, weight, _ = shape.tensors(unit)
    residual = channels_last(torch.randn(1, 64, 512, 520).to(unit))
    rows = [slice(begin, begin + 16) for begin in range(0, 512, 16)]
    with poisoned():
        for given in (None, residual):
            whole = KERNELS.conv_forward(input, weight, None, given, *shape.by, True)
            for part in rows:
                added = None if given is None else channels_last(given[:, :, part])
                values = channels_last(input[:, :, part])
                assert torch.equal(
                    whole[:, :, part], KERNELS.conv_forward(values, weight, None, added, *shape.by, True)
                )


@pytest.mark.parametrize("kernel, channels", [(3, 48), (5, 48), (7, 32)])
def test_gradients_by_many_taps_are_as_accurate_as_stock(kernel, channels):
    """Of a stride: each of their sums has taps times channels terms, too few for long ones to be usual."""
    size, padding = (kernel, kernel), (kernel // 2, kernel // 2)
    shape = Shape(4, 64, channels, (32, 32), size, (2, 2), padding)
    found = failures(ours(*shape.tensors(torch.float32), shape), shape, torch.float32, least_error=False)
    assert not found, "\n".join(found)


OF_IMAGES = [
    Shape(2, 3, 64, (37, 42), (7, 7), (2, 2), (3, 3)),
    Shape(5, 1, 20, (9, 40), (3, 3), (1, 1), (1, 1)),
    Shape(1, 4, 130, (21, 18), (5, 2), (1, 3), (2, 0)),
    Shape(3, 2, 33, (4, 3), (3, 5), (1, 2), (4, 7)),  # padding wider than the image
    Shape(2, 4, 16, (12, 50), (1, 33), (1, 1), (0, 5)),  # 132 channels as one pixel
    Shape(2, 3, 48, (20, 30), (3, 4), (2, 1), (1, 2), dilation=(2, 1)),
]


@pytest.mark.parametrize("shape", OF_IMAGES, ids=str)
def test_few_channels(unit, shape):
    """In channels_last memory, the gradient of the weight takes a row of the kernel as one pixel."""
    input, weight, grad = shape.tensors(unit)
    with poisoned():
        values = ours(input, channels_last(weight), grad, shape)
    found = failures(values, shape, unit, least_error=True)
    assert not found, "\n".join(found)


def test_few_channels_beside_others_that_are_not_finite(unit):
    """What lies beside an image in memory takes no part."""
    shape = OF_IMAGES[0]
    input, weight, grad = shape.tensors(unit)
    around = torch.full((input.numel() + 512,), torch.nan, dtype=unit)
    inside = around[256:-256].view(input.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    inside.copy_(input)
    expected = ours(input, channels_last(weight), grad, shape)
    for value, other in zip(ours(inside, channels_last(weight), grad, shape), expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize(
    "make", [lambda w: w.transpose(2, 3), lambda w: w.flip(0)[::2], lambda w: w[:1].expand(6, 5, 3, 3)]
)
def test_weights_anywhere_in_memory(unit, make):
    weight = make(torch.randn(6, 5, 3, 3).to(unit))
    shape = Shape(2, 5, len(weight), (6, 7), (3, 3), (2, 1), (1, 1))
    input, _, grad = shape.tensors(unit)
    for strided, dense in zip(
        ours(input, weight, grad, shape), ours(input, weight.contiguous(), grad, shape), strict=True
    ):
        assert torch.equal(strided, dense)


def test_groups_that_see_odd_numbers_of_columns(unit):
    """A box of 3 columns takes more copies of the input than one of 4, of which there are fewer."""
    dtype = str(unit).removeprefix("torch.")
    of_group = next((n for n in (64, 32, 16, 8) if _C.convolves(dtype, 3 * n, 3 * n, 3)), None)
    if of_group is None:
        pytest.skip(f"no groups in {dtype} with {_C.cpu_isa()}")
    channels = 3 * of_group
    shape = Shape(9, channels, channels, (1, 3), (7, 7), (2, 1), (4, 5), groups=3)
    with poisoned():
        values = ours(*shape.tensors(unit), shape)
    found = failures(values, shape, unit, least_error=True)
    assert not found, "\n".join(found)


OF_ONE_PIXEL = [
    Shape(9, 32, 40, (1, 1), (3, 3), (2, 2), (1, 1)),
    Shape(8, 32, 64, (1, 1), (1, 1), (2, 2)),
    Shape(5, 20, 33, (1, 7), (3, 1), (2, 1), (1, 0)),
    Shape(1, 64, 96, (1, 30), (3, 1), (3, 1), (1, 0)),
    Shape(8, 64, 64, (6, 1), (3, 3), (1, 2), (1, 1)),
]


@pytest.mark.parametrize("shape", OF_ONE_PIXEL, ids=str)
def test_a_stride_over_one_pixel(unit, shape):
    """Where a kernel steps over the image, all of its taps but one see nothing."""
    with poisoned():
        values = ours(*shape.tensors(unit), shape)
    found = failures(values, shape, unit, least_error=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("padding", [(1, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("stride", [(2, 2), (3, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 2)], ids=str)
def test_gradient_of_the_input_is_the_adjoint(isa, kernel, stride, padding):
    shape = Shape(2, 20, 33, (11, 9), kernel, stride, padding)
    input, weight, grad = shape.tensors(torch.float32)
    output, grad_input, _ = ours(input, weight, grad, shape)
    forward = (output.double() * grad).sum()
    backward = (input.double() * grad_input).sum()
    # Both sums in their order err as Higham 2002, (3.5) says.
    magnitude = (F.conv2d(input.double().abs(), weight.double().abs(), None, *shape.by) * grad.abs()).sum()
    bound = (shape.terms[0] + shape.terms[1]) * UNIT_ROUNDOFF * magnitude
    assert abs(forward - backward) <= bound
    assert bound < 1e-3 * magnitude


# ---------------------------------------------------------------------------------------------------------
# float32 weights beside low-precision activations, as autocast has them


@pytest.mark.parametrize("shape", [SHAPES[72], *EPILOGUE_SHAPES[:3], *resnet50(32)[3:8]], ids=str)
def test_weights_of_float32(unit, shape):
    if unit == torch.float32:
        unit = torch.float16
    input, _, grad = shape.tensors(unit)
    weight = shape.tensors(torch.float32)[1]
    results = ours(input, weight, grad, shape)
    exact = stock(input.double(), weight.double(), grad.double(), shape)
    theirs = stock(input, weight.to(unit), grad, shape)
    assert [t.dtype for t in results] == [unit, unit, torch.float32]
    for name, result, reference, other in zip(NAMES, results, exact, theirs, strict=True):
        error, bound = rms(result.double() - reference), FACTOR * rms(other.double() - reference)
        assert error <= bound, name
    # Summed in float32, and never rounded to less.
    error = rms(results[2].double() - exact[2])
    assert error <= FACTOR * plain_sum_error(exact[2], shape.terms[2])
    if unit == torch.bfloat16 and _C.cpu_isa() in ("avx512_bf16", "avx512_amx"):
        for rounded, result in zip(ours(input, weight.to(unit), grad, shape)[:2], results[:2], strict=True):
            assert torch.equal(rounded, result)
