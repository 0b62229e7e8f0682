"""fuse() on other libraries' models: the same numbers, and fused."""

import importlib

import pytest
import torch
from fusing import DTYPE, images, ran, same
from torch import nn

from fastres.fuse import fuse, unfuse
from fastres.inference import optimize_for_inference

# 64x64 pixels are 2x2 at the end: with fewer, batch norm there amplifies rounding errors beyond the bound.


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision_is_fused_and_computes_the_same(torchvision, name):
    stock = getattr(torchvision.models, name)().to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(size=64))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules())
    assert len(ran(fused, images())) == norms  # each batch norm is in a chain of its own


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet26d", "resnet10t"])
def test_timm_is_fused_and_computes_the_same(timm, name):
    stock = timm.create_model(name).to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(size=64))
    assert len(ran(fused, images())) == sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules())


@pytest.mark.parametrize("name", ["seresnet18", "resnetblur18"])
def test_timm_models_that_are_recognised_in_part_compute_the_same(timm, name):
    stock = timm.create_model(name).to(DTYPE)
    same(stock, fuse(stock), images(size=64))


def test_timm_drop_path_keeps_its_random_numbers(timm):
    stock = timm.create_model("resnet18", drop_path_rate=0.5, drop_block_rate=0.1).to(DTYPE)
    same(stock, fuse(stock), images(size=64))


def test_timm_grad_checkpointing_switched_on_after_fuse(timm):
    stock = timm.create_model("resnet18").to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.set_grad_checkpointing(True)
    same(stock, fused, images())


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers_is_fused_and_computes_the_same(transformers, layer_type):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=layer_type, num_labels=5
    )
    stock = transformers.ResNetForImageClassification(config).to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(size=64))
    assert len(ran(fused, images())) == sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules())


@pytest.mark.parametrize("change", [fuse, unfuse, optimize_for_inference])
def test_a_feature_extractor_stays_in_evaluation(torchvision, change):
    """torchvision's, a torch.fx GraphModule of a class whose copies are in training mode."""
    nodes = {"layer1.0.relu": "first", "layer2": "second"}
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    stock = extraction.create_feature_extractor(torchvision.models.resnet18().eval(), nodes)
    changed, input = change(stock), torch.randn(2, 3, 64, 64)
    assert not any(module.training for module in changed.modules())
    with torch.no_grad():
        torch.testing.assert_close(changed(input), stock(input), rtol=1e-4, atol=1e-4)
