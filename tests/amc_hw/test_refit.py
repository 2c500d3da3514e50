"""Refits against numpy's least squares, and where the lost channels can be made up for exactly."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw import refit
from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.models import ChannelMap
from amc_hw.prune import Kept, keep_channels, slice_channels
from amc_hw.refit import gather_grams, reestimate_batch_norm, refit_faithful, refit_fast

ALL_ROWS = 10**9
Refit = Callable[..., nn.Module]


def seeded(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """(N, 3, size, size): blurred noise, so that neighbouring pixels and channels are correlated as in photographs."""
    noise = seeded((count, 3, size, size), seed)
    return 3 * nn.functional.avg_pool2d(noise, 5, stride=1, padding=2) + 0.5 * noise.mean((1,), keepdim=True)


def randomise(module: nn.Module, images: Tensor, *, seed: int = 0) -> nn.Module:
    """Random weights of low rank over the outputs, and the batch-norm statistics of `images`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                out, into = part.weight.shape[0], part.weight[0].numel()
                rank = max(2, out // 2)
                low = torch.randn(out, rank, generator=generator) @ torch.randn(rank, into, generator=generator)
                noise = torch.randn(out, into, generator=generator)
                part.weight.copy_((low / rank**0.5 + 0.3 * noise).reshape(part.weight.shape) / into**0.5)
                if part.bias is not None:
                    part.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.3, generator=generator)
    reestimate_batch_norm(module.eval(), images)
    return module


def checksums(module: nn.Module) -> dict[str, int]:
    return {name: zlib.crc32(value.numpy()) for name, value in module.state_dict().items()}


def fast(module: nn.Module, graph: LayerGraph, kept: Kept, images: Tensor, **options: float) -> nn.Module:
    small = slice_channels(module, graph, kept)
    grams = gather_grams(module, graph, images, rows=ALL_ROWS)
    refit_fast(small, module, graph, kept, grams, **options)
    return small


def faithful(module: nn.Module, graph: LayerGraph, kept: Kept, images: Tensor, **options: float) -> nn.Module:
    small = slice_channels(module, graph, kept)
    refit_faithful(small, module, graph, kept, images, **{"rows_per_layer": ALL_ROWS, **options})
    return small


both_refits = pytest.mark.parametrize("refitted", [fast, faithful])


