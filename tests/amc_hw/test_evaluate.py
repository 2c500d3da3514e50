"""Accuracy by hand, and an evaluator that keeps its hands off the test split."""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from amc_hw.data import Splits, load_data
from amc_hw.errors import UserError
from amc_hw.evaluate import SEARCH_ROWS, Evaluator, check_expected, fold_batch_norms, warn_of_chance, warn_of_guessing
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.images import TensorImages, load_tensors
from amc_hw.models import LoadedModel
from amc_hw.models.checkpoint import put_back
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.refit import reestimate_batch_norm, refit_faithful, refit_fast
from amc_hw.task import FAR, SEARCH_IMAGES, Classification, Task, accuracy, distortion

SHAPE = (3, 8, 8)


class Reads(Dataset):
    """A split that counts how often each of its images was asked for."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner
        self.counts = [0] * len(inner)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.counts[index] += 1
        return self.inner[index]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


@pytest.fixture(scope="module")
def trained() -> tuple[LoadedModel, LayerGraph]:
    """A network that knows the digits: a few steps are enough."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = network()
    model = LoadedModel("digits net", net, SHAPE, (0.3,) * 3, (0.4,) * 3, (torch.zeros(1, *SHAPE),), None)
    train = load_data("digits", input_shape=SHAPE).train
    images, labels = model.normalised(train.images), train.labels
    optimizer = torch.optim.Adam(net.train().parameters(), lr=0.01)
    for step in range(60):
        batch = torch.arange(step * 128, (step + 1) * 128) % len(images)
        loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    return model, build_graph(net, SHAPE)


@pytest.fixture
def splits() -> Splits:
    found = load_data("digits", input_shape=SHAPE)
    return Splits(found.name, Reads(found.train), Reads(found.val), Reads(found.test), found.classes)


@pytest.fixture
def evaluator(trained: tuple[LoadedModel, LayerGraph], splits: Splits) -> Evaluator:
    return Evaluator(*trained, Classification(trained[0], splits), calibration_images=200)


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[0, 2, 1], [3, 0, 0], [0, 0, 1], [0, 5, 0], [1, 0, 0]]).float()[:, :, None, None]
    labels = torch.tensor([1, 0, 1, 1, 2])  # right, right, wrong, right, wrong
    for batch in (1, 2, 5, 250):
        assert accuracy(nn.Flatten(), logits, labels, batch=batch) == 3 / 5
    assert accuracy(nn.Flatten(), logits[:2], labels[:2]) == 1.0
    with pytest.raises(ValueError):
        accuracy(nn.Flatten(), logits, labels[:3], batch=2)


def test_expected_accuracy() -> None:
    check_expected(0.5, None)
    check_expected(0.8999, 0.893)
    check_expected(0.884, 0.893)
    for found in (0.8, 0.882, 0.904, 0.99):
        with pytest.raises(UserError, match=f"{found:.4f}, --expect-accuracy says 0.893") as caught:
            check_expected(found, 0.893)
        advice = "trained on these images" if found > 0.893 else "check normalisation and data"
        assert advice in str(caught.value)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_scores_that_change_by_chance_are_warned_of() -> None:
    net = nn.Identity()
    for again, warned in ((0.7, False), (0.7005, False), (0.71, True), (-0.7, True)):
        task = SimpleNamespace(split="evaluate", score=lambda module, again=again: again)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warn_of_chance(task, net, 0.7)  # type: ignore[arg-type]
            warn_of_chance(SimpleNamespace(split="test", score=task.score), net, 0.7)  # type: ignore[arg-type]
        assert [str(one.message).startswith(f"the same network scored 0.7000, then {again:.4f}") for one in said] == (
            [True] * warned
        )


def test_an_unpruned_network_that_only_guesses_is_warned_of(
    trained: tuple[LoadedModel, LayerGraph], splits: Splits
) -> None:
    task = Classification(trained[0], splits)
    share = float(task.val[1].bincount().max()) / len(task.val[1])
    assert task.score(trained[0].module) > 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_guessing(task, task.score(trained[0].module))
        for guess in (0.0, share, share + 0.01):
            with pytest.raises(UserWarning, match=f"{guess:.4f}, naming the commonest class is right in {share:.4f}"):
                warn_of_guessing(task, guess)


