"""Gradients with tangents, or in batches, of graphs that were recorded as usual."""

import pytest
import torch
from blocks import in_stock
from layers import channels_last
from torch import nn
from torch.autograd import forward_ad

from fastres.nn import BasicBlock, BnAddReLU2d, BnReLU2d, Bottleneck, ConvBn2d, ConvBnReLU2d
from fastres.sites import add_act, conv_bn_act

pytestmark = pytest.mark.usefixtures("few_values", "small_layers", "one_thread")


class Sum(nn.Module):
    def forward(self, x):
        return add_act(nn.ReLU(), x, x * 0.5)


class WithResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = BnAddReLU2d(32)

    def forward(self, x):
        return self.bn(x, x * 0.5)


class Stem(nn.Module):
    """Of a convolution that is PyTorch's, for its small groups."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, groups=16, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return conv_bn_act(self.conv, self.bn, self.act, x, relu=True, pool=self.pool)


MODULES = {
    "bn_relu": lambda: BnReLU2d(32),
    "bn_relu, evaluation": lambda: BnReLU2d(32).eval(),
    "bn_add_relu": WithResidual,
    "add_relu": Sum,
    "conv_bn_relu": lambda: ConvBnReLU2d(32, 48, 3, padding=1, bias=False),
    "stem": Stem,
    "basic block": lambda: BasicBlock(32, 32),
    "bottleneck": lambda: Bottleneck(32, 32, 2, ConvBn2d(32, 128, 1, 2, bias=False)),
}


def tangent(output, leaves, grads):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(*grads)
        made = torch.autograd.grad(output, leaves, dual)
        return [part for gradient in made for part in forward_ad.unpack_dual(gradient)]


def batched(output, leaves, grads):
    return torch.autograd.grad(output, leaves, grads, is_grads_batched=True)


def mapped(output, leaves, grads):
    return torch.vmap(lambda grad: torch.autograd.grad(output, leaves, grad))(grads)


@pytest.mark.parametrize("ask", [tangent, batched, mapped])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_gradients_equal_stock(make, ask):
    module = make()
    input = channels_last(torch.randn(4, 32, 9, 8))
    made, nodes = [], []
    for call in (lambda m, x: m(x), in_stock):
        leaves = [input.clone().requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
        output = call(module, leaves[0] + 0)
        nodes.append(output.grad_fn.name())
        generator = torch.Generator().manual_seed(0)
        grads = torch.randn(2, *output.shape, generator=generator)
        made.append(ask(output, leaves, grads))
    assert nodes[0] != nodes[1]
    for ours, stock in zip(*made, strict=True):
        assert (ours is None) == (stock is None)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * stock.abs().max().item())
