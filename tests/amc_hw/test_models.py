"""The networks of ours against hand-computed sizes and the real checkpoints; load_model's sources and errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import tarfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from amc_hw.data import Splits
from amc_hw.errors import UserError
from amc_hw.graph import build_graph
from amc_hw.images import TensorImages
from amc_hw.models import MODELS, ChannelMap, load_model
from amc_hw.models.checkpoint import load_checkpoint
from amc_hw.task import Classification

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CHECKPOINTS = {
    "mobilenet_v1_cifar": DATA / "mobilenet_v1_cifar10jpeg.pt",
    "resnet20": DATA / "resnet20_cifar10jpeg.pt",
    "resnet56": DATA / "resnet56_cifar10jpeg.pt",
}


def fails(text: str, **options) -> str:
    """The message of the UserError that loading must raise."""
    with pytest.raises(UserError) as caught:
        load_model(text, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message and "\n" not in message
    return message


def count_macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += weight[0].numel() * output[0].numel()  # MACs of one output value, times output values

    hooks = [
        layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    return total


# Parameters by hand: 3x3 convolutions 3 -> 16, 16 -> 16, 16 -> 32, 32 -> 32, 32 -> 64, 64 -> 64 have 432, 2304, 4608,
# 9216, 18432 and 36864 weights; batch-norm has two a channel; the linear layer 64 * 10 + 10.
_RESNET20_PARAMS = 432 + 6 * 2304 + (4608 + 5 * 9216) + (18432 + 5 * 36864) + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 650
_RESNET56_PARAMS = 432 + 18 * 2304 + (4608 + 17 * 9216) + (18432 + 17 * 36864) + 2 * (16 + 18 * 112) + 650
# MACs: convolution weights times the 32 * 32, 16 * 16 or 8 * 8 places where they are applied.
_RESNET20_MACS = 432 * 1024 + 6 * 2304 * 1024 + (4608 + 5 * 9216) * 256 + (18432 + 5 * 36864) * 64 + 640
_RESNET56_MACS = 432 * 1024 + 18 * 2304 * 1024 + (4608 + 17 * 9216) * 256 + (18432 + 17 * 36864) * 64 + 640


@pytest.mark.parametrize(
    ("spec", "params", "macs"),
    [
        ("mobilenet_v1", 4_231_976, 568_740_352),  # 4.2 million and 569 MMACs in the paper
        ("mobilenet_v1_cifar", 4_231_976 - 1_025_000 + 10_250, None),  # a classifier of 10 rather than 1000
        ("resnet20", _RESNET20_PARAMS, _RESNET20_MACS),
        ("plain20", _RESNET20_PARAMS, _RESNET20_MACS),
        ("resnet56", _RESNET56_PARAMS, _RESNET56_MACS),
    ],
)
def test_params_and_macs(spec: str, params: int, macs: int | None) -> None:
    loaded = load_model(spec)
    assert sum(p.numel() for p in loaded.module.parameters()) == params
    counted = count_macs(loaded.module, loaded.example_inputs)
    assert counted == macs if macs else 46.2e6 < counted < 46.4e6


def test_published_sizes() -> None:
    assert (_RESNET20_PARAMS, _RESNET56_PARAMS) == (269_722, 853_018)
    assert (_RESNET20_MACS, _RESNET56_MACS) == (40_551_040, 125_485_696)


def test_mobilenet_names_strides_and_activations() -> None:
    for spec, first_stride, activation in (("mobilenet_v1", 2, nn.ReLU6), ("mobilenet_v1_cifar", 1, nn.ReLU)):
        module = load_model(spec).module
        layers = dict(module.named_modules())
        strides = [layers[f"features.{i}.0"].stride[0] for i in range(14)]  # type: ignore[index]
        assert strides == [first_stride, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        widths = [layers["features.0.0"].out_channels] + [layers[f"features.{i}.3"].out_channels for i in range(1, 14)]
        assert widths == [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
        activations = [type(layer) for layer in layers.values() if isinstance(layer, nn.ReLU | nn.ReLU6)]
        assert activations == [activation] * 27
        assert all(layer.bias is None for layer in layers.values() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize(
    ("width", "widths"),
    [
        (0.75, [24, 48, 96, 96, 192, 192, *[384] * 6, 768, 768]),
        (0.25, [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]),
        (0.1, [8, 8, 16, 16, 24, 24, *[48] * 6, 104, 104]),  # 12 -> 16, 25 -> 24, 51 -> 48, 102 -> 104
        (0.01, [8] * 14),
    ],
)
def test_width_multiplier(width: float, widths: list[int]) -> None:
    loaded = load_model(f"mobilenet_v1_cifar?width={width}&num_classes=7")
    convolutions = [layer for layer in loaded.module.modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    assert [layer.out_channels for layer in convolutions] == widths
    assert loaded.module(*loaded.example_inputs).shape == (1, 7)


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_and_fx(name: str) -> None:
    loaded = load_model(name)
    assert loaded.spec == name
    assert not loaded.module.training
    assert loaded.input_shape == MODELS[name].input_shape == tuple(loaded.example_inputs[0].shape[1:])
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.std == (0.229, 0.224, 0.225)
    assert loaded.checkpoint_sha256 is None
    traced = torch.fx.symbolic_trace(loaded.module)
    with torch.no_grad():
        expected = loaded.module(*loaded.example_inputs)
        assert torch.equal(traced(*loaded.example_inputs), expected)
    assert expected.shape == (1, 1000 if name == "mobilenet_v1" else 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.spec = "other"  # type: ignore[misc]


def test_seeded_weights_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_model("resnet20").module.state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = (load_model("resnet20", seed=seed).module.state_dict() for seed in (0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_resnet_shortcuts() -> None:
    module = load_model("resnet20").module
    maps = {name: layer for name, layer in module.named_modules() if isinstance(layer, ChannelMap)}
    assert list(maps) == ["layer2.0.shortcut", "layer3.0.shortcut"]
    shortcut = maps["layer2.0.shortcut"]
    assert (shortcut.in_channels, shortcut.out_channels, shortcut.stride) == (16, 32, 2)
    assert shortcut.index == (*[-1] * 8, *range(16), *[-1] * 8)
    assert not any(isinstance(layer, ChannelMap | nn.Identity) for layer in load_model("plain20").module.modules())
    assert load_model("plain20").module.state_dict().keys() == module.state_dict().keys()


# --- ChannelMap


@st.composite
def channel_maps(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    channels = draw(st.integers(1, 6))
    run = [*[-1] * draw(st.integers(0, 3)), *range(channels), *[-1] * draw(st.integers(0, 3))]
    part = list(range(draw(st.integers(0, channels - 1)), channels))
    free = st.lists(st.integers(-1, channels - 1), min_size=1, max_size=8)
    index = draw(st.just(run) | st.just(part) | st.just([-1, *part]) | free)
    return tuple(index), draw(st.integers(1, 3)), channels


@given(channel_maps(), st.integers(1, 7), st.integers(1, 7))
def test_channel_map_does_what_a_loop_does(drawn: tuple[tuple[int, ...], int, int], height: int, width: int) -> None:
    index, stride, channels = drawn
    layer = ChannelMap(index, stride, in_channels=channels)
    x = torch.randn(2, channels, height, width, requires_grad=True)
    expected = torch.zeros(2, len(index), -(-height // stride), -(-width // stride))
    for j, i in enumerate(index):
        for row in range(expected.shape[2]):
            for column in range(expected.shape[3]):
                if i >= 0:
                    expected[:, j, row, column] = x.detach()[:, i, row * stride, column * stride]
    out = layer(x)
    assert torch.equal(out, expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected)
    out.sum().backward()
    assert (layer.in_channels, layer.out_channels, layer.stride, layer.index) == (channels, len(index), stride, index)
    assert not layer.state_dict() and not list(layer.parameters())


def test_channel_map_as_an_fx_leaf() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, ChannelMap) or super().is_leaf_module(m, module_qualified_name)

    graph = Tracer().trace(load_model("resnet56").module)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    shortcuts = [name for name in called if name.endswith("shortcut")]
    assert len(shortcuts) == 27
    assert shortcuts[9::9] == ["layer2.0.shortcut", "layer3.0.shortcut"]


def test_channel_map_needs_no_padding_when_nothing_is_zero() -> None:
    x = torch.randn(1, 4, 2, 2)
    assert ChannelMap(range(4))(x) is x
    assert ChannelMap(range(1, 3), in_channels=4)(x)._base is not None  # a view


@pytest.mark.parametrize(
    ("index", "stride", "channels"), [((), 1, 3), ((-2,), 1, 3), ((3,), 1, 3), ((0,), 0, 3), ((-1,), 1, None)]
)
def test_channel_map_refuses(index: tuple[int, ...], stride: int, channels: int | None) -> None:
    with pytest.raises(ValueError, match="ChannelMap"):
        ChannelMap(index, stride, in_channels=channels)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Constant folding")
def test_channel_map_exports_to_onnx(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    module = nn.Sequential(ChannelMap((-1, 0, 1, 2, -1), 2), ChannelMap((4, -1, 1, 1, 3), in_channels=5)).eval()
    x = torch.randn(1, 3, 5, 4)
    file = tmp_path / "map.onnx"
    torch.onnx.export(module, (x,), file, dynamo=dynamo, verbose=False)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_array_equal(out, module(x).numpy())


# --- Real checkpoints


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_real_checkpoints_load_strictly(name: str) -> None:
    file = CHECKPOINTS[name]
    if not file.exists():
        pytest.skip(f"needs {file}, which is not part of the repository")
    loaded = load_model(name, checkpoint=file)
    stored = torch.load(file, weights_only=True)
    weights = loaded.module.state_dict()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[key], stored[key]) for key in stored)
    assert loaded.checkpoint_sha256 is not None and len(loaded.checkpoint_sha256) == 64


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `test/<class>/` with some real images."""
    if named := os.environ.get("AMC_HW_CIFAR10"):
        return Path(named)
    archive = DATA / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"needs AMC_HW_CIFAR10, the unpacked images, or {archive}")
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(archive, "r|xz") as tar:
        wanted = (member for member in tar if member.name.startswith("test/") and member.name.endswith("0.jpg"))
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
        tar.extractall(folder, members=wanted, **safe)
    return folder