def test_exactly_a_point_off_is_not_more_than_a_point_off() -> None:
    check_expected(0.91, 0.90)
    with pytest.raises(UserError, match="--expect-accuracy 90: accuracies are fractions here, such as 0.9"):
        check_expected(0.91, 90)


def test_at_full_width_the_held_out_accuracy_is_that_of_the_unpruned_network(evaluator: Evaluator) -> None:
    val = load_data("digits", input_shape=SHAPE).val
    model = evaluator.model
    wanted = accuracy(model.module, model.normalised(val.images), val.labels)
    assert evaluator.val_accuracy(evaluator.graph.full_widths) == wanted > 0.8


def test_images_are_normalised_and_the_held_out_ones_come_from_val_alone(evaluator: Evaluator) -> None:
    found = load_data("digits", input_shape=SHAPE)

    def pixels(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    known = {name: pixels(evaluator.model.normalised(getattr(found, name).images)) for name in ("train", "val", "test")}
    assert pixels(evaluator.task.val[0]) == known["val"] and len(evaluator.task.val[0]) == len(found.val)
    assert pixels(evaluator.calibration[0]) < known["train"] and len(evaluator.calibration[0]) == 200
    assert not known["test"] & (known["val"] | known["train"])
    # each image has its own label beside it
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(*evaluator.task.val, strict=True)}
    assert all(labels[evaluator.model.normalised(image).numpy().tobytes()] == label for image, label in _items(found))


def _items(found: Splits) -> list[tuple[Tensor, int]]:
    return [found.val[index] for index in range(len(found.val))]


def test_the_test_split_is_read_once_and_by_test_accuracy_alone(evaluator: Evaluator, splits: Splits) -> None:
    evaluator.val_accuracy((8, 12))
    final = evaluator.final((8, 12))
    assert not any(splits.test.counts)
    found = evaluator.task.test_scores([evaluator.model.module, final])
    assert splits.test.counts == [1] * len(splits.test)
    test = load_data("digits", input_shape=SHAPE).test
    images = evaluator.model.normalised(test.images)
    assert found == [accuracy(module, images, test.labels) for module in (evaluator.model.module, final)]
    assert found[0] > 0.8


def test_training_and_held_out_images_are_read_once_however_many_candidates_there_are(
    evaluator: Evaluator, splits: Splits
) -> None:
    for width in (4, 8, 12):
        evaluator.val_accuracy((width, width))
    assert splits.val.counts == [1] * len(splits.val)
    assert sum(splits.train.counts) == 200 and max(splits.train.counts) == 1


def test_fewer_images_are_a_fixed_random_part(trained: tuple[LoadedModel, LayerGraph], splits: Splits) -> None:
    chosen = []
    for seed in (0, 0, 1):
        task = Classification(trained[0], splits, seed=seed, val_images=40)
        evaluator = Evaluator(*trained, task, seed=seed, calibration_images=50)
        assert (len(evaluator.task.val[0]), len(evaluator.task.val[1]), len(evaluator.calibration[0])) == (40, 40, 50)
        chosen.append(evaluator.task.val[1].tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) > 5  # not the first class only


def test_held_out_accuracy_is_the_same_whenever_it_is_asked_for(
    trained: tuple[LoadedModel, LayerGraph], evaluator: Evaluator, splits: Splits
) -> None:
    candidates = [(4, 6), (8, 12), (3, 24), (16, 5)]
    first = [evaluator.val_accuracy(widths) for widths in candidates]
    assert [evaluator.val_accuracy(widths) for widths in reversed(candidates)] == first[::-1]
    torch.rand(7)  # nor does it depend on the global random state, or on what another evaluator did
    again = Evaluator(*trained, Classification(trained[0], splits), calibration_images=200)
    assert [again.val_accuracy(widths) for widths in candidates] == first
    assert len(set(first)) > 1


def test_held_out_accuracy_is_that_after_a_refit(evaluator: Evaluator) -> None:
    """Over the candidates together: slicing alone loses more."""
    candidates = [(4, 6), (6, 12), (8, 8), (12, 16)]
    kept = [evaluator.kept(widths) for widths in candidates]
    sliced = [slice_channels(evaluator.model.module, evaluator.graph, part) for part in kept]
    without = sum(accuracy(module, *evaluator.task.val) for module in sliced)
    assert sum(evaluator.val_accuracy(widths) for widths in candidates) > without + 0.5


