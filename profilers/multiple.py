"""The channel multiple of a device and its runtime, from a table: where latency steps or other widths cost more."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from profilers.ops import OpSpec
from profilers.table import LatencyTable

MULTIPLES = (1, 4, 8, 16, 32, 64)
POINTS = 12  #: of an operator, at least
GAIN = 0.1  #: what a multiple must explain, of the root mean square error left without one


def channel_multiple(table: LatencyTable) -> int | None:
    """The multiple of channels that explains the operators' latencies best; 1 where none does, None where the table
    holds too little to tell: few widths, or none off a multiple.

    Every operator's latency is fitted by non-negative parts in the widths as they are, in the widths padded to the
    multiple, and in a surcharge for widths off it; what is left, relative, is compared over all operators, each by what
    it takes.
    """
    families: dict[OpSpec, dict[tuple[int, ...], list[float]]] = {}
    for row in table.of_type("op"):
        if row.op is not None and row.op.macs:
            families.setdefault(row.op.family(), {}).setdefault(row.op.axes, []).append(row.median_ms)
    left, total = np.zeros(len(MULTIPLES)), 0.0
    for points in families.values():
        axes = np.array(list(points), float)
        if len(axes) < POINTS or (axes % MULTIPLES[2] == 0).all():
            continue
        latency_ms = np.array([np.median(ms) for ms in points.values()])
        share = float(latency_ms.mean())
        left += share * np.array([_left(axes, latency_ms, multiple) for multiple in MULTIPLES])
        total += share * len(axes)
    if not total:
        return None
    error = np.sqrt(left / total)
    best = int(error.argmin())
    return MULTIPLES[best] if error[best] < (1 - GAIN) * error[0] else 1


def _left(axes: np.ndarray, latency_ms: np.ndarray, multiple: int) -> float:
    """Sum of squared relative errors of the best fit, corrected for its free parts: the more, the better they fit
    noise."""
    columns = [np.ones(len(axes)), *axes.T, axes.prod(axis=1)]
    if multiple > 1:
        padded = np.ceil(axes / multiple) * multiple
        off = axes % multiple != 0
        columns += [*padded.T, padded.prod(axis=1), *off.T, *(off * axes).T, *(off.T * axes.prod(axis=1))]
    features = np.stack([np.asarray(column, float) for column in columns], axis=1) / latency_ms[:, None]
    scale = np.maximum(features.max(axis=0), 1e-12)
    solution, error = nnls(features / scale, np.ones(len(axes)))
    return float(error**2 * len(axes) / max(len(axes) - np.count_nonzero(solution), 1))