@torch.no_grad()
def output_error(small: nn.Module, module: nn.Module, images: Tensor) -> float:
    """Mean square of the difference over the variance of the outputs: 0 is perfect, 1 a constant's."""
    wanted = module(images)
    return float((small(images) - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


# Against numpy


def three_layers(*, bias: bool, batch_norm: bool) -> nn.Sequential:
    """conv 3->8 3x3, relu, conv 8->6 3x3 with stride 2, relu, pooled to 2x2 and flattened, linear 24->4."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4, bias=bias),
    )


def least_squares(inputs: np.ndarray, wanted: np.ndarray, *, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
    """(K, O) coefficients and (O,) constants that map (R, K) to (R, O)."""
    ones = np.ones((len(inputs), 1 if intercept else 0))
    solution, *_ = np.linalg.lstsq(np.hstack([inputs, ones]), wanted, rcond=None)
    return solution[: inputs.shape[1]], solution[-1] if intercept else np.zeros(wanted.shape[1])


@pytest.mark.parametrize(("bias", "batch_norm"), [(True, False), (False, False), (False, True), (True, True)])
def test_fast_refit_is_numpys_least_squares_on_the_same_rows(bias: bool, batch_norm: bool) -> None:
    images = smooth_images(40, 8)
    net = randomise(three_layers(bias=bias, batch_norm=batch_norm), images)
    graph = build_graph(net, (3, 8, 8))
    kept = {"0": np.array([0, 2, 3, 7]), "2": np.array([1, 2, 5])}
    small = fast(net, graph, kept, images, ridge=0.0)

    with torch.no_grad():
        patches = nn.functional.unfold(net[:2](images), 3, padding=1, stride=2)  # (40, 72, 16)
        outputs = nn.functional.conv2d(net[:2](images), net[2].weight, net[2].bias, 2, 1).flatten(2)  # (40, 6, 16)
        features, logits = net[:7](images), net(images)
    rows = patches.transpose(1, 2).reshape(-1, 8, 9).double().numpy()[:, kept["0"]].reshape(640, 36)
    wanted = outputs.transpose(1, 2).reshape(-1, 6).double().numpy()[:, kept["2"]]
    weight, constant = least_squares(rows, wanted, intercept=bias or batch_norm)
    np.testing.assert_allclose(small[2].weight.detach().flatten(1).numpy(), weight.T, rtol=0, atol=2e-4)
    if bias:
        np.testing.assert_allclose(small[2].bias.detach().numpy(), constant, rtol=0, atol=2e-4)
    elif batch_norm:  # what the batch-norm subtracts takes the constant
        lost = net[3].running_mean[kept["2"]] - small[3].running_mean
        np.testing.assert_allclose(lost.numpy(), constant, rtol=0, atol=2e-4)

    # the linear layer reads four pixels of every channel, of the unpruned network
    rows = features.reshape(40, 6, 4).double().numpy()[:, kept["2"]].reshape(40, 12)
    weight, constant = least_squares(rows, logits.double().numpy(), intercept=bias)
    np.testing.assert_allclose(small[7].weight.detach().numpy(), weight.T, rtol=0, atol=2e-4)
    if bias:
        np.testing.assert_allclose(small[7].bias.detach().numpy(), constant, rtol=0, atol=2e-4)
    # what lost outputs only is what slicing left
    assert torch.equal(small[0].weight, net[0].weight[kept["0"]])


@pytest.mark.parametrize("bias", [True, False])
def test_faithful_refit_is_least_squares_on_the_pruned_networks_own_inputs(bias: bool) -> None:
    """Two layers in a row lose inputs; nothing rectifies behind them, so that the second is solved by one round."""
    images = smooth_images(40, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=bias),
        nn.Hardswish(),
        nn.Conv2d(6, 5, 1, bias=bias),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    randomise(net, images)
    graph = build_graph(net, (3, 8, 8))
    kept = {"0": np.array([0, 2, 3, 7]), "2": np.array([1, 2, 5])}
    small = faithful(net, graph, kept, images, ridge=0.0)
    with torch.no_grad():
        hidden = small[:2](images)
        patches = nn.functional.unfold(hidden, 3, padding=1, stride=2).transpose(1, 2).reshape(640, 36)
        wanted = net[:3](images)[:, kept["2"]].flatten(2).transpose(1, 2).reshape(640, 3)
        inputs = small[:4](images).flatten(2).transpose(1, 2).reshape(640, 3)
        outputs = net[:5](images).flatten(2).transpose(1, 2).reshape(640, 5)
    for layer, x, y in ((small[2], patches, wanted), (small[4], inputs, outputs)):
        weight, constant = least_squares(x.double().numpy(), y.double().numpy(), intercept=bias)
        np.testing.assert_allclose(layer.weight.detach().flatten(1).numpy(), weight.T, rtol=0, atol=1e-3)
        if bias:
            np.testing.assert_allclose(layer.bias.detach().numpy(), constant, rtol=0, atol=1e-3)


def test_ridge_pulls_towards_the_sliced_weights_not_towards_zero() -> None:
    images = smooth_images(20, 8)
    net = randomise(three_layers(bias=True, batch_norm=False), images)
    graph = build_graph(net, (3, 8, 8))
    kept = {"0": np.arange(4)}
    sliced = slice_channels(net, graph, kept)
    for refitted in (fast, faithful):
        stiff = refitted(net, graph, kept, images, ridge=1e9)
        torch.testing.assert_close(stiff[2].weight, sliced[2].weight, rtol=1e-4, atol=1e-5)
        free = refitted(net, graph, kept, images)
        assert (free[2].weight - sliced[2].weight).abs().max() > 0.01


# Exact recovery


def redundant(
    *, bias: bool, batch_norm: bool, linear: bool, after: type[nn.Module] = nn.Hardswish
) -> tuple[nn.Sequential, LayerGraph, Kept]:
    """Channels 4..7 are made of 0..3: positive multiples behind a rectifier, any combinations without one.

    after: the activation of the layer that reads them.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias and not linear),
        nn.Identity() if linear else nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        after(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4, bias=bias),
    )
    randomise(net, smooth_images(16, 8))
    mix = seeded((4, 4), 5) if linear else torch.diag(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    with torch.no_grad():
        net[0].weight[4:] = (mix @ net[0].weight[:4].flatten(1)).reshape(4, 3, 3, 3)
        if net[0].bias is not None:
            net[0].bias[4:] = mix @ net[0].bias[:4]
    return net, build_graph(net, (3, 8, 8)), {"0": np.arange(4)}


@both_refits
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_channels_made_of_the_kept_ones_are_made_up_for(
    refitted: Refit, bias: bool, batch_norm: bool, linear: bool
) -> None:
    net, graph, kept = redundant(bias=bias, batch_norm=batch_norm, linear=linear)
    images, other = smooth_images(16, 8), smooth_images(16, 8, seed=9)
    assert output_error(slice_channels(net, graph, kept), net, other) > 0.05
    small = refitted(net, graph, kept, images, ridge=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(small(other), net(other), rtol=0, atol=2e-4)


@both_refits
@pytest.mark.parametrize("batch_norm", [True, False])
def test_channels_made_of_the_kept_ones_are_made_up_for_before_a_rectifier(refitted: Refit, batch_norm: bool) -> None:
    net, graph, kept = redundant(bias=False, batch_norm=batch_norm, linear=False, after=nn.ReLU)
    images, other = smooth_images(16, 8), smooth_images(16, 8, seed=9)
    small = refitted(net, graph, kept, images, ridge=1e-6)
    assert output_error(small, net, other) < 1e-5


@both_refits
@pytest.mark.parametrize("batch_norm", [True, False])
def test_constant_channels_are_made_up_for_by_the_bias_or_the_batch_norm(refitted: Refit, batch_norm: bool) -> None:
    net, graph, kept = redundant(bias=True, batch_norm=batch_norm, linear=False)
    with torch.no_grad():
        net[2].padding = (0, 0)  # at a border a constant channel would not be one
        net[0].weight[4:] = 0
        net[0].bias[4:] = torch.tensor([0.5, 1.0, 2.0, 3.0])
    graph = build_graph(net, (3, 8, 8))
    images = smooth_images(16, 8)
    small = refitted(net, graph, kept, images, ridge=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images), rtol=0, atol=2e-4)


@both_refits
def test_both_refits_go_through_dilation_and_a_depthwise_convolution(refitted: Refit) -> None:
    """Channels 3..5 are copies of 0..2 all the way to the layer that reads them."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 5, (3, 2), padding=(2, 1), dilation=(2, 1), stride=(1, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    randomise(net, smooth_images(8, 9))
    with torch.no_grad():
        for part in (net[0].weight, net[0].bias, net[2].weight, net[2].bias):
            part[3:] = part[:3]
    graph = build_graph(net, (3, 9, 9))
    images = smooth_images(8, 9)
    assert output_error(slice_channels(net, graph, {"0": np.arange(3)}), net, images) > 0.05
    small = refitted(net, graph, {"0": np.arange(3)}, images, ridge=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images), rtol=0, atol=2e-4)


# Which is better, and what it is for


def deep(*, inplace: bool = False) -> nn.Sequential:
    """Eight 3x3 convolutions with batch-norm, on 12x12."""
    layers: list[nn.Module] = []
    for index in range(8):
        stride = 2 if index == 4 else 1
        layers += [nn.Conv2d(3 if index == 0 else 12, 12, 3, padding=1, stride=stride, bias=False)]
        layers += [nn.BatchNorm2d(12), nn.ReLU(inplace)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()


@pytest.fixture(scope="module")
def deep_net() -> tuple[nn.Sequential, LayerGraph, Kept, Tensor]:
    images = smooth_images(60, 12)
    net = randomise(deep(), images)
    graph = build_graph(net, (3, 12, 12))
    return net, graph, keep_channels(net, graph, [7] * 8), images


def test_faithful_refit_beats_the_fast_one_and_both_beat_none(deep_net) -> None:
    net, graph, kept, images = deep_net
    other = smooth_images(100, 12, seed=7)
    none = output_error(slice_channels(net, graph, kept), net, other)
    quick = output_error(fast(net, graph, kept, images), net, other)
    slow = output_error(faithful(net, graph, kept, images), net, other)
    assert slow < 0.7 * quick and quick < 0.9 * none


class Block(nn.Module):
    """conv, relu, conv, added to the shortcut, relu."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, shortcut: nn.Module, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, stride=stride, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(c_out), nn.ReLU(inplace)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.relu.inplace:
            out += self.shortcut(x)
            return nn.functional.relu(out, inplace=True)
        return nn.functional.relu(out + self.shortcut(x))


def residual(*, inplace: bool = False) -> nn.Sequential:
    """Two residual blocks, the first with an option-A shortcut, the second with a convolution in it."""
    option_a = ChannelMap((-1, -1, *range(8), -1, -1))
    convolution = nn.Sequential(nn.Conv2d(12, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace)),
        Block(8, 12, stride=1, shortcut=option_a, inplace=inplace),
        Block(12, 12, stride=2, shortcut=convolution, inplace=inplace),
        Block(12, 12, stride=1, shortcut=nn.Identity(), inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def halved(net: nn.Module, graph: LayerGraph) -> Kept:
    return keep_channels(net, graph, [width // 2 for width in graph.full_widths])


def test_the_shortcuts_error_is_corrected_in_the_blocks_output(monkeypatch: pytest.MonkeyPatch) -> None:
    images, other = smooth_images(60, 12), smooth_images(60, 12, seed=7)
    net = randomise(residual(), images)
    graph = build_graph(net, (3, 12, 12))
    kept = {"0.0": np.array([0, 3, 5, 6])}  # half of what the first block and its shortcut read
    corrected = faithful(net, graph, kept, images)
    follow = refit._follow
    monkeypatch.setattr(refit, "_follow", lambda node, run: replace(follow(node, run), shortcut=None))
    without = faithful(net, graph, kept, images)
    assert output_error(corrected[:2], net[:2], other) < 0.8 * output_error(without[:2], net[:2], other)


def test_a_lost_shortcut_channel_is_made_up_for_exactly_where_the_block_can() -> None:
    """Two channels leave the shortcut with the stem; what they held, only the convolution beside it can still add."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
            self.shortcut, self.out = ChannelMap((0, 1, 2, 3, -1, -1)), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.out(self.conv(x) + self.shortcut(x))

    net = Net().eval()
    images = smooth_images(8, 6)
    randomise(net, images)
    with torch.no_grad():
        net.stem.weight[2:], net.stem.bias[2:] = 2 * net.stem.weight[:2], 2 * net.stem.bias[:2]
    graph = build_graph(net, (3, 6, 6))
    # outputs 2 and 3 lose their shortcut, which is twice what stem channels 0 and 1 are
    small = faithful(net, graph, {"stem": np.array([0, 1])}, images, ridge=1e-5)
    assert small.shortcut.index == (0, 1, -1, -1, -1, -1)
    assert output_error(slice_channels(net, graph, {"stem": np.array([0, 1])}), net, images) > 0.1
    assert output_error(small, net, images) < 1e-6


@pytest.mark.parametrize("make", [deep, residual])
def test_in_place_activations_and_sums_make_no_difference(make: Callable[..., nn.Sequential]) -> None:
    images = smooth_images(30, 12)
    plain, inplace = (randomise(make(inplace=flag), images) for flag in (False, True))
    assert checksums(plain) == checksums(inplace)
    results = []
    for net in (plain, inplace):
        graph = build_graph(net, (3, 12, 12))
        results.append([refitted(net, graph, halved(net, graph), images.clone()) for refitted in (fast, faithful)])
    for a, b in zip(*results, strict=True):
        for name, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


# How it is computed


def test_the_dual_form_gives_what_the_primal_gives(monkeypatch: pytest.MonkeyPatch, deep_net) -> None:
    net, graph, kept, _ = deep_net
    images = smooth_images(12, 12)
    small = slice_channels(net, graph, kept)
    with torch.no_grad():
        before = small(images)
    primal = faithful(net, graph, kept, images, rows_per_layer=600)
    monkeypatch.setattr(refit, "MAX_GRAM", 8)  # every convolution has 27 or 63 inputs
    dual = faithful(net, graph, kept, images, rows_per_layer=600)
    with torch.no_grad():
        torch.testing.assert_close(dual(images), primal(images), rtol=0, atol=5e-3)
        assert (primal(images) - before).abs().max() > 0.1


def test_the_dual_problem_has_at_most_its_own_number_of_rows(monkeypatch: pytest.MonkeyPatch, deep_net) -> None:
    net, graph, kept, _ = deep_net
    asked = []
    sample = refit._sample

    def counted(layer, x, per_image, generator):
        asked.append(per_image)
        return sample(layer, x, per_image, generator)

    monkeypatch.setattr(refit, "_sample", counted)
    monkeypatch.setattr(refit, "MAX_GRAM", 8)
    monkeypatch.setattr(refit, "DUAL_ROWS", 60)
    faithful(net, graph, kept, smooth_images(12, 12))
    assert asked[:7] == [5] * 7  # 60 rows over 12 images; the linear layer, with 7 inputs, is solved as before
    assert asked[7] > 5


def test_layers_too_large_are_left_out_of_the_fast_refit_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth_images(16, 8)
    net = randomise(three_layers(bias=True, batch_norm=False), images)
    graph = build_graph(net, (3, 8, 8))
    monkeypatch.setattr(refit, "MAX_GRAM", 71)  # the convolution 2 has 72 inputs, the linear layer 24
    with pytest.warns(UserWarning, match=r"too many inputs for the fast refit, which leaves out 2$"):
        grams = gather_grams(net, graph, images)
    assert set(grams) == {"7"}
    kept = {"0": np.arange(4), "2": np.arange(3)}
    sliced, small = slice_channels(net, graph, kept), slice_channels(net, graph, kept)
    refit_fast(small, net, graph, kept, grams)
    assert torch.equal(small[2].weight, sliced[2].weight) and not torch.equal(small[7].weight, sliced[7].weight)
    reached = faithful(net, graph, kept, images)
    assert not torch.allclose(reached[2].weight, sliced[2].weight, atol=0.01)


def test_grams_are_the_mean_and_covariance_of_the_patches() -> None:
    images = smooth_images(10, 8)
    net = randomise(three_layers(bias=True, batch_norm=False), images)
    graph = build_graph(net, (3, 8, 8))
    with torch.no_grad():
        patches = nn.functional.unfold(net[:2](images), 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 72)
    rows = patches.double().numpy()
    for batch in (3, 250):
        gram = gather_grams(net, graph, images, rows=ALL_ROWS, batch=batch)["2"]
        np.testing.assert_allclose(gram.mean.numpy(), rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(gram.covariance.numpy(), np.cov(rows.T, bias=True), atol=1e-4)


def test_grams_of_a_large_offset_lose_no_precision() -> None:
    """A mean of 1000 beside a deviation of 1: the plain sum of squares in float32 would be all rounding."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
        net[0].bias.fill_(1000)
    images = seeded((20, 3, 6, 6))
    gram = gather_grams(net, build_graph(net, (3, 6, 6)), images, rows=ALL_ROWS, batch=6)["1"]
    wanted = np.cov(images.permute(1, 0, 2, 3).flatten(1).double().numpy(), bias=True)
    np.testing.assert_allclose(gram.covariance.numpy(), wanted, atol=1e-3)


def test_chunks_of_images_make_no_difference(monkeypatch: pytest.MonkeyPatch, deep_net) -> None:
    net, graph, kept, images = deep_net
    images = images[:20]
    whole = faithful(net, graph, kept, images)
    monkeypatch.setattr(refit._Lockstep, "CHUNK", 7)
    chunked = faithful(net, graph, kept, images)
    with torch.no_grad():
        torch.testing.assert_close(chunked(images), whole(images), rtol=0, atol=5e-3)


def test_one_seed_gives_one_network_and_another_gives_another(deep_net) -> None:
    net, graph, kept, images = deep_net
    options = {"rows_per_layer": 800}
    first, again, other = (faithful(net, graph, kept, images[:30], seed=seed, **options) for seed in (1, 1, 2))
    assert checksums(first) == checksums(again) != checksums(other)


def test_a_network_that_lost_nothing_is_not_touched(deep_net) -> None:
    net, graph, _, images = deep_net
    whole = {group.name: np.arange(group.width) for group in graph.groups}
    for refitted in (fast, faithful):
        assert checksums(refitted(net, graph, whole, images[:10])) == checksums(net)


@both_refits
def test_the_unpruned_network_and_its_mode_are_left_alone(refitted: Refit, deep_net) -> None:
    net, graph, kept, images = deep_net
    before, given = checksums(net), images[:20].clone()
    net[1].train()  # gathered and compared in eval mode all the same
    try:
        refitted(net, graph, kept, given)
        assert [part.training for part in net[:3]] == [False, True, False]
    finally:
        net[1].eval()
    assert checksums(net) == before
    assert torch.equal(given, images[:20])
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in net.modules())
    assert not any(parameter.grad is not None for parameter in net.parameters())


class Tied(nn.Module):
    """Two layers with one weight, after one that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.mid, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(self.mid(self.stem(x).relu()).relu()).relu()).relu())


def test_layers_that_share_a_weight_stay_as_wide_and_as_they_are() -> None:
    images = smooth_images(40, 8)
    net = randomise(Tied(), images)
    graph = build_graph(net, (3, 8, 8))
    assert [group.name for group in graph.groups] == ["stem"]
    reasons = {each.name: each.reason for each in graph.frozen}
    assert {reasons[name] for name in ("mid", "a", "b")} <= {
        f"{name} shares its weights with another layer" for name in ("a", "b")
    }
    small = faithful(net, graph, {"stem": np.arange(5)}, images)
    assert small.a.weight is small.b.weight
    assert torch.equal(small.a.weight, net.a.weight) and not torch.equal(small.mid.weight[:, :5], net.mid.weight[:, :5])
    assert torch.equal(small.b.bias, net.b.bias)
    assert torch.equal(small.head.weight, net.head.weight) is False  # it makes up for what they do not


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm")
@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_layer_whose_weight_is_computed_stays_as_wide_and_as_it_is(normed: Callable[[nn.Module], nn.Module]) -> None:
    images = seeded((40, 8, 8, 8))
    net = randomise(nn.Sequential(*(each for _ in range(4) for each in (nn.Conv2d(8, 8, 1), nn.ReLU()))), images)
    normed(net[2])
    with torch.no_grad():
        net(images[:1])
    graph = build_graph(net, (8, 8, 8))
    assert [group.name for group in graph.groups] == ["4"]
    reasons = {each.name: each.reason for each in graph.frozen}
    assert reasons["0"] == reasons["2"] and reasons["2"].startswith(
        "the weights of 2 are computed from others: torch.nn"
    )
    small = faithful(net, graph, {"4": np.arange(5)}, images)
    assert small[4].out_channels == 5
    torch.testing.assert_close(small[2].weight, net[2].weight)


# Batch-norm statistics


def test_statistics_are_the_average_over_the_images() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.25), nn.ReLU(), nn.Dropout(0.9)).eval()
    images = seeded((12, 3, 5, 5))
    with torch.no_grad():
        x = net[0](images)
    reestimate_batch_norm(net, images, batch=4)
    torch.testing.assert_close(net[1].running_mean, x.mean((0, 2, 3)))
    parts = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in x.split(4)])
    torch.testing.assert_close(net[1].running_var, parts.mean(0))
    assert net[1].momentum == 0.25 and not any(part.training for part in net.modules())


def test_statistics_of_few_images_more_than_a_batch_weigh_all_of_them_alike() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    images = seeded((130, 3, 2, 2))
    images[-2:] += 10.0
    with torch.no_grad():
        x = net[0](images)
    reestimate_batch_norm(net, images)
    torch.testing.assert_close(net[1].running_mean, x.mean((0, 2, 3)))


def test_one_image_of_one_pixel_leaves_no_statistics() -> None:
    images = smooth_images(1, 4)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 4), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).eval()
    small = faithful(net, build_graph(net, (3, 4, 4)), {"0": np.arange(3)}, images)
    assert torch.isfinite(small(images)).all() and torch.isfinite(small[3].running_var).all()


def test_reestimating_after_the_faithful_refit_changes_the_outputs_hardly() -> None:
    images, other = smooth_images(60, 12), smooth_images(60, 12, seed=7)
    net = randomise(residual(), images)
    graph = build_graph(net, (3, 12, 12))
    small = faithful(net, graph, halved(net, graph), images)
    again = copy.deepcopy(small)
    reestimate_batch_norm(again, images)
    assert output_error(again, small, other) < 1e-3
    # after slicing alone it changes much
    sliced = slice_channels(net, graph, halved(net, graph))
    again = copy.deepcopy(sliced)
    reestimate_batch_norm(again, images)
    assert output_error(again, sliced, other) > 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_the_faithful_refit_leaves_the_statistics_of_what_comes_in(bias: bool) -> None:
    """A convolution's own bias is part of it."""
    images = smooth_images(40, 8)
    net = randomise(three_layers(bias=bias, batch_norm=True), images)
    graph = build_graph(net, (3, 8, 8))
    small = faithful(net, graph, {"0": np.arange(4)}, images)
    with torch.no_grad():
        x = small[:3](images)
    torch.testing.assert_close(small[3].running_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(small[3].running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-3, atol=1e-4)
    assert (small[3].running_mean - net[3].running_mean).abs().max() > 1e-2


def test_the_faithful_refit_takes_batch_norms_without_weights() -> None:
    net = three_layers(bias=False, batch_norm=True)
    net[3] = nn.BatchNorm2d(6, affine=False)
    images = smooth_images(16, 8)
    randomise(net[:3], images)
    reestimate_batch_norm(net.eval(), images)
    graph = build_graph(net, (3, 8, 8))
    kept = {"0": np.arange(4)}
    quick = output_error(fast(net, graph, kept, images), net, images)
    assert quick < output_error(slice_channels(net, graph, kept), net, images)
    assert output_error(faithful(net, graph, kept, images), net, images) < 1.1 * quick


# Layers of every kind as products of patches


class SameConv(nn.Conv2d):
    """Padded as TensorFlow does it, whatever its options say."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 1)), self.weight, self.bias, self.stride)  # 7 x 8 or 9 x 8, stride 2


KINDS = [
    nn.Conv2d(4, 3, (3, 2), stride=2, padding=1, dilation=(1, 2)),
    nn.ConvTranspose2d(4, 3, 2, stride=2),
    nn.Conv2d(4, 3, (2, 3), padding="same"),
    SameConv(4, 3, 3, stride=2),
    nn.ConvTranspose2d(4, 3, (3, 4), stride=(2, 1), padding=(1, 2)),
    nn.ConvTranspose2d(4, 3, 3, padding=3, dilation=2, bias=False),
]


@torch.no_grad()
@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_patches_times_weights_are_the_layers_outputs(layer: nn.Module) -> None:
    x = seeded((2, 4, 7, 8))
    positions = refit._sample(layer, x, ALL_ROWS, torch.Generator())
    found = refit._patches(layer, x, positions) @ refit._weight(nn.ModuleDict({"it": layer}), "it").flatten(1).T
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(found + bias, layer(x).permute(0, 2, 3, 1).flatten(0, 2))


@torch.no_grad()
@both_refits
@pytest.mark.parametrize("layer", KINDS[:4], ids=str)
def test_what_other_channels_repeat_is_made_up_for_whatever_the_layer(layer: nn.Module, refitted: Refit) -> None:
    """Two of four channels are copies of the others, up to a factor: without them the refit loses nothing."""
    first = nn.Conv2d(3, 4, 1, bias=False)
    first.weight.copy_(seeded((4, 3, 1, 1)))
    first.weight[2:] = torch.tensor([0.5, 0.25])[:, None, None, None] * first.weight[:2]
    net = nn.Sequential(first, nn.ReLU(), copy.deepcopy(layer)).eval()
    images = smooth_images(6, 9)[:, :, :, :8]
    graph = build_graph(net, (3, 9, 8))
    (group,) = graph.groups
    kept = {group.name: np.array([0, 1])}
    before = output_error(slice_channels(net, graph, kept), net, images)
    assert output_error(refitted(net, graph, kept, images, ridge=1e-9), net, images) < 1e-6 < 0.01 < before


@pytest.mark.parametrize("count", [1, 128, 129, 257])
def test_statistics_where_a_map_is_one_pixel_and_a_batch_one_image(count: int) -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).eval()
    images = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reestimate_batch_norm(net, images)
    assert isinstance(net[1], nn.BatchNorm2d) and net[1].running_mean is not None
    even = torch.stack([part.mean((0, 2, 3)) for part in images.tensor_split(math.ceil(count / 128))])
    wanted = even.mean(0) if count > 1 else torch.zeros(3)
    torch.testing.assert_close(net[1].running_mean, wanted, atol=1e-5, rtol=0)
    assert torch.isfinite(net(images)).all()


def test_a_block_that_adds_nothing_yet_is_left_alone() -> None:
    """The last batch-norm of every block begins at zero in many networks."""
    images = smooth_images(40, 12)
    net = randomise(residual(), images)
    for block in net[1:4]:
        nn.init.zeros_(block.bn2.weight)
    graph = build_graph(net, (3, 12, 12))
    small = faithful(net, graph, halved(net, graph), images)
    assert all(value.isfinite().all() for value in small.state_dict().values())
    assert output_error(small, net, images) < output_error(slice_channels(net, graph, halved(net, graph)), net, images)


def test_weights_that_are_no_numbers_are_one_line() -> None:
    images = smooth_images(20, 12)
    net = randomise(residual(), images)
    with torch.no_grad():
        net[0][0].weight[0, 0, 0, 0] = float("nan")
    graph = build_graph(net, (3, 12, 12))
    with pytest.raises(UserError, match="not finite or far too large: such weights have no refit"):
        faithful(net, graph, halved(net, graph), images)


class SharedNorm(nn.Module):
    """Three convolutions whose outputs go through one batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for conv in self.convs:
            x = self.norm(conv(x)).relu()
        return self.head(x).mean((2, 3))


def test_a_batch_norm_that_others_use_is_not_changed_for_one_layer() -> None:
    images = smooth_images(60, 12)
    net = randomise(SharedNorm(), images)
    graph = build_graph(net, (3, 12, 12))
    before = {name: value.clone() for name, value in net.norm.state_dict().items()}
    kept = halved(net, graph)
    small = faithful(net, graph, kept, images)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert set(small.norm.state_dict()[name].tolist()) <= set(before[name].tolist())
    assert output_error(small, net, images) < output_error(slice_channels(net, graph, kept), net, images)


class ByWidth(nn.Module):
    """A shortcut where two channel counts happen to be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.second(x)
        if self.second.in_channels == self.second.out_channels:
            y = y + x
        return self.head(y.relu()).mean((2, 3))


def test_a_network_that_takes_another_way_once_it_is_pruned_is_refused() -> None:
    images = smooth_images(20, 12)
    net = randomise(ByWidth(), images)
    graph = build_graph(net, (3, 12, 12))
    kept = {"first": np.arange(4)}
    with pytest.raises(UserError, match="takes another way once it is pruned"):
        faithful(net, graph, kept, images)
