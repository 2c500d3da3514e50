"""What ONNX Runtime's profiler says of operators: profiles written here, of kernels whose times are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers.runtimes.ort import WARM_RUNS, node_ms

INSIDE_US, BETWEEN_US = 1.37, 2.21  #: what the profiler adds to a kernel's own time, and takes between two


def profile(
    kernels: Sequence[tuple[str, str, float]], runs: int = 400, *, slow: Mapping[int, float] | None = None
) -> list[dict[str, Any]]:
    """Events of `runs` runs after the warm-up, cut to whole microseconds as the profiler does.

    kernels: name, operator and microseconds of each; slow: how many times longer some runs take.
    """
    rng, now = np.random.default_rng(0), 0.0
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9}]
    for run in range(-WARM_RUNS, runs):
        begun = now = now + float(rng.uniform(5, 50))
        factor = 5.0 if run < 0 else (slow or {}).get(run, 1.0)
        for name, kind, us in kernels:
            dur = us * factor + INSIDE_US
            event = {"cat": "Node", "name": f"{name}_kernel_time", "ts": int(now), "dur": int(dur)}
            events.append(event | {"args": {"op_name": kind}})
            now += dur + BETWEEN_US
        events.append(
            {"cat": "Session", "name": "SequentialExecutor::Execute", "ts": int(begun), "dur": int(now - begun)}
        )
        events.append({"cat": "Session", "name": "model_run", "ts": int(begun), "dur": int(now - begun)})
    return events


def read(kernels: Sequence[tuple[str, str, float]], names: set[str], **options: Any) -> dict[str, float]:
    """Microseconds of every node."""
    found = node_ms(profile(kernels, **options), names, sum(us for *_, us in kernels))
    return {name: 1e3 * ms for name, ms in found.items()}


def convs(truth: Mapping[str, float]) -> list[tuple[str, str, float]]:
    return [(name, "Conv", us) for name, us in truth.items()]


def check(found: Mapping[str, float], truth: Mapping[str, float]) -> None:
    """All but the last, whose end is known to a microsecond; what that leaves open is shared by all."""
    *names, last = truth
    apart = {name: found[name] - found[names[0]] for name in names}
    assert apart == pytest.approx({name: truth[name] - truth[names[0]] for name in names}, abs=0.2)
    assert found[last] == pytest.approx(truth[last], abs=1.0)
    assert sum(found.values()) == pytest.approx(sum(truth.values()))


@settings(max_examples=25)
@given(times_us=st.lists(st.floats(1.0, 30.0), min_size=2, max_size=12))
def test_kernels_are_told_apart_that_differ_by_less_than_a_microsecond(times_us: list[float]) -> None:
    truth = {f"node{index}": us for index, us in enumerate(times_us)}
    check(read(convs(truth), set(truth)), truth)


def test_reorders_are_charged_to_the_node_they_serve() -> None:
    kernels = [
        ("ReorderInput", "ReorderInput", 2.5),
        ("first_nchwc", "Conv", 4.2),
        ("ReorderOutput", "ReorderOutput", 1.1),
        ("ReorderInput_token_7", "ReorderInput", 0.8),
        ("fused second/product", "FusedConv", 3.4),
        ("second/shape", "Reshape", 0.6),
        ("ReorderOutput_token_9", "ReorderOutput", 0.9),
    ]
    truth = {"first": 2.5 + 4.2 + 1.1, "second": 0.8 + 3.4 + 0.6 + 0.9}
    assert read(kernels, set(truth)) == pytest.approx(truth, abs=0.3)


def test_runs_that_were_disturbed_and_the_warm_up_do_not_count() -> None:
    truth = {"one": 3.3, "two": 7.9, "three": 7.5, "four": 2.0}
    slow = {run: 3.0 for run in range(0, 400, 3)}
    check(read(convs(truth), set(truth), slow=slow), truth)


def test_a_machine_that_is_slower_under_the_profiler_costs_the_short_kernels_little() -> None:
    truth = {"one": 100.0, "two": 200.0, "short": 8.0, "three": 150.0, "four": 50.0}
    found = read(convs(truth), set(truth), slow=dict.fromkeys(range(400), 1.1))
    drifted = {name: 1.1 * us for name, us in truth.items()}
    assert found == pytest.approx(drifted, rel=0.3)
    assert {**found, "short": drifted["short"]} == pytest.approx(drifted, rel=0.04)


def test_no_node_is_free_even_where_the_profiler_took_more_than_it() -> None:
    found = node_ms(profile([("one", "Conv", 0.1), ("two", "Conv", 9.0)]), {"one", "two"}, 5.0)
    assert 0 < found["one"] < 1e-5
    assert found["two"] == pytest.approx(9e-3, rel=0.15)


def test_a_network_of_one_operator_takes_what_it_takes_alone() -> None:
    assert read([("one", "Conv", 4.4)], {"one"}) == pytest.approx({"one": 4.4})
