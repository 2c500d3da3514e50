"""What a convolution sees around its input: zeros as its options say, or as TensorFlow puts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.symbolic import CONVS, gives

Pads = tuple[tuple[int, int], tuple[int, int]]  #: pixels before and behind an image, (top, left), (bottom, right)
Conv = nn.Conv1d | nn.Conv2d


def in_plane(option: Sequence[int], across: int) -> tuple[int, int]:
    """A layer's option as (vertical, horizontal). A signal is an image of one row: a layer of signals has `across`
    vertically."""
    first, *rest = option
    return (int(first), int(rest[0])) if rest else (across, int(first))


def as_plane(x: Tensor) -> Tensor:
    """Signals (N, C, L) as the images (N, C, 1, L) that they are; images as they are."""
    return x[:, :, None] if x.dim() == 3 else x


def padding_of(layer: Conv, size: tuple[int, int], name: str = "a convolution") -> Pads:
    """Zeros that `layer` adds to an input of `size` (H, W), which it convolves with its `weight` and `bias`.

    A class derived of nn.Conv2d or nn.Conv1d computes what it likes, so its output is compared: padded by its options,
    by a ZeroPad of its own, as TensorFlow's "SAME" (the odd pixel last), or of signals with all of it in front, as
    causal convolutions have it. UnsupportedOperatorError, naming `name`, for what is none of these.
    """
    if layer.padding_mode != "zeros":
        raise UnsupportedOperatorError(f"{name}: only zero padding is supported, not {layer.padding_mode!r}")
    own = _by_options(layer)
    if type(layer) in CONVS:
        return own
    inside = [around(child.padding) for child in layer.children() if isinstance(child, nn.ZeroPad1d | nn.ZeroPad2d)]
    in_front = [((0, reach_of(layer)[1] - 1), (0, 0))] if isinstance(layer, nn.Conv1d) else []
    for pads in (own, *inside, _same(layer, size), *in_front):
        if _computes(layer, pads, size):
            return pads
    raise UnsupportedOperatorError(
        f"{name}: a {type(layer).__name__} computes something else than a convolution of zero-padded images"
    )


def padded(x: Tensor, pads: Pads) -> Tensor:
    """`x` (N, C, H, W) with zeros around it."""
    (top, left), (bottom, right) = pads
    return F.pad(x, (left, right, top, bottom))


def around(sides: Sequence[int]) -> Pads:
    """Of (left, right, top, bottom), PyTorch's order; what is left out is 0."""
    left, right, top, bottom = (*sides, *[0] * (4 - len(sides)))
    return (top, left), (bottom, right)


def reach_of(layer: Any) -> tuple[int, int]:
    """Pixels that a convolution's kernel spans, (vertical, horizontal)."""
    height, width = (
        d * (k - 1) + 1 for d, k in zip(in_plane(layer.dilation, 1), in_plane(layer.kernel_size, 1), strict=True)
    )
    return height, width


def _by_options(layer: Conv) -> Pads:
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    if layer.padding == "same":  # of stride 1 only, says PyTorch
        return _halves(*(reach - 1 for reach in reach_of(layer)))
    sides = in_plane(layer.padding, 0)  # type: ignore[arg-type]
    return sides, sides


def _same(layer: Conv, size: tuple[int, int]) -> Pads:
    sides = zip(size, in_plane(layer.stride, 1), reach_of(layer), strict=True)
    return _halves(*(max((-(-length // stride) - 1) * stride + reach - length, 0) for length, stride, reach in sides))


def _halves(vertical: int, horizontal: int) -> Pads:
    before = vertical // 2, horizontal // 2
    return before, (vertical - before[0], horizontal - before[1])


@torch.no_grad()
def _computes(layer: Conv, pads: Pads, size: tuple[int, int]) -> bool:
    weight = layer.weight
    drawn = torch.randn(1, layer.in_channels, *size, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(weight.device, weight.dtype)
    x, convolve = padded(drawn, pads), F.conv2d
    if any(length < reach for length, reach in zip(x.shape[2:], reach_of(layer), strict=True)):
        return False
    if isinstance(layer, nn.Conv1d):
        x, drawn, convolve = x.flatten(2), drawn.flatten(2), F.conv1d
    wanted = convolve(x, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    return gives(layer, drawn, wanted)
