"""Data sets on tiny files made here: the splits, the pixels, and every error a user can meet."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from amc_hw.data import Splits, load_data, load_tensors
from amc_hw.errors import UserError

RGB8 = (3, 8, 8)


def fails(text: str, input_shape: tuple[int, ...] = RGB8) -> str:
    """The message of the UserError that loading must raise."""
    with pytest.raises(UserError) as caught:
        load_data(text, input_shape=input_shape)
    return one_line(caught)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message and "\n" not in message
    return message


def check(splits: Splits, shape: tuple[int, int, int]) -> None:
    """What every split must be like."""
    for split in (splits.train, splits.val, splits.test):
        image, label = split[0]
        assert isinstance(image, torch.Tensor) and image.dtype == torch.float32 and image.shape == shape
        assert image.min() >= 0 and image.max() <= 1
        assert type(label) is int and 0 <= label < len(splits.classes)
        images, labels = load_tensors(split)
        assert images.shape == (size(split), *shape) and images.dtype == torch.float32 and images.is_contiguous()
        assert labels.shape == (size(split),) and labels.dtype == torch.int64
        assert torch.equal(images[0], image) and labels[0] == label


def make_folder(root: Path, layout: dict[str, int], *, size: tuple[int, int] = (8, 8), start: int = 0) -> Path:
    """`layout` gives the images of each folder; each is of one grey value: its number, counted over all folders."""
    value = start
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, (value, value, value)).save(root / folder / f"{i:03d}.png")
            value += 1
    return root


def size(split: Dataset) -> int:
    return len(split)  # type: ignore[arg-type]  # torch's Dataset declares no __len__


def values(split: Dataset) -> list[int]:
    """The numbers that make_folder gave to a split's images."""
    return [round(float(image.mean()) * 255) for image in load_tensors(split)[0]]


# --- digits


def test_digits() -> None:
    splits = load_data("digits", input_shape=(3, 32, 32))
    check(splits, (3, 32, 32))
    assert splits.name == "digits" and splits.classes == tuple("0123456789")
    sizes = [size(split) for split in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 1797 and sizes == pytest.approx([1050, 300, 447], abs=10)
    images, labels = load_tensors(splits.train)
    assert torch.equal(images[:, 0], images[:, 2])
    for split in (splits.train, splits.val, splits.test):  # stratified: each class is near a tenth
        assert torch.bincount(load_tensors(split)[1]).div(size(split)).sub(0.1).abs().max() < 0.01


def test_digits_are_disjoint_scaled_and_the_same_every_time() -> None:
    from sklearn.datasets import load_digits

    splits = load_data("digits", input_shape=(1, 8, 8))  # at 8x8 the upsampling is the identity
    parts = [load_tensors(split)[0].flatten(1) for split in (splits.train, splits.val, splits.test)]
    stored = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, stored.tolist()))
    again = load_data("digits", input_shape=(1, 8, 8))
    assert torch.equal(load_tensors(again.val)[0].flatten(1), parts[1])


def test_digits_errors() -> None:
    assert "takes no options" in fails("digits?size=8")
    assert "takes no ':PATH'" in fails("digits:/data")


# --- imagefolder


def test_three_folders(tmp_path: Path) -> None:
    layout = {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 2}
    make_folder(tmp_path, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load_data(f"imagefolder:{tmp_path}", input_shape=RGB8)
    check(splits, RGB8)
    assert splits.classes == ("cat", "dog")
    assert [values(split) for split in (splits.train, splits.val, splits.test)] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
    assert load_tensors(splits.train)[1].tolist() == [0, 0, 0, 1, 1]


def test_without_val_every_tenth_training_image_is_held_out(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 13, "train/b": 8, "test/a": 1, "test/b": 1})
    splits = load_data(f"imagefolder:{tmp_path}", input_shape=RGB8)
    assert values(splits.val) == [0, 10, 20]
    assert values(splits.train) == [i for i in range(21) if i % 10]
    assert values(splits.test) == [21, 22]


def test_without_test_val_becomes_test(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 13, "train/b": 8, "val/a": 1, "val/b": 1})
    with pytest.warns(UserWarning, match="has no test/") as caught:
        splits = load_data(f"imagefolder:{tmp_path}", input_shape=RGB8)
    assert caught[0].filename == __file__
    assert [values(splits.val), values(splits.test)] == [[0, 10, 20], [21, 22]]


@pytest.mark.parametrize("below", ["", "train/"])
def test_one_folder_of_classes_is_split_in_three(tmp_path: Path, below: str) -> None:
    make_folder(tmp_path, {f"{below}a": 13, f"{below}b": 8})
    with pytest.warns(UserWarning, match="no val/ and test/"):
        splits = load_data(f"imagefolder:{tmp_path}", input_shape=RGB8)
    assert [values(splits.val), values(splits.test)] == [[0, 10, 20], [1, 11]]
    assert values(splits.train) == [i for i in range(21) if i % 10 > 1]


