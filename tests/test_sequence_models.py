"""Models in sequences that do more than compute: stock's numbers from the first call on."""

import copy

import pytest
import torch
from sequencing import Uses, images, randomized
from torch import nn

import fastres
from fastres import _C

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor"),
]


def assert_calls_equal(stock, model, *inputs):
    for given in (stock, model):
        torch.manual_seed(0)
        given.outputs = [given(input) for input in inputs]
    for ours, expected in zip(model.outputs, stock.outputs, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def both(stock):
    """The model and its copy in sequences, in evaluation."""
    stock = randomized(stock).eval()
    return stock, fastres.optimize_for_inference(copy.deepcopy(stock))


def of_parts(*between):
    return nn.Sequential(Uses("sum"), *between, Uses("sum"))


@torch.no_grad()
def test_a_norm_that_is_adapted_counts_each_call_once(ran):
    stock, model = both(nn.Sequential(Uses("sum"), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)))
    for given in (stock, model):
        given[2].train()
    input = images(channels=32)
    assert_calls_equal(stock, model, input, input, input)
    assert ran
    assert model[2].num_batches_tracked == stock[2].num_batches_tracked == 3
    torch.testing.assert_close(model[2].running_mean, stock[2].running_mean)


class Remembers(nn.Module):
    """Half of this input and half of the one before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("before", torch.zeros(2, 32, 32, 32))

    def forward(self, x):
        mean = (x + self.before) / 2
        with torch.no_grad():
            self.before.copy_(x)
        return mean


@torch.no_grad()
@pytest.mark.parametrize("part", [Remembers, lambda: nn.Dropout(0.5)], ids=["state", "dropout"])
def test_no_call_runs_twice(part, ran):
    stock, model = both(of_parts(part()))
    for given in (stock, model):
        given[1].train()
    assert_calls_equal(stock, model, *(images(channels=32) for _ in range(4)))
    assert ran


class Crop(nn.Module):
    """To what is not zero, which the input's shape does not tell."""

    def forward(self, x):
        return x[..., : int((x.abs().amax((0, 1, 2)) > 0).sum())]


@torch.no_grad()
def test_an_activation_is_cropped(ran):
    stock, model = both(nn.Sequential(Crop(), Uses("sum")))
    input = images(channels=32)
    narrow = input.clone()
    narrow[..., 20:] = 0
    assert_calls_equal(stock, model, input, input, narrow, input, narrow)
    assert ran


class OfPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = Uses("sum"), nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.body(x.float() / 255).mean((2, 3)))


@torch.no_grad()
@pytest.mark.skipif(not _C.convolves("bfloat16"), reason="the processor has no bf16 convolutions of ours")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
def test_linear_layers_are_cast_as_autocast_says(dtype, ran):
    stock, model = both(OfPixels())
    pixels = (torch.rand(2, 32, 16, 16) * 255).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected, *ours = stock(pixels), model(pixels), model(pixels)
    assert ran
    for output in ours:
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


class Scaled(Uses):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


@torch.no_grad()
def test_an_attribute_of_the_class_changes(ran, monkeypatch):
    stock, model = both(Scaled("sum"))
    input = images(channels=32)
    assert_calls_equal(stock, model, input, input)
    for scale in (3.0, 5.0):
        monkeypatch.setattr(Scaled, "scale", scale)
        ran.clear()
        assert_calls_equal(stock, model, input, input, input)
        assert ran  # by then in sequences again
