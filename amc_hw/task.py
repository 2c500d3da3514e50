"""What a network is for: how good it is, and the inputs that it is refitted on.

Images with labels make a classification task; a user's own functions make any other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from amc_hw.data import Splits, load_data, load_tensors
from amc_hw.errors import DeviceError, UserError
from amc_hw.images import load_parts
from amc_hw.models import LoadedModel
from amc_hw.specs import Spec, load_function, one_line, parse_spec
from profilers.gpu import tf32

#: Images of a batch on a CPU, in bytes: a layer's values are several times as large.
CACHED_BYTES, LARGEST_BATCH = 1_900_000, 250
FINAL_IMAGES, FINAL_BYTES = 5000, 1_000_000_000  #: held-out images that candidates are compared on, at most
TEST_BYTES = 300_000_000  #: of test images that are decoded at a time
SEARCH_IMAGES = 100  #: that every policy of a search is refitted on: the first ones
PROBES, PROBED = 200, 25  #: inputs whose outputs are compared where a function of the user's own scores; of a batch
FAR = 1e6  #: distortion of outputs that are no numbers


class Judged(NamedTuple):
    """What a search knows of a policy. score: as of `Task.score`; distortion: how far the network's outputs are from
    the unpruned one's (`distortion`), None where only the score is known."""

    score: float
    distortion: float | None = None

    @classmethod
    def of(cls, found: float | Judged) -> Judged:
        return found if isinstance(found, Judged) else cls(float(found))


def shown_gain(difference: float, *, accuracy: bool) -> str:
    """A difference of scores for a reader: of accuracies in points."""
    return f"{100 * difference:+.2f} points" if accuracy else f"{difference:+.4g}"


class Task(Protocol):
    """How good a network is. Scores are better when higher; an accuracy is a fraction."""

    split: str  #: what the score that is reported at the end was computed on

    @property
    def in_unit_range(self) -> bool | None:
        """Whether inputs, not normalised, lie in [0, 1]; None where they come from a function of the user's own."""

    def inputs(self, limit: int) -> tuple[Tensor, ...]:
        """At most `limit` inputs to refit with, as the network takes them: (N, ...) for every input it has."""

    def score(self, module: nn.Module) -> float:
        """On held-out training data: of the networks that a search tries."""

    def score_and_outputs(self, module: nn.Module) -> tuple[float, list[Tensor]]:
        """As `score`, and what the network gives for inputs that are the same every time, a tensor per output."""

    def unlikely(self, score: float) -> str | None:
        """Why the unpruned network's `score` cannot be that of a trained one; None where it can."""

    def final_score(self, module: nn.Module) -> float:
        """As `score`, more exactly: of the candidates at the end of a search."""

    def test_scores(self, modules: Sequence[nn.Module]) -> list[float]:
        """For the report, of each module; computed once."""


def check_eval_device(device: str) -> None:
    """UserError or DeviceError where networks cannot be scored on `device`: cpu, cuda or cuda:1."""
    try:
        kind = torch.device(device).type
        if kind != "cpu":
            float(torch.ones(1, device=device) + 1)  # a GPU may be there, and this PyTorch have no kernels for it
    except Exception as error:  # what PyTorch lacks for a device, it says in many ways
        known = isinstance(error, RuntimeError) and "device type" in str(error)
        raise (UserError if known else DeviceError)(f"--eval-device {device}: {one_line(error)}") from None


@contextmanager
def on(module: nn.Module, device: torch.device | str) -> Iterator[nn.Module]:
    """The module, which is on the CPU, on another device, and back. There, too, it computes in float32.

    DeviceError where memory does not suffice there; what was taken is given back, for networks that are timed.
    """
    if torch.device(device).type == "cpu":
        yield module
        return
    try:
        with tf32(False):
            yield module.to(device)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"--eval-device {device}: {one_line(error)}: give --eval-device cpu") from None
    finally:
        module.to("cpu")
        torch.cuda.empty_cache()


