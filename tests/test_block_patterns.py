"""Residual blocks that fuse() finds in other people's models, and what it leaves as it is."""

import copy

import pytest
import torch
from blocks import assert_equal, by_layers, calls_of, is_one, run
from layers import channels_last
from torch import nn
from torch.nn import functional as F

import fastres

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("client, arch, blocks, layers", [
    ("torchvision", "resnet18", 8, 0),
    ("torchvision", "resnext50_32x4d", 16, 0),
    ("timm", "resnet50", 16, 0),
    ("timm", "resnet26d", 4, 4 * 4 + 1),  # the other shortcuts begin with an average or an nn.Identity
])  # fmt: skip
def test_fused_blocks_of_clients(client, arch, blocks, layers, request):
    package = request.getfixturevalue(client)
    make = package.create_model if client == "timm" else lambda name: getattr(package.models, name)()
    model = fastres.fuse(make(arch)).train()
    images = channels_last(torch.randn(2, 3, 64, 64))
    calls = calls_of(model, images)
    assert (calls["_ResidualBlock"], calls.get("_ConvBnAct", 0)) == (blocks, layers)
    ours, _ = run(model, images)
    expected, _ = run(model, images, call=by_layers)
    assert_equal(ours, expected)


class Block(nn.Module):
    """A block as its users write it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.shortcut = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.nothing = nn.Identity()


class ShortcutFirst(Block):
    def forward(self, x):
        identity = self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(self.nothing(x))) + identity)


class NothingFirst(Block):
    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(self.nothing(x)))))))


class ShortcutLast(Block):
    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu_(out)


class Identical(Block):
    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(self.nothing(F.relu(self.bn1(self.conv1(x)))))))


class BranchUsedTwice(Block):
    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + x) + inner


class ShortcutUsedTwice(Block):
    def forward(self, x):
        shortcut = self.shortcut(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut) * shortcut


class SomethingBetween(Block):
    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        half = x * 0.5
        return F.relu(self.bn2(self.conv2(inner)) + x) - half


class ShortcutOfTheBranch(Block):
    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(inner))


def order_of_calls(block, x) -> list[str]:
    names, order = {module: name for name, module in block.named_modules()}, []
    for module in block.modules():
        if module is not block:
            module.register_forward_hook(lambda module, *_: order.append(names[module]))
    block(x)
    return order


@pytest.mark.parametrize("kind, one", [
    (ShortcutFirst, True), (ShortcutLast, True), (Identical, True), (NothingFirst, True),
    (BranchUsedTwice, False), (ShortcutUsedTwice, False), (SomethingBetween, False),
    (ShortcutOfTheBranch, False),
])  # fmt: skip
def test_blocks_as_users_write_them(kind, one):
    stock = kind().train()
    fused, x = fastres.fuse(stock), channels_last(torch.randn(4, 32, 11, 12))
    assert calls_of(fused, x).get("_ResidualBlock", 0) == one
    ours, _ = run(fused, x)
    expected, _ = run(fused, x, call=by_layers)
    assert_equal(ours, expected)
    assert order_of_calls(copy.deepcopy(fused), x) == order_of_calls(copy.deepcopy(stock), x)


def test_a_hook_on_what_is_left_out_is_heard():
    block, calls = fastres.fuse(Identical().train()), []
    x = channels_last(torch.randn(4, 32, 11, 12))
    block.nothing.register_forward_hook(lambda *_: calls.append(None))
    assert not is_one(block(x)) and calls == [None]
