"""The convolution kernels against float64: values, gradients, epilogues, special values."""

import contextlib
import functools
import math
import random
from typing import NamedTuple

import pytest
import torch
from accuracy import FACTOR, rms
from layers import DTYPES, channels_last, units
from torch.nn import functional as F

from fastres import _C, memory

KERNELS = torch.ops.fastres

pytestmark = pytest.mark.usefixtures("one_thread")  # small tasks take longer on two of a busy machine


@pytest.fixture(params=units(), ids="-".join)
def unit(request):
    """Selects an instruction set; the dtype that it is to convolve."""
    before = _C.cpu_isa()
    _C.select_cpu_isa(request.param[0])
    yield DTYPES[request.param[1]]
    _C.select_cpu_isa(before)


@pytest.fixture(params=["direct", "winograd"])
def three_by_three(request):
    """How 3x3 convolutions are multiplied, small ones as well; and shapes that have a part in it."""
    _C.use_winograd("possible" if request.param == "winograd" else "faster")
    yield WINOGRAD_SHAPES if request.param == "winograd" else SHAPES
    _C.use_winograd("faster")


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request, one_thread):
    torch.set_num_threads(request.param)
    return request.param


@contextlib.contextmanager
def poisoned():
    """Fresh memory holds NaN, so that an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        with memory.from_malloc():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------
# cases


class Shape(NamedTuple):
    """Of a convolution."""

    batch: int
    in_channels: int
    out_channels: int
    image: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def by(self):
        return self.stride, self.padding, self.dilation

    @property
    def out(self) -> tuple[int, int]:
        axes = zip(self.image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in axes)
        return height, width

    @property
    def terms(self) -> tuple[int, int, int]:
        """The most that are added up for an element of output, gradient of input and of weight."""
        # With a stride an input pixel meets every (stride / gcd(stride, dilation))-th tap alone.
        taps = [
            -(-k // (s // math.gcd(s, d)))
            for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        ]
        return (
            self.in_channels * math.prod(self.kernel),
            self.out_channels * math.prod(taps),
            self.batch * math.prod(self.out),
        )

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input, weight and the output's gradient, channels last."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return channels_last(torch.randn(size, generator=generator).to(dtype))

        scale = 1 / math.sqrt(self.terms[0])
        weight = randn(self.out_channels, self.in_channels, *self.kernel).mul_(scale)
        return (
            randn(self.batch, self.in_channels, *self.image),
            weight,
            randn(self.batch, self.out_channels, *self.out),
        )


def random_shape(seed: int, most: int = 4_000_000) -> Shape:
    """One that takes at most so many multiplications."""
    choose = random.Random(seed)
    while True:
        kernel = choose.choice([(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (5, 2), (1, 7)])
        shape = Shape(
            choose.randint(1, 5),
            *(choose.choice([1, 3, 5, 16, 64, 65, 130, 200]) for _ in range(2)),
            (choose.choice([1, 2, 3, 7, 9, 13, 17]), choose.choice([1, 2, 3, 5, 8, 11, 23])),
            kernel,
            (choose.randint(1, 3), choose.randint(1, 3)),
            (choose.randint(0, kernel[0] + 2), choose.randint(0, kernel[1] + 2)),
            (choose.randint(1, 2), choose.randint(1, 2)),
        )
        if min(shape.out) > 0 and shape.terms[0] * shape.terms[2] * shape.out_channels <= most:
            return shape


SHAPES = [
    *(random_shape(seed) for seed in range(72)),
    Shape(1, 64, 65, (1, 230)),  # a row is more than a box
    Shape(2, 16, 5, (3, 230), (3, 3), (1, 1), (1, 1)),
    Shape(1, 65, 16, (2, 230), (1, 1), (2, 3), (0, 1)),
    Shape(1, 5, 3, (230, 1), (5, 1), (1, 1), (2, 0)),
    Shape(3, 65, 130, (1, 1), (1, 1)),  # a pixel an image
    Shape(2, 16, 16, (1, 1), (3, 3), (1, 1), (1, 1)),  # sees its padding on all sides
    Shape(2, 3, 5, (1, 2), (2, 2), (2, 3), (4, 4), (2, 2)),  # padding is wider than the image
    Shape(1, 1, 1, (1, 1), (7, 7), (3, 3), (9, 9)),
    Shape(2, 130, 65, (9, 9), (1, 1), (3, 3)),  # most pixels of the input have no gradient
    Shape(2, 300, 70, (4, 5), (3, 3), (1, 1), (1, 1)),  # input channels in several parts
    Shape(1, 70, 600, (3, 4), (3, 3), (1, 1), (1, 1)),  # output channels in several parts
    Shape(5, 16, 16, (20, 20), (3, 3), (2, 2), (1, 1)),  # several boxes of images
]
SHAPES = [shape for shape in SHAPES if min(shape.out) > 0]
WINOGRAD_SHAPES = [
    Shape(batch, inputs, outputs, image, (3, 3), (1, 1), padding)
    for batch, inputs, outputs, image, padding in [
        (2, 16, 64, (7, 9), (1, 1)),
        (3, 65, 70, (6, 5), (0, 0)),
        (2, 130, 65, (13, 31), (2, 1)),
        (1, 20, 33, (3, 130), (1, 1)),  # a row of tiles is more than a box
        (6, 33, 20, (8, 8), (1, 0)),  # several boxes of images
        (1, 300, 16, (5, 4), (1, 1)),  # input channels in several parts
        (2, 16, 300, (16, 24), (1, 1)),  # so many pixels that the weights' gradient is made so, too
        (1, 70, 70, (29, 31), (1, 1)),
        (2, 5, 3, (1, 1), (1, 1)),
        (1, 3, 5, (2, 3), (3, 4)),
    ]
]


def resnet50(image: int) -> list[Shape]:
    """Its different convolutions, for images of so many pixels a side."""
    table = [(3, 64, 7, 2, image)]
    before, side = 64, image // 4
    for stage, width in enumerate((64, 128, 256, 512)):
        stride, wide = 1 if stage == 0 else 2, 4 * width
        table += [
            (before, width, 1, 1, side),
            (width, width, 3, stride, side),
            (before, wide, 1, stride, side),
        ]
        side //= stride
        table += [(width, wide, 1, 1, side), (wide, width, 1, 1, side), (width, width, 3, 1, side)]
        before = wide
    return [
        Shape(2, i, o, (side, side), (k, k), (s, s), (k // 2, k // 2))
        for i, o, k, s, side in dict.fromkeys(table)
    ]


def stock(input, weight, grad, shape: Shape):
    """Output, gradient of the input and of the weight, by PyTorch."""
    grads = torch.ops.aten.convolution_backward(
        grad, input, weight, None, *shape.by, False, [0, 0], 1, [True, True, False]
    )
    return F.conv2d(input, weight, None, *shape.by), grads[0], grads[1]


def ours(input, weight, grad, shape: Shape):
    return (
        KERNELS.conv_forward(input, weight, None, None, *shape.by, False),
        KERNELS.conv_backward_input(grad, weight, input.shape, *shape.by),
        KERNELS.conv_backward_weight(grad, input, weight, *shape.by),
    )


# ---------------------------------------------------------------------------------------------------------
# accuracy

NAMES = ("output", "gradient of the input", "gradient of the weight")

UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2  # of what all kernels sum in

# Rounding to a format of unit roundoff u errs by up to u * 2^e, evenly, where 2^e <= |value| < 2^(e+1). The
# root mean square of that over |value|, whose logarithm is even, is u * sqrt(1/3 * (3/8) / ln 2).
ROUNDING = math.sqrt(1 / 8 / math.log(2))


def plain_sum_error(reference: torch.Tensor, terms: int) -> float:
    """Root mean square error of a loop that adds up `terms` products in float32, one after the other.

    Of independent products with mean 0 the k-th partial sum is sqrt(k / terms) of the whole, and each is
    rounded once: the squares of the roundings add up to terms / 2 of the whole's.
    """
    return ROUNDING * UNIT_ROUNDOFF * math.sqrt((terms + 1) / 2) * rms(reference)


class Reference(NamedTuple):
    """Float64 values, what their terms' magnitudes add up to, stock's error and that of rounding alone."""

    value: torch.Tensor
    magnitude: torch.Tensor
    stock_error: float
    rounding_error: float

    def bound(self, terms: int, dtype: torch.dtype) -> torch.Tensor:
        """For each element, of a sum of `terms` in any order: Higham 2002, (3.5).

        And of its rounding to dtype, also below the smallest normal number.
        """
        info, sum_bound = torch.finfo(dtype), (terms + 1) * UNIT_ROUNDOFF * self.magnitude
        return sum_bound + info.eps / 2 * (self.value.abs() + sum_bound) + info.smallest_normal * info.eps


@functools.cache
def references(shape: Shape, dtype: torch.dtype) -> list[Reference]:
    tensors = shape.tensors(dtype)
    result = []
    for exact, magnitude, theirs in zip(
        stock(*(t.double() for t in tensors), shape),
        stock(*(t.abs() for t in shape.tensors(torch.float32)), shape),
        stock(*tensors, shape),
        strict=True,
    ):
        error, rounded = rms(theirs.double() - exact), exact.to(dtype).double()
        # PyTorch 2.13's bfloat16 gradient of the weight reads memory that nobody wrote, of some shapes.
        error = error if math.isfinite(error) else 0.0
        result.append(Reference(exact, magnitude.double(), error, rms(rounded - exact)))
    return result


# The root mean square of so many elements is certain to a tenth.
FEWEST = 64


def failures(values, shape: Shape, dtype: torch.dtype, least_error: bool) -> list[str]:
    """In words, which of output and gradients is further from float64 than FACTOR times stock.

    Args:
        least_error: stock's error counts for at least that of a plain loop. PyTorch adds some shapes up in
            many small parts, and some in double.
    """
    found = []
    for name, value, reference, terms in zip(
        NAMES, values, references(shape, dtype), shape.terms, strict=True
    ):
        difference = (value.double() - reference.value).abs()
        if not (difference <= reference.bound(terms, dtype)).all():
            found.append(
                f"{name} of {shape}: an element is beyond its bound, largest {difference.max():.3g}"
            )
        floor = reference.rounding_error
        if least_error:
            floor = math.hypot(floor, plain_sum_error(reference.value, terms))
        error, theirs = rms(difference), reference.stock_error
        bound = FACTOR * max(theirs, floor)
        if value.numel() >= FEWEST and not error <= bound:
            found.append(f"{name} of {shape}: error {error:.3e}, stock's {theirs:.3e}, bound {bound:.3e}")
    return found


# ---------------------------------------------------------------------------------------------------------
# values


LAYOUTS = torch.contiguous_format, torch.channels_last


def test_any_shape(unit, threads, three_by_three):
    """In each layout of the weight."""
    found = []
    for index, shape in enumerate(three_by_three if threads == 1 else three_by_three[::3]):
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
# what is done while storing


EPILOGUE_SHAPES = [
    Shape(2, 16, 64, (7, 9), (3, 3), (1, 1), (1, 1)),
    Shape(3, 5, 65, (6, 4), (1, 1)),
    Shape(2, 130, 200, (9, 5), (3, 3), (2, 2), (1, 1)),
    Shape(1, 16, 128, (129, 128), (1, 1)),  # so large that it is written past the caches
]


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_epilogue_equals_its_parts(unit, bias, residual, relu, three_by_three):
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
def test_statistics_of_the_output(unit, threads, mean, three_by_three):
    """Those of what was stored, summed about a value of the box: the spread counts, not the mean."""
    most_pixels_of_a_box = 256 if three_by_three is SHAPES else 512
    for shape in [
        Shape(2, 16, 65, (9, 7), (1, 1)),
        Shape(2, 130, 64, (12, 21), (1, 1)),
        Shape(5, 16, 16, (21, 21), (3, 3), (2, 2)),
        Shape(1, 16, 70, (2, 300), (1, 3)),
        *([] if mean else SHAPES[:: 6 * threads] if three_by_three is SHAPES else three_by_three),
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
        relative = UNIT_ROUNDOFF * (min(shape.terms[2], most_pixels_of_a_box) + 1)
        error = (save_mean - exact.mean((0, 2, 3))).abs()
        assert (error <= relative * spread).all(), shape
        error = (save_rstd.pow(-2) - 1e-5 - exact.var((0, 2, 3), unbiased=False)).abs()
        assert (error <= 3 * relative * spread.square() + 1e-15).all(), shape


def test_the_activation_before_is_made_in_the_loads(unit, threads, three_by_three):
    """As where it is read from memory, to the bit."""
    some = SHAPES[:: 7 * threads] if three_by_three is SHAPES else three_by_three
    for shape in some:
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
            back = (conv_weight, *shape.by, True, True)
            read = KERNELS.conv_bn_act_backward(*front, input, None, None, None, None, False, *back)
            made = KERNELS.conv_bn_act_backward(*front, before, *vectors, mean, rstd, relu, *back)
            for a, b in zip(read, made, strict=True):
                assert torch.equal(a, b), shape


# ---------------------------------------------------------------------------------------------------------
# special values, old memory, repetition


SPECIAL = [
    Shape(2, 16, 64, (7, 9), (3, 3), (1, 1), (1, 1)),
    Shape(2, 65, 5, (8, 5), (3, 2), (2, 3), (2, 0), (1, 2)),
    Shape(3, 5, 65, (6, 4), (1, 1), (2, 2)),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_winograds_sums_of_what_is_not_finite(value):
    """They are not finite where stock's are not; differences of infinities are NaN."""
    _C.use_winograd("possible")
    try:
        for shape in WINOGRAD_SHAPES[:5:2]:
            for place in ((0, 0, 0, 0), (1, 3, 2, 1), (1, 4, 5, 3)):
                tensors = shape.tensors(torch.float32)
                for changed, direction in ((0, 0), (2, 1)):
                    before = tensors[changed][place].clone()
                    tensors[changed][place] = value
                    exact = stock(*(t.double() for t in tensors), shape)[direction]
                    result = ours(*tensors, shape)[direction]
                    assert torch.equal(result.isfinite(), exact.isfinite()), (shape, place, direction)
                    tensors[changed][place] = before
    finally:
        _C.use_winograd("faster")


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


def test_what_an_earlier_call_left_in_memory_has_no_part(unit, threads, three_by_three):
    large = Shape(5, 130, 130, (9, 9), (3, 3), (1, 1), (1, 1))
    nan = [torch.full_like(t, float("nan")) for t in large.tensors(unit)]
    small = [shape for shape in three_by_three if shape.terms[2] < 400]
    small = small[:: threads * 4] if three_by_three is SHAPES else small
    before = [ours(*shape.tensors(unit), shape) for shape in small]
    for shape, expected in zip(small, before, strict=True):
        if shape in small[::4]:
            assert all(t.isnan().all() for t in ours(*nan, large))
        for result, first in zip(ours(*shape.tensors(unit), shape), expected, strict=True):
            assert torch.equal(result, first), shape


def test_same_bits_each_time_for_a_number_of_threads(unit, threads, three_by_three):
    for shape in [*three_by_three[::16], *three_by_three[:6], *resnet50(32)[3::8]]:
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
    if unit == torch.bfloat16 and _C.cpu_isa() == "avx512_bf16":
        for rounded, result in zip(ours(input, weight.to(unit), grad, shape)[:2], results[:2], strict=True):
            assert torch.equal(rounded, result)