@contextmanager
def _pixels_as_rows(module: nn.Module) -> Iterator[None]:
    """Pointwise convolutions compute a map of one pixel as a matrix product: on a CPU it takes a third of the time."""

    def product(conv: nn.Conv2d, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2:] != (1, 1):
            return nn.Conv2d.forward(conv, x)
        return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]

    found = [
        part
        for part in module.modules()
        if type(part) is nn.Conv2d and "forward" not in vars(part) and part.kernel_size == (1, 1)
        if part.groups == 1 and part.padding == (0, 0)
    ]
    for conv in found:
        vars(conv)["forward"] = partial(product, conv)
    try:
        yield
    finally:
        for conv in found:
            del vars(conv)["forward"]


def accuracy(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch: int | None = None,
    device: torch.device | str | None = None,
) -> float:
    """Fraction of `images` (N, C, H, W) whose largest output is the label (N,).

    batch: None for as many as keep a layer's values in a CPU's caches. device: where the network runs, None for where
    the images are; those that are elsewhere are brought there a batch at a time.
    """
    return _right(module, images, labels, batch=batch, device=device) / len(images)


def _right(module: nn.Module, images: Tensor, labels: Tensor, **where: Any) -> int:
    """How many of the images; where: as of `_logits`. UserError where a label has no output."""
    found = list(_logits(module, images, **where))
    check_labels(int(labels.max()), found[0].shape[1])
    predicted = torch.cat([logits.argmax(1) for logits in found])
    return sum(one == other for one, other in zip(predicted.tolist(), labels.tolist(), strict=True))


def check_labels(largest: int, outputs: int) -> None:
    """UserError where a label has no output."""
    if largest >= outputs:
        raise UserError(f"labels reach {largest}, the network has {outputs} outputs (0 to {outputs - 1})")