def test_kept_channels_are_those_of_largest_magnitude(evaluator: Evaluator) -> None:
    kept = evaluator.kept((5, 7))
    wanted = keep_channels(evaluator.model.module, evaluator.graph, (5, 7))
    assert {name: part.tolist() for name, part in kept.items()} == {
        name: part.tolist() for name, part in wanted.items()
    }
    assert [len(part) for part in kept.values()] == [5, 7]


def test_final_network_is_smaller_and_the_original_is_left_alone(evaluator: Evaluator) -> None:
    module = evaluator.model.module
    before = {name: zlib.crc32(value.numpy()) for name, value in module.state_dict().items()}
    final = evaluator.final((6, 9))
    assert (final[0].out_channels, final[3].out_channels, final[8].in_features) == (6, 9, 36)
    assert {name: zlib.crc32(value.numpy()) for name, value in module.state_dict().items()} == before
    assert not any(part.training for part in final.modules())


def test_final_network_takes_new_statistics_where_they_help_and_the_refits_where_not(
    trained: tuple[LoadedModel, LayerGraph], splits: Splits
) -> None:
    evaluator = Evaluator(*trained, Classification(trained[0], splits), calibration_images=40)
    helped = []
    for widths in ((3, 4), (8, 12)):
        kept = evaluator.kept(widths)
        faithful = slice_channels(evaluator.model.module, evaluator.graph, kept)
        inputs = (evaluator.model.module, evaluator.graph, kept, evaluator.calibration)
        refit_faithful(faithful, *inputs, rows_per_layer=60_000)
        again = copy.deepcopy(faithful)
        reestimate_batch_norm(again, evaluator.calibration)
        before, after = (accuracy(module, *evaluator.task.val) for module in (faithful, again))
        helped.append(after > before)
        assert before != after and accuracy(evaluator.final(widths), *evaluator.task.val) == max(before, after)
    assert set(helped) == {True, False}


