"""The CUDA kernels, run on the host, against float64 and within 1.5 times the error of stock PyTorch."""

import math
from collections import defaultdict

import emu
import pytest
import torch
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Vectors of 16 bytes fit, or do not; one channel, fewer than a warp's, more than a tile's; several groups.
SHAPES = [
    (2, 64, 7, 7),
    (1, 1, 3, 5),
    (3, 3, 5, 7),
    (2, 130, 4, 3),
    (1, 16, 8, 8),
    (1, 520, 2, 4),
    (2, 32, 24, 48),
    (3, 2, 96, 100),
]
# What fits on the emulated chip: part of a tile; several groups; more tiles than blocks; several slices.
ON_CHIP = [
    ((2, 64, 7, 7), torch.channels_last),
    ((1, 16, 8, 8), torch.channels_last),
    ((2, 32, 24, 20), torch.channels_last),
    ((1, 200, 2, 4), torch.channels_last),
    ((2, 4, 12, 16), torch.contiguous_format),
    ((2, 5, 48, 48), torch.contiguous_format),
]
FIRST_SEED = 20240607


@pytest.fixture(params=[0, 1], ids=["two_launches", "on_chip"])
def each_way(request):
    """Training reads its tensors twice; or once, where they fit on the chip."""
    with emu.on_chip(request.param):
        yield


def random(shape, dtype, layout, generator, mean=0.3, std=1.5):
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
    return values.to(dtype).contiguous(memory_format=layout)


