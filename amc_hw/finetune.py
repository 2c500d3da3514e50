"""Get back the accuracy that pruning took: SGD on the training split, on one machine or many (Accelerate).

What is pruned stays pruned. A run that was cut goes on after the last epoch that it finished.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from amc_hw.choices import LAYER_NORM_LR, USUAL_LR
from amc_hw.data import Splits, load_data, load_tensors
from amc_hw.errors import FailedError, UserError
from amc_hw.images import ImageFiles, TensorImages
from amc_hw.models import load_model
from amc_hw.models.checkpoint import checkpoint_sha256, put_back
from amc_hw.runs import JOURNAL, Journal, Progress, alone_in, record_command, save_json, save_weights, silent
from amc_hw.subject import Pruned, found_near, open_pruned
from amc_hw.task import Classification, check_labels
from profilers.files import write_whole

IN_MEMORY = 2_000_000_000  #: bytes of decoded training images that are kept
STATE = "state.pt"
SEEDS = 1 << 63  #: of a generator
PLAN_STEPS = 5  #: that are made to tell what all of them will take


@dataclass(frozen=True)
class FinetuneConfig:
    """How to train.

    out: folder of the run, by default that of the policy with `-finetuned`. lr: at the start of a cosine to zero, after
    one epoch of linear warm-up; by default USUAL_LR, or where there are layer-norms LAYER_NORM_LR. distill: weight of
    the unpruned network's softened outputs in the loss (Hinton et al., 2015); checkpoint: its weights. crop: images are
    shifted by at most that share of their size. precision: of PRECISIONS.
    """

    out: Path | None = None
    data: str | None = None
    checkpoint: Path | None = None
    epochs: int = 30
    lr: float | None = None
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    distill: float = 0.0
    temperature: float = 4.0
    crop: float = 0.125
    flip: bool = False
    precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("out", "checkpoint"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else Path(given))
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"--lr {self.lr} must be a number above 0")
        if not 0 <= self.distill <= 1:
            raise UserError(f"--distill {self.distill} must lie in 0..1")
        if self.distill and self.checkpoint is None:
            raise UserError("--distill needs the unpruned network: give its --checkpoint")


class _Order(Sampler[int]):
    """A permutation of the images that follows from the seed and the epoch, in every process the same."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 100_003 + self.epoch) % SEEDS)
        return iter(torch.randperm(self.count, generator=generator).tolist())


def finetune(policy: Path, config: FinetuneConfig, *, progress: Progress = silent) -> dict[str, Any]:
    """Train the pruned network of `policy` on its data set's training split; a new policy in a folder of its own, with
    the weights of the epoch that is best on held-out images, those before any of them included.

    UserError where the policy's task has no labels, FailedError where the loss is no longer finite.
    """
    pruned, data, accelerator = _opened(policy, config)
    config = _with_rate(config, pruned.module)
    from accelerate.utils import broadcast_object_list

    folder = policy.parent.resolve() if policy.parent.name in ("", "..") else policy.parent
    out = config.out or folder.with_name(f"{folder.name}-finetuned")
    start = time.monotonic()
    with alone_in(out if accelerator.is_main_process else out / f"rank{accelerator.process_index}"):
        journal = None
        if accelerator.is_main_process:
            journal = Journal(out / JOURNAL, _header(pruned, config), kind="fine-tuning")
        finished = out / "result.json"
        if finished.exists():
            progress(0, 1, f"{out} has this fine-tuning's result already")
            found: dict[str, Any] = json.loads(finished.read_text())
            return found
        splits = load_data(data, input_shape=pruned.policy.input_shape)
        run = _Run(pruned, splits, config, out, accelerator, journal, progress)
        if accelerator.is_main_process:
            record_command(out)
        trained = run.train()
        accelerator.wait_for_everyone()
        modules = [pruned.module, trained] + ([] if run.unpruned is None else [run.unpruned.cpu()])
        before, after, *baseline = run.task.test_scores(modules)
        result = {
            "schema_version": 1,
            "policy": str(out / "policy.json"),
            "accuracy_before": before,
            "accuracy_after": after,
            "baseline_accuracy": baseline[0] if baseline else None,
            "accuracy_split": "test",
            "held_out_before": run.before,
            "held_out_after": run.best[0],
            "epochs": config.epochs,
            "epoch_kept": run.best[1],
            "processes": accelerator.num_processes,
            "seconds": time.monotonic() - start,
        }
        result = broadcast_object_list([result])[0]  # batch-norm statistics differ a little between processes
        if accelerator.is_main_process:
            save_weights(out / pruned.policy.weights, trained.state_dict())
            replace(pruned.policy, data=config.data or pruned.policy.data).save(out / "policy.json")
            save_json(finished, result)
            (out / STATE).unlink(missing_ok=True)
        return result


