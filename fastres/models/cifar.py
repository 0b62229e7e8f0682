"""The thin ResNets for 32x32 images, and their plain twins.

Reference: He et al. 2015 (arXiv:1512.03385), section 4.2: 6n + 2 layers, three stages of n blocks with
16, 32 and 64 channels, parameter-free shortcuts (option A).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import sites
from fastres.models.resnet import init_weights
from fastres.nn import BasicBlock, PlainBlock


class ZeroPadShortcut(nn.Module):
    """Every `stride`-th pixel, with channels of zeros appended: the identity of option A across two stages.

    Shape: (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = planes - inplanes, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))

    def extra_repr(self) -> str:
        return f"added={self.added}, stride={self.stride}"


class CifarResNet(nn.Module):
    """A residual network of three stages.

    Args:
        block: BasicBlock or PlainBlock.
        depth: 6n + 2 layers with weights.
        num_classes: outputs.
        in_channels: of the images.

    Shape: (N, in_channels, H, W) to (N, num_classes).
    """

    def __init__(
        self, block: type[BasicBlock], depth: int, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}, expected 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...")
        blocks = depth // 6
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(block, 16, 16, blocks, stride=1)
        self.layer2 = _stage(block, 16, 32, blocks, stride=2)
        self.layer3 = _stage(block, 32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = sites.conv_bn_act(self.conv1, self.bn1, self.relu, x, relu=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(block: type[BasicBlock], inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = ZeroPadShortcut(inplanes, planes, stride) if block.has_shortcut and stride != 1 else None
    return nn.Sequential(
        block(inplanes, planes, stride, shortcut), *(block(planes, planes) for _ in range(1, blocks))
    )


_DEPTHS = (20, 32, 44, 56, 110)
_FAMILIES = {"cifar_resnet": BasicBlock, "cifar_plain": PlainBlock}
__all__ = ["CifarResNet", *(f"{family}{depth}" for family in _FAMILIES for depth in _DEPTHS)]


def _builder(family: str, depth: int):
    def build(**kwargs: Any) -> CifarResNet:
        return CifarResNet(_FAMILIES[family], depth, **kwargs)

    build.__name__ = build.__qualname__ = f"{family}{depth}"
    build.__doc__ = f"""{depth} layers of {_FAMILIES[family].__name__}.

    Args:
        **kwargs: as of :class:`CifarResNet`.

    Reference: He et al. 2015, section 4.2.
    """
    return build


globals().update({f"{family}{depth}": _builder(family, depth) for family in _FAMILIES for depth in _DEPTHS})
