"""Accuracy of a pruned network: on held-out training data while searching, on the test split once at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from amc_hw.data import Splits, load_tensors
from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph
from amc_hw.models import LoadedModel
from amc_hw.prune import Kept, channel_magnitudes, keep_channels, slice_channels
from amc_hw.refit import Grams, gather_grams, reestimate_batch_norm, refit_faithful, refit_fast

REFIT_BYTES = 4_000_000_000
REFITS = ("faithful", "fast")
#: Of the faithful refit inside a search; they rank policies nearly as 500 images do (docs/decisions/0005).
SEARCH_IMAGES, SEARCH_ROWS = 100, 3000
FINAL_IMAGES, FINAL_BYTES = 5000, 1_000_000_000  #: held-out images that candidates are compared on, at most


def accuracy(module: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 250) -> float:
    """Fraction of `images` (N, C, H, W) whose largest output is the label (N,)."""
    right = 0
    with torch.inference_mode():
        for chunk, wanted in zip(images.split(batch), labels.split(batch), strict=True):
            right += int((module(chunk).argmax(1) == wanted).sum())
    return right / len(images)


def _images_in_memory(graph: LayerGraph) -> int:
    """Images whose largest values the lock-step refit can hold: about six of them in both networks together."""
    largest = max(op.out_channels * op.out_height * op.out_width for op in graph.op_graph().ops)
    return max(50, REFIT_BYTES // (6 * 4 * largest))


class Evaluator:
    """Prunes, refits and tests one network. Images are decoded and normalised once; Gram matrices gathered once.

    refit: of the policies that a search asks for, one of REFITS; UserError for any other.
    """

    def __init__(
        self,
        model: LoadedModel,
        graph: LayerGraph,
        splits: Splits,
        *,
        seed: int = 0,
        refit: str = REFITS[0],
        calibration_images: int = 2000,
        val_images: int = 1000,
    ) -> None:
        check_refit(refit)
        self.model, self.graph, self.splits, self.seed = model, graph, splits, seed
        self.calibration, _ = self._images(splits.train, min(calibration_images, _images_in_memory(graph)))
        self.val = self._images(splits.val, val_images)
        self.magnitudes = channel_magnitudes(model.module, graph)
        self.refit = refit

    @cached_property
    def grams(self) -> Grams:
        return gather_grams(self.model.module, self.graph, self.calibration[:1000], seed=self.seed)

    def _images(self, split: torch.utils.data.Dataset, limit: int | None) -> tuple[Tensor, Tensor]:
        images, labels = load_tensors(split, limit=limit, seed=self.seed)
        return self.model.normalised(images), labels

    def kept(self, widths: Sequence[int]) -> dict[str, np.ndarray]:
        """Group name -> indices of the channels that stay at `widths`, ascending."""
        return keep_channels(self.model.module, self.graph, widths, magnitudes=self.magnitudes)

    def val_accuracy(self, widths: Sequence[int]) -> float:
        """Held-out accuracy after the refit of a search."""
        kept = self.kept(widths)
        small = slice_channels(self.model.module, self.graph, kept)
        if self.refit == "fast":
            refit_fast(small, self.model.module, self.graph, kept, self.grams)
        else:
            self._refit_faithful(small, kept, self.calibration[:SEARCH_IMAGES], SEARCH_ROWS)
        return accuracy(small, *self.val)

    def _refit_faithful(self, small: nn.Module, kept: Kept, images: Tensor, rows: int) -> None:
        refit_faithful(small, self.model.module, self.graph, kept, images, rows_per_layer=rows, seed=self.seed)

    def final_accuracy(self, module: nn.Module) -> float:
        """Held-out accuracy on more images than an episode's: candidates that are close are told apart."""
        return accuracy(module, *self._final_val)

    @cached_property
    def _final_val(self) -> tuple[Tensor, Tensor]:
        each = 4 * math.prod(self.model.input_shape)
        return self._images(self.splits.val, min(FINAL_IMAGES, max(len(self.val[0]), FINAL_BYTES // each)))

    def final(self, widths: Sequence[int]) -> nn.Module:
        """The pruned network after the faithful refit, batch-norm statistics re-estimated where that helps."""
        kept = self.kept(widths)
        small = slice_channels(self.model.module, self.graph, kept)
        self._refit_faithful(small, kept, self.calibration, 60_000)
        before = accuracy(small, *self.val)
        statistics = {name: value.clone() for name, value in small.state_dict().items()}
        reestimate_batch_norm(small, self.calibration)
        if accuracy(small, *self.val) < before:
            small.load_state_dict(statistics)
        return small

    def test_accuracy(self, modules: Sequence[nn.Module]) -> list[float]:
        """Accuracy of each module on the whole test split, read once."""
        images, labels = self._images(self.splits.test, None)
        return [accuracy(module, images, labels) for module in modules]


def check_refit(refit: str) -> None:
    if refit not in REFITS:
        raise UserError(f"unknown --refit {refit!r}; known: {', '.join(REFITS)}")


def check_expected(found: float, expected: float | None) -> None:
    """UserError where the unpruned accuracy is off by more than a point: the normalisation or the data is wrong."""
    if expected is not None and not abs(found - expected) <= 0.01 + 1e-9:  # NaN fails this, too
        raise UserError(
            f"the unpruned accuracy is {found:.4f}, --expect-accuracy says {expected}: check normalisation and labels"
        )