def plan_finetune(policy: Path, config: FinetuneConfig) -> dict[str, Any]:
    """What `finetune` would do: epochs, steps and about how many minutes; a few steps are made, nothing is written."""
    pruned, data, accelerator = _opened(policy, config)
    config = _with_rate(config, pruned.module)
    start = time.monotonic()
    splits = load_data(data, input_shape=pruned.policy.input_shape)
    run = _Run(pruned, splits, config, Path(), accelerator, None, silent)
    loading = time.monotonic() - start
    return {
        "epochs": config.epochs,
        "steps": run.steps,
        "batch": config.batch,
        "processes": accelerator.num_processes,
        "minutes": (loading + run.seconds()) / 60,
    }


def _opened(policy: Path, config: FinetuneConfig) -> tuple[Pruned, str, Any]:
    """The pruned network, its data and an Accelerator; UserError where one of them cannot be had."""
    pruned = open_pruned(policy)
    data = config.data or (pruned.policy.data and found_near(pruned.policy.data, policy, pruned.policy))
    if data is None:
        raise UserError(
            "fine-tuning needs images with labels (--data): for another task put amc_hw.load_pruned(policy) "
            "into your own training loop, and keep what it gives with amc_hw.save_pruned"
        )
    try:
        from accelerate import Accelerator
    except ImportError:
        raise UserError("fine-tuning needs Accelerate: pip install 'amc-hw[finetune]'") from None
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("--precision fp16 needs a GPU: take bf16 or no")
    # several processes on CPUs are one group only where the CPU is asked for
    several_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    return pruned, data, Accelerator(mixed_precision=config.precision, cpu=several_cpus)


def _with_rate(config: FinetuneConfig, module: nn.Module) -> FinetuneConfig:
    if config.lr is not None:
        return config
    layer_norms = any(isinstance(part, nn.LayerNorm) for part in module.modules())
    return replace(config, lr=LAYER_NORM_LR if layer_norms else USUAL_LR)


def _header(pruned: Pruned, config: FinetuneConfig) -> dict[str, Any]:
    named = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    found = pruned.policy
    return {
        "schema_version": 1,
        "model": found.model,
        "widths": found.widths,
        "weights_sha256": pruned.weights_sha256(),
        **named,
        "out": None,
        "checkpoint": None if config.checkpoint is None else checkpoint_sha256(config.checkpoint),
    }


def _unpruned(pruned: Pruned, checkpoint: Path | None) -> nn.Module | None:
    """The network before it was pruned, where its weights are given."""
    if checkpoint is None:
        return None
    return load_model(pruned.model.found, input_shape=pruned.policy.input_shape, checkpoint=checkpoint).module


