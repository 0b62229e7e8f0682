"""Modules of a ResNet whose convolution, batch norm, residual addition and ReLU run fused.

Each has the constructor arguments, parameters and state_dict keys of the torch.nn modules that it stands
for, and runs those modules themselves where they cannot be fused (fastres.sites decides at every call).
"""

import sys
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fastres import sites

__all__ = ["BasicBlock", "BnAddReLU2d", "BnReLU2d", "Bottleneck", "ConvBn2d", "ConvBnReLU2d", "PlainBlock"]

NormLayer = Callable[..., nn.Module]


class _BnAct2d(nn.BatchNorm2d):
    """A batch norm with more behind it."""

    @property
    def num_features(self) -> int:
        # convert_sync_batchnorm makes a plain batch norm of it, and is silent on that.
        if sys._getframe(1).f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__:
            raise TypeError(
                f"SyncBatchNorm.convert_sync_batchnorm would drop the ReLU of {type(self).__name__}; build "
                "the model of nn.BatchNorm2d and nn.ReLU, and convert that"
            )
        return self.__dict__["num_features"]

    @num_features.setter
    def num_features(self, value: int) -> None:
        self.__dict__["num_features"] = value


class BnReLU2d(_BnAct2d):
    """relu(batch_norm(input)).

    Args: as of torch.nn.BatchNorm2d.

    Shape: (N, C, H, W) to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        return sites.own_bn_act(self, input)


class BnAddReLU2d(_BnAct2d):
    """relu(batch_norm(input) + residual), the end of a residual block.

    Args: as of torch.nn.BatchNorm2d.

    Shape: (N, C, H, W) and (N, C, H, W) to the same.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return sites.own_bn_act(self, input, residual)


class ConvBn2d(nn.Sequential):
    """batch_norm(conv2d(input)), an nn.Sequential of the two: its state_dict keys begin with 0 and 1.

    Args: as of torch.nn.Conv2d, then, by keyword, as of torch.nn.BatchNorm2d.

    Shape: (N, C_in, H, W) to (N, C_out, H_out, W_out).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias,
                padding_mode,
                **place,
            ),
            nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **place),
        )

    @classmethod
    def of(cls, conv: nn.Module, bn: nn.Module) -> "ConvBn2d":
        """Made of modules at hand; other kinds than nn.Conv2d and nn.BatchNorm2d run as they are."""
        self = cls.__new__(cls)
        nn.Sequential.__init__(self, conv, bn)
        return self

    def __getitem__(self, index):
        # nn.Sequential makes a slice by calling its own class with the modules.
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(self, input: Tensor) -> Tensor:
        if len(self) != 2:  # someone appended to the nn.Sequential that this is
            return super().forward(input)
        conv, bn = self
        return sites.conv_bn_act(conv, bn, None, input, relu=False)


sites.register_container(ConvBn2d)


class ConvBnReLU2d(ConvBn2d):
    """relu(batch_norm(conv2d(input))).

    Args and shape: as of :class:`ConvBn2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if len(self) != 2:  # someone appended to the nn.Sequential that this is
            return F.relu(nn.Sequential.forward(self, input))
        conv, bn = self
        return sites.conv_bn_act(conv, bn, None, input, relu=True)


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        inplanes, planes, 3, stride=stride, padding=dilation, groups=groups, bias=False, dilation=dilation
    )


def _conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """relu(F(x) + shortcut(x)), F being two 3x3 convolutions with their batch norms.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: the shortcut, None for the identity.
        groups, base_width, dilation: 1, 64 and 1; torchvision's block knows no others either.
        norm_layer: makes a norm of its number of channels; nn.BatchNorm2d runs fused.

    Shape: (N, inplanes, H, W) to (N, planes, H / stride, W / stride).
    Reference: He et al. 2015 (arXiv:1512.03385), figure 5 left; torchvision.models.resnet.BasicBlock.
    """

    expansion = 1
    has_shortcut = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        branch = (self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)
        return sites.residual_block(branch, self.downsample, x)


class PlainBlock(BasicBlock):
    """relu(F(x)): BasicBlock without its shortcut, what residual learning is compared with.

    Args and shape: as of :class:`BasicBlock`; downsample is None.
    Reference: He et al. 2015, figure 3, middle.
    """

    has_shortcut = False

    def forward(self, x: Tensor) -> Tensor:
        out = sites.conv_bn_act(self.conv1, self.bn1, self.relu, x, relu=True)
        return sites.conv_bn_act(self.conv2, self.bn2, self.relu, out, relu=True)


class Bottleneck(nn.Module):
    """relu(F(x) + shortcut(x)), F being 1x1, 3x3 and 1x1 convolutions with their batch norms.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels.
        stride: of the 3x3 convolution.
        downsample: the shortcut, None for the identity.
        groups, base_width: of the 3x3 convolution, which has planes * base_width / 64 * groups channels.
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm of its number of channels; nn.BatchNorm2d runs fused.

    Shape: (N, inplanes, H, W) to (N, 4 * planes, H / stride, W / stride).
    Reference: He et al. 2015, figure 5 right; torchvision.models.resnet.Bottleneck, for the stride too.
    """

    expansion = 4
    has_shortcut = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        branch = (
            (self.conv1, self.bn1, self.relu),
            (self.conv2, self.bn2, self.relu),
            (self.conv3, self.bn3, self.relu),
        )
        return sites.residual_block(branch, self.downsample, x)
