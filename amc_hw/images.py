"""Images as data sets: in memory or in files, and how a split becomes one tensor."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amc_hw.errors import UserError
from amc_hw.specs import one_line

Shape = tuple[int, ...]  #: of one image (C, H, W), or of what else a network reads
_DECODE_CHUNK = 64  # images decoded by one task of the thread pool


class TensorImages(Dataset):
    """Images in memory: `images` (N, C, H, W), uint8 or float32 in [0, 1]; `labels` (N,) int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _unit_range(self.images[index]), int(self.labels[index])

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `indices` as two tensors, as `load_tensors` returns them."""
        return _unit_range(self.images[indices]), self.labels[indices]


class ImageFiles(Dataset):
    """Image files, decoded when asked for: the shorter side resized to `resize`, the middle cropped to `shape`."""

    def __init__(self, samples: Sequence[tuple[str, int]], shape: Shape, resize: int) -> None:
        self.samples, self.shape, self.resize = list(samples), shape, resize

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.samples[index]
        return _unit_range(torch.from_numpy(self._decode(file)).permute(2, 0, 1).contiguous()), label

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `indices` as two tensors, decoded by a few threads (decoding frees the GIL)."""
        samples = [self.samples[i] for i in indices.tolist()]
        images = torch.empty(len(samples), *self.shape)

        def decode(start: int) -> None:
            chunk = np.stack([self._decode(file) for file, _ in samples[start : start + _DECODE_CHUNK]])
            torch.div(torch.from_numpy(chunk).permute(0, 3, 1, 2), 255, out=images[start : start + _DECODE_CHUNK])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:
            tasks = [pool.submit(decode, start) for start in range(0, len(samples), _DECODE_CHUNK)]
            try:
                for task in tasks:
                    task.result()
            except BaseException:  # a damaged file or Ctrl-C: do not decode the rest first
                pool.shutdown(cancel_futures=True)
                raise
        return images, torch.tensor([label for _, label in samples])

    def _decode(self, file: str) -> np.ndarray:  # (H, W, C) uint8
        from PIL import Image

        channels, height, width = self.shape
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB" if channels == 3 else "L")
        except Exception as exc:  # a damaged file fails in as many ways as there are formats
            raise UserError(f"image {file!r} cannot be decoded: {one_line(exc)}") from exc
        if image.size != (width, height):
            from torchvision.transforms import functional as F

            image = F.center_crop(F.resize(image, [self.resize]), [height, width])
        pixels = np.array(image)
        return pixels if channels == 3 else pixels[:, :, None]


def load_tensors(dataset: Dataset, *, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) float32 in [0, 1] and labels (N,) int64 of a split, in order, in memory.

    With a `limit`, at most that many, drawn and ordered at random, the same for one `seed`, so that any first part
    of them is a fair sample, too; the others are not decoded. Raises UserError on an image that cannot be decoded,
    naming the file, and on a `limit` below 1.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if limit is not None and limit < 1:
        raise UserError(f"the number of images must be at least 1, not {limit}")
    indices = torch.arange(count)
    if limit is not None:
        indices = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return _loaded(dataset, indices)


def load_parts(dataset: Dataset, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As `load_tensors` all of a split, `size` images at a time: a large one does not fit in memory."""
    for indices in torch.arange(len(dataset)).split(size):  # type: ignore[arg-type]
        yield _loaded(dataset, indices)


def _loaded(dataset: Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(dataset, TensorImages | ImageFiles):
        return dataset.gather(indices)
    images, labels = zip(*(dataset[i] for i in indices.tolist()), strict=True)
    if bad := [label for label in labels if label < 0]:
        raise UserError(f"labels start at 0, there is {int(bad[0])}")
    return torch.stack(images), torch.tensor([operator.index(label) for label in labels])


def _unit_range(images: Tensor) -> Tensor:
    return images / 255 if images.dtype == torch.uint8 else images
