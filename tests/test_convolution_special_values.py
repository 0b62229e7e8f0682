"""The convolution kernels on NaN and infinities, in used memory, again and on other numbers of threads."""

import pytest
import torch
from convolving import BY_WINOGRAD, KERNELS, NAMES, Shape, grouped, ours, resnet50, stock

pytestmark = pytest.mark.usefixtures("one_thread")  # small tasks take longer on two of a busy machine


SPECIAL = [
    Shape(2, 16, 64, (7, 9), (3, 3), (1, 1), (1, 1)),
    Shape(2, 65, 5, (8, 5), (3, 2), (2, 3), (2, 0), (1, 2)),
    Shape(3, 5, 65, (6, 4), (1, 1), (2, 2)),
    grouped(4, 5, (9, 8), (3, 3), (1, 1), (1, 1)),
    grouped(16, 2, (8, 7), (3, 3), (2, 2), (1, 1)),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", SPECIAL, ids=str)
def test_nan_and_inf_go_where_they_are_multiplied(unit, shape, value):
    """Where stock's would go; which of the zeros around the image it multiplies depends on the shape."""
    for place in [(0, 0, 0, 0), (1, 3, 2, 1), (1, 4, 5, 3)]:
        for changed in (0, 2):  # the input and the output's gradient
            tensors = shape.tensors(unit)
            place_inside = tuple(min(p, s - 1) for p, s in zip(place, tensors[changed].shape, strict=True))
            tensors[changed][place_inside] = value
            exact = stock(*(t.double() for t in tensors), shape)
            # A convolution of what is not finite with ones counts it, where it takes part.
            marks = [(~t.isfinite()).double() for t in tensors]
            ones = [torch.ones_like(m) for m in marks]
            ones[changed] = marks[changed]
            counts = stock(*ones, shape)
            for name, result, expected, count in zip(
                NAMES, ours(*tensors, shape), exact, counts, strict=True
            ):
                if changed == (2 if name == NAMES[0] else 0 if name == NAMES[1] else -1):
                    continue  # it is no operand
                inside = count > 0
                if not (changed == 2 and name == NAMES[2]):  # which multiplies the zeros as well
                    assert result[~inside].isfinite().all(), name
                assert torch.equal(result[inside].isnan(), expected[inside].isnan()), name
                assert torch.equal(result[inside].isinf(), expected[inside].isinf()), name


@pytest.mark.parametrize("way", [BY_WINOGRAD], ids=["winograd"], indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_winograds_sums_of_what_is_not_finite(unit, value, way):
    """They are not finite where stock's are not; differences of infinities are NaN."""
    for shape in way.shapes[:5:2]:
        for place in ((0, 0, 0, 0), (1, 3, 2, 1), (1, 4, 5, 3)):
            tensors = shape.tensors(torch.float32)
            for changed, direction in ((0, 0), (2, 1)):
                before = tensors[changed][place].clone()
                tensors[changed][place] = value
                exact = stock(*(t.double() for t in tensors), shape)[direction]
                result = ours(*tensors, shape)[direction]
                assert torch.equal(result.isfinite(), exact.isfinite()), (shape, place, direction)
                tensors[changed][place] = before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_channels_nan_does_not_reach_the_others(unit, value):
    """In the gradient of the weight, whose sums take the zeros around the image along."""
    shape = Shape(2, 65, 70, (5, 6), (3, 3), (1, 1), (1, 1))
    input, weight, grad = shape.tensors(unit)
    input[1, 64, 2, 2] = value
    grad[0, 69, 0, 0] = value
    result = KERNELS.conv_backward_weight(grad, input, weight, *shape.by)
    assert result[:69, :64].isfinite().all()
    assert not result[69, 0].isfinite().all() and not result[0, 64].isfinite().any()


def test_what_an_earlier_call_left_in_memory_has_no_part(unit, threads, way):
    large = Shape(5, 130, 130, (9, 9), (3, 3), (1, 1), (1, 1))
    nan = [torch.full_like(t, float("nan")) for t in large.tensors(unit)]
    way = way._replace(shapes=[shape for shape in way.shapes if shape.terms[2] < 400])
    small = way.some(4 * threads)
    before = [ours(*shape.tensors(unit), shape) for shape in small]
    for shape, expected in zip(small, before, strict=True):
        if shape in small[::4]:
            assert all(t.isnan().all() for t in ours(*nan, large))
        for result, first in zip(ours(*shape.tensors(unit), shape), expected, strict=True):
            assert torch.equal(result, first), shape


def test_same_bits_each_time_for_a_number_of_threads(unit, threads, way):
    for shape in [*way.some(16), *way.shapes[:6], *resnet50(32)[3::8]]:
        tensors = shape.tensors(unit)
        first = ours(*tensors, shape)
        for _ in range(2):
            for a, b in zip(first, ours(*tensors, shape), strict=True):
                assert torch.equal(a, b), shape


def test_same_bits_however_many_threads_share_few_pixels(unit, one_thread):
    by = Shape(1, 64, 330, (14, 14), (3, 3), (1, 1), (1, 1))  # one box, six blocks of channels or more
    for shape in (by, by._replace(out_channels=64), by._replace(image=(2, 3))):
        tensors = shape.tensors(unit)
        forward = torch.ops.fastres.conv_forward
        expected = None
        for threads in (1, 2, 3, 4, 7, 16):
            torch.set_num_threads(threads)
            output = forward(*tensors[:2], None, None, shape.stride, shape.padding, shape.dilation, False)
            expected = output if expected is None else expected
            assert torch.equal(output, expected), (shape, threads)