def _logits(
    module: nn.Module, images: Tensor, *, batch: int | None = None, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """(batch, classes) for one batch after the other; batch, device: as of `accuracy`."""
    device = images.device if device is None else torch.device(device)
    if batch is None:
        each = images[:1].numel() * images.element_size()
        batch = min(max(CACHED_BYTES // max(each, 1), 8), LARGEST_BATCH) if device.type == "cpu" else LARGEST_BATCH
    plain = False  # `view` wants channels first
    faster = _pixels_as_rows(module) if device.type == "cpu" else nullcontext()
    with on(module, device), faster, torch.inference_mode():  # moved before: what is moved inside can only be read
        for part in images.split(batch):
            chunk = (part.contiguous() if plain else part).to(device)
            try:
                logits = module(chunk)
            except RuntimeError as error:
                if "view size" not in str(error) or chunk.is_contiguous():
                    raise
                plain = True
                logits = module(chunk.contiguous())
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                what = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise UserError(f"the network returns {what}, not (N, classes): give --evaluate file.py:function")
            yield logits


def distortion(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far a network's outputs are from those of the unpruned one: the mean squared difference over the variance of
    the latter, averaged over the outputs. It tells policies apart whose scores are too close."""
    each = [
        float((one.double() - other.double()).square().mean() / other.double().var().clamp(min=1e-30))
        for one, other in zip(found, wanted, strict=True)
    ]
    far = sum(each) / len(each)
    return far if math.isfinite(far) else FAR


class Classification:
    """Accuracy on the splits of a data set, computed on a device. Images are decoded and normalised once."""

    split = "test"

    def __init__(
        self, model: LoadedModel, splits: Splits, *, seed: int = 0, val_images: int = 1000, device: str = "cpu"
    ) -> None:
        if len(model.example_inputs) > 1:
            raise UserError(f"{model.spec} takes {len(model.example_inputs)} inputs: give --evaluate and --calibrate")
        self.model, self.splits, self.seed, self.device = model, splits, seed, device
        if model.assumed:
            warnings.warn(
                f"{model.spec} names no {' and '.join(model.assumed)}: images are normalised as ImageNet's (mean "
                f"{' '.join(map(str, model.mean))}, std {' '.join(map(str, model.std))}); set net.mean and net.std in "
                "the factory, (0, 0, 0) and (1, 1, 1) for images as they are",
                stacklevel=2,
            )
        self.val = self._held_out(val_images)

    def _held_out(self, limit: int) -> tuple[Tensor, Tensor]:
        images, labels = load_tensors(self.splits.val, limit=limit, seed=self.seed)
        self.in_unit_range = bool(images.min() >= 0 and images.max() <= 1)
        return self._ready(images).to(self.device), labels.to(self.device)

    def _ready(self, images: Tensor) -> Tensor:
        images = self.model.normalised(images)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # which convolutions are faster on
        return images

    def inputs(self, limit: int) -> tuple[Tensor, ...]:
        images, _ = load_tensors(self.splits.train, limit=limit, seed=self.seed)
        return (self.model.normalised(images),)

    def score(self, module: nn.Module) -> float:
        return accuracy(module, *self.val)

    def score_and_outputs(self, module: nn.Module) -> tuple[float, list[Tensor]]:
        images, labels = self.val
        logits = torch.cat(list(_logits(module, images)))
        check_labels(max(len(self.splits.classes) - 1, int(labels.max())), logits.shape[1])
        return int((logits.argmax(1) == labels).sum()) / len(labels), [logits]

    def unlikely(self, score: float) -> str | None:
        share = float(torch.bincount(self.val[1]).max()) / len(self.val[1])
        if score > share + 3 * math.sqrt(share * (1 - share) / len(self.val[1])):
            return None
        return f"naming the commonest class is right in {share:.4f}: an untrained network, or labels in another order?"

    @cached_property
    def _final_val(self) -> tuple[Tensor, Tensor]:
        return self._held_out(min(FINAL_IMAGES, max(len(self.val[0]), FINAL_BYTES // self._image_bytes)))

    @property
    def _image_bytes(self) -> int:
        return 4 * math.prod(self.model.input_shape)

    def final_score(self, module: nn.Module) -> float:
        return accuracy(module, *self._final_val)

    def test_scores(self, modules: Sequence[nn.Module]) -> list[float]:
        right, count = [0] * len(modules), 0
        for images, labels in load_parts(self.splits.test, max(1, TEST_BYTES // self._image_bytes)):
            images, count = self._ready(images), count + len(labels)
            for place, module in enumerate(modules):
                right[place] += _right(module, images, labels, device=self.device)
        return [each / count for each in right]


class OwnTask:
    """Scores and inputs of a user's own functions; what is not given comes from `labelled`.

    evaluate: module in eval mode -> score. calibrate: () -> inputs of the network, a tensor or a tuple of tensors each,
    with a batch dimension.
    """

    def __init__(
        self,
        model: LoadedModel,
        evaluate: Spec | None,
        calibrate: Spec | None,
        labelled: Classification | None,
        device: str = "cpu",
    ) -> None:
        if evaluate is None and calibrate is None:
            raise ValueError("a task of one's own has a function of one's own")
        self.model, self.labelled, self.device = model, labelled, device
        self._evaluate = None if evaluate is None else load_function(evaluate, kind="evaluate function")
        self._calibrate = None if calibrate is None else load_function(calibrate, kind="calibrate function")
        self._names = (str(evaluate), str(calibrate))
        self.split = "evaluate" if labelled is None or evaluate is not None else labelled.split

    @property
    def in_unit_range(self) -> bool | None:
        return None if self._calibrate is not None or self.labelled is None else self.labelled.in_unit_range

    def inputs(self, limit: int) -> tuple[Tensor, ...]:
        if self._calibrate is None:
            assert self.labelled is not None
            return self.labelled.inputs(limit)
        return collect_inputs(self._calibrate, self._names[1], self.model.example_inputs, limit)

    def score(self, module: nn.Module) -> float:
        if self._evaluate is None:
            assert self.labelled is not None
            return self.labelled.score(module)
        with on(module, self.device):
            return own_score(self._evaluate, self._names[0], module)

    def score_and_outputs(self, module: nn.Module) -> tuple[float, list[Tensor]]:
        if self._evaluate is None:
            assert self.labelled is not None
            return self.labelled.score_and_outputs(module)
        return self.score(module), self._outputs(module)

    @cached_property
    def _probes(self) -> tuple[Tensor, ...]:
        """Others than a search refits on, as far as there are more."""
        return tuple(part[-PROBES:] for part in self.inputs(SEARCH_IMAGES + PROBES))

    def _outputs(self, module: nn.Module) -> list[Tensor]:
        with on(module, self.device), torch.inference_mode():
            chunks = [part.to(self.device).split(PROBED) for part in self._probes]
            found = [tree_leaves(module(*chunk)) for chunk in zip(*chunks, strict=True)]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def unlikely(self, score: float) -> str | None:
        if self._evaluate is not None:
            return None
        assert self.labelled is not None
        return self.labelled.unlikely(score)

    def final_score(self, module: nn.Module) -> float:
        if self._evaluate is None:
            assert self.labelled is not None
            return self.labelled.final_score(module)
        return self.score(module)

    def test_scores(self, modules: Sequence[nn.Module]) -> list[float]:
        if self._evaluate is None:
            assert self.labelled is not None
            return self.labelled.test_scores(modules)
        return [self.score(module) for module in modules]


def load_task(
    model: LoadedModel,
    *,
    data: str | None,
    evaluate: str | None = None,
    calibrate: str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Task:
    """The task of `data`, or of a user's functions in its place; UserError where something is missing or wrong.

    data: None where the user names none: then both functions are needed. device: where networks are scored.
    """
    check_eval_device(device)
    labelled = None
    if evaluate is None or calibrate is None:
        if data is None:
            missing = "--evaluate" if evaluate is None else "--calibrate"
            raise UserError(f"{missing} is missing: give it, or --data with images and labels")
        labelled = Classification(model, load_data(data, input_shape=model.input_shape), seed=seed, device=device)
    if evaluate is None and calibrate is None:
        assert labelled is not None
        return labelled
    score, inputs = (None if text is None else parse_spec(text) for text in (evaluate, calibrate))
    return OwnTask(model, score, inputs, labelled, device)


def own_score(evaluate: Callable[..., Any], name: str, module: nn.Module) -> float:
    """What a user's function makes of a network; UserError where it fails, gives no number, or moves the network."""
    module.eval()
    before = [(value.device, value.dtype) for value in module.state_dict().values()]
    try:
        with torch.no_grad():
            found = evaluate(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} raised {one_line(error)}") from error
    for (device, dtype), value in zip(before, module.state_dict().values(), strict=True):
        if (value.device, value.dtype) != (device, dtype):
            now = f"{value.device}, {value.dtype}"
            raise UserError(
                f"{name} left the network on {now}, it was on {device}, {dtype}: move a copy, or move it back"
            )
    module.eval()
    try:
        score = float(found)
    except (TypeError, ValueError):
        raise UserError(f"{name} returned {found!r}, not a number") from None
    if not math.isfinite(score):
        raise UserError(f"{name} returned {score}: a score must be a finite number, better when higher")
    return score


def collect_inputs(
    calibrate: Callable[..., Any], name: str, examples: Sequence[Tensor], limit: int
) -> tuple[Tensor, ...]:
    """At most `limit` inputs that a user's function yields; UserError where they do not fit the `examples`."""
    wanted, batches, count = [tuple(example.shape[1:]) for example in examples], [], 0
    try:
        yielded = calibrate()
        if not isinstance(yielded, Iterable):
            raise UserError(f"{name} returned {yielded!r}: it yields batches of inputs")
        for item in yielded:
            batch = tuple(item) if isinstance(item, tuple | list) else (item,)
            if not all(isinstance(part, Tensor) and part.dim() > 0 for part in batch):
                raise UserError(f"{name} yielded a {type(item).__name__} of other things than tensors")
            shapes = [tuple(part.shape[1:]) for part in batch]
            if shapes != wanted or len({len(part) for part in batch}) > 1:
                found = " and ".join(str(tuple(part.shape)) for part in batch)
                takes = " and ".join(f"(N, {', '.join(map(str, shape))})" for shape in wanted)
                raise UserError(f"{name} yielded {found}, the network takes {takes}")
            batches.append([part.detach().float().cpu() for part in batch])
            if not all(bool(torch.isfinite(part).all()) for part in batches[-1]):
                raise UserError(f"{name} yielded numbers that are not finite")
            count += len(batch[0])
            if count >= limit:
                break
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} raised {one_line(error)}") from error
    if not count:
        raise UserError(f"{name} yielded nothing")
    return tuple(torch.cat(parts)[:limit] for parts in zip(*batches, strict=True))