class Versioned(nn.Sequential):
    """Loads by the version of its state dict, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *rest) -> None:
        if metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_network_that_is_loaded_by_its_version_gets_its_statistics_back(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Versioned(*network()).eval()
    model = LoadedModel("versioned", net, SHAPE, (0.3,) * 3, (0.4,) * 3, (torch.zeros(1, *SHAPE),), None)
    evaluator = Evaluator(model, build_graph(net, SHAPE), Classification(model, splits), calibration_images=40)
    scores = iter([0.9, 0.1])  # with new statistics worse
    monkeypatch.setattr(evaluator.task, "score", lambda module: next(scores))
    final = evaluator.final((6, 9))
    assert torch.equal(final[1].running_mean, net[1].running_mean[evaluator.kept((6, 9))["0"]])
    weights = {name: torch.full_like(value, 3) for name, value in final.state_dict().items()}
    with pytest.raises(ValueError, match="version"):
        final.load_state_dict(weights)
    put_back(final, weights)
    assert all(bool((value == 3).all()) for value in final.state_dict().values())


def test_widths_that_do_not_fit_are_refused(evaluator: Evaluator) -> None:
    for widths in ((8,), (0, 8), (17, 8)):
        with pytest.raises(UserError, match="width"):
            evaluator.val_accuracy(widths)


def test_any_data_set_of_image_and_label_will_do(trained: tuple[LoadedModel, LayerGraph]) -> None:
    """In memory and one by one give the same: the first is only faster."""
    found = load_data("digits", input_shape=SHAPE)
    assert isinstance(found.train, TensorImages)
    slow = Splits("plain", *(Reads(part) for part in (found.train, found.val, found.test)), found.classes)
    tasks = (Classification(trained[0], part, val_images=60) for part in (found, slow))
    a, b = (Evaluator(*trained, task, calibration_images=50) for task in tasks)
    assert all(torch.equal(one, other) for one, other in zip(a.task.val, b.task.val, strict=True))
    assert torch.equal(a.calibration[0], b.calibration[0])


def test_a_policy_is_judged_by_its_score_and_how_far_its_outputs_are(evaluator: Evaluator) -> None:
    full = evaluator.graph.full_widths
    score, far = evaluator.judge(full)
    assert score == evaluator.val_accuracy(full) and far == pytest.approx(0, abs=1e-9)
    fars = [evaluator.judge((width, full[1])).distortion for width in (full[0] - 1, full[0] // 2, 2)]
    assert all(each is not None and math.isfinite(each) for each in fars)
    assert 0 < fars[0] < fars[1] < fars[2]  # type: ignore[operator]
    small = slice_channels(evaluator.model.module, evaluator.graph, evaluator.kept((2, full[1])))
    _, (logits,) = evaluator.task.score_and_outputs(small)
    with torch.inference_mode():
        torch.testing.assert_close(logits, small(evaluator.task.val[0]), rtol=1e-4, atol=1e-4)


def test_distortion_by_hand() -> None:
    wanted = [torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0, 4.0]])]  # variances 2 and 3
    assert distortion(wanted, wanted) == 0
    assert distortion([wanted[0] + 1, wanted[1]], wanted) == pytest.approx((1 / 2 + 0) / 2)
    assert distortion([wanted[0], wanted[1] * 0], wanted) == pytest.approx((18 / 3) / 3 / 2)
    assert distortion([wanted[0] * float("nan"), wanted[1]], wanted) == FAR


def test_a_search_refits_faithfully_on_few_images(evaluator: Evaluator) -> None:
    widths = (8, 12)
    kept = evaluator.kept(widths)
    small = slice_channels(evaluator.model.module, evaluator.graph, kept)
    images = evaluator.calibration[0][:SEARCH_IMAGES]
    refit_faithful(small, evaluator.model.module, evaluator.graph, kept, images, rows_per_layer=SEARCH_ROWS, seed=0)
    assert evaluator.val_accuracy(widths) == accuracy(small, *evaluator.task.val)
    assert "grams" not in vars(evaluator)  # nobody asked for them


def test_the_fast_refit_on_demand(trained: tuple[LoadedModel, LayerGraph], splits: Splits) -> None:
    evaluator = Evaluator(*trained, Classification(trained[0], splits), calibration_images=200, refit="fast")
    widths = (8, 12)
    kept = evaluator.kept(widths)
    small = slice_channels(evaluator.model.module, evaluator.graph, kept)
    refit_fast(small, evaluator.model.module, evaluator.graph, kept, evaluator.grams)
    assert evaluator.val_accuracy(widths) == accuracy(small, *evaluator.task.val)
    with pytest.raises(UserError, match="unknown --refit 'slow'; known: faithful, fast") as caught:
        Evaluator(*trained, Classification(trained[0], splits), refit="slow")
    assert caught.value.exit_code == 2


def test_candidates_are_compared_on_all_held_out_images(
    trained: tuple[LoadedModel, LayerGraph], splits: Splits
) -> None:
    task = Classification(trained[0], splits, val_images=50)
    evaluator = Evaluator(*trained, task, calibration_images=200)
    val = load_data("digits", input_shape=SHAPE).val
    module = trained[0].module
    assert len(evaluator.task.val[0]) == 50 < len(val.labels)
    assert task.final_score(module) == accuracy(module, trained[0].normalised(val.images), val.labels)


def test_a_label_without_an_output_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(UserError, match="labels reach 10, the network has 10 outputs .0 to 9."):
        accuracy(network, torch.zeros(4, 3, 2, 2), torch.tensor([1, 3, 10, 2]))


def test_the_test_split_is_never_in_memory_as_a_whole(
    trained: tuple[LoadedModel, LayerGraph], splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = load_tensors(splits.test)
    networks = [trained[0].module, nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))]
    wanted = [accuracy(each, trained[0].normalised(images), labels) for each in networks]
    monkeypatch.setattr("amc_hw.task.TEST_BYTES", 100 * images[0].numel() * 4)
    seen: list[int] = []
    networks[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    assert Classification(trained[0], splits).test_scores(networks) == wanted
    assert sum(seen) == len(labels) > 100 >= max(seen)


def test_a_network_that_reshapes_by_view_is_scored_in_the_layout_that_it_needs() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 4, 3), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.conv(x).view(len(x), -1)

    network = Viewing().eval()
    images, labels = torch.randn(40, 3, 8, 8), torch.randint(144, (40,))
    wanted = accuracy(network, images, labels, batch=10)
    network.calls = 0
    assert accuracy(network, images.contiguous(memory_format=torch.channels_last), labels, batch=10) == wanted
    assert network.calls == 5  # one attempt, and four batches


class WithRectifier(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def folding_network() -> nn.Sequential:
    """Whose batch-norms 1, 4 and 7 follow a convolution, 9 a rectifier; 11 has a class of its own."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.BatchNorm2d(12, eps=0.1),
        nn.ReLU(),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 1),
        WithRectifier(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


@pytest.mark.parametrize("pruned", [False, True])
def test_batch_norms_are_folded_where_they_follow_a_convolution_and_the_function_stays(pruned: bool) -> None:
    torch.manual_seed(1)
    net, images = folding_network(), torch.randn(64, *SHAPE)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.uniform_(part.weight, -2, 2)
            nn.init.normal_(part.bias)
    net.train()(images)
    graph = build_graph(net.eval(), SHAPE)
    widths = tuple(group.width // (2 if pruned else 1) for group in graph.groups)
    small = slice_channels(net, graph, keep_channels(net, graph, widths))
    folded = copy.deepcopy(small)
    fold_batch_norms(folded, graph)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), small(images), rtol=1e-4, atol=1e-4)
        drawn = {place: torch.randn(2, small[place].num_features, 4, 4) for place in (1, 4, 7, 9, 11)}
        assert [place for place, values in drawn.items() if folded[place](values) is values] == [1, 4, 7]


