"""Values: fused ops and stock PyTorch against float64, in each dtype, layout, shape, instruction set."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate
from convolving import poisoned
from torch.nn import functional as F

from fastres import ops

SHAPES = [
    (4, 64, 8, 8),  # whole vectors
    (2, 3, 5, 7),  # less than a vector
    (3, 130, 3, 3),  # whole vectors and a rest
    (5, 13, 1, 1),  # one pixel
    (1, 1, 2, 1),  # two values in all
    (1, 2050, 2, 2),  # batch of one, more channels than a block
    (6, 5),
    (3, 7, 11),
    (2, 3, 2, 4, 5),
    (33, 24, 31, 29),  # several tasks
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dtypes_of(device: str) -> list[torch.dtype]:
    return DTYPES if device == "cpu" else DTYPES[:-1]


def in_layout(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    if not channels_last or tensor.dim() not in (4, 5):
        return tensor.contiguous()
    return tensor.contiguous(
        memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    )


class Case:
    """One batch norm with everything that goes into it, in float64; `run` computes it in a dtype."""

    def __init__(
        self, shape, device, residual=False, affine=True, training=True, relu=True, mean=0.0, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(*size, dtype=torch.float64, generator=generator).to(device)

        channels = shape[1]
        self.input = randn(*shape) * 2 + mean
        self.residual = randn(*shape) if residual else None
        self.weight = randn(channels) if affine else None
        self.bias = randn(channels) if affine else None
        self.running_mean = randn(channels) + mean
        self.running_var = randn(channels).square() + 0.5
        self.grad = randn(*shape)
        self.training, self.relu = training, relu

    def rounded_to(self, dtype):
        """The same case with values that `dtype` holds exactly: rounding the input is nobody's error."""
        for name in ("input", "residual", "grad"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(dtype).double())
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(parameters).double())
        return self

    def run(self, fused: bool, dtype: torch.dtype, channels_last: bool = False) -> dict[str, torch.Tensor]:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32

        def leaf(tensor, to, layout=False):
            if tensor is None:
                return None
            tensor = tensor.to(to, copy=True)
            return (in_layout(tensor, channels_last) if layout else tensor).requires_grad_()

        leaves = {
            "input": leaf(self.input, dtype, layout=True),
            "residual": leaf(self.residual, dtype, layout=True),
            "weight": leaf(self.weight, parameters),
            "bias": leaf(self.bias, parameters),
        }
        statistics = {n: getattr(self, n).to(parameters).clone() for n in ("running_mean", "running_var")}
        rest = (leaves["weight"], leaves["bias"], self.training, 0.3, 1e-5)
        if not fused:
            output = F.batch_norm(leaves["input"], *statistics.values(), *rest)
            output = output if self.residual is None else output + leaves["residual"]
            output = F.relu(output) if self.relu else output
        elif self.residual is not None:
            output = ops.bn_add_relu(leaves["input"], leaves["residual"], *statistics.values(), *rest)
        else:
            op = ops.bn_relu if self.relu else ops.batch_norm
            output = op(leaves["input"], *statistics.values(), *rest)
        output.backward(in_layout(self.grad.to(dtype), channels_last))
        gradients = {f"grad_{n}": t.grad for n, t in leaves.items() if t is not None}
        return {"output": output, **gradients, **statistics}


