"""Policies scored in processes beside the search: the same refit and the same score, several at once.

A worker builds the network from its spec and takes over the parent's weights, so that what a search was given in memory
is what is scored.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amc_hw.errors import FailedError, UserError
from amc_hw.evaluate import Evaluator
from amc_hw.graph import build_graph
from amc_hw.models import load_model
from amc_hw.policy import Policy
from amc_hw.prune import slice_channels
from amc_hw.subject import Subject
from amc_hw.task import load_task

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """What a worker needs for an `Evaluator` like the parent's. normalisation: mean and deviation. state: of the
    network that a search begins with; base: the policy that this was pruned by before; task, options: keywords of
    `load_task` and `Evaluator`."""

    spec: str
    input_shape: tuple[int, ...]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    keep: tuple[str, ...]
    base: Policy | None
    state: dict[str, torch.Tensor]
    task: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, subject: Subject, task: dict[str, Any], **options: Any) -> Recipe:
        model = subject.model
        network = model.found, model.input_shape, (model.mean, model.std)
        return cls(*network, subject.keep, subject.base, model.module.state_dict(), task, options)

    def evaluator(self) -> Evaluator:
        keep = self.keep if self.base is None else self.base.keep
        model = load_model(self.spec, input_shape=self.input_shape)  # the parent has checked what is read of it
        graph = build_graph(model.module, model.input_shape, examples=model.example_inputs, keep=keep)
        if self.base is not None:
            model = replace(model, module=slice_channels(model.module, graph, self.base.kept_arrays()))
            graph = build_graph(model.module, model.input_shape, examples=model.example_inputs, keep=self.keep)
        model = replace(model, mean=self.normalisation[0], std=self.normalisation[1], assumed=())
        model.module.load_state_dict(self.state)
        model.module.eval()
        task = load_task(model, **self.task)
        return Evaluator(model, graph, task, **self.options)


def _refitted(evaluator: Evaluator, widths: Widths) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in evaluator.final(widths).state_dict().items()}


#: What a worker can be asked of a policy: what `Evaluator.judge` says; the state dict of `Evaluator.final`, as arrays;
#: the score on the test split after it.
WORK: dict[str, Callable[[Evaluator, Widths], Any]] = {
    "judge": lambda evaluator, widths: evaluator.judge(widths),
    "final": _refitted,
    "test": lambda evaluator, widths: evaluator.task.test_scores([evaluator.final(widths)])[0],
}


def free_memory() -> int:
    """Bytes that further work may take, as Linux tells; 0 where nothing does."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return 0


class Workers:
    """`count` processes that refit and score policies.

    `ahead` asks for some, calling gives one of them, computed or awaited. Which worker scores a policy, and when, does
    not change its score. Use as a context: on leaving, what was asked for in vain is given up, except for
    the policies that are being scored.
    """

    def __init__(self, count: int, recipe: Recipe) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker imports the script that made it
            raise UserError(GUARD)
        self._count, self._recipe, self._worked = count, recipe, False
        self._made: ProcessPoolExecutor | None = None
        self._asked: dict[tuple[Widths, str], Future[Any]] = {}

    def _submitted(self, widths: Widths, work: str) -> Future[Any]:
        """Processes are made when there is something to score, deaf to a terminal's interrupt, which they inherit: the
        parent ends them."""
        if self._made is None:
            self._made = ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("spawn"),  # a forked process hangs in torch's threads
                initializer=_begin,
                initargs=(self._recipe, max(1, torch.get_num_threads() // self._count)),
            )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self._made.submit(_score, widths, work)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._made is not None:
            self._made.shutdown(cancel_futures=True)

    def ahead(self, policies: Sequence[Widths], work: str = "judge") -> None:
        """Begin with policies that will be asked for. work: of WORK."""
        for widths in policies:
            if not self.begun(widths, work):
                try:
                    self._asked[widths, work] = self._submitted(widths, work)
                except BrokenProcessPool:
                    raise self._lost() from None

    def begun(self, widths: Widths, work: str = "judge") -> bool:
        """Whether a policy was announced, and not taken yet."""
        return (widths, work) in self._asked

    def __call__(self, widths: Widths, work: str = "judge") -> Any:
        """What WORK says of a policy."""
        self.ahead([widths], work)
        try:
            found = self._asked.pop((widths, work)).result()
        except BrokenProcessPool:
            raise self._lost() from None
        self._worked = True
        return found

    def _lost(self) -> FailedError:
        script = getattr(sys.modules["__main__"], "__spec__", None) is None and sys.argv[0].endswith(".py")
        return FailedError(f"{LOST}; or {GUARD}" if script and not self._worked else LOST)


GUARD = 'a script that asks for workers is imported by them: put what it does under if __name__ == "__main__":'
LOST = (
    "a worker process ended (out of memory?): run the same command again, it goes on; fewer --workers need less memory"
)

_recipe: Recipe | None = None
_evaluator: Evaluator | None = None


def _begin(recipe: Recipe, threads: int) -> None:
    global _recipe
    sys.stdout = sys.stderr  # as in the parent, standard output holds its result alone
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _recipe = recipe


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score(widths: Widths, work: str) -> Any:
    """Here and not in `_begin`, whose errors would not reach the parent: the evaluator is built once."""
    global _evaluator
    if _evaluator is None:
        assert _recipe is not None
        _evaluator = _recipe.evaluator()
    return WORK[work](_evaluator, widths)
