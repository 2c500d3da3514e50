"""What a convolution sees around its input: zeros as its options say, or as TensorFlow puts them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.symbolic import gives

Pads = tuple[tuple[int, int], tuple[int, int]]  #: pixels before and behind an image, (top, left), (bottom, right)


def padding_of(layer: nn.Conv2d, size: tuple[int, int], name: str = "a convolution") -> Pads:
    """Zeros that `layer` adds to an input of `size` (H, W), which it convolves with its `weight` and `bias`.

    A class derived of nn.Conv2d computes what it likes, so its output is compared: padded by its options, by a
    ZeroPad2d of its own, or as TensorFlow's "SAME" (the odd pixel last). UnsupportedOperatorError, naming `name`, for
    what is none of these.
    """
    if layer.padding_mode != "zeros":
        raise UnsupportedOperatorError(f"{name}: only zero padding is supported, not {layer.padding_mode!r}")
    own = _by_options(layer)
    if type(layer) is nn.Conv2d:
        return own
    inside = [around(child.padding) for child in layer.children() if isinstance(child, nn.ZeroPad2d)]
    for pads in (own, *inside, _same(layer, size)):
        if _computes(layer, pads, size):
            return pads
    raise UnsupportedOperatorError(
        f"{name}: a {type(layer).__name__} computes something else than a convolution of zero-padded images"
    )


def padded(x: Tensor, pads: Pads) -> Tensor:
    """`x` (N, C, H, W) with zeros around it."""
    (top, left), (bottom, right) = pads
    return F.pad(x, (left, right, top, bottom))


def around(sides: tuple[int, ...]) -> Pads:
    """Of (left, right, top, bottom), PyTorch's order."""
    left, right, top, bottom = sides
    return (top, left), (bottom, right)


def _reach(layer: nn.Conv2d) -> tuple[int, int]:
    height, width = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return height, width


def _by_options(layer: nn.Conv2d) -> Pads:
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    if layer.padding == "same":  # of stride 1 only, says PyTorch
        return _halves(*(reach - 1 for reach in _reach(layer)))
    vertical, horizontal = map(int, layer.padding)
    return (vertical, horizontal), (vertical, horizontal)


def _same(layer: nn.Conv2d, size: tuple[int, int]) -> Pads:
    sides = zip(size, layer.stride, _reach(layer), strict=True)
    return _halves(*(max((-(-length // stride) - 1) * stride + reach - length, 0) for length, stride, reach in sides))


def _halves(vertical: int, horizontal: int) -> Pads:
    before = vertical // 2, horizontal // 2
    return before, (vertical - before[0], horizontal - before[1])


@torch.no_grad()
def _computes(layer: nn.Conv2d, pads: Pads, size: tuple[int, int]) -> bool:
    weight = layer.weight
    drawn = torch.randn(1, layer.in_channels, *size, generator=torch.Generator().manual_seed(0))
    x = padded(drawn.to(weight.device, weight.dtype), pads)
    if any(length < reach for length, reach in zip(x.shape[2:], _reach(layer), strict=True)):
        return False
    wanted = F.conv2d(x, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    return gives(layer, drawn.to(weight.device, weight.dtype), wanted)
