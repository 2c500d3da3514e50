"""Data sets by name: train, validation and test splits of images in [0, 1], or of other inputs, with integer labels.

Every tenth training image (0, 10, 20, ... in sorted order) is the validation split where a data set brings none.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amc_hw.errors import UserError
from amc_hw.images import ImageFiles, Shape, TensorImages, load_tensors
from amc_hw.specs import Spec, call_factory, one_line, parse_spec, positive_int, read_options, unknown_name

__all__ = ["DATASETS", "Splits", "load_data", "load_tensors"]

_HOLD_OUT = 10


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint map-style data sets of (image, label): float32 (C, H, W) in [0, 1], not normalised, or what else
    the network reads, of any range; and an int.

    `classes` names the labels 0, 1, ...; it is empty where a factory does not say them.
    """

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    classes: tuple[str, ...]


def load_data(spec: str | Spec, *, input_shape: Sequence[int]) -> Splits:
    """Open the data set that `spec` names, for a model whose input is `input_shape`, such as (C, H, W).

    `digits`, `imagefolder:PATH?size=224&resize=256`, `cifar10:PATH`, `npz:PATH`, or a factory that returns
    `Splits` or (train, val, test). Image files are decoded when they are asked for, not here.

    Raises:
        UserError: unknown data set or option, a path that is missing, empty or without class folders, splits whose
            classes differ, images that are not of the model's input shape, labels out of range.
    """
    spec = parse_spec(spec)
    shape = tuple(input_shape)
    source = DATASETS.get(spec.name)
    if source in (_digits, _imagefolder, _cifar10) and len(shape) != 3:
        own = "npz:PATH, or a data set of your own"
        raise UserError(f"{spec.name} gives images, the model takes {_by(shape)}: give {own}")
    try:
        splits = _from_factory(spec) if source is None else source(spec, shape)
    except OSError as exc:
        raise UserError(f"{str(spec)!r} cannot be read: {one_line(exc)}") from exc
    for name, split in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if not len(split):  # type: ignore[arg-type]
            raise UserError(f"{str(spec)!r} has no {name} images: give it more of them, or a {name} split")
        if source is None:
            _check_sample(spec, name, split, shape, classes=len(splits.classes))
    return splits


