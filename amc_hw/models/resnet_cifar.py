"""ResNet-20 and ResNet-56 for 32x32 images (He et al., CVPR 2016, section 4.2), and Plain-20 without shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amc_hw.models.channel_map import ChannelMap


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the shortcut where there is one: (N, C_in, H, W) to (N, C_out, H/s, W/s)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut = _shortcut(in_channels, out_channels, stride) if residual else None

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.relu2(out)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option A: skip pixels, and add channels of zeros on both sides."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    before = (out_channels - in_channels) // 2
    after = out_channels - in_channels - before
    return ChannelMap((*[-1] * before, *range(in_channels), *[-1] * after), stride)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `blocks` basic blocks each: depth 6 * blocks + 2.

    Maps (N, 3, 32, 32) to logits (N, num_classes). `residual=False` leaves the shortcuts out.
    """

    def __init__(self, *, blocks: int, num_classes: int, residual: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1, residual=residual)
        self.layer2 = _stage(16, 32, blocks, stride=2, residual=residual)
        self.layer3 = _stage(32, 64, blocks, stride=2, residual=residual)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32)
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, 32, 32)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)  # (N, 64)
        return self.linear(x)


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int, residual: bool) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride, residual=residual)
    rest = (BasicBlock(out_channels, out_channels, stride=1, residual=residual) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def resnet20(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-20: 269,722 parameters and 40.6 MMACs at 32x32 with 10 classes."""
    return CifarResNet(blocks=3, num_classes=num_classes)


def resnet56(*, num_classes: int = 10) -> CifarResNet:
    """ResNet-56: 853,018 parameters and 125.5 MMACs at 32x32 with 10 classes."""
    return CifarResNet(blocks=9, num_classes=num_classes)


def plain20(*, num_classes: int = 10) -> CifarResNet:
    """Plain-20: ResNet-20's layers and names without the shortcuts."""
    return CifarResNet(blocks=3, num_classes=num_classes, residual=False)
