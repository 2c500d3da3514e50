"""A task of one's own: scores and inputs from a user's functions, and every way in which these can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from amc_hw.api import load_pruned
from amc_hw.errors import UserError
from amc_hw.models import load_model
from amc_hw.settings import read_settings
from amc_hw.task import PROBES, SEARCH_IMAGES, Classification, OwnTask, load_task

SHAPE = (3, 8, 8)
FUNCTIONS = """
import torch
from torch import nn

calls = []

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)

def score(model):
    calls.append(model.training)
    return float(model(torch.ones(1, 3, 8, 8)).mean())

def half(model, factor=0.5):
    return factor

def nan(model):
    return float("nan")

def word(model):
    return "good"

def raises(model):
    raise RuntimeError("no such file")

def moves(model):
    model.to("meta")
    return 1.0

def halves(model):
    model.half()
    return 1.0

def trains(model):
    model.train()
    return torch.tensor(0.25)

def inputs():
    for value in range(5):
        yield torch.full((3, 3, 8, 8), float(value))

def many():
    for value in range(400):
        yield torch.full((1, 3, 8, 8), float(value))

def pairs():
    yield torch.zeros(2, 3, 8, 8), torch.zeros(2, 4)

def small():
    yield torch.zeros(2, 3, 4, 4)

def nothing():
    return []

def words():
    yield "image"

def breaks():
    yield torch.zeros(1, 3, 8, 8)
    raise OSError("the disk is gone")
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def task_of(functions: str, *, evaluate: str = "score", calibrate: str = "inputs") -> OwnTask:
    model = load_model(f"{functions}:net")
    task = load_task(model, data=None, evaluate=f"{functions}:{evaluate}", calibrate=f"{functions}:{calibrate}")
    assert isinstance(task, OwnTask)
    return task