@pytest.mark.slow
def test_resnet20_classifies_real_images(cifar_folder: Path) -> None:
    from amc_hw.data import load_data, load_tensors

    file = CHECKPOINTS["resnet20"]
    if not file.exists():
        pytest.skip(f"needs {file}, which is not part of the repository")
    loaded = load_model("resnet20", checkpoint=file)
    with pytest.warns(UserWarning, match="no val/ and test/"):
        # the folder of test images read as a flat one: its largest part serves
        splits = load_data(f"imagefolder:{cifar_folder}/test", input_shape=loaded.input_shape)
    images, labels = load_tensors(splits.train, limit=500)
    assert splits.classes[:2] == ("airplane", "automobile") and images.shape == (500, 3, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (loaded.mean, loaded.std))
    with torch.no_grad():
        predicted = loaded.module((images - mean) / std).argmax(1)
    assert (predicted == labels).float().mean() > 0.80  # 88.1% on all test images


# --- Checkpoint files


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return load_model("resnet20", seed=3).module.state_dict()


def test_accepted_layouts(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file = tmp_path / "w.pt"
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    for content in (
        weights,
        {"state_dict": weights, "epoch": 3},
        {"model": {f"module.{key}": value for key, value in weights.items()}},
        old,
    ):
        torch.save(content, file)
        module = load_model("resnet20", checkpoint=str(file)).module
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in weights.items())


