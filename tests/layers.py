"""conv_bn_relu layers for the tests: stock PyTorch's, what goes into one, and how both are compared."""

import contextlib
from typing import NamedTuple

import torch
from accuracy import FACTOR, rms
from torch.nn import functional as F

from fastres import _C, ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LEARNED = ("input", "weight", "residual", "bn_weight", "bn_bias")


def units() -> list[tuple[str, str]]:
    """Instruction sets and the dtypes that each has convolutions of, of its own."""
    before, found = _C.cpu_isa(), []
    for isa in _C.cpu_isas():
        _C.select_cpu_isa(isa)
        dtypes = ["bfloat16"] if isa in ("avx512_bf16", "avx512_amx") else DTYPES
        found += [(isa, dtype) for dtype in dtypes if _C.convolves(dtype)]
    _C.select_cpu_isa(before)
    return found


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, its storage resized as offloading does it."""
    tensor.untyped_storage().resize_(0)
    return tensor


def is_node(output: torch.Tensor) -> bool:
    return output.grad_fn is not None and "_ConvBnAct" in output.grad_fn.name()


def conv_bn_relu(
    input, weight, running_mean, running_var, bn_weight=None, bn_bias=None, *, residual=None,
    conv_bias=None, stride=1, padding=0, dilation=1, groups=1, training=False, momentum=0.1, eps=1e-5,
    activation="relu",
):  # fmt: skip
    """By PyTorch's ops."""
    output = F.conv2d(input, weight, conv_bias, stride, padding, dilation, groups)
    output = F.batch_norm(output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    output = output if residual is None else output + residual
    return F.relu(output) if activation else output


def assert_accurate(name: str, fused, stock, reference) -> None:
    """Root mean square error of `fused` within FACTOR of stock's, or of the rounded reference's."""
    assert fused.dtype == stock.dtype and fused.shape == stock.shape, name
    reference = reference.detach()
    error, theirs, floor = (
        rms(value.detach().double() - reference) for value in (fused, stock, reference.to(stock.dtype))
    )
    bound = FACTOR * max(theirs, floor)
    assert error <= bound, f"{name}: error {error:.3e}, stock's {theirs:.3e}, bound {bound:.3e}"


class Precision(NamedTuple):
    activations: torch.dtype
    weights: torch.dtype
    autocast: bool

    @property
    def convolves(self) -> bool:
        return _C.convolves(str(self.activations).removeprefix("torch."))

    def context(self):
        return torch.autocast("cpu", self.activations, enabled=self.autocast)


FLOAT32 = Precision(torch.float32, torch.float32, False)
PRECISIONS = {
    "float32": FLOAT32,
    "bfloat16-autocast": Precision(torch.bfloat16, torch.float32, True),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, False),
    "float16": Precision(torch.float16, torch.float16, False),
}


class Case:
    """A layer with all that goes into it, of values that `precision` holds; `run` computes it."""

    def __init__(
        self, precision=FLOAT32, residual=True, kernel=3, channels=(32, 64), image=(17, 15), batch=8, **by
    ):
        self.precision, self.by = precision, dict(stride=1, padding=kernel // 2, training=True) | by
        self.by |= dict(momentum=0.3, eps=1e-3)
        of_group = channels[0] // self.by.get("groups", 1)
        self.values = {
            "input": channels_last(torch.randn(batch, channels[0], *image).to(precision.activations)),
            "weight": torch.randn(channels[1], of_group, kernel, kernel) / (of_group**0.5 * kernel),
            "bn_weight": torch.rand(channels[1]) + 0.5,
            "bn_bias": torch.randn(channels[1]),
            "running_mean": torch.randn(channels[1]),
            "running_var": torch.rand(channels[1]) + 0.5,
        }
        self.values["weight"] = self.values["weight"].to(precision.weights)
        size = F.conv2d(self.values["input"].float(), self.values["weight"].float(), **self.geometry).shape
        if residual:
            self.values["residual"] = channels_last(torch.randn(size).to(precision.activations))
        self.grad = channels_last(torch.randn(size).to(precision.activations))

    @property
    def geometry(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: value for name, value in self.by.items() if name in names}

    def keep_off_the_kink(self) -> None:
        """Let no gradient come from where the ReLU's mask is a matter of rounding."""
        values = {name: value.double() for name, value in self.values.items()}
        products = F.conv2d(values["input"], values["weight"], **self.geometry)
        output = conv_bn_relu(**values, **self.by | dict(activation=None))
        scale = (products.var((0, 2, 3), keepdim=True, unbiased=False) + self.by["eps"]).rsqrt()
        if "bn_weight" in values:
            scale = scale * values["bn_weight"].view(1, -1, 1, 1)
        largest = (products * scale).abs().amax((0, 2, 3), keepdim=True)
        largest += output.abs().amax((0, 2, 3), keepdim=True)
        # Both are rounded to half of eps at the most: this is eight times as much.
        margin = 4 * torch.finfo(self.precision.activations).eps * largest
        self.grad[output.abs() < margin] = 0

    def leaves(self, double: bool = False, wanted=LEARNED) -> dict[str, torch.Tensor]:
        return {
            name: (value.double() if double else value.clone()).requires_grad_(name in wanted)
            for name, value in self.values.items()
        }

    def run(self, function, double: bool = False, wanted=LEARNED) -> dict[str, torch.Tensor]:
        leaves = self.leaves(double, wanted)
        with contextlib.nullcontext() if double else self.precision.context():
            output = function(**leaves, **self.by)
        if function is ops.conv_bn_relu and not double:
            expected = self.precision.convolves and any(name in wanted for name in self.values)
            assert is_node(output) == expected
        if output.requires_grad:
            output.backward(self.grad.to(output.dtype))
        gradients = {f"gradient of {n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        return {"output": output, **gradients, **{n: leaves[n] for n in ("running_mean", "running_var")}}

    def check(self) -> None:
        if self.by.get("activation", "relu"):
            self.keep_off_the_kink()
        fused, stock = self.run(ops.conv_bn_relu), self.run(conv_bn_relu)
        reference = self.run(conv_bn_relu, double=True)
        assert fused.keys() == stock.keys() == reference.keys()
        for name in fused:
            assert_accurate(name, fused[name], stock[name], reference[name])
