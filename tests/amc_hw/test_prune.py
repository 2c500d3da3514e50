"""Which channels stay, and that the smaller network computes what the masked one does, for every network we name."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mask_channels
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.models import ChannelMap, load_model
from amc_hw.prune import KeptAxes, channel_magnitudes, keep_channels, kept_axes, slice_channels

FACTORY = '''
import torch
from torch import nn


def conv(c_in, c_out, kernel, **options):
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, bias=False, **options), nn.BatchNorm2d(c_out), nn.ReLU6())


class Mixed(nn.Module):
    """A concatenation, a depthwise convolution, a residual sum, a flattened map and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, 3)
        self.left, self.right = conv(8, 6, 1), nn.Conv2d(8, 10, 3, padding=1)
        self.narrow = nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.inner, self.depthwise = conv(8, 12, 5), conv(12, 12, 3, groups=12)
        self.back = nn.Conv2d(12, 8, 3, padding=2, dilation=2)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(8 * 4 * 4, 24)
        self.classifier = nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.narrow(torch.cat([self.left(x), self.right(x)], 1))
        x = torch.relu(x + self.back(self.depthwise(self.inner(x))))
        return self.classifier(torch.relu(self.hidden(torch.flatten(self.pool(x), 1))))


def factory():
    return Mixed(), torch.zeros(1, 3, 16, 16)