@pytest.mark.filterwarnings("ignore:.*no val/")
def test_a_class_called_train(tmp_path: Path) -> None:
    make_folder(tmp_path, {"boat": 6, "train": 6})
    assert load_data(f"imagefolder:{tmp_path}", input_shape=RGB8).classes == ("boat", "train")


@pytest.mark.filterwarnings("ignore:.*no val/")
def test_resize_and_crop(tmp_path: Path) -> None:
    # left half black, right half white, 160 wide and 80 high
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[:, 80:] = 255
    for i in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i:02d}.png")
    image, _ = load_data(f"imagefolder:{tmp_path}", input_shape=(3, 64, 64)).train[0]  # resized to 73, cropped to 64
    assert image.shape == (3, 64, 64)
    assert image[:, :, :28].max() == 0 and image[:, :, 36:].min() == 1
    grey, _ = load_data(f"imagefolder:{tmp_path}?size=40&resize=80", input_shape=(1, 40, 40)).train[0]
    assert grey.shape == (1, 40, 40) and torch.equal(grey[0, 0], torch.arange(40).ge(20).float())  # cropped only
    wide, _ = load_data(f"imagefolder:{tmp_path}", input_shape=(3, 20, 40)).train[0]
    assert wide.shape == (3, 20, 40)


@pytest.mark.filterwarnings("ignore:.*no val/")
def test_default_resize_is_of_the_input_height(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 12})
    for shape, resize in (((3, 224, 224), 256), ((3, 64, 64), 73), ((3, 63, 63), 63), ((3, 32, 32), 32)):
        assert load_data(f"imagefolder:{tmp_path}", input_shape=shape).train.resize == resize  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*no val/")
def test_images_of_the_right_size_are_not_touched(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    (tmp_path / "a").mkdir()
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i:02d}.png")
    images, _ = load_tensors(load_data(f"imagefolder:{tmp_path}", input_shape=(3, 64, 64)).val)
    assert torch.equal(images, torch.from_numpy(noise[::10]).permute(0, 3, 1, 2) / 255)


def test_imagefolder_errors(tmp_path: Path) -> None:
    assert "write imagefolder:PATH" in fails("imagefolder")
    assert "there is no folder" in fails(f"imagefolder:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in fails(f"imagefolder:{tmp_path}/empty")
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "loose.png")
    assert "no class folders" in fails(f"imagefolder:{tmp_path}/empty")
    assert "there is no folder" in fails(f"imagefolder:{tmp_path}/empty/loose.png")
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    assert "no images in cat" in fails(f"imagefolder:{tmp_path}/bare")
    make_folder(tmp_path / "untrained", {"val/a": 2})
    assert "no train/" in fails(f"imagefolder:{tmp_path}/untrained")
    make_folder(tmp_path / "differ", {"train/a": 12, "train/b": 2, "test/a": 2, "test/c": 2})
    assert "train/ and test/ differ in classes: b, c" in fails(f"imagefolder:{tmp_path}/differ")
    good = make_folder(tmp_path / "good", {"train/a": 12, "test/a": 2})
    message = fails(f"imagefolder:{good}?size=32", (3, 64, 64))
    assert "3x32x32" in message and "3x64x64" in message and "--input 1x3x32x32" in message
    assert "takes 4x8x8" in fails(f"imagefolder:{good}", (4, 8, 8))
    assert "resize must be at least 8" in fails(f"imagefolder:{good}?resize=4")
    assert "'size' in" in fails(f"imagefolder:{good}?size=big")
    assert "are size, resize" in fails(f"imagefolder:{good}?sise=8")


@pytest.mark.filterwarnings("ignore:.*no val/")
def test_too_few_images(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1})
    assert "has no train images" in fails(f"imagefolder:{tmp_path}")


@pytest.mark.filterwarnings("ignore:.*no val/")
def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 12}, size=(64, 64))
    for content in (b"no image", (tmp_path / "a" / "005.png").read_bytes()[:60]):
        (tmp_path / "a" / "005.png").write_bytes(content)
        splits = load_data(f"imagefolder:{tmp_path}", input_shape=(3, 64, 64))
        with pytest.raises(UserError) as caught:
            load_tensors(splits.train)
        assert str(tmp_path / "a" / "005.png") in one_line(caught)
        with pytest.raises(UserError):
            splits.train[3]


