"""How good a pruned network is: on held-out data while searching, on the test split once at the end."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph
from amc_hw.models import LoadedModel
from amc_hw.prune import Kept, channel_magnitudes, keep_channels, slice_channels
from amc_hw.refit import Grams, count_of, gather_grams, reestimate_batch_norm, refit_faithful, refit_fast
from amc_hw.symbolic import BATCH_NORMS, CONVS
from amc_hw.task import SEARCH_IMAGES, Classification, Judged, Task, distortion

REFIT_BYTES = 4_000_000_000
REFITS = ("faithful", "fast")
#: A layer, of the faithful refit inside a search: on SEARCH_IMAGES they rank policies nearly as more on 500 images do
#: (docs/decisions/0005).
SEARCH_ROWS = 3000
TIMED_EPISODES = 5
ENOUGH_SECONDS = 5.0
FINAL_ROWS = 30  #: of the final refit, per image and layer


def _bytes_per_image(graph: LayerGraph) -> int:
    """Of the lock-step refit, about: six of the largest values in both networks together."""
    return 6 * 4 * max(op.out_channels * op.out_height * op.out_width for op in graph.op_graph().ops)


@torch.no_grad()
def fold_batch_norms(module: nn.Module, graph: LayerGraph) -> None:
    """Batch-norms become part of the convolutions that they follow, in place: the same function in less time, of a
    network that nothing more is done with than to score it. module: that of `graph`, at any widths, in eval mode."""
    for layer in graph.layers:
        if layer.module is None or layer.batch_norm is None:
            continue
        conv, norm = module.get_submodule(layer.module), module.get_submodule(layer.batch_norm)
        if type(conv) not in CONVS or type(norm) not in BATCH_NORMS:  # a derived class may do more
            continue
        if "weight" not in conv._parameters:  # made anew at every call
            continue
        assert isinstance(conv, CONVS) and isinstance(norm, BATCH_NORMS)
        assert norm.running_mean is not None and norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        vars(norm)["forward"] = nn.Identity().forward


class Evaluator:
    """Prunes, refits and tests one network. Inputs are prepared once; Gram matrices gathered once.

    refit: of the policies that a search asks for, one of REFITS; UserError for any other.
    """

    def __init__(
        self,
        model: LoadedModel,
        graph: LayerGraph,
        task: Task,
        *,
        seed: int = 0,
        refit: str = REFITS[0],
        calibration_images: int = 2000,
    ) -> None:
        check_refit(refit)
        self.model, self.graph, self.task, self.seed = model, graph, task, seed
        self.calibration = task.inputs(min(calibration_images, max(50, REFIT_BYTES // _bytes_per_image(graph))))
        self.magnitudes = channel_magnitudes(model.module, graph)
        self.refit = refit

    @cached_property
    def grams(self) -> Grams:
        return gather_grams(self.model.module, self.graph, self._calibration(1000), seed=self.seed)

    def _calibration(self, limit: int) -> tuple[Tensor, ...]:
        return tuple(part[:limit] for part in self.calibration)

    def kept(self, widths: Sequence[int]) -> dict[str, np.ndarray]:
        """Group name -> indices of the channels that stay at `widths`, ascending."""
        return keep_channels(self.model.module, self.graph, widths, magnitudes=self.magnitudes)

    def val_accuracy(self, widths: Sequence[int]) -> float:
        """Held-out score after the refit of a search."""
        return self.judge(widths).score

    @cached_property
    def _unpruned(self) -> tuple[float, list[Tensor]]:
        """Its held-out score, and its outputs."""
        score, outputs = self.task.score_and_outputs(self.model.module)
        if not all(bool(torch.isfinite(each).all()) for each in outputs):
            raise UserError(f"{self.model.spec} gives numbers that are not finite: look at its weights and its inputs")
        return score, outputs

    @property
    def unpruned_score(self) -> float:
        """Held-out score of the network as it is; UserError where its outputs are no numbers."""
        return self._unpruned[0]

    def judge(self, widths: Sequence[int]) -> Judged:
        """Held-out score after the refit of a search, and how far the outputs are from the unpruned network's."""
        kept = self.kept(widths)
        small = slice_channels(self.model.module, self.graph, kept)
        if self.refit == "fast":
            refit_fast(small, self.model.module, self.graph, kept, self.grams)
        else:
            self._refit_faithful(small, kept, self._calibration(SEARCH_IMAGES), SEARCH_ROWS)
        if isinstance(self.task, Classification):  # a user's function gets the network as it is
            fold_batch_norms(small, self.graph)
        score, outputs = self.task.score_and_outputs(small)
        return Judged(score, distortion(outputs, self._unpruned[1]))

    def seconds(self, widths: Sequence[int], *, workers: int = 1) -> tuple[float, float]:
        """About how long a search with `workers` takes for one policy, and in the end for one candidate: measured on
        `widths`, with a worker's share of the threads."""

        def refit(images: int) -> None:
            kept = self.kept(widths)
            small = slice_channels(self.model.module, self.graph, kept)
            self._refit_faithful(small, kept, self._calibration(images), SEARCH_ROWS)

        refit(10)  # what runs for the first time takes longer
        _ = self._unpruned, self.grams if self.refit == "fast" else None
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        try:
            episode = _seconds_of(lambda: self.val_accuracy(widths), times=TIMED_EPISODES)
        finally:
            torch.set_num_threads(threads)
        score = _seconds_of(lambda: self.task.score(self.model.module))
        candidate = _seconds_of(lambda: refit(SEARCH_IMAGES)) * count_of(self.calibration) / SEARCH_IMAGES
        return episode / workers, candidate + 3 * score

    def _refit_faithful(self, small: nn.Module, kept: Kept, inputs: tuple[Tensor, ...], rows: int) -> None:
        refit_faithful(small, self.model.module, self.graph, kept, inputs, rows_per_layer=rows, seed=self.seed)

    @property
    def final_bytes(self) -> int:
        """Of memory that `final` takes, about."""
        return count_of(self.calibration) * _bytes_per_image(self.graph)

    def final(self, widths: Sequence[int]) -> nn.Module:
        """The pruned network after the faithful refit, batch-norm statistics re-estimated where that helps."""
        kept = self.kept(widths)
        small = slice_channels(self.model.module, self.graph, kept)
        self._refit_faithful(small, kept, self.calibration, FINAL_ROWS * count_of(self.calibration))
        if not any(isinstance(part, BATCH_NORMS) for part in small.modules()):
            return small
        before = self.task.score(small)
        statistics = copy.deepcopy(small.state_dict())  # with the versions of its modules
        reestimate_batch_norm(small, self.calibration)
        if self.task.score(small) < before:
            small.load_state_dict(statistics)
        return small


