"""Fine-tuning: what it changes, what it keeps, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from amc_hw.api import load_pruned
from amc_hw.data import load_data
from amc_hw.errors import FailedError, UserError
from amc_hw.finetune import FinetuneConfig, _in_memory, finetune, plan_finetune
from amc_hw.models import load_model
from amc_hw.policy import Policy
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.runs import save_weights
from amc_hw.subject import load_graph
from amc_hw.task import Classification

pytest.importorskip("accelerate")
MODEL = "mobilenet_v1_cifar?width=0.25"


def quiet(done: int, total: int, text: str) -> None:
    pass


def steps_of_an_epoch() -> int:
    """Steps of an epoch: 256 images each, the rest left out."""
    from amc_hw.data import load_data

    return len(load_data("digits", input_shape=(3, 32, 32)).train) // 256  # type: ignore[arg-type]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A pruned network with random weights: there is much to learn."""
    torch.manual_seed(0)
    model, graph = load_graph(MODEL)
    kept = keep_channels(model.module, graph, [max(1, width // 2) for width in graph.full_widths])
    folder = tmp_path / "run"
    folder.mkdir()
    save_weights(folder / "pruned.pt", slice_channels(model.module, graph, kept).state_dict())
    Policy(
        model=MODEL,
        input_shape=model.input_shape,
        mean=model.mean,
        std=model.std,
        data="digits",
        widths={name: len(channels) for name, channels in kept.items()},
        kept={name: channels.tolist() for name, channels in kept.items()},
        checkpoint_sha256=None,
        device="fake",
        dtype="float32",
    ).save(folder / "policy.json")
    return folder / "policy.json"


@pytest.mark.slow
def test_accuracy_rises_and_the_widths_stay(policy: Path) -> None:
    before = policy.parent.joinpath("pruned.pt").read_bytes()
    found = finetune(policy, FinetuneConfig(epochs=6, batch=64), progress=quiet)
    assert found["accuracy_before"] < 0.3 and found["accuracy_after"] > 0.7 and found["accuracy_split"] == "test"
    folder = policy.parent.with_name("run-finetuned")
    assert found["baseline_accuracy"] is None and found["policy"] == str(folder / "policy.json")
    old, new = json.loads(policy.read_text()), json.loads(Path(found["policy"]).read_text())
    assert old == new and policy.parent.joinpath("pruned.pt").read_bytes() == before
    module = load_pruned(found["policy"])
    assert not module.training and not (folder / "state.pt").exists()
    again = finetune(policy, FinetuneConfig(epochs=6, batch=64), progress=quiet)
    assert again == found
    rows = [json.loads(line) for line in Path(found["policy"]).with_name("metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows[1:]] == list(range(6)) and rows[-1]["loss"] < rows[1]["loss"]


@pytest.mark.slow
def test_a_policy_is_never_made_worse_in_silence(policy: Path) -> None:
    good = finetune(policy, FinetuneConfig(epochs=3, batch=64), progress=quiet)
    assert good["epoch_kept"] > 0 and good["held_out_after"] > good["held_out_before"]
    said: list[str] = []
    with pytest.warns(UserWarning, match="no epoch was better than the policy was before .* try a lower --lr than 3"):
        worse = finetune(
            Path(good["policy"]), FinetuneConfig(epochs=1, batch=64, lr=3.0), progress=lambda *_: said.append(_[2])
        )
    assert worse["epoch_kept"] == 0 and worse["held_out_after"] == worse["held_out_before"]
    assert worse["accuracy_after"] == worse["accuracy_before"] == good["accuracy_after"]
    assert said[0] == f"before: held-out accuracy {good['held_out_after']:.4f}"
    one, other = (load_pruned(each["policy"]).state_dict() for each in (good, worse))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_best_epoch_is_kept_through_an_interruption(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"whole": [0.1, 0.5, 0.9, 0.2], "parts": [0.1, 0.5, 0.9, 0.1, 0.2]}  # of parts once more at the restart
    found = {}
    for name, told in scores.items():
        given = iter(told)
        monkeypatch.setattr("amc_hw.finetune.Classification.score", lambda self, module, given=given: next(given))
        config = FinetuneConfig(epochs=3, batch=256, out=policy.parent.with_name(name))
        if name == "parts":
            with pytest.raises(InterruptedError):
                finetune(policy, config, progress=interrupted_after(2 * steps_of_an_epoch()))
        found[name] = finetune(policy, config, progress=quiet)
    assert [each["epoch_kept"] for each in found.values()] == [2, 2]
    one, other = (load_pruned(each["policy"]).state_dict() for each in found.values())
    assert all(torch.equal(one[name], other[name]) for name in one)


def interrupted_after(steps: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done >= steps:
            raise InterruptedError

    return progress


def test_seeds_of_any_size_are_taken(policy: Path) -> None:
    assert plan_finetune(policy, FinetuneConfig(epochs=1, batch=256, seed=2**63 - 1))["steps"] > 0


def test_what_has_no_labels_is_told_before_what_is_not_installed(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match="pip install 'amc-hw.finetune.'"):
        finetune(policy, FinetuneConfig(epochs=1), progress=quiet)
    policy.write_text(json.dumps(json.loads(policy.read_text()) | {"data": None}))
    with pytest.raises(UserError, match="your own training loop"):
        finetune(policy, FinetuneConfig(epochs=1), progress=quiet)


def test_a_plan_names_the_steps_and_writes_nothing(policy: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan = plan_finetune(policy, FinetuneConfig(epochs=3, batch=256))
    assert plan["steps"] == 3 * steps_of_an_epoch() and plan["epochs"] == 3 and 0 < plan["minutes"] < 10
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_processes_train_one_network(policy: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "amc_hw.cli", "finetune", "--policy", str(policy), "--epochs", "2", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert one["processes"] == 2 and one == other
    task = Classification(load_model(MODEL), load_data("digits", input_shape=(3, 32, 32)))
    assert task.test_scores([load_pruned(one["policy"])]) == [one["accuracy_after"]]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(policy: Path, tmp_path: Path) -> None:
    whole = finetune(policy, FinetuneConfig(epochs=3, batch=256, out=tmp_path / "whole"), progress=quiet)
    config = FinetuneConfig(epochs=3, batch=256, out=tmp_path / "parts")
    each = steps_of_an_epoch()
    for stop in (1, each + 2, 2 * each + 1):
        with pytest.raises(InterruptedError):
            finetune(policy, config, progress=interrupted_after(stop))
    parts = finetune(policy, config, progress=quiet)
    one, other = (torch.load(Path(found["policy"]).with_name("pruned.pt")) for found in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert parts["accuracy_after"] == whole["accuracy_after"]


@pytest.mark.slow
def test_the_unpruned_network_teaches(policy: Path, tmp_path: Path) -> None:
    """With nothing but the teacher in the loss, its mistakes are learnt: here a constant answer."""
    teacher = load_model(MODEL).module
    with torch.no_grad():
        teacher.classifier.weight.zero_()
        teacher.classifier.bias.copy_(torch.tensor([0.0] * 3 + [9.0] + [0.0] * 6))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    config = FinetuneConfig(
        epochs=4, batch=64, distill=1.0, checkpoint=tmp_path / "teacher.pt", out=tmp_path / "taught"
    )
    found = finetune(policy, config, progress=quiet)
    assert (
        found["baseline_accuracy"] == pytest.approx(found["accuracy_after"], abs=0.03) and found["accuracy_after"] < 0.2
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "--lr 0.0 must be a number above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"distill": 1.5}, "--distill 1.5 must lie in 0..1"),
        ({"distill": 0.5}, "--distill needs the unpruned network: give its --checkpoint"),
    ],
)
def test_settings_that_make_no_sense(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FinetuneConfig(**options)


def test_a_task_without_labels_is_sent_to_its_own_loop(policy: Path) -> None:
    data = json.loads(policy.read_text()) | {"data": None, "evaluate": "a.py:b", "calibrate": "a.py:c"}
    policy.write_text(json.dumps(data))
    with pytest.raises(UserError, match="put amc_hw.load_pruned.policy. into your own training loop"):
        finetune(policy, FinetuneConfig(), progress=quiet)


def test_what_ended_is_not_the_answer_to_another_question(policy: Path) -> None:
    """A trial of one epoch, then other settings, or other weights of the same widths, in the same folder."""
    first = finetune(policy, FinetuneConfig(epochs=1, batch=512), progress=quiet)
    assert finetune(policy, FinetuneConfig(epochs=1, batch=512), progress=quiet) == first
    with pytest.raises(UserError, match="run-finetuned holds another fine-tuning .epochs: 1, not 2."):
        finetune(policy, FinetuneConfig(epochs=2, batch=512), progress=quiet)
    state = torch.load(policy.parent / "pruned.pt", weights_only=True)
    save_weights(policy.parent / "pruned.pt", {name: value * 1.01 for name, value in state.items()})
    with pytest.raises(UserError, match="holds another fine-tuning .weights_sha256: "):
        finetune(policy, FinetuneConfig(epochs=1, batch=512), progress=quiet)


def test_the_policy_says_what_the_data_are_not_the_settings_of_the_folder(
    policy: Path, monkeypatch: pytest.MonkeyPatch, amc_hw: Callable
) -> None:
    monkeypatch.chdir(policy.parent)
    Path("amc-hw.toml").write_text('data = "npz:nowhere.npz"\ncheckpoint = "nowhere.pt"\n')
    done = amc_hw("finetune", "--policy", "policy.json", "--epochs", "1", "--batch", "512", "--out", "tuned")
    assert done.code == 0, done.err
    assert json.loads(Path("tuned/policy.json").read_text())["data"] == "digits"
    done = amc_hw("report", "tuned")
    assert done.code == 2 and "of a fine-tuning, report the search that it began with" in done.mistake


def test_images_that_vary_are_drawn_anew_in_every_epoch() -> None:
    class Varied(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(3, 8, 8), 0

    kept = _in_memory(Varied(), (3, 8, 8))
    assert not torch.equal(kept[0][0], kept[0][0])


def test_a_batch_larger_than_the_data_is_refused(policy: Path) -> None:
    with pytest.raises(UserError, match="--batch 5000 is larger than the training split"):
        finetune(policy, FinetuneConfig(batch=5000), progress=quiet)
    finetune(policy, FinetuneConfig(batch=512, epochs=1), progress=quiet)  # the mistake has not taken the folder


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is no mistake there")
def test_half_precision_needs_a_gpu(policy: Path) -> None:
    with pytest.raises(UserError, match="--precision fp16 needs a GPU: take bf16 or no"):
        finetune(policy, FinetuneConfig(precision="fp16"), progress=quiet)


def test_other_weights_at_the_same_place_teach_something_else(policy: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "w.pt"
    state = load_model(MODEL).module.state_dict()
    torch.save(state, checkpoint)
    config = FinetuneConfig(epochs=1, batch=512, checkpoint=checkpoint)
    finetune(policy, config, progress=quiet)
    torch.save({name: value * 2 for name, value in state.items()}, checkpoint)
    with pytest.raises(UserError, match="holds another fine-tuning .checkpoint: "):
        finetune(policy, config, progress=quiet)
    checkpoint.unlink()
    with pytest.raises(UserError, match="cannot read checkpoint"):
        finetune(policy, config, progress=quiet)


@pytest.mark.slow
def test_a_loss_that_explodes_and_a_state_that_is_damaged(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="the loss is no longer finite in epoch .*: lower --lr"):
        finetune(policy, FinetuneConfig(lr=1e30, epochs=2, batch=64, out=tmp_path / "wild"), progress=quiet)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "state.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="state.pt is damaged .*: remove it to begin again"):
        finetune(policy, FinetuneConfig(out=tmp_path / "cut"), progress=quiet)


@pytest.mark.slow
def test_by_command(policy: Path, monkeypatch: pytest.MonkeyPatch, amc_hw: Callable) -> None:
    monkeypatch.chdir(policy.parent)
    done = amc_hw("finetune", "--policy", "policy.json", "--epochs", "1", "--out", "tuned", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["epochs"] == 1 and Path(found["policy"]).exists() and "held-out accuracy" in done.err
    assert amc_hw("finetune", "--policy", "nowhere.json").code == 2
    done = amc_hw("finetune", "--policy", "policy.json", "--epochs", "1", "--batch", "512", "--json")
    assert done.code == 0 and Path("../run-finetuned/policy.json").samefile(json.loads(done.out)["policy"])