def test_scores_and_inputs_are_those_of_the_users_functions(functions: str) -> None:
    task = task_of(functions)
    module = task.model.module
    wanted = float(module(torch.ones(1, 3, 8, 8)).mean())
    assert task.score(module) == task.final_score(module) == wanted
    assert task.test_scores([module, module]) == [wanted, wanted] and task.split == "evaluate"
    (images,) = task.inputs(7)
    assert images[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert len(task.inputs(100)[0]) == 15
    assert task_of(functions, evaluate="half").score(module) == 0.5


def test_outputs_are_those_of_the_same_inputs_every_time(functions: str) -> None:
    task = task_of(functions)
    module = task.model.module
    score, (outputs,) = task.score_and_outputs(module)
    assert score == task.score(module)
    torch.testing.assert_close(outputs, module(task.inputs(200)[0]))
    many = task_of(functions, calibrate="many")
    inputs, (outputs,) = many.inputs(400)[0], many.score_and_outputs(module)[1]
    torch.testing.assert_close(outputs, module(inputs[SEARCH_IMAGES : SEARCH_IMAGES + PROBES]))
    assert len(task_of(functions, evaluate="half").score_and_outputs(module)[1]) == 1


def test_options_reach_the_function(functions: str) -> None:
    model = load_model(f"{functions}:net")
    task = load_task(model, data=None, evaluate=f"{functions}:half?factor=0.75", calibrate=f"{functions}:inputs")
    assert task.score(model.module) == 0.75


def test_a_network_is_evaluated_and_left_in_eval_mode(functions: str) -> None:
    task = task_of(functions, evaluate="trains")
    assert task.score(task.model.module.train()) == 0.25
    assert not any(part.training for part in task.model.module.modules())


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ("nan", "returned nan: a score must be a finite number"),
        ("word", "returned 'good', not a number"),
        ("raises", "raised RuntimeError: no such file"),
        ("moves", "left the network on meta, torch.float32, it was on cpu"),
        ("halves", "left the network on cpu, torch.float16"),
    ],
)
def test_an_evaluate_function_that_cannot_be_used(functions: str, evaluate: str, words: str) -> None:
    task = task_of(functions, evaluate=evaluate)
    with pytest.raises(UserError, match=f"mine.py:{evaluate} {words}") as caught:
        task.score(task.model.module)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("calibrate", "words"),
    [
        ("pairs", r"yielded \(2, 3, 8, 8\) and \(2, 4\), the network takes \(N, 3, 8, 8\)"),
        ("small", r"yielded \(2, 3, 4, 4\), the network takes \(N, 3, 8, 8\)"),
        ("nothing", "yielded nothing"),
        ("words", "yielded a str of other things than tensors"),
        ("breaks", "raised OSError: the disk is gone"),
    ],
)
def test_a_calibrate_function_that_cannot_be_used(functions: str, calibrate: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        task_of(functions, calibrate=calibrate).inputs(10)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(functions: str) -> None:
    model = load_model(f"{functions}:net")
    with pytest.raises(UserError, match="--calibrate is missing: give it, or --data"):
        load_task(model, data=None, evaluate=f"{functions}:score")
    with pytest.raises(UserError, match="--evaluate is missing"):
        load_task(model, data=None, calibrate=f"{functions}:inputs")
    with pytest.raises(UserError, match="has no function 'nowhere'"):
        load_task(model, data=None, evaluate=f"{functions}:nowhere", calibrate=f"{functions}:inputs")


def test_images_with_labels_stand_in_for_the_function_that_is_not_given() -> None:
    model = load_model("mobilenet_v1_cifar?width=0.25")
    labelled = load_task(model, data="digits")
    assert isinstance(labelled, Classification)
    both = load_task(model, data="digits", evaluate="builtins:id")
    assert torch.equal(both.inputs(20)[0], labelled.inputs(20)[0]) and both.split == "evaluate"


class Boxes(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": x}


def test_a_network_that_returns_no_logits_needs_a_score_of_its_own() -> None:
    task = Classification(load_model("mobilenet_v1_cifar?width=0.25"), load_splits(), val_images=10)
    with pytest.raises(UserError, match="returns a dict, not .N, classes.: give --evaluate"):
        task.score(Boxes())
    with pytest.raises(UserError, match="not .N, classes.: give --evaluate"):
        task.score(nn.Conv2d(3, 2, 1))


def load_splits():
    from amc_hw.data import load_data

    return load_data("digits", input_shape=(3, 32, 32))


SEGMENTER = '''
import torch
from torch import nn
from torch.nn import functional as F


class Segmenter(nn.Module):
    """Where is the bright disc? A mask from two levels."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.head = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(self, x):
        first = self.down(x)
        deep = self.deep(F.max_pool2d(first, 2))
        return {"mask": self.head(torch.cat([self.up(deep), first], 1))}


def discs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * 12 + 2
    rows, columns = torch.arange(16.0)[:, None], torch.arange(16.0)[None, :]
    masks = ((rows - centre[:, :1, 0]) ** 2 + (columns - centre[:, 1:, 0]) ** 2 < 9).float()[:, None]
    return masks + 0.5 * torch.randn(count, 1, 16, 16, generator=generator), masks


def make():
    torch.manual_seed(0)
    net = Segmenter()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(120):
        images, masks = discs(32, step)
        loss = F.binary_cross_entropy_with_logits(net(images)["mask"], masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), discs(1, 0)[0]


def iou(net):
    images, masks = discs(64, 10_000)
    found = net(images)["mask"] > 0
    return float((found & masks.bool()).sum() / (found | masks.bool()).sum())


def images():
    for start in range(4):
        yield discs(64, 20_000 + start)[0]
'''


@pytest.mark.slow
def test_a_segmenter_is_searched_under_its_own_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amc_hw) -> None:
    """From nothing but a file with a network, a score and inputs to a pruned, exported network that still segments."""
    monkeypatch.chdir(tmp_path)
    Path("seg.py").write_text(SEGMENTER)
    spec = ("--device", "fake", "--model", "seg.py:make")
    assert amc_hw("profile", *spec).code == 0
    task = ("--evaluate", "seg.py:iou", "--calibrate", "seg.py:images")
    checked = json.loads(amc_hw("check", *spec, *task, "--json").out)
    assert checked["accuracy"] > 0.8 and checked["groups"] == 4 and checked["measurements_missing"] == 0
    done = amc_hw("search", *spec, *task, "--flops-ratio", "0.5", "--episodes", "20", "--out", "run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["accuracy_split"] == "evaluate" and found["macs"] <= 0.5 * found["baseline_macs"]
    assert found["accuracy"] > 0.6 and found["baseline_accuracy"] == pytest.approx(checked["accuracy"])
    assert "score" in done.err
    pruned = load_pruned("run/policy.json")
    assert set(pruned(torch.zeros(1, 1, 16, 16))) == {"mask"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # its file is found from the policy on
    again = load_pruned("../run/policy.json")
    assert torch.equal(again(torch.ones(1, 1, 16, 16))["mask"], pruned(torch.ones(1, 1, 16, 16))["mask"])
    monkeypatch.chdir(tmp_path)
    exported = amc_hw("export", "--policy", "run/policy.json", "--format", "onnx", "--out", "small.onnx", "--json")
    assert json.loads(exported.out)["max_abs_diff"] < 1e-3


def test_a_task_is_remembered_for_the_commands_that_follow(
    functions: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amc_hw: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    task = ("--evaluate", f"{functions}:score", "--calibrate", f"{functions}:inputs")
    assert amc_hw("init", "--device", "fake", "--model", f"{functions}:net", *task).code == 0
    assert "data" not in read_settings()
    checked = amc_hw("check", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["accuracy"] == task_of(functions).score(load_model(f"{functions}:net").module)


def test_the_default_data_do_not_stand_in_for_what_a_task_leaves_out(
    functions: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amc_hw: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = ("--device", "fake", "--model", f"{functions}:net", "--flops-ratio", "0.5")
    assert amc_hw("profile", *spec[:4]).code == 0
    done = amc_hw("search", *spec, "--evaluate", f"{functions}:score")
    assert done.code == 2 and "--calibrate is missing" in done.mistake
    done = amc_hw("search", *spec, "--evaluate", f"{functions}:nan", "--calibrate", f"{functions}:inputs")
    assert done.code == 2 and "mine.py:nan returned nan" in done.mistake
