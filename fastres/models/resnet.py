"""The ImageNet ResNets under torchvision's names, signatures and keys, and the paper's plain twins.

Reference: He et al. 2015 (arXiv:1512.03385), table 1; Xie et al. 2016 (arXiv:1611.05431);
Zagoruyko and Komodakis 2016 (arXiv:1605.07146).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fastres import sites
from fastres.nn import BasicBlock, Bottleneck, ConvBn2d, NormLayer, PlainBlock


class ResNet(nn.Module):
    """A residual network of four stages.

    Args:
        block: BasicBlock, Bottleneck or PlainBlock.
        layers: blocks in each stage.
        num_classes: outputs.
        zero_init_residual: begin with every residual branch at zero (Goyal et al. 2017, arXiv:1706.02677).
        groups, width_per_group: of the 3x3 convolutions of Bottleneck.
        replace_stride_with_dilation: for stages 2 to 4, whether to dilate instead of striding.
        norm_layer: makes a norm of its number of channels; None: nn.BatchNorm2d, which runs fused.

    Shape: (N, 3, H, W) to (N, num_classes).
    Reference: torchvision.models.ResNet.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = (False, False, False)
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None or a 3-element tuple, "
                f"got {replace_stride_with_dilation}"
            )
        self._norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        init_weights(self, zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        outplanes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if block.has_shortcut and (stride != 1 or self.inplanes != outplanes):
            conv = nn.Conv2d(self.inplanes, outplanes, kernel_size=1, stride=stride, bias=False)
            downsample = ConvBn2d.of(conv, self._norm_layer(outplanes))
        make = partial(block, groups=self.groups, base_width=self.base_width, norm_layer=self._norm_layer)
        layer = [make(self.inplanes, planes, stride, downsample, dilation=first_dilation)]
        self.inplanes = outplanes
        layer += [make(outplanes, planes, dilation=self.dilation) for _ in range(1, blocks)]
        return nn.Sequential(*layer)

    def forward(self, x: Tensor) -> Tensor:
        x = sites.conv_bn_act(self.conv1, self.bn1, self.relu, x, relu=True, pool=self.maxpool)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


def init_weights(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He initialisation of convolutions (arXiv:1502.01852), ones and zeros in norms, as in torchvision."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)
    if zero_init_residual:
        for module in model.modules():
            # A block without a shortcut would be zero for good.
            if isinstance(module, (BasicBlock, Bottleneck)) and module.has_shortcut:
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if last.weight is not None:
                    nn.init.constant_(last.weight, 0)


def _resnet(
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    weights: Mapping[str, Tensor] | str | PathLike | Any | None,
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    if weights is None:
        return ResNet(block, layers, **kwargs)
    if hasattr(weights, "get_state_dict"):  # a member of a torchvision weights enum
        kwargs.setdefault("num_classes", len(weights.meta["categories"]))
        weights = weights.get_state_dict(progress=progress, check_hash=True)
    elif not isinstance(weights, Mapping):
        try:
            weights = torch.load(weights, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"weights={weights!r} is no file; fastres has none of its own, and takes a state_dict, "
                "the path of one, or a member of torchvision's weights such as ResNet50_Weights.DEFAULT"
            ) from error
        except AttributeError as error:  # of torch.load, which takes open files, too
            raise TypeError(
                f"weights={weights!r}: expected None, a state_dict, a path or torchvision's weights"
            ) from error
    model = ResNet(block, layers, **kwargs)
    model.load_state_dict(weights)
    return model


# name: block, layers, and what differs from ResNet's defaults.
_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...], dict[str, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), {"groups": 64, "width_per_group": 4}),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"width_per_group": 128}),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), {"width_per_group": 128}),
    "plain18": (PlainBlock, (2, 2, 2, 2), {}),
    "plain34": (PlainBlock, (3, 4, 6, 3), {}),
}
__all__ = ["ResNet", *_RESNETS]


def _builder(name: str):
    block, layers, defaults = _RESNETS[name]

    def build(*, weights=None, progress: bool = True, **kwargs: Any) -> ResNet:
        for argument, value in defaults.items():
            if kwargs.setdefault(argument, value) != value:
                raise ValueError(f"{name} has {argument}={value}, not {kwargs[argument]}")
        return _resnet(block, layers, weights, progress, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name}, without pretrained weights of its own.

    Args:
        weights: None for fresh ones, else a state_dict, the path of a saved one, or a member of a
            torchvision weights enum.
        progress: show a bar where torchvision downloads.
        **kwargs: as of :class:`ResNet`, but for what makes it this model.

    Reference: {"He et al. 2015, figure 3" if block is PlainBlock else f"torchvision.models.{name}"}.
    """
    return build


globals().update({name: _builder(name) for name in _RESNETS})
