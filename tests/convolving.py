"""The convolution kernels: shapes for their tests, stock PyTorch's results, and how both are compared."""

import contextlib
import functools
import math
import random
from typing import NamedTuple

import torch
from accuracy import FACTOR, rms
from layers import channels_last
from torch.nn import functional as F

from fastres import _C, memory

KERNELS = torch.ops.fastres


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
    groups: int = 1

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
            self.in_channels // self.groups * math.prod(self.kernel),
            self.out_channels // self.groups * math.prod(taps),
            self.batch * math.prod(self.out),
        )

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input, weight and the output's gradient, channels last."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return channels_last(torch.randn(size, generator=generator).to(dtype))

        scale = 1 / math.sqrt(self.terms[0])
        weight = randn(self.out_channels, self.in_channels // self.groups, *self.kernel).mul_(scale)
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
    # Narrow blocks of channels, and images so wide that the kernel's columns share what is loaded.
    Shape(2, 24, 17, (9, 21), (3, 3), (1, 1), (1, 1)),
    Shape(3, 16, 32, (6, 40), (5, 5), (1, 1), (3, 0), (1, 2)),
    Shape(2, 65, 31, (20, 19), (3, 3), (2, 1), (1, 1)),
    Shape(2, 32, 16, (8, 8), (1, 1)),
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


def grouped(channels: int, groups: int, image, *geometry, batch: int = 2) -> Shape:
    """Of groups of so many channels each."""
    total = channels * groups
    return Shape(batch, total, total, image)._replace(
        **dict(zip(("kernel", "stride", "padding", "dilation"), geometry, strict=False)), groups=groups
    )


GROUPED_SHAPES = [
    grouped(4, 32, (9, 14), (3, 3), (1, 1), (1, 1)),
    grouped(8, 3, (14, 15), (3, 3), (2, 2), (1, 1), batch=3),
    grouped(16, 5, (7, 7), (3, 3), (1, 1), (1, 1), batch=6),  # several boxes of images
    grouped(32, 3, (9, 6), (3, 3), (2, 1), (0, 2)),
    grouped(64, 2, (7, 5), (3, 3), (1, 1), (1, 1)),
    grouped(4, 3, (5, 8), (1, 1), (1, 1)),
    grouped(8, 9, (8, 9), (1, 1), (2, 2)),
    grouped(16, 2, (10, 11), (3, 3), (1, 1), (2, 2), (2, 2)),
    grouped(4, 5, (9, 12), (5, 2), (1, 2), (2, 1), (1, 2)),
    grouped(8, 2, (6, 10), (1, 2), (1, 1), (0, 1), (1, 2)),
    grouped(32, 2, (4, 9), (2, 3), (1, 3), (1, 2)),
    grouped(64, 1, (5, 5), (3, 3), (1, 1), (1, 1)),  # one group is none
    grouped(4, 17, (2, 460), (3, 3), (1, 1), (1, 1)),  # a row is more than a box
    grouped(8, 8, (1, 1), (3, 3), (1, 1), (1, 1), batch=5),  # sees its padding on all sides
    grouped(4, 4, (1, 2), (3, 7), (2, 2), (4, 6), (1, 2)),  # padding is wider than the image
    grouped(16, 3, (9, 9), (1, 1), (3, 3)),  # most pixels of the input have no gradient
]


EPILOGUE_SHAPES = [
    Shape(2, 16, 64, (7, 9), (3, 3), (1, 1), (1, 1)),
    Shape(3, 5, 65, (6, 4), (1, 1)),
    Shape(2, 130, 200, (9, 5), (3, 3), (2, 2), (1, 1)),
    Shape(1, 16, 128, (129, 128), (1, 1)),  # so large that it is written past the caches
]


class Way(NamedTuple):
    """How convolutions are multiplied: what _C.use_winograd is told, and shapes for its tests."""

    use_winograd: str
    shapes: list[Shape]
    most_pixels_of_a_box: int

    def covered(self, dtype: str) -> "Way":
        """The shapes that the instruction set in use has kernels for."""
        return self._replace(
            shapes=[s for s in self.shapes if _C.convolves(dtype, s.in_channels, s.out_channels, s.groups)]
        )

    def some(self, every: int) -> list[Shape]:
        """Every `every`-th, where there are many."""
        return self.shapes[::every] if len(self.shapes) > 20 else self.shapes


DIRECTLY = Way("never", SHAPES, 256)
BY_WINOGRAD = Way("possible", WINOGRAD_SHAPES, 512)
BY_GROUPS = Way("never", GROUPED_SHAPES, 512)


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
        grad, input, weight, None, *shape.by, False, [0, 0], shape.groups, [True, True, False]
    )
    return F.conv2d(input, weight, None, *shape.by, shape.groups), grads[0], grads[1]


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
        values: output and gradients, or the output alone.
        least_error: stock's error counts for at least that of a plain loop. PyTorch adds some shapes up in
            many small parts, and some in double.
    """
    assert len(values) in (1, len(NAMES))
    found = []
    for name, value, reference, terms in zip(
        NAMES, values, references(shape, dtype), shape.terms, strict=False
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
