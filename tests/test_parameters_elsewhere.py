"""Parameters whose memory is there only while their own module runs, as of FSDP and of offloading."""

import copy

import pytest
import torch
from blocks import by_layers
from layers import channels_last
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