def shifted_storage(tensor):
    """The same tensor one element further on in memory: no vector of it is aligned."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


class Errors:
    """Squared errors of ours and of stock against float64, pooled over seeds: one draw is luck."""

    def __init__(self):
        self.ours, self.stock, self.exact = defaultdict(list), defaultdict(list), defaultdict(list)

    def add(self, name, ours, stock, exact, exact_of_stock):
        self.ours[name].append((ours.double() - exact).flatten())
        self.stock[name].append((stock.double() - exact_of_stock).flatten())
        self.exact[name].append(exact.flatten() * torch.finfo(ours.dtype).eps)

    def check(self):
        for name in self.ours:
            ours, stock, ulp = (rms(errors[name]) for errors in (self.ours, self.stock, self.exact))
            bound = 1.5 * stock if stock > 0 else ulp
            assert ours <= bound, (
                f"{name}: rms error {ours:.3e}, stock's {stock:.3e} (seeds from {FIRST_SEED} on)"
            )


def rms(values):
    return torch.cat(values).square().mean().sqrt().item()


class Case:
    """One batch norm's arguments, with what stock PyTorch makes of them in `dtype` and in float64."""

    def __init__(
        self, shape, dtype, layout, *, residual, relu=True, training=True, mean=0.3,
        parameters=torch.float32, seed=FIRST_SEED,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        channels = shape[1]
        self.relu, self.training = relu, training
        self.input = random(shape, dtype, layout, generator, mean=mean)
        self.grad = random(shape, dtype, layout, generator, mean=0.1, std=1.0)
        self.residual = random(shape, dtype, layout, generator) if residual else None
        self.weight, self.bias, self.running_mean = (
            torch.randn(channels, generator=generator).to(parameters) for _ in range(3)
        )
        self.running_var = (torch.rand(channels, generator=generator) + 0.5).to(parameters)

    def shift_storage(self):
        for name in ("input", "grad", "residual"):
            if getattr(self, name) is not None:
                setattr(self, name, shifted_storage(getattr(self, name)))

    def ours(self):
        running = self.running_mean.clone(), self.running_var.clone()
        arguments = {"relu": self.relu, "training": self.training}
        output, mean, rstd = emu.batch_norm(
            self.input, self.weight, self.bias, *running, residual=self.residual, **arguments
        )
        grads = emu.batch_norm_backward(
            self.grad, self.input, output if self.residual is not None else None, self.weight, self.bias,
            mean, rstd, grad_residual=self.residual is not None and self.relu, **arguments,
        )  # fmt: skip
        return {"output": output, "mean": running[0], "var": running[1]}, grads

    def stock(self, activation_dtype, parameter_dtype, mask):
        """Forward and gradients; a mask, where given, takes the place of the ReLU's own."""
        input = self.input.detach().to(activation_dtype).requires_grad_()
        weight, bias = (p.detach().to(parameter_dtype).requires_grad_() for p in (self.weight, self.bias))
        running = (
            self.running_mean.to(parameter_dtype).clone(),
            self.running_var.to(parameter_dtype).clone(),
        )
        normalized = F.batch_norm(input, *running, weight, bias, self.training)
        output = normalized if self.residual is None else normalized + self.residual.to(activation_dtype)
        output = torch.relu(output) if self.relu else output
        mask = (output > 0 if mask is None else mask) if self.relu else torch.ones_like(output)
        grad = self.grad.to(activation_dtype) * mask
        grads = torch.autograd.grad(normalized, (input, weight, bias), grad)
        forward = {"output": output.detach(), "mean": running[0], "var": running[1]}
        return forward, (grads[0], grad, *grads[1:])

    def add_errors(self, errors):
        ours, our_grads = self.ours()
        stock, stock_grads = self.stock(self.input.dtype, self.weight.dtype, None)
        exact, exact_grads = self.stock(torch.float64, torch.float64, ours["output"] > 0)
        _, exact_of_stock = self.stock(torch.float64, torch.float64, stock["output"] > 0)
        for name in ("output", "mean", "var"):
            errors.add(name, ours[name], stock[name], exact[name], exact[name])
        for i, name in ((0, "grad_input"), (2, "grad_weight"), (3, "grad_bias")):
            errors.add(name, our_grads[i], stock_grads[i], exact_grads[i], exact_of_stock[i])
        if our_grads[1] is not None:
            assert torch.equal(our_grads[1].double(), exact_grads[1]), (
                "grad_residual is not the masked gradient"
            )


def check(*args, prepare=lambda case: None, **options):
    errors = Errors()
    seeds = max(3, min(64, 8192 // math.prod(args[0])))
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        case = Case(*args, **options, seed=seed)
        prepare(case)
        case.add_errors(errors)
    errors.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_training_is_as_exact_as_stock(shape, layout, dtype, residual):
    check(shape, dtype, layout, residual=residual)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("shape, layout", ON_CHIP, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_training_on_chip_is_as_exact_as_stock(shape, layout, dtype, residual, blocks):
    before = emu.cooperative_launches()
    with emu.on_chip(blocks):
        check(shape, dtype, layout, residual=residual)
    assert emu.cooperative_launches() > before


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_evaluation_is_as_exact_as_stock(shape, layout, dtype, residual):
    check(shape, dtype, layout, residual=residual, training=False)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_activation(dtype, layout, training):
    check((2, 24, 5, 8), dtype, layout, residual=False, relu=False, training=training)


@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_memory(dtype, layout, residual):
    check((2, 32, 4, 8), dtype, layout, residual=residual, prepare=Case.shift_storage)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_half_precision(parameters, layout):
    check((3, 16, 6, 8), parameters, layout, residual=True, parameters=parameters)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mean_far_from_zero(layout):
    check((4, 32, 12, 12), torch.float32, layout, residual=False, mean=3e3)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("where", [(0, 0, 0), (3, 5, 5)], ids=["first", "inside"])
def test_outlier_spoils_no_statistics(layout, where):
    n, h, w = where
    check(
        (4, 16, 12, 12),
        torch.float32,
        layout,
        residual=False,
        prepare=lambda case: case.input[n, :, h, w].fill_(1e4),
    )


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_parameters_and_no_running_statistics(layout):
    generator = torch.Generator().manual_seed(FIRST_SEED)
    input, grad = (
        random((2, 12, 5, 4), torch.float32, layout, generator).requires_grad_() for _ in range(2)
    )
    output, mean, rstd = emu.batch_norm(input, None, None, None, None, relu=True, training=True)
    exact = F.batch_norm(input.double(), None, None, training=True)
    assert (output - exact.relu()).abs().max() < 1e-6
    grads = emu.batch_norm_backward(grad, input, None, None, None, mean, rstd, relu=True, training=True)
    expected = torch.autograd.grad(exact, input, grad.double() * (output > 0))[0]
    assert (grads[0] - expected).abs().max() < 1e-6


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_input_propagates_as_in_stock(value, layout, training):
    case = Case((2, 16, 6, 8), torch.float32, layout, residual=False, training=training)
    case.input[1, 3, 2, 5] = value
    case.input[0, 9, 0, 0] = value
    ours, our_grads = case.ours()
    stock, stock_grads = case.stock(torch.float32, torch.float32, None)
    assert torch.equal(ours["output"].isnan(), stock["output"].isnan())
    assert torch.equal(ours["output"].isinf(), stock["output"].isinf())
    assert torch.equal(ours["var"].isfinite(), stock["var"].isfinite())
    relu_passes = (
        torch.autograd.grad(torch.relu(stock["output"].requires_grad_()).sum(), stock["output"])[0] > 0
    )
    stock_grads = case.stock(torch.float32, torch.float32, relu_passes | stock["output"].isnan())[1]
    for ours_, stock_ in zip(
        (our_grads[0], *our_grads[2:]), (stock_grads[0], *stock_grads[2:]), strict=True
    ):
        assert torch.equal(ours_.isfinite(), stock_.isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_stops_where_the_output_was_stored_as_zero(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    factors = torch.tensor([0.25, 0.5, 0.50001, 1.0, -1.0, 0.0])
    weight = (factors.double() * smallest).float()
    input = torch.ones(1, 6, 1, 8, dtype=dtype)
    zeros, ones = torch.zeros(6), torch.ones(6)
    output, mean, rstd = emu.batch_norm(
        input, weight, zeros, zeros, ones, relu=True, training=False, eps=0.0
    )
    grad_bias = emu.batch_norm_backward(
        input, input, None, weight, zeros, mean, rstd, relu=True, training=False
    )[3]
    assert torch.equal(grad_bias > 0, output[0, :, 0, 0] > 0)
    assert (output[0, :, 0, 0] > 0).tolist() == [False, False, True, True, False, False]


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_bits_in_any_order_of_threads(layout):
    case = Case((2, 96, 17, 16), torch.bfloat16, layout, residual=True)
    first = case.ours()
    emu.set_schedule(descending=True)
    try:
        second = case.ours()
    finally:
        emu.set_schedule(descending=False)
    for a, b in zip([*first[0].values(), *first[1]], [*second[0].values(), *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape, layout, launches",
    [
        ((2, 64, 8, 8), torch.channels_last, 2),
        ((2, 4, 8, 8), torch.contiguous_format, 2),
        ((1, 520, 2, 4), torch.channels_last, 2),  # more tiles than blocks
        (
            (2, 32, 24, 48),
            torch.channels_last,
            1,
        ),  # 288 kB: one tensor fits, the backward pass's two do not
        ((4, 32, 24, 48), torch.channels_last, 0),
        ((2, 30, 8, 8), torch.channels_last, 0),  # no whole vectors
    ],
    ids=str,
)
def test_one_launch_where_all_fits_on_the_chip(shape, layout, launches):
    before = emu.cooperative_launches()
    with emu.on_chip(1):
        Case(shape, torch.float32, layout, residual=False).ours()
    assert emu.cooperative_launches() - before == launches
    Case(shape, torch.float32, layout, residual=False).ours()
    assert emu.cooperative_launches() - before == launches


def test_launches_overlap_where_that_is_asked_for():
    case = Case((2, 64, 8, 8), torch.float32, torch.channels_last, residual=True)
    before = emu.overlapping_launches()
    case.ours()
    assert emu.overlapping_launches() - before == 6  # three forward, three backward
    emu.overlap_launches(False)
    try:
        case.ours()
    finally:
        emu.overlap_launches(True)
    assert emu.overlapping_launches() - before == 6


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_card_that_holds_fewer_blocks_launches_twice(blocks):
    case = Case((2, 64, 8, 8), torch.float32, torch.channels_last, residual=True)
    emu.hold_blocks(blocks)
    try:
        before = emu.cooperative_launches()
        with emu.on_chip(1):
            case.add_errors(errors := Errors())
        assert emu.cooperative_launches() == before
    finally:
        emu.hold_blocks(4)
    errors.check()


def test_blocks_a_multiprocessor_have_a_bound():
    with pytest.raises(RuntimeError, match="blocks_a_multiprocessor is 3, expected 0 to 2"):
        emu.use_on_chip(3)


def test_empty_batch():
    input = torch.empty(0, 8, 4, 4)
    mean, var = torch.ones(8), torch.full((8,), 4.0)
    _, save_mean, save_rstd = emu.batch_norm(
        input, None, None, mean, var, relu=True, training=False, eps=0.0
    )
    assert torch.equal(save_mean, mean) and torch.equal(save_rstd, torch.full((8,), 0.5))
    grads = emu.batch_norm_backward(
        input, input, None, None, None, save_mean, save_rstd, relu=True, training=False
    )
    assert torch.equal(grads[2], torch.zeros(8)) and torch.equal(grads[3], torch.zeros(8))


def test_float64_is_refused():
    input = torch.zeros(1, 8, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64 activations, expected float32, bfloat16 or float16"):
        emu.batch_norm(input, None, None, None, None, relu=True, training=True)
    with pytest.raises(RuntimeError, match="weight is float64"):
        emu.batch_norm(
            input.float(), torch.ones(8, dtype=torch.float64), None, None, None, relu=True, training=True
        )


TENSORS = ["input", "residual", "grad", "output", "grad_input", "grad_residual"]


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tensor", TENSORS)
def test_a_single_tensor_that_is_not_aligned(tensor, layout):
    def results(shift: bool):
        case = Case((2, 16, 8, 8), torch.bfloat16, layout, residual=True)
        if shift and hasattr(case, tensor):
            setattr(case, tensor, shifted_storage(getattr(case, tensor)))
        with emu.shifted(tensor if shift else ""):
            forward, grads = case.ours()
        return *forward.values(), *grads

    for ours, aligned in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(ours, aligned)


@pytest.mark.parametrize("tensor", ["input", "other", "output", "grad", "grad_input"])
def test_a_single_tensor_of_add_relu_that_is_not_aligned(tensor):
    tensors = {name: torch.randn(4096) for name in ("input", "other", "grad")}
    if tensor in tensors:
        tensors[tensor] = shifted_storage(tensors[tensor])
    with emu.shifted(tensor):
        output = emu.add_relu(tensors["input"], tensors["other"])
        grad_input = emu.add_relu_backward(tensors["grad"], output)
    assert torch.equal(output, torch.relu(tensors["input"] + tensors["other"]))
    assert torch.equal(grad_input, tensors["grad"] * (output > 0))


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("size", [1, 7, 8, 255, 4097, 50001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_equals_stock(dtype, size, aligned):
    generator = torch.Generator().manual_seed(FIRST_SEED)
    tensors = [torch.randn(size, generator=generator).to(dtype) for _ in range(3)]
    tensors[0][size // 2] = torch.nan
    input, other, grad = tensors if aligned else map(shifted_storage, tensors)
    output = emu.add_relu(input, other)
    stock = torch.relu(input + other).requires_grad_()
    assert torch.equal(output.nan_to_num(7), stock.detach().nan_to_num(7))
    expected = torch.autograd.grad(torch.relu(stock), stock, grad)[0]
    assert torch.equal(emu.add_relu_backward(grad, output), expected)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_made_again_is_the_same_to_the_bit(dtype, layout, with_residual):
    generator = torch.Generator().manual_seed(FIRST_SEED)
    for shape in SHAPES[:4]:
        input = random(shape, dtype, layout, generator)
        residual = random(shape, dtype, layout, generator) if with_residual else None
        weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
        output, mean, rstd = emu.batch_norm(
            input, weight, bias, None, None, residual=residual, relu=True, training=True
        )
        again = emu.batch_norm_again(input, weight, bias, mean, rstd, residual=residual, relu=True)
        assert torch.equal(output, again)
