"""MobileNet-V1 (Howard et al., arXiv 1704.04861), for 224x224 and for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# (output channels, stride of the depthwise convolution) of the 13 separable blocks
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1),
    (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
_STEM_CHANNELS = 32


class MobileNetV1(nn.Module):
    """A 3x3 convolution, 13 depthwise-separable blocks, global average pooling, a linear classifier.

    Maps (N, 3, H, W) to logits (N, num_classes). `features.0` is (conv, bn, act), `features.i` is
    (depthwise, bn, act, pointwise, bn, act). Convolutions have no bias.

    Args:
        width: multiplier of every channel count; other than 1, counts become multiples of 8, at least 8.
        num_classes: outputs of the classifier.
        first_stride: stride of `features.0`.
        activation: class of the activation, `nn.ReLU` or `nn.ReLU6`.
    """

    def __init__(self, *, width: float, num_classes: int, first_stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        channels = _scaled(_STEM_CHANNELS, width)
        blocks = [
            nn.Sequential(
                nn.Conv2d(3, channels, 3, stride=first_stride, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                activation(),
            )
        ]
        for full_channels, stride in _BLOCKS:
            out_channels = _scaled(full_channels, width)
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
                    nn.BatchNorm2d(channels),
                    activation(),
                    nn.Conv2d(channels, out_channels, 1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    activation(),
                )
            )
            channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.features(x)  # (N, C, H / 32, W / 32), or / 16 when first_stride is 1
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)  # (N, C)
        return self.classifier(x)


def _scaled(channels: int, width: float) -> int:
    if width == 1:
        return channels
    return max(8, (int(channels * width) + 4) // 8 * 8)


def mobilenet_v1(*, width: float = 1.0, num_classes: int = 1000) -> MobileNetV1:
    """MobileNet-V1 for (N, 3, 224, 224), with ReLU6 as in TensorFlow's original; 569 MMACs at width 1."""
    return MobileNetV1(width=width, num_classes=num_classes, first_stride=2, activation=nn.ReLU6)


def mobilenet_v1_cifar(*, width: float = 1.0, num_classes: int = 10) -> MobileNetV1:
    """MobileNet-V1 for (N, 3, 32, 32): the first stride is 1 and the activation ReLU; 46 MMACs at width 1."""
    return MobileNetV1(width=width, num_classes=num_classes, first_stride=1, activation=nn.ReLU)
