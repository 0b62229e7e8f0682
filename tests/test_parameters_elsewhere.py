"""Parameters whose memory is there only while their own module runs, as of FSDP and of offloading."""

import copy

import pytest
import torch
from blocks import by_layers
from layers import channels_last, without_memory
from torch import nn

import fastres
from fastres.nn import BasicBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def offload(blocks):
    kept = {}

    def put_away(module, *_):
        for parameter in module.parameters():
            kept[parameter] = parameter.detach().clone()
            parameter.untyped_storage().resize_(0)

    def fetch(module, *_):
        for parameter in module.parameters():
            if parameter.untyped_storage().size() == 0:
                parameter.untyped_storage().resize_(parameter.nbytes)
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
                    parameter.copy_(kept[parameter])

    def when_left(module, _, output):
        put_away(module)
        output.register_hook(lambda grad: fetch(module))

    for block in blocks:
        block.register_forward_pre_hook(fetch)
        block.register_forward_hook(when_left)
        put_away(block)


def gradients(model, input, call):
    output = call(model, input)
    output.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


class SiteBySite(nn.Module):
    """Batch norms without convolutions of ours in front."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(64), nn.BatchNorm2d(64), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.relu(self.bn1(x))) + x)


def projected():
    return BasicBlock(64, 64, 1, nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)))


@pytest.mark.parametrize("call", [lambda model, x: model(x), by_layers], ids=["blocks", "layers"])
@pytest.mark.parametrize("make", [lambda: BasicBlock(64, 64), projected, SiteBySite])
def test_gradients_are_those_of_parameters_that_stay(make, call):
    model = fastres.fuse(nn.Sequential(*(make() for _ in range(3)))).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    input = channels_last(torch.randn(4, 64, 9, 10))
    away = copy.deepcopy(model)
    offload(away)
    for ours, expected in zip(gradients(away, input, call), gradients(model, input, call), strict=True):
        assert torch.equal(ours, expected)


def test_a_parameter_without_memory_is_an_error():
    bn = nn.BatchNorm2d(64)
    bn.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight has no memory"):
        fastres.ops.bn_relu(torch.randn(4, 64, 9, 10), None, None, bn.weight, bn.bias, training=True)
    conv = nn.Conv2d(64, 64, 3, bias=False)
    conv.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight has no memory"):
        fastres.ops.conv_bn_relu(
            channels_last(torch.randn(4, 64, 9, 10)), conv.weight, None, None, training=True
        )


@pytest.mark.parametrize("memory", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
def test_an_activation_without_memory_is_an_error(memory):
    def images():
        return memory(torch.randn(4, 64, 9, 10))

    bn, weight = nn.BatchNorm2d(64), torch.randn(64, 64, 3, 3)
    statistics = bn.running_mean, bn.running_var
    calls = [
        lambda: fastres.ops.bn_relu(without_memory(images()), *statistics, training=True),
        lambda: fastres.ops.bn_add_relu(images(), without_memory(images()), *statistics, training=True),
        lambda: fastres.ops.add_relu(images(), without_memory(images())),
        lambda: fastres.ops.conv_bn_relu(without_memory(images()), weight, *statistics, training=True),
        lambda: fastres.ops.conv_bn_relu(without_memory(images()), weight, *statistics),
    ]
    before = copy.deepcopy(bn)
    for call in calls:
        with pytest.raises(RuntimeError, match="has no memory|not allocated"):
            call()
    assert torch.equal(bn.running_mean, before.running_mean)


@pytest.mark.parametrize("make", [lambda: BasicBlock(64, 64), SiteBySite], ids=["block", "layers"])
def test_an_input_whose_memory_goes_before_the_backward_pass_is_an_error(make):
    input = channels_last(torch.randn(4, 64, 9, 10))
    loss = make().train()(input).sum()
    without_memory(input)
    with pytest.raises(RuntimeError, match="has no memory|not allocated"):
        loss.backward()
