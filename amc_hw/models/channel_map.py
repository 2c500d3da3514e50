"""ChannelMap: a shortcut without weights that picks, moves and zero-fills channels, and skips pixels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelMap(nn.Module):
    """Output channel j copies input channel `index[j]` of `x[:, :, ::stride, ::stride]`; -1 gives zeros.

    Maps (N, in_channels, H, W) to (N, len(index), ceil(H / stride), ceil(W / stride)). This is the option-A
    shortcut of He et al. (CVPR 2016, section 4.2), written so that it can still be expressed after pruning.
    No parameters, nothing in the state dict.

    Args:
        index: for each output channel an input channel, or -1.
        stride: step over height and width, at least 1.
        in_channels: channels of the input; by default those up to the largest one in `index`.

    Raises:
        ValueError: an index below -1 or not below `in_channels`, an empty index, a stride below 1.
    """

    picks: Tensor

    def __init__(self, index: Iterable[int], stride: int = 1, *, in_channels: int | None = None) -> None:
        super().__init__()
        self.index = tuple(int(i) for i in index)
        self.stride = int(stride)
        self.in_channels = max(self.index, default=-1) + 1 if in_channels is None else int(in_channels)
        self.out_channels = len(self.index)
        if not self.index or self.stride < 1 or self.in_channels < 1:
            raise ValueError(f"ChannelMap needs channels and a stride of at least 1, got {self.extra_repr()}")
        if min(self.index) < -1 or max(self.index) >= self.in_channels:
            raise ValueError(f"ChannelMap indices must lie in -1..{self.in_channels - 1}, got {self.index}")
        self._run = _contiguous_run(self.index)
        # -1 points at the channel of zeros that forward() appends
        picks = torch.tensor([i if i >= 0 else self.in_channels for i in self.index])
        self.register_buffer("picks", picks, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W)
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self._run is None:
            if -1 in self.index:
                x = F.pad(x, (0, 0, 0, 0, 0, 1))
            return torch.index_select(x, 1, self.picks)
        before, start, stop, after = self._run
        if (start, stop) != (0, self.in_channels):
            x = x[:, start:stop]
        return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, stride={self.stride}"


def _contiguous_run(index: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """(-1s before, first channel, last channel + 1, -1s after) where `index` is such a run, else None."""
    positions = [j for j, i in enumerate(index) if i >= 0]
    if not positions:
        return None
    first, last = positions[0], positions[-1]
    start = index[first]
    if index[first : last + 1] != tuple(range(start, start + last - first + 1)):
        return None
    return first, start, start + last - first + 1, len(index) - 1 - last
