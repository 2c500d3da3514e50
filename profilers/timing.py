"""How to time honestly: warm-up, several models interleaved in random order, medians with a spread.

Interleaving puts drift of the machine on every model alike, so that ratios within one call hold although
absolute times wander.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from profilers.errors import DeviceError, UnsteadyError

Clock = Callable[[], float]
PRECISION, MOST_LOADS = 0.01, 4
LOADS = 2  #: at least, of networks whose latency counts


@dataclass(frozen=True)
class TimingPlan:
    """rounds: how often every model is visited; burst_s: how long one visit times it; min_runs: in one visit."""

    rounds: int = 15
    burst_s: float = 0.02
    min_runs: int = 3
    max_runs: int = 200
    warmup_runs: int = 3


def time_interleaved(
    runs: Sequence[Callable[[], None]],
    plan: TimingPlan,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Milliseconds of one run, per model: one sample (the median of a burst) for every round.

    runs[i]() executes model i once. In every round each model is visited once, in random order; the first
    run of a visit brings its data back into the caches and is not counted.
    """
    rng = np.random.default_rng(seed)
    samples: list[list[float]] = [[] for _ in runs]
    for run in runs:
        for _ in range(plan.warmup_runs):
            run()
    for _ in range(plan.rounds):
        for index in rng.permutation(len(runs)):
            samples[index].append(_burst(runs[index], plan, clock))
    return samples


def _burst(run: Callable[[], None], plan: TimingPlan, clock: Clock) -> float:
    run()
    elapsed: list[float] = []
    end = clock() + plan.burst_s
    while len(elapsed) < plan.min_runs or (clock() < end and len(elapsed) < plan.max_runs):
        start = clock()
        run()
        elapsed.append(clock() - start)
    return float(np.median(elapsed)) * 1e3


class Steady:
    """Measures beside an anchor, and again where the anchor was far slower than it should be or samples spread too far.

    Dividing by the anchor takes out drift that is alike for all; a machine that is disturbed slows small operators
    more than large ones, so ratios shift, too.

    reference_ms: the anchor's latency on the machine at rest; None: the median of those seen so far.
    """

    LIMIT_PCT = 10.0
    WAITS_S = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0)

    def __init__(self, reference_ms: float | None = None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._reference_ms, self._sleep = reference_ms, sleep
        self._seen: list[float] = []

    def __call__(self, measure: Callable[[], list[list[float]]]) -> list[list[float]]:
        """The samples that `measure` returns, the anchor's first; DeviceError where the machine does not settle."""
        for wait_s in (*self.WAITS_S, None):
            try:
                samples = measure()
            except UnsteadyError as error:
                what = error.what
            else:
                anchor_ms = float(np.median(samples[0]))
                self._seen.append(anchor_ms)
                reference_ms = self._reference_ms or float(np.median(self._seen))
                if anchor_ms <= reference_ms * (1 + self.LIMIT_PCT / 100):
                    return samples
                what = f"the unpruned network takes {anchor_ms:.4g} ms, not {reference_ms:.4g}"
            if wait_s is not None:
                warnings.warn(f"the machine is disturbed ({what}): measuring again in {wait_s:.0f} s", stacklevel=2)
                self._sleep(wait_s)
        raise DeviceError(
            f"the machine is too unstable: {what}; stop other programs and run the same command again, or measure "
            "the table anew where the machine has changed for good"
        )


def loaded_anew(
    measure: Callable[[int], list[list[float]]],
    *,
    loads: int = LOADS,
    precision: float = PRECISION,
    stated: bool = False,
) -> list[list[float]]:
    """Samples in milliseconds of several measurements together, the anchor's first. Each of them loads the networks
    anew, which may lay them out in memory better or worse: now and then one runs slower by 5 to 30% for as long as it
    stays loaded.

    measure: number of the load -> samples, the anchor's first, all alike in number. loads: at least, and MOST_LOADS at
    most, until the share of the anchor's latency is known to `precision` for every network, relative: half of the 95%
    interval of rounds, and the standard error of loads. stated: half of a 95% interval of loads, too, for what is
    reported with one.
    """
    found: list[list[list[float]]] = []
    for load in range(max(loads, MOST_LOADS)):
        found.append(measure(load))
        shares = zip(*([np.divide(samples, anchor) for samples in rest] for anchor, *rest in found), strict=True)
        if load + 1 >= loads and all(_uncertainty(share, stated=stated) <= precision for share in shares):
            break
    return [[ms for samples in each for ms in samples] for each in zip(*found, strict=True)]


def _uncertainty(loads: Sequence[np.ndarray], *, stated: bool) -> float:
    """How far the median of samples may be off, relative: within loads, or because loads differ."""
    by_load = [float(np.log(np.median(samples))) for samples in loads]
    between = 0.0  # a single load tells nothing of it
    if len(loads) > 1:
        between = mean_half_width(by_load) if stated else _standard_error(by_load)
    return max(median_half_width(np.concatenate(loads)), between)


def _standard_error(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def mean_half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half of the 95% interval of the mean of independent values (N,), N > 1, by Student's t."""
    from scipy.special import stdtrit  # not for a process that only times

    return float(stdtrit(len(values) - 1, 0.975)) * _standard_error(values)


def spread_pct(samples_ms: Sequence[float]) -> float:
    """Interquartile range over the median, in percent."""
    low, middle, high = np.percentile(samples_ms, (25, 50, 75))
    return float((high - low) / middle * 100)


def median_half_width(samples: Sequence[float] | np.ndarray) -> float:
    """Half of the 95% interval of the median, relative to it, by the interquartile range: that of normal samples."""
    low, middle, high = np.percentile(samples, (25, 50, 75))
    return float(1.82 * (high - low) / middle / math.sqrt(len(samples)))


def refuse_noise(samples_ms: Sequence[float], limit_pct: float) -> None:
    """UnsteadyError where the samples spread too far to mean anything."""
    spread = spread_pct(samples_ms)
    if spread > limit_pct:
        raise UnsteadyError(f"samples spread by {spread:.0f}% (limit {limit_pct:.0f}%)")


def ratio_ci95(
    pruned_ms: Sequence[float], baseline_ms: Sequence[float], *, per_load: int, seed: int = 0
) -> tuple[float, float]:
    """95% interval of median(baseline) / median(pruned), samples paired by round, `per_load` of one load after another:
    that of a bootstrap over rounds, or wider, by Student's t, where the ratios of loads differ by more."""
    rng = np.random.default_rng(seed)
    pruned, baseline = np.asarray(pruned_ms), np.asarray(baseline_ms)
    picks = rng.integers(0, len(pruned), (2000, len(pruned)))
    ratios = np.median(baseline[picks], axis=1) / np.median(pruned[picks], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    loads = [slice(start, start + per_load) for start in range(0, len(pruned), per_load)]
    by_load = [float(np.log(np.median(baseline[load]) / np.median(pruned[load]))) for load in loads]
    if len(by_load) > 1:
        middle = np.median(baseline) / np.median(pruned)
        factor = math.exp(mean_half_width(by_load))
        low, high = min(low, middle / factor), max(high, middle * factor)
    return float(low), float(high)