def test_a_limit_decodes_only_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, {"train/a": 99, "train/b": 56, "test/a": 1, "test/b": 1})
    splits = load_data(f"imagefolder:{tmp_path}", input_shape=RGB8)
    opened = []
    original = Image.open

    def counted(file: str) -> Image.Image:
        opened.append(file)
        return original(file)

    monkeypatch.setattr(Image, "open", counted)
    images, labels = load_tensors(splits.train, limit=20, seed=1)
    assert len(opened) == 20 and images.shape == (20, 3, 8, 8)
    numbers = [round(float(image.mean()) * 255) for image in images]
    assert len(set(numbers)) == 20 and numbers != sorted(numbers)  # any first part is a sample of all classes
    assert len(set(labels[:10].tolist())) == 2
    assert labels.tolist() == [int(number >= 99) for number in numbers]
    assert torch.equal(load_tensors(splits.train, limit=20, seed=1)[0], images)
    assert not torch.equal(load_tensors(splits.train, limit=20, seed=2)[0], images)
    every, ordered = load_tensors(splits.train, limit=10**6)[0], load_tensors(splits.train)[0]
    assert torch.equal(every.sum((1, 2, 3)).sort()[0], ordered.sum((1, 2, 3)).sort()[0])
    with pytest.raises(UserError) as caught:
        load_tensors(splits.train, limit=0)
    one_line(caught)


# --- cifar10


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's python version in small, checksums included: each image is of one value, its index."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(numbers: range) -> dict:
        pixels = np.repeat(np.array(numbers, np.uint8)[:, None], 3072, axis=1)
        return {"data": pixels, "labels": [number % 10 for number in numbers]}

    train = [[f"data_batch_{i + 1}", write(f"data_batch_{i + 1}", batch(range(5 * i, 5 * i + 5)))] for i in range(5)]
    names = [f"class{i}" for i in range(10)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(range(100, 104)))]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", {"label_names": names})}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path


def test_cifar10(cifar10: Path) -> None:
    for path in (cifar10, cifar10 / "cifar-10-batches-py"):
        splits = load_data(f"cifar10:{path}", input_shape=(3, 32, 32))
        check(splits, (3, 32, 32))
        assert splits.classes[3] == "class3"
        assert [values(splits.val), values(splits.test)] == [[0, 10, 20], [100, 101, 102, 103]]
        assert values(splits.train) == [i for i in range(25) if i % 10]
        assert load_tensors(splits.train)[1].tolist() == [i % 10 for i in range(25) if i % 10]


def test_cifar10_errors(cifar10: Path, tmp_path: Path) -> None:
    assert "images are 32x32x3, the model takes 3x8x8" in fails(f"cifar10:{cifar10}")
    assert "is not CIFAR-10's python version" in fails(f"cifar10:{tmp_path}/none")
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    assert "is not CIFAR-10's python version" in fails(f"cifar10:{cifar10}", (3, 32, 32))


# --- npz


