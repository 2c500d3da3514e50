"""Timing on a fake clock: visits, what counts, when a machine is refused, and what a spread and an interval are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers.errors import DeviceError
from profilers.timing import (
    LOADS,
    MOST_LOADS,
    Steady,
    TimingPlan,
    loaded_anew,
    median_half_width,
    ratio_ci95,
    refuse_noise,
    spread_pct,
    time_interleaved,
)

PLAN = TimingPlan(rounds=6, burst_s=0.02, min_runs=3, max_runs=8, warmup_runs=2)


class Machine:
    """A clock that only running models moves, and a log of what ran."""

    def __init__(self) -> None:
        self.now, self.log = 100.0, ""

    def clock(self) -> float:
        return self.now

    def model(self, name: str, ms: Callable[[int], float]) -> Callable[[], None]:
        """ms(n): what the model's n-th run takes; n counts from 0 again whenever another model ran in between."""
        in_a_row = 0

        def run() -> None:
            nonlocal in_a_row
            in_a_row = in_a_row + 1 if self.log.endswith(name) else 0
            self.log += name
            self.now += ms(in_a_row) / 1e3

        return run


def visits(log: str) -> str:
    """The models in order, one letter per visit; two visits in a row to one model count as one."""
    return "".join(name for index, name in enumerate(log) if index == 0 or log[index - 1] != name)


# Interleaving


def test_every_model_gets_one_sample_of_its_own_latency_per_round() -> None:
    machine = Machine()
    models = [machine.model("a", lambda _: 2.0), machine.model("b", lambda _: 5.0)]
    first, second = time_interleaved(models, PLAN, clock=machine.clock)
    assert first == pytest.approx([2.0] * 6)
    assert second == pytest.approx([5.0] * 6)


def test_warmup_and_the_first_run_of_a_visit_are_not_counted() -> None:
    machine = Machine()
    cold = machine.model("a", lambda run: 1.0 if run else 50.0)  # its data has left the caches when another ran
    other = machine.model("b", lambda _: 3.0)
    plan = TimingPlan(rounds=6, burst_s=0.0, min_runs=1, warmup_runs=2)
    assert time_interleaved([cold, other], plan, clock=machine.clock)[0] == pytest.approx([1.0] * 6)
    assert machine.log.startswith("aabb")
    assert len(machine.log) == 2 * (2 + 6 * 2)  # of both: two to warm up, then one uncounted and one counted a round


def test_a_sample_is_the_median_of_its_burst() -> None:
    machine = Machine()
    durations = [9.0, 1.0, 2.0, 30.0]  # the first is not counted
    plan = TimingPlan(rounds=1, burst_s=0.0, min_runs=3, warmup_runs=0)
    assert time_interleaved([machine.model("a", durations.__getitem__)], plan, clock=machine.clock) == [
        [pytest.approx(2.0)]
    ]


@pytest.mark.parametrize(
    ("ms", "counted"),
    [
        (15.0, 3),  # one run fills most of the burst: still min_runs of them
        (4.5, 5),  # as many as it takes to reach 20 ms
        (0.001, 8),  # at most max_runs
        (0.0, 8),
    ],
)
def test_a_burst_lasts_its_time_within_the_limits_on_runs(ms: float, counted: int) -> None:
    machine = Machine()
    time_interleaved([machine.model("a", lambda _: ms)], PLAN, clock=machine.clock)
    assert len(machine.log) == PLAN.warmup_runs + PLAN.rounds * (1 + counted)


def log_of(names: str, seed: int) -> str:
    machine = Machine()
    plan = TimingPlan(rounds=6, burst_s=0.0, min_runs=1, warmup_runs=0)
    time_interleaved([machine.model(name, lambda _: 1.0) for name in names], plan, seed=seed, clock=machine.clock)
    return machine.log


