"""Residual blocks that fuse() finds in other people's models, and what it leaves as it is."""

import copy

import pytest
import torch
from blocks import assert_equal, by_layers, calls_of, is_one, run
from layers import channels_last
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import _C
from fastres.models.by_name import build

pytestmark = pytest.mark.usefixtures("one_thread")

# AVX2 has no kernels for the groups of the last stage, of 32 channels.
HAS_WIDE_GROUPS = _C.convolves("float32", 1024, 1024, 32)
RESNEXT, RESNEXT_ON_AVX2 = (16, 0), (13, 3 * 2 + 1)


@pytest.mark.parametrize("client, arch, blocks, layers", [
    ("torchvision", "resnet18", 8, 0),
    ("torchvision", "resnext50_32x4d", *(RESNEXT if HAS_WIDE_GROUPS else RESNEXT_ON_AVX2)),
    ("timm", "resnet50", 16, 0),
    ("timm", "resnet26d", 5, 3 * 4 + 1),  # the other shortcuts begin with an average
    ("torchvision", "regnet_x_400mf", 22, 0),
    ("transformers", "resnet-26", 8, 0),
])  # fmt: skip
def test_fused_blocks_of_clients(client, arch, blocks, layers, request):
    request.getfixturevalue(client)
    model = fastres.fuse(build(f"{client}:{arch}")).train()
    if client == "transformers":
        model = Logits(model)
    images = channels_last(torch.randn(2, 3, 64, 64))
    calls = calls_of(model, images)
    assert (calls["_ResidualBlock"], calls.get("_ConvBnAct", 0)) == (blocks, layers)
    ours, _ = run(model, images)
    expected, _ = run(model, images, call=by_layers)
    assert_equal(ours, expected)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


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


class Layer(nn.Module):
    def __init__(self, size, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, size, padding=size // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(32), nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class InContainers(nn.Module):
    def __init__(self, shortcut=None):
        super().__init__()
        self.body = nn.Sequential(Layer(1), nn.Sequential(Layer(3), Layer(1, relu=False)))
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ProjectedInContainers(InContainers):
    def __init__(self):
        super().__init__(Layer(1, relu=False))


class ProjectedFirst(ProjectedInContainers):
    def forward(self, x):
        shortcut = self.shortcut(x)
        shortcut += self.body(x)
        return F.relu(shortcut)


class InOneForward(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        conv, bn = self.shortcut
        return F.relu(out + bn(conv(x)))


class NothingBeforeAndAfter(Block):
    def __init__(self):
        super().__init__()
        self.shortcut.insert(0, nn.Identity())
        self.shortcut.append(nn.Identity())

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class MoreInAContainer(InContainers):
    def __init__(self):
        super().__init__()
        self.body[0] = nn.Sequential(self.body[0], nn.Sigmoid())


class ActiveShortcut(InContainers):
    def __init__(self):
        super().__init__(Layer(1))


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
    (ShortcutOfTheBranch, False), (InContainers, True), (ProjectedInContainers, True),
    (ProjectedFirst, True), (InOneForward, True), (NothingBeforeAndAfter, True), (MoreInAContainer, False),
    (ActiveShortcut, False),
])  # fmt: skip
def test_blocks_as_users_write_them(kind, one):
    stock = kind().train()
    fused, x = fastres.fuse(stock), channels_last(torch.randn(4, 32, 11, 12))
    assert calls_of(fused, x).get("_ResidualBlock", 0) == one
    ours, _ = run(fused, x)
    expected, _ = run(fused, x, call=by_layers)
    assert_equal(ours, expected)
    assert order_of_calls(copy.deepcopy(fused), x) == order_of_calls(copy.deepcopy(stock), x)


@pytest.mark.parametrize("path", ["body", "body.0", "body.1", "body.1.1", "shortcut", "shortcut.bn"])
def test_a_hook_on_a_container_is_heard(path):
    block, x = fastres.fuse(ProjectedInContainers().train()), channels_last(torch.randn(4, 32, 11, 12))
    expected, calls = block(x), []
    assert is_one(expected)
    hook = block.get_submodule(path).register_forward_hook(lambda *_: calls.append(None))
    output = block(x)
    assert calls == [None] and not is_one(output)
    torch.testing.assert_close(output, expected)
    hook.remove()
    assert is_one(block(x))


def test_a_container_that_is_replaced():
    block, x = fastres.fuse(ProjectedInContainers().train()), channels_last(torch.randn(4, 32, 11, 12))
    block.body[0] = nn.Identity()
    assert not is_one(block(x))
    stock = fastres.unfuse(block)
    torch.testing.assert_close(block(x), stock(x))


def test_a_hook_on_what_is_left_out_is_heard():
    block, calls = fastres.fuse(Identical().train()), []
    x = channels_last(torch.randn(4, 32, 11, 12))
    block.nothing.register_forward_hook(lambda *_: calls.append(None))
    assert not is_one(block(x)) and calls == [None]
