"""A convolution in evaluation with the maximum over windows behind it: values, errors, and when it runs."""

import pytest
import torch
from convolving import KERNELS, Shape, poisoned
from layers import channels_last
from torch import library, nn
from torch.nn import functional as F

import fastres
from fastres import recording
from fastres.max_pool import MaxPool

RESNET = MaxPool((3, 3), (2, 2), (1, 1), False)
STEM = Shape(2, 3, 64, (32, 32), (7, 7), (2, 2), (3, 3))
CASES = [
    (STEM, RESNET),
    (STEM._replace(batch=1, image=(230, 230)), RESNET),  # images in parts, and parts in chunks
    (STEM._replace(batch=3, out_channels=130, image=(61, 250)), RESNET),
    (STEM._replace(image=(33, 31)), MaxPool((2, 2), (2, 2), (0, 0), True)),
    (STEM._replace(image=(200, 90)), MaxPool((5, 4), (2, 1), (2, 2), True)),
    (STEM._replace(image=(200, 90)), MaxPool((2, 3), (3, 4), (1, 1), True)),  # rows that no window sees
    (Shape(2, 33, 64, (150, 60), (1, 1), (1, 1), (2, 1)), RESNET),
    (Shape(2, 20, 70, (90, 60), (3, 3), (1, 1), (1, 1)), RESNET),  # by Winograd's tiles
    (Shape(1, 64, 64, (90, 60), (3, 3), (1, 2), (0, 3), (2, 1)), MaxPool((1, 1), (1, 1), (0, 0), False)),
    (Shape(2, 64, 64, (90, 60), (3, 3), (1, 1), (1, 1), groups=4), RESNET),
    (Shape(2, 5, 3, (1, 1), (7, 7), (1, 1), (3, 3)), RESNET),
]


def call(shape, pool, dtype, *, packs=True, spoil=None):
    """What the op gives with the pool in it, and with the pool behind it."""
    input, weight, _ = shape.tensors(dtype)
    if spoil is not None:
        spoil(input)
    packed = KERNELS.conv_pack_weight(weight, input, shape.stride, shape.dilation, shape.groups)
    mean, bias = torch.randn(2, shape.out_channels)
    arguments = (input, weight, packed if packs else None, None, None, mean, mean.abs() + 0.5, None, bias)
    with poisoned():
        apart = KERNELS.conv_bn_act_eval(*arguments, *shape.by, 1e-3, True)
        one = KERNELS.conv_bn_act_eval(*arguments, *shape.by, 1e-3, True, pool.of_size(shape.out))
    return one, F.max_pool2d(apart, pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode)


@pytest.mark.parametrize("shape, pool", CASES)
def test_values_are_those_of_the_parts(shape, pool, unit, threads):
    for packs in (True, False):
        one, apart = call(shape, pool, unit, packs=packs)
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one, apart)


def test_not_a_number_is_the_largest(unit):
    def spoil(input):
        input[0, 0, 10, 10] = torch.nan

    one, apart = call(STEM, RESNET, unit, spoil=spoil)
    assert one.isnan().any() and not one.isnan().all()
    torch.testing.assert_close(one, apart, rtol=0, atol=0, equal_nan=True)


def op(**changes):
    """The op of a small stem with one argument changed."""
    input, weight, _ = STEM.tensors(torch.float32)
    arguments = {
        "input": input, "conv_weight": weight, "packed": None, "conv_bias": None, "residual": None,
        "running_mean": torch.zeros(64), "running_var": torch.ones(64), "weight": None, "bias": None,
        "stride": STEM.stride, "padding": STEM.padding, "dilation": STEM.dilation, "eps": 0.0, "relu": True,
        "pool": RESNET.of_size(STEM.out),
    }  # fmt: skip
    return KERNELS.conv_bn_act_eval(**(arguments | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pool": [8] * 7}, "pool takes eight integers, or none"),
        ({"pool": [0, 8, 3, 3, 2, 2, 1, 1]}, "output_size takes two integers of at least 1"),
        ({"pool": [10, 8, 3, 3, 2, 2, 1, 1]}, "output_size has windows outside of the image"),
        ({"pool": [8, 8, 17, 17, 2, 2, 1, 1]}, "kernel_size has more than 256 pixels"),
        ({"pool": [8, 8, 3, 3, 0, 2, 1, 1]}, "stride takes two integers of at least 1"),
        ({"pool": [8, 8, 3, 3, 2, 2, 2, 1]}, "padding is more than half of the kernel"),
        (
            {"residual": channels_last(torch.ones(2, 64, 16, 16))},
            "no kernel for a residual before a maximum",
        ),
    ],
)
def test_what_the_op_refuses(changes, message):
    with pytest.raises(RuntimeError, match=f"fastres::conv_bn_act_eval: .*{message}"):
        op(**changes)


def test_opcheck():
    input, weight, _ = STEM.tensors(torch.float32)
    arguments = (input, weight, None, None, torch.zeros(64), torch.ones(64), None, None)
    library.opcheck(
        KERNELS.conv_bn_act_infer.default, (*arguments, *STEM.by, 0.0, True, RESNET.of_size(STEM.out))
    )


class Stem(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.pool = nn.ReLU(), pool

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("grad", [False, True])
def test_one_op_runs_a_stem_where_no_gradient_is_wanted(grad):
    stock = Stem(nn.MaxPool2d(3, 2, 1)).eval().to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, 3, 64, 64))
    model = fastres.fuse(stock)
    with torch.set_grad_enabled(grad), recording.record() as records:
        output = model(x)
    assert [(record.ran, record.fused) for record in records] == [("conv_bn_relu_max_pool", True)]
    assert records[0].own_convolution != grad
    torch.testing.assert_close(output, stock(x))


def test_windows_that_see_no_pixel_are_an_error_as_in_stock():
    stock = Stem(nn.MaxPool2d(40)).eval().to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, 3, 64, 64))
    for model in (stock, fastres.fuse(stock)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="[Oo]utput size is too small"):
            model(x)