def _digits(spec: Spec, shape: Shape) -> Splits:
    from sklearn.datasets import load_digits

    if spec.path is not None:
        raise UserError(f"digits takes no ':PATH', got {str(spec)!r}")
    read_options(spec, {})
    channels = shape[0]
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8)
    images = torch.nn.functional.interpolate(images, size=shape[1:], mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    # Of every twelve images of a class 7 train, 2 validate and 3 test: 1058, 298 and 441 in all.
    turn = torch.empty_like(labels)
    for label in range(10):
        turn[labels == label] = torch.arange(int((labels == label).sum())) % 12
    masks = (turn < 7, (turn >= 7) & (turn < 9), turn >= 9)
    train, val, test = (TensorImages(images[mask].expand(-1, channels, -1, -1), labels[mask]) for mask in masks)
    return Splits(str(spec), train, val, test, classes=tuple(map(str, range(10))))


def _imagefolder(spec: Spec, shape: Shape) -> Splits:
    options = read_options(spec, {"size": positive_int, "resize": positive_int})
    channels, height, width = shape
    size = options.get("size", height)
    if channels not in (1, 3) or ("size" in options and (height, width) != (size, size)):
        raise UserError(
            f"{str(spec)!r} gives images of 3x{size}x{size}, the model takes {_by(shape)}: "
            f"leave size out, or give --input 1x3x{size}x{size}"
        )
    side = max(height, width)
    resize = options.get("resize", round(side * 256 / 224) if side >= 64 else side)
    if resize < side:
        raise UserError(f"{str(spec)!r}: resize must be at least {side}, the model's input, not {resize}")
    root = _path(spec)
    if not root.is_dir():
        raise UserError(f"{str(spec)!r}: there is no folder {str(root)!r}")
    found = {name: _image_folder(root / name) for name in ("train", "val", "test") if _has_folders(root / name)}
    if found and "train" not in found:
        raise UserError(f"{str(root)!r} has {'/ and '.join(found)}/ but no train/: add it, or name a folder of classes")
    flat = _image_folder(root) if not found else found["train"] if len(found) == 1 else None
    for name, (classes, _) in found.items():
        if differing := sorted(set(classes) ^ set(found["train"][0])):
            raise UserError(f"{str(root)!r}: train/ and {name}/ differ in classes: {', '.join(differing[:5])}")

    if flat is not None:
        warnings.warn(f"{root} has no val/ and test/: every tenth image each is taken for them", stacklevel=3)
        classes, samples = flat
        val, test = samples[::_HOLD_OUT], samples[1::_HOLD_OUT]
        train = [sample for i, sample in enumerate(samples) if i % _HOLD_OUT > 1]
    else:
        classes, train = found["train"]
        if "test" not in found:
            warnings.warn(f"{root} has no test/: val/ is the test split, every tenth of train/ is val", stacklevel=3)
        test = found["test" if "test" in found else "val"][1]
        if "test" in found and "val" in found:
            val = found["val"][1]
        else:
            val = train[::_HOLD_OUT]
            train = [sample for i, sample in enumerate(train) if i % _HOLD_OUT]
    files = [ImageFiles(samples, shape, resize) for samples in (train, val, test)]
    return Splits(str(spec), files[0], files[1], files[2], classes)


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _image_folder(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Class names and (file, label) in sorted order, by class, then file name."""
    from torchvision.datasets import ImageFolder

    if not _has_folders(folder):
        raise UserError(f"{str(folder)!r} has no class folders: images belong in {folder}/CLASS/")
    images = ImageFolder(str(folder), allow_empty=True)
    used = {label for _, label in images.samples}
    if empty := [name for name, label in images.class_to_idx.items() if label not in used]:
        raise UserError(f"{str(folder)!r} has no images in {', '.join(empty[:5])}: add some, or remove the folder")
    return tuple(images.classes), images.samples


def _cifar10(spec: Spec, shape: Shape) -> Splits:
    from torchvision.datasets import CIFAR10

    read_options(spec, {})
    root = _path(spec)
    if root.name == CIFAR10.base_folder:
        root = root.parent
    try:
        train, test = (CIFAR10(str(root), train=flag, download=False) for flag in (True, False))
    except Exception as exc:
        raise UserError(f"{str(root / CIFAR10.base_folder)!r} is not CIFAR-10's python version, whole") from exc
    sets = [_pixels(spec, data.data, data.targets, shape, name) for name, data in (("train", train), ("test", test))]
    return _hold_out(spec, sets[0], None, sets[1], tuple(train.classes))


def _npz(spec: Spec, shape: Shape) -> Splits:
    read_options(spec, {})
    path = _path(spec)
    if not path.is_file():
        raise UserError(f"{str(spec)!r}: there is no file {str(path)!r}")
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            there = sorted(archive.files)
            arrays = {key: archive[key] for key in there if key[:2] in ("x_", "y_")}
    except Exception as exc:
        raise UserError(f"{str(path)!r} is not an npz file of plain arrays: {one_line(exc)}") from exc
    has_val = "x_val" in arrays or "y_val" in arrays
    parts = {}
    for part in ("train", "val", "test") if has_val else ("train", "test"):
        for key in (f"x_{part}", f"y_{part}"):
            if key not in arrays:
                raise UserError(f"{str(path)!r} has no array {key!r}: it has {', '.join(there) or 'none'}")
        parts[part] = _pixels(spec, arrays[f"x_{part}"], arrays[f"y_{part}"], shape, part)
    if not len(parts["train"]):
        raise UserError(f"{str(path)!r} has no training images: x_train is empty")
    count = int(parts["train"].labels.max()) + 1
    for part, images in parts.items():
        if len(images) and int(images.labels.max()) >= count:
            largest = int(images.labels.max())
            raise UserError(f"{str(path)!r}: y_{part} has label {largest}, those of y_train end at {count - 1}")
    return _hold_out(spec, parts["train"], parts.get("val"), parts["test"], tuple(map(str, range(count))))


def _pixels(spec: Spec, images: Any, labels: Any, shape: Shape, part: str) -> TensorImages:
    """Arrays as a data set, checked: (N, H, W, C) or (N, C, H, W), uint8 or float, and labels (N,); of a network that
    reads no images, inputs as it takes them, float."""
    images, labels = np.asarray(images), np.asarray(labels)
    where, of_images = f"{str(spec)!r}, {part}", len(shape) == 3
    if of_images and images.ndim == 4 and images.shape[1:] == (*shape[1:], shape[0]):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1:] != shape:
        found, order = _by(images.shape[1:]), ", channels first or last" if of_images else ""
        raise UserError(f"{where}: {_what(shape)} are {found}, the model takes {_by(shape)}{order}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"{where}: labels must be {len(images)} integers, not {_by(labels.shape)} of {labels.dtype}")
    if len(labels) and labels.min() < 0:
        raise UserError(f"{where}: labels start at 0, there is {labels.min()}")
    if images.dtype.kind == "f":
        images = images.astype(np.float32)
        _check_values(where, torch.from_numpy(images), shape, told=part == "train")
    elif not of_images:
        raise UserError(f"{where}: inputs must be floats, not {images.dtype}: convert and scale them")
    elif images.dtype != np.uint8:
        raise UserError(f"{where}: images must be uint8 or float, not {images.dtype}")
    return TensorImages(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))


def _hold_out(
    spec: Spec, train: TensorImages, val: TensorImages | None, test: TensorImages, classes: tuple[str, ...]
) -> Splits:
    if val is None:
        held = torch.arange(len(train)) % _HOLD_OUT == 0
        val = TensorImages(train.images[held], train.labels[held])
        train = TensorImages(train.images[~held], train.labels[~held])
    return Splits(str(spec), train, val, test, classes)


def _from_factory(spec: Spec) -> Splits:
    if spec.path is None and not spec.is_file:
        file = Path(spec.name).expanduser()
        if file.suffix == ".npz" or file.is_dir():
            kind = "imagefolder" if file.is_dir() else "npz"
            raise UserError(f"{spec.name!r} does not say what it is: write {kind}:{spec.name}")
        raise unknown_name("data set", spec.name, DATASETS)
    made = call_factory(spec, kind="data set", known=DATASETS)
    if isinstance(made, Splits):
        return made
    if not isinstance(made, tuple) or len(made) != 3 or not all(hasattr(part, "__getitem__") for part in made):
        raise UserError(f"{str(spec)!r} returned a {type(made).__name__}, not Splits or (train, val, test)")
    return Splits(str(spec), *made, classes=tuple(map(str, getattr(made[0], "classes", ()))))


def _check_sample(spec: Spec, name: str, split: Dataset, shape: Shape, *, classes: int) -> None:
    """The first sample stands for the others: a factory's images are not all loaded to look at them."""
    where = f"{str(spec)!r}, {name}"
    try:
        image, label = split[0]
        label = operator.index(label)
    except UserError:
        raise
    except Exception as exc:
        raise UserError(f"{where}: the first item is not (image, integer label): {one_line(exc)}") from exc
    if not isinstance(image, Tensor) or image.dtype != torch.float32:
        raise UserError(f"{where}: {_what(shape)} must be float32 tensors, not {_kind(image)}")
    if tuple(image.shape) != shape:
        raise UserError(f"{where}: {_what(shape)} are {_by(image.shape)}, the model takes {_by(shape)}: give --input")
    _check_values(where, image, shape, told=name == "train")
    if label < 0 or (classes and label >= classes):
        raise UserError(f"{where}: labels lie in 0..{classes - 1 if classes else 'classes - 1'}, the first is {label}")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_values(where: str, values: Tensor, shape: Shape, *, told: bool) -> None:
    """A warning, where it is `told`, of images that leave [0, 1], as log-mel spectrograms do; UserError of those from 0
    to 255, and of what is not finite."""
    if not values.numel():
        return
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{where}: there are {_what(shape)} that are not finite")
    low, high = float(values.min()), float(values.max())
    if len(shape) != 3 or (low >= 0 and high <= 1):
        return
    if low >= 0 and high <= 255 and bool((values == values.round()).all()):
        raise UserError(f"{where}: float images of whole numbers up to {high:g}: give uint8, or divide by 255")
    if not told:
        return
    warnings.warn(
        f"{where}: images lie in [{low:.3g}, {high:.3g}], not in [0, 1]: the network reads (x - mean) / std of them",
        stacklevel=2,
    )


def _what(shape: Shape) -> str:
    return "images" if len(shape) == 3 else "inputs"


def _path(spec: Spec) -> Path:
    if spec.path is None:
        raise UserError(f"{str(spec)!r} does not say where the data lie: write {spec.name}:PATH")
    return Path(spec.path).expanduser()


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "single numbers"


#: By the names of `amc_hw.choices.DATA_SETS`.
DATASETS: dict[str, Callable[[Spec, Shape], Splits]] = {
    "digits": _digits,
    "imagefolder": _imagefolder,
    "cifar10": _cifar10,
    "npz": _npz,
}
