"""The channel multiple of synthetic devices: it is found where there is one, and not read into smoothness or noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from profilers.multiple import POINTS, channel_multiple
from profilers.ops import OpSpec
from profilers.table import Identity, LatencyTable, Measurement

Latency = Callable[[OpSpec], float]


def spatial(c_in: int, c_out: int) -> OpSpec:
    return OpSpec("conv", (c_in,), 8, 8, c_out, kernel=(3, 3), padding=(1, 1))


def depthwise(channels: int) -> OpSpec:
    return OpSpec("depthwise_conv", (channels,), 8, 8, channels, kernel=(3, 3), padding=(1, 1), groups=channels)


def pooled(channels: int) -> OpSpec:
    return OpSpec("global_avg_pool", (channels,), 8, 8, channels)


def profiled() -> list[OpSpec]:
    """As a profile chooses them: half of the widths on multiples of 8, half on any from 13 to 128."""
    rng = np.random.default_rng(0)
    pairs = np.vstack([8 * rng.integers(2, 17, (40, 2)), rng.integers(13, 129, (40, 2))])
    widths = [*(8 * rng.permutation(np.arange(2, 17))[:10]), *rng.permutation(np.arange(13, 129))[:30]]
    return [spatial(int(a), int(b)) for a, b in pairs] + [depthwise(int(width)) for width in dict.fromkeys(widths)]


def smooth(op: OpSpec) -> float:
    return 0.01 + (1e-4 * op.in_channels[0] if op.kind == "conv" else 2e-3) * op.out_channels


def stepping(multiple: int) -> Latency:
    """Blocks of `multiple` channels cost as if they were full."""
    return lambda op: smooth(op.with_axes(-(-width // multiple) * multiple for width in op.axes))


def surcharging(multiple: int) -> Latency:
    """Outputs off the multiple take another path, 40% slower, however far off they are."""
    return lambda op: smooth(op) * (1.0 if op.out_channels % multiple == 0 else 1.4)


def table(ops: Sequence[OpSpec], latency_ms: Latency, *, noise: float = 0.0, seed: int = 0) -> LatencyTable:
    rng = np.random.default_rng(seed)
    rows = [Measurement("op", (latency_ms(op) * float(np.exp(noise * rng.standard_normal())),), op=op) for op in ops]
    return LatencyTable(Path("t.jsonl"), Identity("chip", "runtime", "1"), {}, rows)


@pytest.mark.parametrize("multiple", [4, 8, 16, 32])
@pytest.mark.parametrize("kind", [stepping, surcharging])
def test_the_multiple_of_a_device_is_found(kind: Callable[[int], Latency], multiple: int) -> None:
    assert channel_multiple(table(profiled(), kind(multiple))) == multiple


def test_a_smooth_device_has_none() -> None:
    assert channel_multiple(table(profiled(), smooth)) == 1


@pytest.mark.parametrize("seed", range(6))
def test_noise_of_two_percent_changes_no_answer(seed: int) -> None:
    for multiple in (4, 8, 16, 32):
        for kind in (stepping, surcharging):
            assert channel_multiple(table(profiled(), kind(multiple), noise=0.02, seed=seed)) == multiple
    assert channel_multiple(table(profiled(), smooth, noise=0.02, seed=seed)) == 1


def test_a_multiple_is_not_read_into_the_noise_of_few_points() -> None:
    few = profiled()[10:70]
    found = [channel_multiple(table(few, smooth, noise=0.02, seed=seed)) for seed in range(20)]
    assert found == [1] * 20


@pytest.mark.parametrize("kind", [stepping(16), surcharging(8), smooth])
def test_widths_on_multiples_of_8_alone_tell_nothing(kind: Latency) -> None:
    aligned = [op for op in profiled() if all(width % 8 == 0 for width in op.axes)]
    assert len(aligned) >= POINTS and channel_multiple(table(aligned, kind)) is None


def test_too_few_widths_tell_nothing() -> None:
    odd = [depthwise(width) for width in range(13, 13 + POINTS)]
    assert channel_multiple(table(odd, smooth)) == 1
    assert channel_multiple(table(odd[1:], smooth)) is None
    assert channel_multiple(table(odd[1:] * 3, smooth)) is None  # the same widths again are no more
    assert channel_multiple(table([], smooth)) is None


def test_operators_without_products_do_not_count() -> None:
    pools = [pooled(width) for width in range(13, 80)]
    assert channel_multiple(table(pools, stepping(32))) is None
    assert channel_multiple(table([*profiled(), *pools], lambda op: stepping(8 if op.macs else 32)(op))) == 8


def test_the_operators_that_take_the_time_decide() -> None:
    def latency_ms(op: OpSpec) -> float:
        return stepping(16)(op) if op.kind == "conv" else 1e-3 * stepping(4)(op)

    assert channel_multiple(table(profiled(), latency_ms)) == 16


def test_of_repeated_measurements_the_median_counts() -> None:
    ops = profiled()
    wild = table(ops, lambda op: 5 * smooth(op) if op.axes[0] % 4 else 0.2 * smooth(op))
    steady = table(ops, stepping(8)).rows + table(ops, stepping(8)).rows
    wild.rows += steady
    assert channel_multiple(wild) == 8
