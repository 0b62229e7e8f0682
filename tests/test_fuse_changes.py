"""A fused model whose modules are replaced or hooked afterwards does what stock would."""

import copy

import pytest
import torch
from fusing import DTYPE, close, images, ran, same
from torch import nn
from torch.nn import functional as F
from user_blocks import Body, Chosen, InPlaceSum, Layers, LeavesInput, Shortcut, conv

from fastres.explain import explain
from fastres.fuse import fuse, unfuse

# ---------------------------------------------------------------------------------------------------------
# modules that change after fuse


@pytest.mark.parametrize("name", ["bn1", "conv2", "bn2", "relu"])
def test_a_layer_is_replaced_after_fuse(name):
    stock = InPlaceSum().to(DTYPE)
    fused = fuse(stock)
    other = {"relu": nn.GELU()}.get(name, nn.Identity())
    for model in (stock, fused):
        setattr(model, name, other)
    same(stock, fused, images(4))


def test_a_shortcut_is_taken_away_after_fuse(torchvision):
    stock = torchvision.models.resnet.BasicBlock(
        4, 4, downsample=nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))
    ).to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.downsample = None
    same(stock, fused, images(4))


def test_a_shortcut_is_added_after_fuse(torchvision):
    stock = torchvision.models.resnet.BasicBlock(4, 4).to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.downsample = nn.Sequential(nn.Tanh())
    same(stock, fused, images(4))


def test_a_container_grows_after_fuse():
    stock = Body().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.body.append(nn.Tanh())
    same(stock, fused, images(4))


def test_one_of_two_names_of_a_module_is_set_after_fuse():
    stock = LeavesInput().to(DTYPE)
    fused = fuse(stock)
    assert len(ran(fused, images(4))) == 2
    for model in (stock, fused):
        model.relu2 = nn.Tanh()
    same(stock, fused, images(4))


def test_an_identity_is_replaced_after_fuse(timm):
    stock = timm.create_model("resnet18").to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.layer1[0].drop_block = nn.LeakyReLU()
    same(stock, fused, images())


def test_a_forward_on_the_instance_is_respected():
    """As accelerate and others do."""
    stock = Body().to(DTYPE)
    stock.body[1].forward = lambda x: x * 3
    stock.forward = lambda x: stock.body(x) - x
    fused = copy.copy(stock)
    fuse(fused, inplace=True)
    x = images(4)
    close(fused(x), stock(x), "output")


@pytest.mark.parametrize("name", ["body", "body.3", "body.4"])
def test_a_forward_on_the_instance_of_a_fused_layer(name):
    fused = fuse(Body().to(DTYPE))
    fused.get_submodule(name).forward = lambda x: x * 3
    x = images(4)
    stock = unfuse(fused)
    close(fused(x), stock(x), "output")


def test_a_class_gets_another_forward_after_fuse():
    class Patched(Layers):
        def forward(self, x):
            return F.relu(self.bn1(self.conv1(x)))

    stock = Patched().to(DTYPE)
    fused = fuse(stock, inplace=True)
    Patched.forward = lambda self, x: x * 2
    x = images(4)
    close(fused(x), x * 2, "output")


def test_a_helper_method_is_replaced_on_the_instance_after_fuse():
    stock = Chosen().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.body = lambda x, *names: x * 2
    same(stock, fused, images(4))


# ---------------------------------------------------------------------------------------------------------
# hooks


def hook_calls(model, x, names):
    """The order in which forward hooks on these modules fire, with what they see."""
    seen = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, output.detach().clone()))
        )
        for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "names", [["bn2"], ["conv1"], ["shortcut", "bn2"], ["conv2", "shortcut.1", "shortcut.0"]]
)
def test_forward_hooks_fire_in_their_order(names):
    stock = Shortcut().to(DTYPE)
    fused = fuse(stock)
    x = images(4)
    expected = hook_calls(stock, x, names)
    actual = hook_calls(fused, x, names)
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for (name, a), (_, e) in zip(actual, expected, strict=True):
        close(a, e, f"what the hook on {name} sees")


@pytest.mark.parametrize("name", ["layer", "layer.1", "layer.1.activation"])
def test_a_hook_on_an_inlined_container_fires(transformers, name):
    block = transformers.models.resnet.modeling_resnet.ResNetBasicLayer(4, 4).to(DTYPE)
    fused = fuse(block)
    assert [n for n, _ in hook_calls(fused, images(4), [name])] == [name]


def test_a_hook_that_was_there_before_fuse_fires():
    block = Body().to(DTYPE)
    seen = []
    block.body[4].register_forward_hook(lambda *_: seen.append("norm"))
    block.body.register_forward_pre_hook(lambda *_: seen.append("body"))
    fuse(block, inplace=True)
    assert not seen
    block(images(4))
    assert seen == ["body", "norm"]


def test_a_hook_that_changes_its_output():
    stock = InPlaceSum().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.bn2.register_forward_hook(lambda module, args, output: output * 2)
    same(stock, fused, images(4))


def test_backward_hooks_fire():
    fused = fuse(InPlaceSum().to(DTYPE))
    seen = []
    fused.bn1.register_full_backward_hook(lambda *_: seen.append("bn1"))
    fused(images(4)).sum().backward()
    assert seen == ["bn1"]


def test_a_hook_on_the_block_leaves_it_fused():
    fused = fuse(InPlaceSum().to(DTYPE))
    seen = []
    fused.register_forward_hook(lambda *_: seen.append("block"))
    assert len(ran(fused, images(4))) == 2
    assert seen == ["block"]


@pytest.mark.parametrize("block", [Shortcut, Body])
def test_global_hooks_fire_on_every_layer(block):
    fused = fuse(block().to(DTYPE))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        fused(images(4))
    finally:
        handle.remove()
    layers = (
        ["Conv2d", "BatchNorm2d"] * 3 if block is Shortcut else ["Conv2d", "BatchNorm2d"] * 2 + ["ReLU"]
    )
    assert sorted(seen) == sorted([*layers, "Sequential", block.__name__])


class _Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)

    def helper(self, x):
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.helper(x)


def test_a_helper_that_is_replaced_in_its_class(monkeypatch):
    model = fuse(_Helped().eval())
    input = torch.randn(2, 3, 16, 16)
    before = model(input)
    monkeypatch.setattr(_Helped, "helper", lambda self, x: _plain(self, x) + 1)
    torch.testing.assert_close(model(input), before + 1)
    assert "helper was replaced" in str(explain(model, input))


def _plain(self, x):
    return F.relu(self.bn(self.conv(x)))
