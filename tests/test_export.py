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
CASES = [(kind, "train", True, 64) for kind in ("fuse", "frozen")]
CASES += [(kind, "eval", True, size) for kind in MAKE for size in (17, 64)]
CASES += [("fuse", mode, False, 64) for mode in ("train", "eval")]


@pytest.mark.parametrize("kind, mode, grad, size", CASES)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_any_number_of_images(kind, mode, grad, size, strict, few_values, monkeypatch):
    monkeypatch.undo()  # the usual rule of few values
    stock = model().train(mode == "train")
    fused = MAKE[kind](stock)
    images, shapes = channels_last(torch.randn(4, 3, size, size)), ({0: Dim("batch", min=2, max=64)},)
    with torch.set_grad_enabled(grad):
        exported = export(fused, (images,), dynamic_shapes=shapes, strict=strict)
        for batch in (2, 7, 64):
            images = channels_last(torch.randn(batch, 3, size, size))
            expected = copy.deepcopy(stock)(images)
            torch.testing.assert_close(exported.module()(images), expected, rtol=1e-3, atol=1e-3)