'''


def randomise(module: nn.Module, input_shape: tuple[int, int, int], *, seed: int = 0) -> None:
    """Weights that read some channels more than others, and batch-norms near what the data needs, nothing 0 or 1:
    so that even the last layer of a deep network, halved, still depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                weight = part.weight.normal_(0, (0.15 / part.weight[0].numel()) ** 0.5, generator=generator)
                weight *= torch.randn(weight.shape[1], generator=generator).exp().view(-1, *[1] * (weight.dim() - 2))
                if part.bias is not None:
                    part.bias.normal_(0, 0.3, generator=generator)
        for norm in norms:
            norm.weight.uniform_(0.3, 1.0, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
            norm.train().momentum = 1.0
        module(torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(1)))
        for norm in norms:
            norm.eval()
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features, generator=generator)
            norm.running_var.clamp_(min=float(norm.running_var.mean()))  # a channel that is hardly used stays so
            norm.running_var *= torch.empty(norm.num_features).uniform_(0.7, 1.4, generator=generator)


def checksums(module: nn.Module) -> dict[str, int]:
    return {name: zlib.crc32(value.numpy()) for name, value in module.state_dict().items()}


def real_macs(module: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one image, counted while the network runs, not from any graph."""
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += layer.weight[0].numel() * output[0].numel()

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        module(image)
    for handle in handles:
        handle.remove()
    return total


# Every network: (spec, input that is valid and fast, its frozen classifier)
NETWORKS = [
    ("mobilenet_v1?num_classes=10", (3, 64, 64), "classifier"),
    ("mobilenet_v1_cifar", None, "classifier"),
    ("plain20", None, "linear"),
    ("resnet20", None, "linear"),
    ("resnet56", None, "linear"),
    ("torchvision:mobilenet_v2?num_classes=10", (3, 64, 64), "classifier.1"),
    ("torchvision:resnet18?num_classes=10", (3, 64, 64), "fc"),
    # its adaptive pooling to 7x7 is the identity for 224x224 only
    ("torchvision:vgg16_bn?num_classes=10", None, "classifier.6"),
    ("FACTORY:factory", None, "classifier"),
]
SLOW = ("torchvision:mobilenet_v2", "torchvision:vgg16_bn")


def parameters() -> list[object]:
    return [
        pytest.param(network, id=network[0].split("?")[0], marks=[pytest.mark.slow] * network[0].startswith(SLOW))
        for network in NETWORKS
    ]


@dataclass(frozen=True)
class Halved:
    """A network, and what became of it at half widths."""

    module: nn.Module
    graph: LayerGraph
    widths: list[int]
    kept: dict[str, np.ndarray]
    sliced: nn.Module
    images: Tensor
    before: Mapping[str, int]
    outputs: Tensor
    classifier: str


@pytest.fixture(scope="module", params=parameters())
def halved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halved:
    spec, shape, classifier = request.param
    if spec.startswith("FACTORY"):
        file = tmp_path_factory.mktemp("factory") / "nets.py"
        file.write_text(FACTORY)
        spec = spec.replace("FACTORY", str(file))
    loaded = load_model(spec, input_shape=shape)
    graph = build_graph(loaded.module, loaded.input_shape)
    randomise(loaded.module, loaded.input_shape)
    before = checksums(loaded.module)
    images = torch.randn(2, *loaded.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = loaded.module(images)
    widths = [width // 2 for width in graph.full_widths]
    kept = keep_channels(loaded.module, graph, widths)
    sliced = slice_channels(loaded.module, graph, kept)
    return Halved(loaded.module, graph, widths, kept, sliced, images, before, outputs, classifier)


def test_only_the_classifier_is_frozen_and_has_a_reason(halved: Halved) -> None:
    assert [(frozen.name, frozen.width, frozen.reason) for frozen in halved.graph.frozen] == [
        (halved.classifier, 10, "network output")
    ]
    assert all(len(halved.kept[group.name]) == group.width // 2 for group in halved.graph.groups)


def test_half_widths_take_at_most_half_the_macs_and_the_graph_counts_them_right(halved: Halved) -> None:
    image = halved.images[:1]
    full, half = real_macs(halved.module, image), real_macs(halved.sliced, image)
    assert full == halved.graph.op_graph().macs
    assert half == halved.graph.op_graph(halved.widths).macs
    assert half <= 0.5 * full


def test_sliced_network_computes_what_the_masked_one_does_and_the_original_is_left_alone(halved: Halved) -> None:
    masked = mask_channels(halved.module, halved.graph, halved.kept)
    with torch.no_grad():
        small, wanted = halved.sliced(halved.images), masked(halved.images)
        again = halved.module(halved.images)
    assert small.shape == halved.outputs.shape == (2, 10)
    torch.testing.assert_close(small, wanted, rtol=0, atol=1e-5)
    # the comparison means something: inputs and removed channels both matter
    assert (wanted - halved.outputs).abs().max() > 0.05
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    torch.testing.assert_close(again, halved.outputs, rtol=1e-6, atol=1e-6)
    assert checksums(halved.module) == halved.before


def test_sliced_network_is_physically_smaller_and_shares_no_memory(halved: Halved) -> None:
    owned = {value.untyped_storage().data_ptr() for value in (*halved.module.parameters(), *halved.module.buffers())}
    for value in (*halved.sliced.parameters(), *halved.sliced.buffers()):
        assert value.untyped_storage().data_ptr() not in owned
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    convolutions = batch_norms = 0
    for part in halved.sliced.modules():
        if isinstance(part, nn.Conv2d):
            convolutions += 1
            assert part.weight.shape[:2] == (part.out_channels, part.in_channels // part.groups)
        elif isinstance(part, nn.Linear):
            assert part.weight.shape == (part.out_features, part.in_features)
        elif isinstance(part, nn.BatchNorm2d):
            batch_norms += 1
            assert {len(value) for value in (part.weight, part.bias, part.running_mean, part.running_var)} == {
                part.num_features
            }
    assert convolutions > 2 and batch_norms > 2
    assert not any(part.training for part in halved.sliced.modules())
    assert all(parameter.requires_grad for parameter in halved.sliced.parameters())


# Tiny networks by hand


def randomised(spec: str) -> tuple[nn.Module, LayerGraph]:
    loaded = load_model(spec)
    randomise(loaded.module, loaded.input_shape)
    return loaded.module, build_graph(loaded.module, loaded.input_shape)


RESNET20 = randomised("resnet20")


@pytest.fixture(scope="module")
def mixed_net(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, LayerGraph]:
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(FACTORY)
    return randomised(f"{file}:factory")


@settings(max_examples=20)
@given(data=st.data())
def test_any_channels_may_stay_down_to_one_per_group(mixed_net: tuple[nn.Module, LayerGraph], data: st.DataObject):
    module, graph = mixed_net
    kept = {}
    for group in graph.groups:
        chosen = data.draw(st.sets(st.integers(0, group.width - 1), min_size=1), label=group.name)
        kept[group.name] = np.array(sorted(chosen))
    sliced, masked = slice_channels(module, graph, kept), mask_channels(module, graph, kept)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(sliced(images), masked(images), rtol=1e-5, atol=1e-5)
    assert real_macs(sliced, images[:1]) == graph.macs([len(kept[group.name]) for group in graph.groups])


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_option_a_shortcuts_are_sliced_on_both_sides(seed: int) -> None:
    """resnet20's stages are separate groups: the map between two of them loses inputs and outputs independently."""
    module, graph = RESNET20
    rng = np.random.default_rng(seed)
    kept = {
        group.name: np.sort(rng.choice(group.width, rng.integers(1, group.width + 1), replace=False))
        for group in graph.groups
    }
    sliced, masked = slice_channels(module, graph, kept), mask_channels(module, graph, kept)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(sliced(images), masked(images), rtol=1e-5, atol=1e-5)
    shortcut = sliced.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, ChannelMap) and shortcut.stride == 2
    into, out = kept["conv1"], kept["layer2.0.conv2"]
    # channel j of the wide side is channel j - 8 of the narrow one (16 -> 32, 8 zeros on both sides)
    wanted = tuple(into.tolist().index(j - 8) if j - 8 in into else -1 for j in out.tolist())
    assert (shortcut.index, shortcut.in_channels) == (wanted, len(into))


def tiny() -> tuple[nn.Module, LayerGraph]:
    """conv 2->4 (1x1), relu, depthwise, conv 4->3 (1x1), pooled, linear 3->2."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2),
    ).eval()
    return net, build_graph(net, (2, 4, 4))


def set_weight(layer: nn.Module, rows: list[list[float]]) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows).reshape(layer.weight.shape))


def test_magnitudes_are_those_of_the_weights_that_read_a_channel() -> None:
    net, graph = tiny()
    set_weight(net[0], [[9, 9]] * 4)  # a producer does not count
    with torch.no_grad():
        net[2].weight.fill_(100)  # nor does a depthwise filter
    set_weight(net[3], [[1, -2, 0, 3], [0, 2, 0, -4], [1, 1, 0.5, 0]])
    set_weight(net[6], [[1, 5, -1], [1, -5, 2]])
    magnitudes = channel_magnitudes(net, graph)
    assert {name: values.tolist() for name, values in magnitudes.items()} == {"0": [2, 5, 0.5, 7], "3": [2, 10, 3]}
    kept = keep_channels(net, graph, (2, 1))
    assert {name: channels.tolist() for name, channels in kept.items()} == {"0": [1, 3], "3": [1]}


def test_magnitudes_of_two_readers_and_of_a_flattened_map_add_up() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)
            self.out = nn.Linear(3 * 2 * 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.out(torch.flatten(self.b(x) + self.c(x), 1))

    net = Net().eval()
    graph = build_graph(net, (1, 2, 2))
    with torch.no_grad():
        net.b.weight[:, 0], net.b.weight[:, 1] = 1, -2  # (3, 1, 3, 3) each: sums 27 and 54
        net.c.weight[:, 0], net.c.weight[:, 1] = -100, 1  # sums 300 and 3
        net.out.weight.copy_(torch.arange(1.0, 13).repeat(2, 1))  # channel c is read at 4c..4c+3
    magnitudes = channel_magnitudes(net, graph)
    assert {name: values.tolist() for name, values in magnitudes.items()} == {"a": [327, 57], "b": [20, 52, 84]}


def test_of_equal_channels_those_with_the_lower_index_stay() -> None:
    net, graph = tiny()
    set_weight(net[3], [[1, 2, 1, 1]] * 3)
    assert keep_channels(net, graph, (3, 3))["0"].tolist() == [0, 1, 2]


def test_given_magnitudes_are_used_instead_of_the_weights() -> None:
    net, graph = tiny()
    kept = keep_channels(net, graph, (2, 2), magnitudes={"0": np.array([0, 3, 1, 2.0]), "3": np.array([5, 0, 1.0])})
    assert {name: channels.tolist() for name, channels in kept.items()} == {"0": [1, 3], "3": [0, 2]}


def test_axes_that_stay_by_hand() -> None:
    _, graph = tiny()
    axes = kept_axes(graph, {"0": np.array([3, 1])})  # in any order; a group that is not named stays whole
    as_lists = {
        name: tuple(None if part is None else part.tolist() for part in (axis.out, axis.into))
        for name, axis in axes.items()
    }
    assert as_lists == {"0": ([1, 3], None), "2": ([1, 3], None), "3": (None, [1, 3])}
    assert kept_axes(graph, {}) == {} == kept_axes(graph, {"0": np.arange(4)})
    assert KeptAxes() == KeptAxes(None, None)


def test_slicing_by_hand() -> None:
    net, graph = tiny()
    randomise(net, (2, 4, 4))
    small = slice_channels(net, graph, {"0": np.array([1, 3]), "3": np.array([0, 2])})
    assert torch.equal(small[0].weight, net[0].weight[[1, 3]]) and torch.equal(small[0].bias, net[0].bias[[1, 3]])
    assert torch.equal(small[2].weight, net[2].weight[[1, 3]]) and torch.equal(small[2].bias, net[2].bias[[1, 3]])
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (2, 2, 2)
    assert torch.equal(small[3].weight, net[3].weight[[0, 2]][:, [1, 3]])
    assert torch.equal(small[3].bias, net[3].bias[[0, 2]])
    assert torch.equal(small[6].weight, net[6].weight[:, [0, 2]]) and torch.equal(small[6].bias, net[6].bias)
    assert (small[6].in_features, small[6].out_features) == (2, 2)
    assert [tuple(part.weight.shape) for part in (net[0], net[2], net[3], net[6])] == [
        (4, 2, 1, 1),
        (4, 1, 3, 3),
        (3, 4, 1, 1),
        (2, 3),
    ]


def test_masking_zeroes_what_reads_a_removed_channel_and_nothing_else() -> None:
    net, graph = tiny()
    randomise(net, (2, 4, 4))
    masked = mask_channels(net, graph, {"0": np.array([1, 3])})
    assert not masked[3].weight[:, [0, 2]].any() and torch.equal(masked[3].weight[:, [1, 3]], net[3].weight[:, [1, 3]])
    changed = [name for name, value in masked.state_dict().items() if not torch.equal(value, net.state_dict()[name])]
    assert changed == ["3.weight"]
    assert net[3].weight.all()


def test_keeping_everything_changes_nothing() -> None:
    net, graph = tiny()
    for made in (slice_channels(net, graph, {}), mask_channels(net, graph, {})):
        assert made is not net
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), net.parameters(), strict=True))


def test_frozen_parameters_and_training_mode_survive_slicing() -> None:
    net, graph = tiny()
    net[0].weight.requires_grad_(False)
    net.train()
    small = slice_channels(net, graph, {"0": np.array([0])})
    assert [parameter.requires_grad for parameter in small.parameters()] == [False] + [True] * 7
    assert all(part.training for part in small.modules())


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"7": [0]}, "no group '7'"),
        ({"0": [4]}, "group 0 has channels 0..3, cannot keep channel 4"),
        ({"0": [-1, 0]}, "group 0 has channels 0..3, cannot keep channel -1"),
        ({"3": []}, "group 3 has channels 0..2, cannot keep none"),
    ],
)
def test_channels_that_the_graph_does_not_have(kept: dict[str, list[int]], message: str) -> None:
    net, graph = tiny()
    for make in (slice_channels, mask_channels):
        with pytest.raises(ValueError, match=message):
            make(net, graph, {name: np.array(channels, dtype=int) for name, channels in kept.items()})


def test_widths_that_do_not_fit_the_graph_are_refused() -> None:
    net, graph = tiny()
    for widths in ((2,), (0, 1), (5, 1), (2, 4)):
        with pytest.raises(UserError, match="width"):
            keep_channels(net, graph, widths)


def test_a_weight_of_two_layers_cannot_be_sliced() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).eval()
    graph = build_graph(net, (3, 2, 2))
    net[1].weight = net[0].weight
    with pytest.raises(UserError, match=r"0.weight is shared with another layer"):
        slice_channels(net, graph, {"0": np.array([0])})


def test_a_parametrized_weight_is_refused_by_name() -> None:
    net, graph = tiny()
    parametrizations.weight_norm(net[3])
    for act in (lambda: keep_channels(net, graph, (2, 2)), lambda: slice_channels(net, graph, {"0": np.array([0])})):
        with pytest.raises(UserError, match="3: its weight is not a plain parameter; remove the parametrization"):
            act()