def arrays(count: int = 24, *, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of one value each, channels last, and labels 0, 1, 2, 0, ..."""
    numbers = np.arange(first, first + count)
    return np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 8, 8, 3)).copy(), numbers % 3


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_npz(tmp_path: Path, channels_first: bool, kind: type) -> None:
    content: dict[str, Any] = {}
    for part, count in (("train", 24), ("test", 3)):
        x, y = arrays(count)
        x = x.transpose(0, 3, 1, 2) if channels_first else x
        content |= {f"x_{part}": x if kind is np.uint8 else x / 255, f"y_{part}": y.astype(np.uint8)}
    np.savez(tmp_path / "d.npz", **content)
    splits = load_data(f"npz:{tmp_path}/d.npz", input_shape=RGB8)
    check(splits, RGB8)
    assert splits.classes == ("0", "1", "2")
    assert [values(splits.val), values(splits.test)] == [[0, 10, 20], [0, 1, 2]]
    assert values(splits.train) == [i for i in range(24) if i % 10]


def test_npz_with_val(tmp_path: Path) -> None:
    content = {}
    for i, part in enumerate(("train", "val", "test")):
        content[f"x_{part}"], content[f"y_{part}"] = arrays(3, first=30 * i)
    np.savez_compressed(tmp_path / "d.npz", **content)  # type: ignore[arg-type]
    splits = load_data(f"npz:{tmp_path}/d.npz", input_shape=RGB8)
    assert [values(s) for s in (splits.train, splits.val, splits.test)] == [[0, 1, 2], [30, 31, 32], [60, 61, 62]]


def test_npz_errors(tmp_path: Path) -> None:
    file = tmp_path / "d.npz"
    spec = f"npz:{file}"
    (x, y), (x_test, y_test) = arrays(), arrays(3)
    good = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    assert "there is no file" in fails(spec)
    for damaged in (b"", b"no archive", b"PK\x03\x04 cut short"):
        file.write_bytes(damaged)
        assert "is not an npz file" in fails(spec)
    with file.open("wb") as stream:
        np.save(stream, x)
    assert "is not an npz file" in fails(spec)
    changes: list[tuple[dict, str]] = [
        ({"y_test": None}, "has no array 'y_test': it has x_test, x_train, y_train"),
        ({"x_val": x_test}, "has no array 'y_val'"),
        ({"x_train": x[:, :4]}, "train: images are 4x8x3, the model takes 3x8x8"),
        ({"x_train": x[:, :, :, 0]}, "images are 8x8, the model"),
        ({"x_test": x_test.astype(np.int32)}, "test: images must be uint8"),
        ({"x_train": x.astype(np.float32)}, "float images of whole numbers up to 23: give uint8, or divide by 255"),
        ({"x_train": np.full(x.shape, np.nan)}, "there are images that are not finite"),
        ({"y_train": y[:5]}, "labels must be 24 integers, not 5 of"),
        ({"y_train": y / 2}, "labels must be 24 integers"),
        ({"y_train": y - 1}, "labels start at 0, there is -1"),
        ({"y_test": y_test + 5}, "y_test has label 7, those of y_train end at 2"),
        ({"x_test": x_test[:0], "y_test": y_test[:0]}, "has no test images"),
        ({"x_train": x[:0], "y_train": y[:0]}, "has no training images: x_train is empty"),
        ({"y_train": np.array([{}] * 24, dtype=object)}, "is not an npz file of plain arrays"),
    ]
    for change, part in changes:
        content = {key: value for key, value in {**good, **change}.items() if value is not None}
        np.savez(file, **content)
        assert part in fails(spec)


# --- factories, and names that nothing answers to


FACTORIES = """
import torch
from torch.utils.data import TensorDataset
from amc_hw.data import Splits, load_data
def made(count=4, size=8, scale=1.0, label=0):
    images = torch.rand(count, 3, size, size) * scale
    return TensorDataset(images, torch.full((count,), label))
def three(**options):
    return made(**options), made(), made()
def named():
    return Splits("mine", *three(), classes=("only",))
def mislabelled():
    return Splits("mine", *three(label=1), classes=("only",))
def two():
    return made(), made()
def bytes_only():
    return [(b"x", 0)], made(), made()
def nothing_else():
    return [3], made(), made()
"""


def test_factories(tmp_path: Path) -> None:
    file = tmp_path / "sets.py"
    file.write_text(FACTORIES)
    splits = load_data(f"{file}:three?count=7", input_shape=RGB8)
    assert [size(split) for split in (splits.train, splits.val, splits.test)] == [7, 4, 4]
    assert splits.classes == () and splits.name == f"{file}:three?count=7"
    images, labels = load_tensors(splits.train, limit=5)
    assert images.shape == (5, 3, 8, 8) and labels.dtype == torch.int64
    assert load_data(f"{file}:named", input_shape=RGB8).classes == ("only",)
    for text, part in [
        ("three?size=9", "train: images are 3x9x9, the model takes 3x8x8"),
        ("three?label=-1", "labels lie in 0..classes - 1, the first is -1"),
        ("mislabelled", "labels lie in 0..0, the first is 1"),
        ("three?count=0", "has no train images"),
        ("three?label=0.5", "not (image, integer label)"),
        ("two", "returned a tuple, not Splits or (train, val, test)"),
        ("bytes_only", "float32 tensors, not bytes"),
        ("nothing_else", "the first item is not (image, integer label)"),
        ("none", "has no function 'none'"),
    ]:
        assert part in fails(f"{file}:{text}")


def test_images_that_leave_the_unit_range_are_taken_as_they_are(tmp_path: Path) -> None:
    """Log-mel spectrograms, for instance."""
    x, y = np.random.default_rng(0).normal(-5, 3, (20, 1, 4, 6)).astype(np.float32), np.arange(20) % 2
    np.savez(tmp_path / "mel.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.warns(UserWarning, match=r"images lie in \[-.*\], not in \[0, 1\]: the network reads"):
        splits = load_data(f"npz:{tmp_path / 'mel.npz'}", input_shape=(1, 4, 6))
    images, _ = load_tensors(splits.test)
    assert torch.equal(images, torch.from_numpy(x))


def test_labels_of_foreign_data_sets_are_checked_when_they_are_read() -> None:
    with pytest.raises(UserError) as caught:
        load_tensors(TensorDataset(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, -1])))
    assert "there is -1" in one_line(caught)


def test_unknown_data_sets() -> None:
    message = fails("imagefolders:/data")
    assert "did you mean imagefolder?" in message
    assert "cifar10, digits, imagefolder, npz, file.py:factory" in message
    assert "did you mean digits?" in fails("digit")
