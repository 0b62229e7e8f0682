"""Models that run in sequences, and what they are compared with."""

import torch
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import recording


def randomized(model):
    """With statistics and factors that are not their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(batch=2, side=32, channels=3):
    return torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)


def without_sequences(model, input):
    """What it gives where each layer is called by itself, which `recording.record` asks for."""
    with torch.no_grad(), recording.record():
        return model(input)


def optimized(model, input=None):
    """The model in sequences, after the call that makes them."""
    model = fastres.optimize_for_inference(randomized(model))
    if input is not None:
        with torch.no_grad():
            model(input)
    return model


def check(model, input, ran, expected):
    """The same bits as without, by so many convolutions in sequences."""
    ran.clear()
    with torch.no_grad():
        output = model(input)
    assert ran == expected
    torch.testing.assert_close(output, without_sequences(model, input), rtol=0, atol=0)


def ran_of(model, input, ran):
    ran.clear()
    with torch.no_grad():
        model(input)
    return list(ran)


def small():
    return fastres.unfuse(fastres.models.resnet18(num_classes=10))


class Uses(nn.Module):
    """A residual block whose values are also used elsewhere, in the way that `use` tells."""

    def __init__(self, use, channels=32):
        super().__init__()
        self.use = use
        for i in range(1, 5):
            setattr(self, f"conv{i}", nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(channels))

    def forward(self, x):
        first = F.relu(self.bn1(self.conv1(x)))
        second = F.relu(self.bn2(self.conv2(first)) + x)
        if self.use == "gate":
            second = second * torch.sigmoid(second.mean((2, 3), keepdim=True))
        third = F.relu(self.bn3(self.conv3(second)) + first)
        fourth = self.bn4(self.conv4(third))
        fourth += second if self.use == "in place" else third
        fourth = F.relu(fourth)
        if self.use == "features":
            return first, third, fourth
        return (fourth, fourth + x) if self.use == "last" else fourth
