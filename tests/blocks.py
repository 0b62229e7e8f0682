"""Residual blocks for the tests, and how they are run: as they are, layer by layer, in stock PyTorch."""

import copy

import pytest
import torch
from layers import FLOAT32, channels_last
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastres import sites
from fastres.nn import BasicBlock, Bottleneck, ConvBn2d

KINDS = {
    "basic": lambda: BasicBlock(64, 64),
    "basic, projected": lambda: BasicBlock(64, 96, 2, ConvBn2d(64, 96, 1, 2, bias=False)),
    "bottleneck": lambda: Bottleneck(128, 32),
    "bottleneck, projected": lambda: Bottleneck(64, 32, 2, ConvBn2d(64, 128, 1, 2, bias=False)),
    "bottleneck, groups": lambda: Bottleneck(128, 64, 1, ConvBn2d(128, 256, 1, bias=False), 16, 8),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def made(make, precision=FLOAT32):
    block = make().train()
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
        elif isinstance(bn, nn.Conv2d):
            bn.to(precision.weights)
    channels = block.conv1.in_channels
    return block, channels_last(torch.randn(4, channels, 9, 10).to(precision.activations))


def is_one(output: torch.Tensor) -> bool:
    return output.grad_fn is not None and "_ResidualBlock" in output.grad_fn.name()


def run(block, input, precision=FLOAT32, call=None, needs_input=True):
    """Output, gradients and buffers of a copy, and whether it ran as one node."""
    block = copy.deepcopy(block)
    leaf = input.clone().requires_grad_(needs_input)
    with precision.context():
        output = (call or (lambda block, x: block(x)))(
            block, leaf + 0
        )  # no leaf, whose gradients do not meet
    generator = torch.Generator().manual_seed(0)
    if output.requires_grad:
        grad = torch.randn(output.shape, generator=generator).to(output.dtype)
        output.backward(channels_last(grad) if grad.dim() == 4 else grad)
    values = {"output": output.detach(), "gradient of input": leaf.grad}
    values |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return values | dict(block.named_buffers()), is_one(output)


def by_layers(block, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "_as_one", lambda *_: None)
        return block(x)


def in_stock(block, x):
    with sites.stock():
        return block(x)


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        same = value is expected[name] if value is None else torch.equal(value, expected[name])
        assert same, name


def calls_of(model, images) -> dict[str, int]:
    """How often a forward called each op or autograd function."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(images)
    return {event.key: event.count for event in profiled.key_averages()}