def check(dtype: torch.dtype, channels_last: bool, shape, device, prepare=None, **variant) -> None:
    """Hold a case against float64 and stock, drawn so often that 48 channels' errors are seen together.

    Each channel's coefficients are rounded once, so that the errors of few channels are a matter of luck.
    """
    draws = []
    for draw in range(-(-48 // shape[1])):
        case = Case(shape, device, seed=draw, **variant)
        if prepare is not None:
            prepare(case)
        case.rounded_to(dtype)
        draws.append(
            (
                case.run(fused=True, dtype=dtype, channels_last=channels_last),
                case.run(fused=False, dtype=dtype, channels_last=channels_last),
                case.run(fused=False, dtype=torch.float64),
            )
        )
    for name in draws[0][0]:
        fused, stock, reference = (torch.stack([draw[side][name] for draw in draws]) for side in range(3))
        if dtype == torch.float64:  # the reference has this dtype's errors itself
            torch.testing.assert_close(fused, reference, rtol=1e-9, atol=1e-9)
        else:
            assert_as_accurate(name, fused, stock, reference)


@pytest.fixture(name="poisoned")
def _poisoned():
    with poisoned():
        yield


VARIANTS = [
    pytest.param(dict(residual=residual, affine=affine, training=training, relu=relu), id=name)
    for name, residual, affine, training, relu in [
        ("bn", False, True, True, False),
        ("bn_relu", False, True, True, True),
        ("bn_add_relu", True, True, True, True),
        ("bn_relu-plain", False, False, True, True),
        ("bn_add_relu-plain", True, False, True, True),
        ("bn-eval", False, True, False, False),
        ("bn_relu-eval", False, True, False, True),
        ("bn_add_relu-eval", True, True, False, True),
    ]
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(variant, shape, channels_last, device, emulated, poisoned):
    if emulated and math.prod(shape) == 2:
        pytest.skip("stock's sums of two values are exact on the CPU")
    if emulated and shape[1] > 1000:
        pytest.skip("so many channels take seconds; test_emu_batch_norm has 520")
    for dtype in dtypes_of(device):
        check(dtype, channels_last, shape, device, **variant)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_float64(any_isa, dtype, channels_last, poisoned):
    for variant, shape in itertools.product(VARIANTS, [(3, 37, 5, 5), (2, 130, 4, 9)]):
        check(dtype, channels_last, shape, "cpu", **variant.values[0])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_keeps_its_digits_where_the_mean_is_far_from_zero(
    mean, dtype, channels_last, device, emulated, any_isa
):
    if emulated and (mean > 1e2 or any_isa != "scalar"):
        pytest.skip("stock adds up in double on the CPU, and no instruction set plays a part")
    if device == "cuda" and (any_isa != "scalar" or dtype == torch.float64):
        pytest.skip("CUDA has no float64, and no instruction set of the CPU plays a part")
    check(dtype, channels_last, (7, 24, 13, 11), device, mean=mean)


def test_an_outlier_in_the_first_place_costs_no_digits(device):
    def prepare(case):
        case.input[0, :, 0, 0] = 3e3

    check(torch.float32, True, (8, 48, 12, 12), device, prepare)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_each_time_for_a_number_of_threads(threads, channels_last):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(torch.float32, channels_last, (16, 48, 33, 31), "cpu", residual=True)
        case = Case((16, 48, 33, 31), "cpu", residual=True)
        first = case.run(fused=True, dtype=torch.float32, channels_last=channels_last)
        for _ in range(3):
            again = case.run(fused=True, dtype=torch.float32, channels_last=channels_last)
            for name, value in first.items():
                assert torch.equal(value, again[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_nan_and_inf_go_where_stock_lets_them_go(value, training, channels_last, device, emulated):
    if emulated and training and math.isinf(value):
        pytest.skip("where sums on the CPU are infinite, those about a moving mean become NaN")
    for residual, place in itertools.product((False, True), [(0, 3, 0, 0), (1, 3, 2, 2), (39, 3, 4, 3)]):
        case = Case((40, 20, 5, 4), device, residual=residual, training=training)
        case.input[place] = value
        if residual:
            case.residual[0, 7, 1, 1] = value
        stock = case.run(fused=False, dtype=torch.float32, channels_last=channels_last)
        fused = case.run(fused=True, dtype=torch.float32, channels_last=channels_last)
        # An infinite sum's mean is infinite, one about a moving mean NaN: stock has CUDA kernels of both.
        either = device == "cuda" and training and math.isinf(value)
        for name in stock:
            if either and name == "running_mean":
                assert torch.equal(fused[name].isfinite(), stock[name].isfinite()), name
                continue
            assert torch.equal(fused[name].isnan(), stock[name].isnan()), name
            assert torch.equal(fused[name].isinf(), stock[name].isinf()), name


def test_output_keeps_the_memory_layout(device):
    for channels_last in (False, True):
        input = in_layout(torch.randn(2, 6, 5, 4, device=device), channels_last).requires_grad_()
        output = ops.bn_relu(input, None, None, training=True)
        output.sum().backward()
        assert output.stride() == input.stride()
        assert input.grad.stride() == input.stride()


@pytest.mark.parametrize("first", [1, 3])
def test_memory_that_begins_anywhere(first, any_isa):
    """Slices of a batch of images that are no whole vectors, large enough for streaming stores."""
    whole = torch.randn(first + 3, 33, 295, 295)
    for channels_last in (False, True):
        images = in_layout(whole, channels_last)[first:]
        reference = F.relu(F.batch_norm(images.double(), None, None, training=True))
        stock = F.relu(F.batch_norm(images, None, None, training=True))
        assert_as_accurate("output", ops.bn_relu(images, None, None, training=True), stock, reference)


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (4, 5), (2, 3, 5, 7), (3, 2, 2, 3, 2, 2), (64, 33, 31, 17)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_add_relu_equals_stock_to_the_bit(shape, channels_last, device, poisoned):
    for dtype in dtypes_of(device):
        a, b, grad = (
            in_layout(torch.randn(shape, device=device).to(dtype), channels_last) for _ in range(3)
        )
        results = []
        for function in (ops.add_relu, lambda a, b: torch.relu(a + b)):
            leaves = [t.clone().requires_grad_() for t in (a, b)]
            output = function(*leaves)
            output.backward(grad)
            results.append((output, *(leaf.grad for leaf in leaves)))
        for fused, stock in zip(*results, strict=True):
            assert torch.equal(fused, stock)


CONVOLUTIONS = [
    dict(),
    dict(stride=2, padding=1),
    dict(padding="same", dilation=2),
    dict(padding=(0, 2), stride=(1, 2)),
    dict(groups=3, padding="valid"),
]


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "eval-no_grad"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_conv_bn_relu_equals_its_parts(residual, mode, arguments, activation, device):
    torch.manual_seed(0)
    make = dict(dtype=torch.float64, device=device)
    input = torch.randn(2, 6, 9, 8, **make)
    weight = torch.randn(9, 6 // arguments.get("groups", 1), 3, 3, **make)
    leaves = [input, weight, *(torch.randn(9, **make) for _ in range(3))]
    statistics = torch.randn(9, **make), torch.rand(9, **make) + 0.5
    shape = F.conv2d(input, weight, **arguments).shape
    leaves.append(torch.randn(shape, **make) if residual else None)

    def stock(input, weight, conv_bias, bn_weight, bn_bias, residual, mean, var):
        output = F.conv2d(input, weight, conv_bias, **arguments)
        output = F.batch_norm(output, mean, var, bn_weight, bn_bias, mode == "train", 0.2, 1e-3)
        output = output if residual is None else output + residual
        return F.relu(output) if activation else output

    def fused(input, weight, conv_bias, bn_weight, bn_bias, residual, mean, var):
        return ops.conv_bn_relu(
            input, weight, mean, var, bn_weight, bn_bias, residual=residual, conv_bias=conv_bias,
            training=mode == "train", momentum=0.2, eps=1e-3, activation=activation, **arguments,
        )  # fmt: skip

    results = []
    for function in (stock, fused):
        inputs = [t if t is None else t.clone().requires_grad_(mode != "eval-no_grad") for t in leaves]
        buffers = [t.clone() for t in statistics]
        output = function(*inputs, *buffers)
        if output.requires_grad:
            output.square().sum().backward()
        results.append((output, *buffers, *(t.grad for t in inputs if t is not None)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_folded_convolution_is_as_accurate_as_stock(dtype):
    torch.manual_seed(0)
    input, weight = torch.randn(4, 32, 14, 14).to(dtype), (torch.randn(48, 32, 3, 3) / 17).to(dtype)
    parameters = [
        t.to(dtype) for t in (torch.randn(48), torch.rand(48) + 0.5, torch.randn(48), torch.randn(48))
    ]

    def stock(input, weight, *parameters):
        return F.relu(F.batch_norm(F.conv2d(input, weight, padding=1), *parameters))

    reference = stock(*(t.double() for t in (input, weight, *parameters)))
    fused = ops.conv_bn_relu(input, weight, *parameters, padding=1)
    assert_as_accurate("output", fused, stock(input, weight, *parameters), reference)


def test_pytorchs_own_samples_of_batch_norm(device):
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
    checked = 0
    for dtype in dtypes_of(device):
        for sample in info.sample_inputs(device, dtype, requires_grad=True):
            results = []
            for function in (ops.batch_norm, F.batch_norm):
                copy = sample.transform(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t)
                input = copy.input.requires_grad_()
                output = function(input, *copy.args, **copy.kwargs)
                (grad,) = torch.autograd.grad(output.square().sum(), input)
                results.append((output, grad, *copy.args))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs)
            checked += 1
    assert checked >= 10