@given(count=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_every_round_visits_every_model_once(count: int, seed: int) -> None:
    names = "abcdef"[:count]
    log = log_of(names, seed)[::2]  # a visit is one uncounted and one counted run here
    rounds = [log[start : start + count] for start in range(0, len(log), count)]
    assert ["".join(sorted(one)) for one in rounds] == [names] * 6


def test_the_order_of_a_round_is_random_and_follows_from_the_seed() -> None:
    log = log_of("abcdef", 0)[::2]
    assert len({log[start : start + 6] for start in range(0, 36, 6)}) > 3
    assert visits(log_of("abcdef", 0)) == visits(log_of("abcdef", 0)) != visits(log_of("abcdef", 1))


def test_nothing_to_time_gives_nothing() -> None:
    assert time_interleaved([], PLAN) == []


# A machine that is disturbed


class Anchor:
    """Measures an anchor that takes the given milliseconds, one after another, beside a network that takes twice."""

    def __init__(self, *anchor_ms: float) -> None:
        self.left = list(anchor_ms)

    def __call__(self) -> list[list[float]]:
        ms = self.left.pop(0)
        return [[ms, ms, 100 * ms], [2 * ms]]  # an outlier does not disturb


def test_a_steady_machine_is_measured_once_and_never_waited_for() -> None:
    slept: list[float] = []
    measure = Anchor(1.0, 1.0)
    assert Steady(0.95, sleep=slept.append)(measure) == [[1.0, 1.0, 100.0], [2.0]]  # within ten percent
    assert (measure.left, slept) == ([1.0], [])


def test_a_disturbed_machine_is_measured_again_after_growing_waits() -> None:
    slept: list[float] = []
    measure = Anchor(1.3, 1.2, 1.05, 1.0)
    with pytest.warns(UserWarning) as said:
        samples = Steady(1.0, sleep=slept.append)(measure)
    assert samples == [[1.05, 1.05, 105.0], [2.1]]
    assert measure.left == [1.0]
    assert slept == [2.0, 5.0]
    assert [str(one.message) for one in said] == [
        "the machine is disturbed (the unpruned network takes 1.3 ms, not 1): measuring again in 2 s",
        "the machine is disturbed (the unpruned network takes 1.2 ms, not 1): measuring again in 5 s",
    ]


@pytest.mark.filterwarnings("ignore:the machine is disturbed")
def test_a_machine_that_does_not_settle_is_given_up() -> None:
    slept: list[float] = []
    with pytest.raises(DeviceError, match=r"too unstable: the unpruned network takes 1\.5 ms, not 1; stop other"):
        Steady(1.0, sleep=slept.append)(Anchor(*[1.5] * 20))
    assert len(slept) > 2
    assert slept == list(Steady.WAITS_S[: len(slept)])
    assert DeviceError.exit_code == 3


def test_samples_that_spread_too_far_are_measured_again() -> None:
    left, slept = [[1.0, 2.0, 3.0], [1.0, 1.1, 1.2]], list[float]()

    def measure() -> list[list[float]]:
        samples = left.pop(0)
        refuse_noise(samples, 25.0)
        return [samples]

    with pytest.warns(UserWarning, match=r"disturbed \(samples spread by 50% \(limit 25%\)\): measuring again in 2 s"):
        assert Steady(1.1, sleep=slept.append)(measure) == [[1.0, 1.1, 1.2]]
    assert slept == [2.0] and not left


@pytest.mark.filterwarnings("ignore:the machine is disturbed")
def test_every_wait_is_followed_by_a_measurement() -> None:
    events = ""

    def measure() -> list[list[float]]:
        nonlocal events
        events += "m"
        return [[1.5]]

    def sleep(_: float) -> None:
        nonlocal events
        events += "s"

    with pytest.raises(DeviceError):
        Steady(1.0, sleep=sleep)(measure)
    assert events.endswith("m")


def test_without_a_reference_the_median_anchor_so_far_is_it() -> None:
    """One fast moment does not make the usual speed a disturbance."""
    slept: list[float] = []
    steady = Steady(sleep=slept.append)
    for each in (1.0, 1.09, 0.8, 1.05):
        assert steady(Anchor(each))[0][0] == each
    assert slept == []
    with pytest.warns(UserWarning, match=r"takes 1\.3 ms, not 1\.05"):
        assert steady(Anchor(1.3, 1.1))[0][0] == 1.1
    assert slept == [2.0]


def test_a_reference_that_was_given_stays() -> None:
    slept: list[float] = []
    steady = Steady(1.0, sleep=slept.append)
    steady(Anchor(0.5))
    assert steady(Anchor(1.05))[0][0] == 1.05
    assert slept == []


# Loads


@pytest.mark.parametrize(
    ("slow", "loads"),
    [
        ((1.0, 1.0), LOADS),
        ((1.0, 1.3, 1.0, 1.0), MOST_LOADS),
        ((1.3, 1.0, 1.0, 1.0), MOST_LOADS),
        ((1.0, 1.015, 1.0), LOADS),
    ],
)
def test_networks_are_loaded_again_while_loads_differ(slow: tuple[float, ...], loads: int) -> None:
    """slow: by load, of the second of two networks beside the anchor."""
    asked: list[int] = []

    def measure(load: int) -> list[list[float]]:
        asked.append(load)
        drift = 1 + load  # alike for all
        return [[4.0 * drift] * 9, [1.0 * drift] * 9, [2.0 * drift * slow[load]] * 9]

    anchor, first, second = map(np.array, loaded_anew(measure))
    assert asked == list(range(loads)) and len(anchor) == len(first) == len(second) == 9 * loads
    assert np.all(first / anchor == 0.25)
    assert np.median(second / anchor) == pytest.approx(0.5, rel=0.01)


def test_what_is_reported_is_loaded_again_sooner() -> None:
    """Two loads that differ by a little tell less of a third one than their standard error says."""
    asked: list[int] = []

    def measure(load: int) -> list[list[float]]:
        asked.append(load)
        return [[4.0] * 9, [2.0 * (1, 1.004, 1, 1.004)[load]] * 9]

    loaded_anew(measure)
    assert asked == [0, 1]
    loaded_anew(measure, stated=True)
    assert asked == [0, 1, 0, 1, 2]


def test_rounds_that_spread_are_no_steadier_for_loads_alike() -> None:
    wide = [1.0, 1.2, 1.4] * 3
    assert len(loaded_anew(lambda load: [[1.0] * 9, wide])[1]) == 9 * MOST_LOADS
    narrow = [1.4, 1.401, 1.402] * 3
    assert len(loaded_anew(lambda load: [[1.0] * 9, narrow])[1]) == 9 * LOADS


def test_loads_are_as_many_as_asked_for_at_least() -> None:
    samples = [[1.0] * 3, [2.0] * 3]
    assert [len(each) for each in loaded_anew(lambda _load: samples, loads=6)] == [18, 18]
    assert loaded_anew(lambda _load: samples[:1]) == [[1.0] * 3 * LOADS]


# Spread and ratio

LATENCIES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def test_the_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread_pct([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx(100 * (4 - 2) / 3)
    assert spread_pct([2.0]) == 0.0
    assert spread_pct([1.0] * 9 + [50.0]) == 0.0  # one outlier is no spread


@given(samples=LATENCIES, factor=st.floats(0.01, 100))
def test_the_spread_does_not_depend_on_the_unit(samples: list[float], factor: float) -> None:
    assert spread_pct([factor * ms for ms in samples]) == pytest.approx(spread_pct(samples), rel=1e-6, abs=1e-6)


def test_noise_is_refused_above_the_limit_only() -> None:
    samples = [1.0, 2.0, 3.0, 4.0, 5.0]
    refuse_noise(samples, 67.0)
    with pytest.raises(DeviceError, match=r"samples spread by 67% \(limit 66%\); stop other programs"):
        refuse_noise(samples, 66.0)


def test_steady_latencies_have_one_ratio() -> None:
    assert ratio_ci95([2.0] * 7, [5.0] * 7, per_load=7) == (2.5, 2.5)


@given(drift=LATENCIES)
def test_drift_that_is_alike_for_both_cancels_in_the_ratio(drift: list[float]) -> None:
    low, high = ratio_ci95(drift, [3 * ms for ms in drift], per_load=len(drift))
    assert low == pytest.approx(3.0)
    assert high == pytest.approx(3.0)


def test_the_interval_holds_the_ratio_of_the_medians_and_narrows_with_samples() -> None:
    rng = np.random.default_rng(0)
    pruned, baseline = 2.0 + rng.normal(0, 0.1, 400), 5.0 + rng.normal(0, 0.2, 400)
    low, high = ratio_ci95(list(pruned), list(baseline), per_load=400)
    assert low < np.median(baseline) / np.median(pruned) < high
    assert 2.4 < low < high < 2.6
    few_low, few_high = ratio_ci95(list(pruned[:20]), list(baseline[:20]), per_load=20)
    assert high - low < 0.6 * (few_high - few_low)
    assert ratio_ci95(list(pruned), list(baseline), per_load=400) == (low, high)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.05])
def test_the_interval_of_a_speedup_holds_the_true_one_however_much_loads_differ(spread: float) -> None:
    """spread: standard deviation of what one load does to a network, which no round of it shows."""
    rng = np.random.default_rng(1)

    def measure(load: int) -> list[list[float]]:
        return [
            list(ms * (1 + spread * rng.standard_normal()) * (1 + 0.02 * rng.standard_normal(25))) for ms in (1.0, 0.5)
        ]

    inside = []
    for _ in range(300):
        baseline, pruned = loaded_anew(measure, stated=True)
        low, high = ratio_ci95(pruned, baseline, per_load=25)
        inside.append(low <= 2.0 <= high)
    assert 0.9 < np.mean(inside) < 0.995


def test_the_interval_of_a_median_holds_the_true_one_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(10.0, 1.0, (2000, 25))
    inside = [abs(np.median(draw) - 10.0) <= median_half_width(draw) * np.median(draw) for draw in draws]
    assert 0.9 < np.mean(inside) < 0.98
    assert median_half_width([3.0] * 9) == 0.0
    assert median_half_width(np.tile(draws[0], 4)) == pytest.approx(median_half_width(draws[0]) / 2, rel=0.1)