class _Run:
    def __init__(
        self,
        pruned: Pruned,
        splits: Splits,
        config: FinetuneConfig,
        out: Path,
        accelerator: Any,
        journal: Journal | None,
        progress: Progress,
    ) -> None:
        """journal: of the main process alone."""
        self.config, self.out, self.accelerator, self.progress = config, out, accelerator, progress
        self.journal = journal
        self.loaded = pruned.model
        train = _in_memory(splits.train, pruned.policy.input_shape)
        if len(train) < config.batch:  # type: ignore[arg-type]
            raise UserError(f"--batch {config.batch} is larger than the training split, {len(train)} images")  # type: ignore[arg-type]
        self.task = Classification(pruned.model, splits, seed=config.seed)
        self.order = _Order(len(train), config.seed)  # type: ignore[arg-type]
        loader: DataLoader = DataLoader(train, config.batch, sampler=self.order, drop_last=True)
        module = copy.deepcopy(pruned.module).requires_grad_(True)
        if config.flip and len(pruned.policy.input_shape) != 3:
            raise UserError(f"--flip mirrors images, {pruned.policy.model} reads none")
        self.layout = _layout(module, pruned.policy.input_shape)
        decayed = [p for p in module.parameters() if p.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": [p for p in module.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        assert config.lr is not None
        self.lr = config.lr
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=config.momentum, nesterov=config.momentum > 0)
        self.module, self.optimizer, self.loader = accelerator.prepare(module, optimizer, loader)
        if not len(self.loader):
            raise UserError(f"--batch {config.batch} on {accelerator.num_processes} processes is larger than the split")
        self.steps = config.epochs * len(self.loader)
        self.before = math.nan  # held-out accuracy, of the main process alone
        self.best: tuple[float, int, dict[str, Tensor]] = (math.nan, 0, {})  # that, after how many epochs, weights
        self.unpruned = _unpruned(pruned, config.checkpoint)
        self.teacher = self.unpruned if config.distill else None
        if self.teacher is not None:
            self.teacher.to(accelerator.device)

    def _rate(self, step: int) -> float:
        """Learning rate of a step: linear over the first epoch, then a cosine to zero (Loshchilov and Hutter, 2017)."""
        warm = min(len(self.loader), self.steps // 2)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))

    def train(self) -> nn.Module:
        if self.accelerator.is_main_process:
            self.before = self._held_out()
            self.best = self.before, 0, self._weights()
            self.progress(0, self.steps, f"before: held-out accuracy {self.before:.4f}")
        first = self._resume()
        for epoch in range(first, self.config.epochs):
            self._epoch(epoch)
        module: nn.Module = self.accelerator.unwrap_model(self.module).cpu().eval()
        accuracy, kept, weights = self.best
        if self.accelerator.is_main_process:
            put_back(module, weights)
            if kept == 0:
                warnings.warn(
                    f"no epoch was better than the policy was before (held-out accuracy {accuracy:.4f}): its weights "
                    f"stay as they were; try a lower --lr than {self.lr:g}, or more --epochs",
                    stacklevel=2,
                )
            elif kept < self.config.epochs:
                self.progress(0, self.steps, f"epoch {kept} was the best: its weights are kept")
        return module

    def _held_out(self) -> float:
        module = self.accelerator.unwrap_model(self.module)
        found = self.task.score(module.cpu().eval())
        module.to(self.accelerator.device)
        return found

    def _weights(self) -> dict[str, Tensor]:
        state = self.accelerator.unwrap_model(self.module).state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def _resume(self) -> int:
        path = self.out / STATE
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.module).load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best = state["best"]
        except Exception as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}): remove it to begin again") from None
        return int(state["epoch"]) + 1

    def _save(self, epoch: int) -> None:
        if not self.accelerator.is_main_process:
            return
        buffer = io.BytesIO()
        module = self.accelerator.unwrap_model(self.module)
        optimizer = self.optimizer.state_dict()
        torch.save({"epoch": epoch, "module": module.state_dict(), "optimizer": optimizer, "best": self.best}, buffer)
        write_whole(self.out / STATE, buffer.getvalue())

    def _epoch(self, epoch: int) -> None:
        config, start, total, count = self.config, time.monotonic(), 0.0, 0
        self.order.epoch = epoch
        self.module.train()
        for index, (images, labels) in enumerate(self.loader):
            step = epoch * len(self.loader) + index
            total, count = total + self._step(step, images, labels), count + 1
            if not math.isfinite(total):
                raise FailedError(f"the loss is no longer finite in epoch {epoch + 1}: lower --lr {self.lr:g}")
            self.progress(step, self.steps, f"epoch {epoch + 1} of {config.epochs}, loss so far {total / count:.3f}")
        if self.accelerator.is_main_process:
            held_out = self._held_out()
            if held_out >= self.best[0]:  # of equals the later
                self.best = held_out, epoch + 1, self._weights()
            text = f"epoch {epoch + 1} of {config.epochs}: loss {total / count:.4f}, held-out accuracy {held_out:.4f}"
            self.progress(0, self.steps, text)
            seconds = time.monotonic() - start
            row = {
                "epoch": epoch,
                "loss": total / count,
                "accuracy": held_out,
                "lr": self._rate(step),
                "seconds": seconds,
            }
            assert self.journal is not None
            if all(known.get("epoch") != epoch for known in self.journal.recorded):  # the state was not saved in time
                self.journal.append(row)
        self._save(epoch)

    def _step(self, step: int, images: Tensor, labels: Tensor) -> float:
        """One step of the optimizer; its loss."""
        rank = self.accelerator.process_index
        generator = torch.Generator().manual_seed(((self.config.seed * 1009 + step) * 1009 + rank) % SEEDS)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        loss = self._loss(self._varied(images, generator), labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        return float(loss.detach())

    def seconds(self) -> float:
        """What training would take, by its first steps and one scoring of the held-out images; the network is no
        longer what it was."""
        self.module.train()
        ends = [time.monotonic()]
        for step, (images, labels) in enumerate(itertools.islice(self.loader, PLAN_STEPS)):
            self._step(step, images, labels)
            ends.append(time.monotonic())
        start = time.monotonic()
        self.task.score(self.accelerator.unwrap_model(self.module).cpu().eval())
        each = statistics.median(after - before for before, after in itertools.pairwise(ends))
        return each * self.steps + (time.monotonic() - start) * self.config.epochs

    def _varied(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised; images (N, C, H, W) shifted before and, where asked for, mirrored at random, one by one."""
        images = self.loaded.normalised(images.cpu())
        if images.dim() != 4:
            return images.to(self.accelerator.device)
        height, width = images.shape[2:]
        reach = [int(self.config.crop * size) for size in (height, width)]
        padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
        corners = [torch.randint(2 * r + 1, (len(images),), generator=generator) for r in reach]
        mirrored = torch.rand(len(images), generator=generator) < (0.5 if self.config.flip else 0.0)
        rows = corners[0][:, None] + torch.arange(height)
        columns = corners[1][:, None] + torch.arange(width)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        each = torch.arange(len(images))[:, None, None]
        varied = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return varied.contiguous(memory_format=self.layout).to(self.accelerator.device)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.module(images)
        check_labels(int(labels.max()), logits.shape[1])
        loss = F.cross_entropy(logits, labels)
        if self.teacher is None:
            return loss
        heat, weight = self.config.temperature, self.config.distill
        with torch.no_grad():
            taught = self.teacher(images)
        soft = F.kl_div(
            F.log_softmax(logits / heat, 1), F.log_softmax(taught / heat, 1), reduction="batchmean", log_target=True
        )
        return (1 - weight) * loss + weight * heat**2 * soft


@torch.no_grad()
def _layout(module: nn.Module, shape: tuple[int, ...]) -> torch.memory_format:
    """Channels last, which convolutions of images are faster on, unless the network reshapes by `view`."""
    if len(shape) != 3:
        return torch.contiguous_format
    try:
        module(torch.zeros(2, *shape).contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def _in_memory(dataset: Dataset, shape: tuple[int, ...]) -> Dataset:
    """Image files decoded once, where few enough to be kept; a data set of a user's own may vary its images."""
    count = len(dataset)  # type: ignore[arg-type]
    if not isinstance(dataset, ImageFiles) or 4 * count * math.prod(shape) > IN_MEMORY:
        return dataset
    return TensorImages(*load_tensors(dataset))
