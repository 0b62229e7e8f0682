"""torch.export of fused models, with any number of images."""

import copy

import pytest
import torch
from layers import channels_last
from torch import nn
from torch.export import Dim, export

import fastres


def model():
    few = nn.Sequential(nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    many = nn.Sequential(nn.Conv2d(16, 64, 3, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    last = nn.Sequential(nn.Conv2d(64, 64, 3, 2), nn.BatchNorm2d(64))
    blocks = fastres.nn.BasicBlock(64, 64), fastres.nn.BasicBlock(64, 64)
    return nn.Sequential(few, many, *blocks, last)


MAKE = {
    "fuse": fastres.fuse,
    "frozen": lambda model: fastres.fuse(model).requires_grad_(False),
    "optimize_for_inference": fastres.optimize_for_inference,
}


@pytest.mark.parametrize("size", [64, 17])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_any_number_of_images(make, strict, grad, training, size, few_values, monkeypatch):
    monkeypatch.undo()  # the usual rule of few values
    stock = model().train(training)
    fused = make(stock)
    if fused.training != training:
        pytest.skip("optimize_for_inference() is for inference")
    images = channels_last(torch.randn(4, 3, size, size))
    with torch.set_grad_enabled(grad):
        exported = export(
            fused, (images,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},), strict=strict
        )
        for batch in (2, 7, 64):
            images = channels_last(torch.randn(batch, 3, size, size))
            expected = copy.deepcopy(stock)(images)
            torch.testing.assert_close(exported.module()(images), expected, rtol=1e-3, atol=1e-3)