def test_checkpoint_that_does_not_fit(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file = tmp_path / "w.pt"
    torch.save(weights, file)
    message = fails("resnet20?num_classes=100", checkpoint=file)
    assert str(file) in message
    assert "linear.weight is (10, 64) in the file and (100, 64) in the model, and 1 more" in message
    message = fails("resnet56", checkpoint=file)  # the first missing key, in the model's order
    assert "layer1.3.conv1.weight is missing in the file and (16, 16, 3, 3) in the model" in message
    torch.save({**weights, "extra": torch.zeros(2)}, file)
    message = fails("resnet20", checkpoint=file)
    assert "extra is (2,) in the file and missing in the model; check" in message


class _Harmful:
    def __reduce__(self):
        return os.system, ("echo harmful",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_that_loads_by_its_version_is_told_it(tmp_path: Path, wrapped: bool) -> None:
    """torchvision's MnasNet refuses a state dict that does not say which version it is of."""
    made = torchvision.models.mnasnet0_5(num_classes=3)
    path = tmp_path / "w.pt"
    torch.save((nn.DataParallel(made) if wrapped else made).state_dict(), path)
    other = torchvision.models.mnasnet0_5(num_classes=3)
    load_checkpoint(other, path)
    assert torch.equal(other.layers[0].weight, made.layers[0].weight)
    torch.save(dict(made.state_dict()), path)
    with pytest.raises(UserError, match="w.pt' cannot be loaded into the model: .*version should be set"):
        load_checkpoint(other, path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    assert str(file) in fails("resnet20", checkpoint=file)
    assert "No such file" in fails("resnet20", checkpoint=file)
    assert "directory" in fails("resnet20", checkpoint=tmp_path)
    for content in (b"", b"no checkpoint\nat all", b"PK\x03\x04 cut short"):
        file.write_bytes(content)
        message = fails("resnet20", checkpoint=file)
        assert str(file) in message and "is not a checkpoint" in message
    for harmful in (_Harmful(), nn.Linear(2, 2)):
        torch.save(harmful, file)
        assert "is not a checkpoint of tensors alone" in fails("resnet20", checkpoint=file)
    for useless in ([1, 2], {}, {"epoch": 3}, {"state_dict": {3: torch.zeros(1)}}):
        torch.save(useless, file)
        assert "holds no state dict" in fails("resnet20", checkpoint=file)


# --- Other sources


def test_unknown_models() -> None:
    message = fails("mobilenetv1")
    assert "did you mean mobilenet_v1" in message
    for known in (*MODELS, "torchvision", "timm", "file.py:factory", "package.module:factory"):
        assert known in message
    assert "takes no ':PATH'" in fails("resnet20:x")
    assert "the options of resnet20 are num_classes" in fails("resnet20?width=2")
    assert "a number above 0" in fails("mobilenet_v1?width=wide")
    assert "resnet18" in fails("torchvision:resnet81")
    assert "write torchvision:NAME" in fails("torchvision")
    assert "--checkpoint" in fails("torchvision:resnet18?weights=DEFAULT")
    assert "unexpected keyword argument" in fails("torchvision:resnet18?depth=3")


def test_torchvision() -> None:
    loaded = load_model("torchvision:squeezenet1_1?num_classes=12")
    assert loaded.input_shape == (3, 224, 224)
    assert loaded.module(*loaded.example_inputs).shape == (1, 12)
    small = load_model("torchvision:mobilenet_v2?num_classes=4&width_mult=0.25", input_shape=(1, 3, 64, 48))
    assert small.input_shape == (3, 64, 48) and small.example_inputs[0].shape == (1, 3, 64, 48)
    small_patches = "torchvision:vit_b_16?image_size=32&num_layers=1&num_classes=5"
    assert "cannot be built" in fails(small_patches)  # vit_b_16 fixes its own number of layers


def test_torchvision_inception_takes_299() -> None:
    loaded = load_model("torchvision:inception_v3?init_weights=false&aux_logits=false")
    assert loaded.input_shape == (3, 299, 299)


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in fails("timm:resnet10t")

    asked: list[str] = []

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        asked.append(name)
        assert not pretrained
        module = nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        config = {"input_size": (3, 48, 48), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        object.__setattr__(module, "pretrained_cfg", config)
        return module

    stub = types.SimpleNamespace(create_model=create_model, list_models=lambda: ["tiny"])
    stub.is_model = lambda name: name.partition(".")[0] == "tiny"  # perhaps with the tag of its weights
    monkeypatch.setitem(sys.modules, "timm", stub)
    assert load_model("timm:tiny.of_1k?num_classes=6").input_shape == (3, 48, 48)
    loaded = load_model("timm:tiny?num_classes=6")
    assert loaded.input_shape == (3, 48, 48) and loaded.mean == (0.5,) * 3 and loaded.std == (0.25,) * 3
    assert asked == ["tiny.of_1k", "tiny"]
    assert "cannot be built" in fails("timm:tiny?depth=3")
    assert fails("timm:tine") == "unknown timm model 'tine': did you mean tiny?"


@pytest.fixture
def nets(tmp_path: Path) -> str:
    file = tmp_path / "nets.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "def bare(channels=3):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout())\n"
        "def with_inputs():\n    return bare(), torch.zeros(4, 3, 20, 24)\n"
        "def with_attributes():\n"
        "    module = bare()\n"
        "    module.input_shape, module.mean, module.std = (3, 40, 40), (0.1, 0.2, 0.3), torch.tensor([0.5])\n"
        "    return module\n"
        "def number():\n    return 3\n"
        "def words():\n    return bare(), 'words'\n"
    )
    return str(file)


def test_factories(nets: str) -> None:
    assert "give --input 1x3x224x224" in fails(f"{nets}:bare")
    loaded = load_model(f"{nets}:bare", input_shape=(3, 16, 16))
    assert loaded.input_shape == (3, 16, 16) and not loaded.module.training
    assert torch.equal(
        load_model(f"{nets}:bare", input_shape=(3, 16, 16)).module(*loaded.example_inputs),
        loaded.module(*loaded.example_inputs),
    )
    loaded = load_model(f"{nets}:with_inputs")
    assert loaded.input_shape == (3, 20, 24) and loaded.example_inputs[0].shape == (1, 3, 20, 24)
    assert load_model(f"{nets}:with_inputs", input_shape=(3, 9, 9)).example_inputs[0].shape == (1, 3, 9, 9)
    loaded = load_model(f"{nets}:with_attributes")
    assert loaded.input_shape == (3, 40, 40) and loaded.mean == (0.1, 0.2, 0.3) and loaded.std == (0.5,) * 3
    grey = load_model(f"{nets}:bare?channels=1", input_shape=(1, 8, 8))
    assert grey.mean == (0.0,) and grey.std == (1.0,)
    assert load_model("torchvision.models:squeezenet1_1", input_shape=(3, 64, 64)).input_shape == (3, 64, 64)
    assert "returned a int, not a module" in fails(f"{nets}:number")
    assert "not tensors" in fails(f"{nets}:words")
    assert "the options of bare are channels" in fails(f"{nets}:bare?depth=3")


def test_images_of_a_factory_that_names_no_normalisation_are_normalised_aloud(nets: str) -> None:
    part = TensorImages(torch.rand(20, 3, 16, 16), torch.arange(20) % 5)
    data = Splits("drawn", part, part, part, tuple("abcde"))
    unsaid = load_model(f"{nets}:bare", input_shape=(3, 16, 16))
    with pytest.warns(UserWarning, match=r"nets.py:bare names no mean and std: images are .* \(mean 0.485 0.456 0.406"):
        Classification(unsaid, data)
    said = [
        load_model(f"{nets}:bare", input_shape=(3, 16, 16), mean=(0,), std=(1,)),
        load_model(f"{nets}:with_attributes", input_shape=(3, 16, 16)),
        load_model("resnet20", input_shape=(3, 16, 16)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in said:
            Classification(each, data)
    half = load_model(f"{nets}:bare", input_shape=(3, 16, 16), mean=(0.5,))
    with pytest.warns(UserWarning, match="nets.py:bare names no std: images are"):
        Classification(half, data)
    assert (
        unsaid.assumed == ("mean", "std") and not load_model(f"{nets}:bare?channels=1", input_shape=(1, 8, 8)).assumed
    )


def test_one_number_is_the_mean_of_all_channels(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make(tensor='no'):\n"
        "    net = nn.Conv2d(3, 4, 1)\n"
        "    net.input_shape, net.mean, net.std = (3, 8, 8), -6.0, 1.5 if tensor == 'no' else torch.tensor(1.5)\n"
        "    return net\n"
    )
    for options in ("", "?tensor=yes"):
        loaded = load_model(f"{tmp_path / 'one.py'}:make{options}")
        assert (loaded.mean, loaded.std) == ((-6.0,) * 3, (1.5,) * 3)


WRAPPED = """
import torch, warnings
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

def net():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net.input_shape = (3, 8, 8)
    return net

def parallel(): return nn.DataParallel(net())
def compiled(): return torch.compile(net())

def outside():
    inner = net()
    del inner.input_shape
    made = nn.DataParallel(torch.compile(inner))
    made.input_shape = (3, 8, 8)
    return made

def normed():
    made = net()
    parametrizations.weight_norm(made[0])
    parametrizations.spectral_norm(made[2])
    return made

def hooked():
    made = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(made[0])
    torch.nn.utils.spectral_norm(made[2])
    return made
"""


@pytest.mark.parametrize("name", ["parallel", "compiled", "outside"])
def test_a_network_is_taken_out_of_what_runs_it_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    loaded = load_model(f"{tmp_path / 'wrapped.py'}:{name}")
    assert type(loaded.module) is nn.Sequential and loaded.input_shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["normed", "hooked"])
def test_weights_that_norms_compute_become_plain_ones(tmp_path: Path, name: str) -> None:
    file = tmp_path / "wrapped.py"
    file.write_text(WRAPPED)
    spec = importlib.util.spec_from_file_location("wrapped", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = getattr(module, name)().eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    loaded = load_model(f"{file}:{name}", checkpoint=tmp_path / "w.pt")
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(loaded.module(images), net(images))
    assert set(loaded.module.state_dict()) == {f"{place}.{part}" for place in (0, 2) for part in ("weight", "bias")}
    assert [group.name for group in build_graph(loaded.module, (3, 8, 8)).groups] == ["0"]


def test_a_segmentation_network_of_torchvision_is_built_without_fetching_anything() -> None:
    model = load_model("torchvision:lraspp_mobilenet_v3_large?num_classes=5", input_shape=(3, 64, 64))
    assert model.module(*model.example_inputs)["out"].shape == (1, 5, 64, 64)


def test_inputs_and_normalisation_that_do_not_fit() -> None:
    message = fails("resnet20", input_shape=(1, 32, 32))
    assert "does not take input 1x1x32x32" in message
    assert "does not take input 1x3x32:" in fails("resnet20", input_shape=(3, 32))
    for shape in ((2, 3, 32, 32), (3, 0, 32), "3x32x32"):
        assert "must be like 1x3x224x224" in fails("resnet20", input_shape=shape)
    loaded = load_model("resnet20", mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert loaded.mean == (0.5, 0.5, 0.5) and loaded.std == (0.1, 0.2, 0.3)
    assert "mean must have 3" in fails("resnet20", mean=(0.5, 0.5))
    assert "std must have 3 finite" in fails("resnet20", std=(0.5, 0.5, float("nan")))
    assert "above 0" in fails("resnet20", std=(0.5, 0.5, 0.0))