def _seconds_of(run: Callable[[], object], *, times: int = 1) -> float:
    """Median of `times` runs, of fewer where one takes longer than ENOUGH_SECONDS."""
    taken: list[float] = []
    while len(taken) < times and sum(taken) < ENOUGH_SECONDS:
        start = time.monotonic()
        run()
        taken.append(time.monotonic() - start)
    return median(taken)


def check_refit(refit: str) -> None:
    if refit not in REFITS:
        raise UserError(f"unknown --refit {refit!r}; known: {', '.join(REFITS)}")


CHANCE = 0.005  #: between two scores of a network, relative: more is not by rounding


def check_expected(found: float, expected: float | None) -> None:
    """UserError where the unpruned accuracy is off by more than a point: the normalisation or the data is wrong."""
    if expected is not None and found <= 1 < expected <= 100:
        raise UserError(f"--expect-accuracy {expected}: accuracies are fractions here, such as {expected / 100:g}")
    if expected is not None and not abs(found - expected) <= 0.01 + 1e-9:  # NaN fails this, too
        advice = "check normalisation and data"
        if found > expected:
            advice = "was it trained on these images? Put others aside (val/, or x_val and y_val)"
        raise UserError(f"the unpruned network scores {found:.4f}, --expect-accuracy says {expected}: {advice}")


def warn_of_chance(task: Task, module: nn.Module, unpruned: float) -> None:
    """A warning where a user's function scores the same network otherwise the next time."""
    if task.split == "evaluate" and abs((again := task.score(module)) - unpruned) > CHANCE * abs(unpruned):
        warnings.warn(
            f"the same network scored {unpruned:.4f}, then {again:.4f}: such scores do not tell policies apart (fix "
            "its order, seed and inputs)",
            stacklevel=2,
        )


def warn_of_guessing(task: Task, unpruned: float) -> None:
    """A warning where the unpruned network is no better than a guess."""
    if (reason := task.unlikely(unpruned)) is not None:
        warnings.warn(f"the unpruned accuracy is {unpruned:.4f}, {reason}", stacklevel=2)