def test_a_convolution_whose_weight_is_made_anew_keeps_its_batch_norm() -> None:
    torch.manual_seed(1)
    net = network().eval().requires_grad_(False)
    graph = build_graph(net, SHAPE)
    weight = net[0].weight.detach()
    del net[0]._parameters["weight"]
    net[0].weight = weight  # as old-style normalisations of weights keep it
    images = torch.randn(4, *SHAPE)
    wanted = net(images)
    fold_batch_norms(net, graph)
    torch.testing.assert_close(net(images), wanted)
    assert net[0].weight is weight and net[3].bias is not None


def test_only_images_with_labels_are_scored_on_a_folded_network(evaluator: Evaluator) -> None:
    class Own:
        """A task that is not `Classification`."""

        inputs, score_and_outputs = evaluator.task.inputs, evaluator.task.score_and_outputs

    seen = []

    def judged(task: Task) -> list[bool]:
        def noted(module: nn.Module) -> tuple[float, list[Tensor]]:
            seen.append(module)
            return type(evaluator.task).score_and_outputs(evaluator.task, module)

        task.score_and_outputs = noted  # type: ignore[method-assign]
        Evaluator(evaluator.model, evaluator.graph, task, calibration_images=50).judge((8, 12))
        return ["forward" in vars(part) for part in seen[0].modules() if isinstance(part, nn.BatchNorm2d)]

    assert judged(evaluator.task) == [True, True]
    seen.clear()
    assert judged(Own()) == [False, False]  # type: ignore[arg-type]


def test_pointwise_convolutions_of_one_pixel_are_products_while_a_network_is_scored() -> None:
    torch.manual_seed(0)

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network = nn.Sequential(
        nn.Conv2d(3, 8, 1),  # of many pixels
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.Conv2d(16, 16, 1, groups=4),
        Scaled(16, 10, 1),
        nn.Conv2d(10, 10, 1, padding=1),  # of one pixel before the padding
        nn.AdaptiveMaxPool2d(1),
        nn.Conv2d(10, 10, 1),
        nn.Flatten(),
    ).eval()
    images = torch.randn(30, 3, 5, 5)
    with torch.inference_mode():
        labels = network(images).argmax(1)
    shapes: list[tuple[int, ...]] = []
    network[7].register_forward_hook(lambda _layer, args, found: shapes.append((*args[0].shape, *found.shape)))
    assert accuracy(network, images, labels, batch=20) == 1.0
    assert shapes == [(20, 10, 1, 1) * 2, (10, 10, 1, 1) * 2]
    assert not any("forward" in vars(part) for part in network.modules())
    with pytest.raises(RuntimeError):
        accuracy(network, images[:, :2], labels)
    assert not any("forward" in vars(part) for part in network.modules())


def test_a_forward_of_a_layers_own_stays_while_a_network_is_scored() -> None:
    network = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Flatten()).eval()
    network[0].forward = own = lambda x: torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10)[:, :, None, None]
    labels = torch.randint(10, (30,))
    assert accuracy(network, labels.float()[:, None, None, None].expand(-1, 3, 1, 1), labels) == 1.0
    assert network[0].forward is own
