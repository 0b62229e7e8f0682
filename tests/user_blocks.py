"""Blocks as users write them, which are fused."""

import abc

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Layers(nn.Module):
    """What most blocks below are made of."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(4, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()


class OneLine(Layers):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class Functional(Layers):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class TorchRelu(Layers):
    def forward(self, x):
        return torch.relu(self.bn1(self.conv1(x)))


class Method(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x)).relu_()


class InPlaceSum(Layers):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class SumIntoFreshShortcut(Layers):
    """The sum is written into the shortcut's result, which nothing else holds."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        identity = self.bn2(self.conv2(x))
        identity += out
        return F.relu(identity)


class ResidualFirst(Layers):
    def forward(self, x):
        return self.relu(torch.add(x, self.bn1(self.conv1(x))))


class AddMethod(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x)).add_(x).relu()


class PreActivation(Layers):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        return self.conv2(self.relu(self.bn2(out))) + x


class SumAlone(Layers):
    def forward(self, x):
        return self.relu(self.conv1(x) + self.conv2(x))


class Chosen(Layers):
    """Looks layers up by name, in helper methods, under a flag."""

    use_shortcut = True

    def __init__(self):
        super().__init__()
        self.activation = F.relu

    def body(self, x, *names):
        for name in names:
            x = getattr(self, f"bn{name}")(getattr(self, f"conv{name}")(x))
        return x

    def forward(self, x):
        out = self.body(x, 1)
        return self.activation(out + x if self.use_shortcut else out)


class SharedNorm(Layers):
    """One batch norm twice: its running statistics depend on the order of the calls."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        identity = self.bn1(self.conv2(x))
        return self.relu(out + identity)


class Shortcut(Layers):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class EmptyShortcut(Shortcut):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential()


class Body(nn.Module):
    """The branch is a container of its own, as in transformers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))

    def forward(self, x):
        return F.relu(x + self.body(x))


class Abstract(abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class Registered(Layers, Abstract):
    """A class whose base keeps a list of its subclasses."""

    subclasses = 0

    def __init_subclass__(cls):
        Registered.subclasses += 1

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)))


class Training(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        if self.training:
            return F.relu(out)
        return F.relu(out + x)


class Scaled(Layers):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x * self.scale + self.shift)) + self.shift)


class LeavesInput(Layers):
    """Two names for one module, one of which may later be another."""

    def __init__(self):
        super().__init__()
        self.relu1 = self.relu2 = nn.ReLU()

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)))
