"""What a sum in place is written to: memory of its own when fuse() ran, which it may not stay."""

import copy

import pytest
import torch
from torch import nn

import fastres
from fastres.fuse import is_fused


class MayPassOn(nn.Module):
    """A DropPath: in evaluation its argument itself."""

    def forward(self, x):
        return x * 1.5 if self.training else x


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x)


class Within(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


class Block(nn.Module):
    """Gives its argument as well, to which the sum is written where `pre` passes that on."""

    def __init__(self, pre):
        super().__init__()
        self.pre, self.conv, self.bn = pre, nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)

    def forward(self, x):
        y = self.pre(x)
        y += self.bn(self.conv(x))
        return torch.relu(y), x


def same(fused, stock):
    x = torch.randn(4, 32, 9, 9)
    with torch.no_grad():
        for ours, theirs in zip(fused(x.clone()), stock(x.clone()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", [lambda part: part, Within], ids=["itself", "within"])
def test_a_part_that_passes_its_argument_on_in_one_mode(training, wrap):
    stock = Block(wrap(MayPassOn())).train(training)
    fused = fastres.fuse(copy.deepcopy(stock))
    for mode in (training, not training, training):
        same(fused.train(mode), stock.train(mode))
    # Of this part alone the mode is another than the block's.
    fused.pre.train(not training), stock.pre.train(not training)
    same(fused, stock)


class PassesOn(nn.ReLU):
    def forward(self, x):
        return x


def conv():
    return nn.Conv2d(32, 32, 1)


CHANGES = {
    "another module": (conv, lambda block: setattr(block, "pre", nn.Identity())),
    "in place": (nn.ReLU, lambda block: setattr(block.pre, "inplace", True)),
    "another class": (nn.ReLU, lambda block: setattr(block, "pre", PassesOn())),
    "in a container": (lambda: nn.Sequential(conv()), lambda b: setattr(b.pre, "0", nn.Identity())),
    "in a module": (lambda: Within(conv()), lambda block: setattr(block.pre, "part", nn.Identity())),
    "a forward of its own": (conv, lambda block: setattr(block.pre, "forward", lambda x: x)),
}


@pytest.mark.parametrize("make, change", CHANGES.values(), ids=CHANGES)
def test_a_part_that_comes_to_pass_its_argument_on(make, change):
    stock = Block(make())
    fused = fastres.fuse(copy.deepcopy(stock))
    assert is_fused(fused)
    same(fused, stock)
    change(fused), change(stock)
    same(fused, stock)


@pytest.mark.parametrize("make", [Scales, conv, lambda: Within(conv())], ids=["scales", "conv", "within"])
def test_what_a_hook_keeps_is_written_to_as_before(make):
    stock = Block(make())
    fused = fastres.fuse(copy.deepcopy(stock))
    kept = {}
    for model in (fused, stock):
        model.pre.register_forward_hook(lambda _, args, output, model=model: kept.update({model: output}))
    same(fused, stock)
    torch.testing.assert_close(kept[fused], kept[stock], rtol=1e-4, atol=1e-4)


def test_a_sum_on_what_a_part_made_stays_fused():
    x = torch.randn(4, 32, 48, 48)
    explained = fastres.explain(fastres.fuse(Block(Scales())), x)
    assert "add_relu" in str(explained)
