"""Several forward passes before their backward passes, and parameters that change between: as in stock."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres import fuse, kernels


@pytest.fixture(autouse=True, params=[True, False], ids=["few_values_composed", "all_by_kernels"])
def small_and_large(request, few_values, monkeypatch):
    """With the usual number of values up to which PyTorch's own operations run, or none."""
    monkeypatch.setattr(kernels, "few_values", few_values if request.param else 0)


LAYOUTS = [torch.channels_last, torch.contiguous_format]


def both(make, layout):
    """A stock model and the same one fused."""
    stock = make().to(memory_format=layout)
    return stock, fuse(copy.deepcopy(stock))


def assert_same(stock, ours, tolerance=1e-3):
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            scale = a.grad.abs().max().clamp_min(1e-3).item()
            torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=0, atol=tolerance, msg=name)
    for (name, a), (_, b) in zip(stock.named_buffers(), ours.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn, self.pool = nn.BatchNorm2d(32), nn.MaxPool2d(2)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.conv(x))))
        return F.relu(self.bn2(self.conv2(x)) + x)


def images(layout, batch, size):
    return torch.randn(batch, 3, size, size).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_sizes(layout):
    """Crops of several sizes, whose losses are added."""
    models_ = both(Layers, layout)
    small, large = images(layout, 2, 12), images(layout, 4, 64)
    for model in models_:
        (model(small).square().mean() + model(large).square().mean() + model(small).mean()).backward()
    assert_same(*models_)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_evaluation_then_training(layout):
    models_ = both(Layers, layout)
    small, large = images(layout, 2, 12), images(layout, 4, 64)
    for model in models_:
        # Stock's evaluation computes its gradient by the statistics that training has updated since.
        with torch.no_grad():
            target = model.eval()(large)
        (model.train()(large) - target).square().mean().backward()
        model(small)
    assert_same(*models_)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_biases_that_are_updated_between(layout, training):
    """Stock keeps no bias for the backward pass."""
    models_ = both(Layers, layout)
    inputs = [images(layout, 4, 48) for _ in range(2)]
    for model in models_:
        model.train(training).requires_grad_(False)
        biases = [model.bn.bias, model.bn2.bias]
        for bias in biases:
            bias.requires_grad_()
        optimizer = torch.optim.SGD(biases, 0.5)
        losses = [model(input).square().mean() for input in inputs]
        losses[0].backward()
        optimizer.step()
        losses[1].backward()
    assert_same(*models_)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_whole_network(layout, torchvision):
    models_ = both(lambda: torchvision.models.resnet18(num_classes=10), layout)
    inputs = images(layout, 2, 64), images(layout, 2, 96)
    for model in models_:
        sum(model(input).square().mean() for input in inputs).backward()
    assert_same(*models_, tolerance=2e-2)
