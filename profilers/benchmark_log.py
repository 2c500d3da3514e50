"""What a log of TFLite's `benchmark_model` says: the timed runs, and the operators where it profiled them.

The text is meant for people, and its form changed over the years: lines begin with `native : file.cc:12 `, `INFO: ` or
nothing, operator tables have a [start] column or not, or are comma-separated. Nearly every number stands in it more
than once, and every reading is checked against the others: a damaged log is an error, never a wrong number.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from profilers.errors import UserError

#: Every column that an operator table or a summary by type ever had, as `_column` writes them.
COLUMNS = ("node type", "count", "start", "first", "avg ms", "%", "avg%", "cdf%", "mem kb", "times called", "name")
#: How far the operators' sum may be from the profiler's own total, and from the mean of the timed runs.
TOTAL_TOLERANCE, TIMED_TOLERANCE = 0.02, 0.10

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)", re.ASCII | re.IGNORECASE)
_PREFIX = re.compile(r"(?:native : \S+:\d+ |(?:INFO|WARN|WARNING|ERROR|VERBOSE|CREATE): )*")
_ANNOUNCED = (  # the lines that belong to an operator table or say that one will come
    r".*with detailed stat logging|Enable op profiling: \[1\]|.*Profiling Info for|=====|\s*\[?node type|Timings \(|"
    r".*nodes (?:executed|observed)"
)
_SIX_DIGITS = 1e-5  # numbers that are not in fixed point have six significant digits: 5e-6 of each, twice


@dataclass(frozen=True)
class Stats:
    """Latency of whole inferences in milliseconds; None for what the log's line does not have."""

    count: int
    mean_ms: float
    first_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    std_ms: float | None = None
    median_ms: float | None = None


@dataclass(frozen=True)
class OpRow:
    """One row of the operator table: mean_ms is of one inference, that is of all `times_called` calls together."""

    type: str
    name: str
    mean_ms: float
    times_called: int
    share_pct: float


@dataclass(frozen=True)
class BenchmarkRun:
    """One run of benchmark_model.

    model: path of the graph; input_shape: of its only input, as written; threads: None where it was left to the
    runtime. None stands wherever the log does not say.
    timed: the timed runs, never the warm-up. ops: in run order, empty where the log has no table. The oldest builds
    profile the warm-up too, so their operators are means over both.
    delegate: name of the delegate that was applied, several joined by "+"; delegate_kernels: how many parts of the
    graph it runs, where the log counts them; partial: it runs only a part of the graph. ignored: flags that the program
    does not know.
    """

    model: str | None
    input_shape: tuple[int, ...] | None
    threads: int | None
    timed: Stats
    ops: tuple[OpRow, ...]
    delegate: str | None
    delegate_kernels: int | None
    partial: bool
    ignored: tuple[str, ...] = ()


def read_log(text: str | bytes, *, name: str) -> BenchmarkRun:
    """The one run in a log; `name` (a path, say) begins every message.

    Raises UserError, in one line and with the line number where there is one: the log is empty, binary, cut off,
    of a failed run or of several, is malformed, or contradicts itself.
    """
    log = _Log(text, name)
    if failed := log.find(".*Benchmarking failed"):
        raise log.error(f"the run failed ({log.first_error()}); mend that and run again", failed[0].at)
    summaries = log.find(r"(Average inference|Inference) timings in us: (.+)")
    runs = max(len(summaries), len(log.find(r".*STARTING!$")))
    if runs > 1:
        raise log.error(f"{runs} runs in one log; cut it into one file for each")
    if not summaries:
        why = log.first_error() or "no line 'Inference timings in us'"
        raise log.error(f"the benchmark did not finish ({why}); run it again and keep all of its output")
    warmup, timed = _timings(log, summaries[0])
    ops = _operators(log, warmup, timed)
    threads = _setting(log, r"(?:Num threads|#threads used for CPU inference): \[([1-9][0-9]{0,3})\]$")
    applied = log.find(r"(?:Explicitly applied|Applied) (.+?) delegate\b(?:.*(partially))?(?:.* w/ (\d+) delegate k)?")
    delegates = [line.groups[0] for line in applied]
    if not applied and not log.find("Though XNNPACK delegate is explicitly applied.*will not be executed"):
        # where nothing was asked for, the runtime applies XNNPACK by itself and says only that it made it
        delegates = ["XNNPACK"] if log.find("Created TensorFlow Lite XNNPACK delegate") else []
    kernels = [int(line.groups[2]) for line in applied if line.groups[2]]
    return BenchmarkRun(
        model=_setting(log, r"Graph: \[(.+)\]$"),
        input_shape=_input_shape(log),
        threads=int(threads) if threads else None,
        timed=timed,
        ops=ops,
        delegate="+".join(dict.fromkeys(delegates)) or None,
        delegate_kernels=sum(kernels) if kernels else None,
        partial=any(line.groups[1] for line in applied),
        ignored=tuple(flag for line in log.find(".*Unconsumed cmdline flags: (.+)") for flag in line.groups[0].split()),
    )


class _Line(NamedTuple):
    at: int  # counted from 0
    groups: tuple[str, ...]


class _Log:
    """The lines of a log, raw and without their prefixes."""

    def __init__(self, text: str | bytes, name: str) -> None:
        self.name = name
        try:
            decoded = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise self.error(f"not text: byte {error.start} is not UTF-8; give the log that was printed") from None
        if "\0" in decoded:
            raise self.error("not text: it has NUL bytes; give the log that was printed, as UTF-8")
        if not decoded.strip():
            raise self.error("an empty log; run benchmark_model again and keep all of its output")
        self.lines = [line.rstrip(" \r") for line in decoded.split("\n")]
        self.bodies = [_PREFIX.sub("", line.strip(), count=1) for line in self.lines]

    def error(self, message: str, at: int | None = None) -> UserError:
        return UserError(f"{self.name}: {message}" if at is None else f"{self.name}:{at + 1}: {message}")

    def find(self, pattern: str, start: int = 0, stop: int | None = None) -> list[_Line]:
        """The lines that begin like the pattern, from line `start` to before line `stop`."""
        matches = [(at, re.match(pattern, body)) for at, body in enumerate(self.bodies[start:stop], start)]
        return [_Line(at, tuple(group or "" for group in match.groups())) for at, match in matches if match]

    def only(self, pattern: str, what: str, start: int, stop: int) -> _Line:
        found = self.find(pattern, start, stop)
        if len(found) != 1:
            raise self.error(f"the operator table has {len(found)} times {what}, should be once", start)
        return found[0]

    def number(self, text: str, what: str, at: int, *, above_zero: bool = True) -> float:
        """A finite number that is not negative (not zero either, if above_zero)."""
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            kind = "a positive number" if above_zero else "a number of at least 0"
            raise self.error(f"{what} is {_quoted(text)}, should be {kind}", at)
        return value

    def whole(self, text: str, what: str, at: int | None = None) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text):
            raise self.error(f"{what} is {_quoted(text)}, should be a whole number", at)
        return int(text)

    def first_error(self) -> str:
        return next((_quoted(line.strip()) for line in self.lines if re.match(r".*ERROR: ", line)), "")


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= 100 else text[:97] + "...")


def _setting(log: _Log, pattern: str) -> str | None:
    found = {line.groups[0] for line in log.find(pattern)}
    if len(found) > 1:
        raise log.error(f"two values of one setting: {', '.join(_quoted(value) for value in sorted(found))}")
    return found.pop() if found else None


def _input_shape(log: _Log) -> tuple[int, ...] | None:
    shape = _setting(log, r"Input shapes: \[(.+)\]$")
    if shape is None or ":" in shape:  # several inputs
        return None
    return tuple(log.whole(size, "size of the input") for size in shape.split(","))


def _stats(log: _Log, text: str, at: int) -> Stats:
    """`count=200 first=.. curr=.. min=.. max=.. avg=.. std=.. [p5=.. median=.. p95=..]` in microseconds, or, where
    all values were the same, `count=2 curr=5(all same)`, `count=1 curr=5` and `count=0`."""
    pairs = [part.partition("=")[::2] for part in text.replace("(all same)", "").split()]
    values = dict(pairs)
    known = {"count", "first", "curr", "min", "max", "avg", "std", "p5", "median", "p50", "p95"}
    if len(values) != len(pairs) or not known >= values.keys() or pairs[:1] != [("count", values.get("count"))]:
        raise log.error(f"malformed statistics {_quoted(text)}", at)
    count = log.whole(values.pop("count"), "count", at)
    if count == 0:
        return Stats(0, 0.0)
    same = count == 1 or "(all same)" in text
    if same == ("avg" in values) or not values.keys() >= ({"curr"} if same else {"first", "curr", "min", "max", "std"}):
        raise log.error(f"incomplete statistics {_quoted(text)}", at)
    ms = {key: round(log.number(value, key, at, above_zero=key != "std") / 1000, 9) for key, value in values.items()}
    mean = ms["curr"] if same else ms["avg"]
    least, most = ms.get("min", mean), ms.get("max", mean)
    slack = _SIX_DIGITS * mean
    inside = [value for key, value in ms.items() if key != "std"]
    if not (least - slack <= min(inside) and max(inside) <= most + slack and ms.get("std", 0) <= most - least):
        raise log.error(f"statistics contradict their own min and max: {_quoted(text)}", at)
    median = ms.get("median", ms.get("p50"))
    return Stats(count, mean, ms.get("first"), ms.get("min"), ms.get("max"), ms.get("std"), median)


def _timings(log: _Log, summary: _Line) -> tuple[Stats, Stats]:
    """Warm-up and timed runs: the lines `count=..` in this order, checked against the means in the summary."""
    means = dict(re.findall(r"([A-Za-z][A-Za-z ()]*): ([^,]*)(?:, |$)", summary.groups[1]))
    expected = [means.get("Warmup", means.get("Warmup (avg)")), means.get("no stats", means.get("Inference (avg)"))]
    found = log.find(r"(count=.*)")
    stats = [_stats(log, line.groups[0].rstrip(), line.at) for line in found]
    if len(stats) == 1:  # old builds print no statistics of a warm-up that was switched off
        stats.insert(0, Stats(0, 0.0))
    if len(stats) != 2:
        raise log.error(f"{len(found)} lines of statistics ('count=..'), should be two: warm-up and timed runs")
    for what, stat, text in zip(("warm-up", "timed runs"), stats, expected, strict=True):
        mean = log.number((text or "").strip(), f"mean of the {what}", summary.at, above_zero=False) / 1000
        whole = 0.001 if "no stats" in means else 0.0  # the oldest builds cut it to whole microseconds
        if abs(mean - stat.mean_ms) > whole + _SIX_DIGITS * stat.mean_ms:
            raise log.error(f"mean of the {what} is {mean} ms here, {stat.mean_ms} ms in its statistics", summary.at)
    if stats[1].count == 0:
        raise log.error("no timed run (count=0); run again with --num_runs of at least 1", found[-1].at)
    return stats[0], stats[1]


def _operators(log: _Log, warmup: Stats, timed: Stats) -> tuple[OpRow, ...]:
    """The operator table of the timed runs, checked; empty where there is none."""
    regular = log.find("Operator-wise Profiling Info for Regular Benchmark Runs:")
    start = regular[0].at if len(regular) == 1 else 0
    titles = log.find("=+ Run Order =+", start)
    if not titles:
        marks = log.find(_ANNOUNCED)
        if log.find(r"(?:CSV File to export profiling data to|Op profiling output file\.?): \[[^\]]"):
            marks = [mark for mark in marks if "op profiling" not in log.bodies[mark.at]]  # it went to that file
        if marks:
            raise log.error("an operator table is announced, but not there; keep all of the output", marks[0].at)
        return ()
    if len(regular) > 1 or (not regular and log.find("Profiling Info for Benchmark Initialization")):
        raise log.error(f"{len(regular)} headings of the operators of the timed runs, should be one", titles[0].at)
    first = titles[0].at
    ends = log.find(r"([0-9]+) nodes observed\s*$", first)
    if not ends:
        raise log.error("the operator table is cut off; run again and keep all of the output", first)
    end = ends[0].at + 1
    # subgraphs and the inside of a delegate have tables of their own: their time is already in the main graph's rows
    inner = log.find(r"Subgraph \(index|Delegate internal:", end)
    if any(title.at < (inner[0].at if inner else len(log.lines)) for title in titles[1:]):
        raise log.error("a second operator table; cut the log into one file for each run", titles[1].at)

    rows = _table(log, first, ("avg ms", "%", "cdf%", "times called", "name"))
    counts = [ends[0], *log.find(r"Number of nodes executed: ([0-9]+)\s*$", start, end)]
    for line in counts:
        if log.whole(line.groups[0], "number of nodes", line.at) != len(rows):
            raise log.error(f"{line.groups[0]} nodes here, {len(rows)} rows in run order", line.at)
    timings = log.only(r"Timings \(microseconds\): (count=.*)", "a line of timings", first, end)
    total = _stats(log, timings.groups[0].rstrip(), timings.at)
    if total.count not in (timed.count, warmup.count + timed.count):
        raise log.error(f"{total.count} runs were profiled, {warmup.count} + {timed.count} were made", timings.at)
    _check_rows(log, rows, total.mean_ms)
    _check_top(log, rows, log.only("=+ Top by Computation Time =+", "'Top by Computation Time'", first, end).at)
    _check_types(log, rows, log.only("=+ Summary by node type =+", "'Summary by node type'", first, end).at)
    sum_ms = sum(row.mean_ms for row in rows)
    for what, mean_ms, most in (("profile", total.mean_ms, TOTAL_TOLERANCE), ("timed", timed.mean_ms, TIMED_TOLERANCE)):
        if abs(sum_ms - mean_ms) > most * mean_ms:
            raise log.error(f"operators sum to {sum_ms:.3f} ms, the {what} mean is {mean_ms:.3f} ms", timings.at)
    return tuple(OpRow(row.type, row.name, row.mean_ms, row.calls, row.cells["%"]) for row in rows)


class _Row(NamedTuple):
    at: int
    type: str
    name: str
    cells: dict[str, float]
    csv: bool

    @property
    def calls(self) -> int:
        return int(self.cells["times called"])

    @property
    def mean_ms(self) -> float:  # [avg ms] is of one call
        return round(self.cells["avg ms"] * self.calls, 9)

    def rounding(self, column: str) -> float:
        """How far the number may be from what it was rounded from: tables have three decimals."""
        return _SIX_DIGITS * abs(self.cells[column]) if self.csv else 0.00051


def _column(title: str) -> str:
    return title.strip().lower().replace("_", " ").replace(" %", "%")


def _table(log: _Log, title_at: int, needed: Sequence[str]) -> list[_Row]:
    """The rows under a title, up to an empty line. The first column is the type, the others are read by the header."""
    header = log.lines[title_at + 1] if title_at + 1 < len(log.lines) else ""
    csv = "[" not in header
    columns = [_column(title) for title in (header.split(",") if csv else re.findall(r"\[([^\]]*)\]", header))]
    known = set(needed) <= set(columns) <= set(COLUMNS) and len(set(columns)) == len(columns)
    if not known or columns[0] != "node type":
        raise log.error(f"unknown columns {_quoted(header)}", title_at + 1)
    numbers = [column for column in columns[1:] if column != "name"]
    # types and names have spaces and commas of their own, unquoted: only the numbers between them tell the columns
    gap = r", *" if csv else r"\s+"
    number = gap + r"(-?(?:[0-9.]+(?:e[-+]?[0-9]+)?|nan|inf)%?)"
    row_form = re.compile(r"\s*(\S.*?)" + number * len(numbers) + (gap + r"(\S.*)" if "name" in columns else r"\s*"))
    rows = []
    for at in range(title_at + 2, len(log.lines)):
        if not log.lines[at].strip():
            break
        cells = row_form.fullmatch(log.lines[at])
        if not cells:
            raise log.error(f"not a row of {len(columns)} columns: {_quoted(log.lines[at])}", at)
        texts = dict(zip(columns, cells.groups(), strict=True))
        values = {}
        for column in numbers:
            text = texts[column]
            if column.endswith("%") != text.endswith("%"):
                raise log.error(f"[{column}] is {_quoted(text)}", at)
            if column in ("count", "times called"):
                values[column] = float(log.whole(text, f"[{column}]", at))
            elif column != "mem kb":  # memory may be negative, and nothing here needs it
                values[column] = log.number(text.removesuffix("%"), f"[{column}]", at, above_zero=False)
        rows.append(_Row(at, texts["node type"], texts.get("name", ""), values, csv))
    if not rows:
        raise log.error("a table without rows; run again and keep all of the output", title_at)
    return rows


def _check_rows(log: _Log, rows: Sequence[_Row], total_ms: float) -> None:
    """Each row against its own share of the total, and the rows against their order."""
    seen: dict[str, int] = {}
    for row in rows:
        if (other := seen.setdefault(row.name, row.at)) != row.at:
            raise log.error(f"operator {_quoted(row.name)} stands on line {other + 1} already", row.at)
        if row.calls == 0:
            raise log.error("[times called] is 0; operators that do not run each time cannot be read", row.at)
        share = 100 * row.mean_ms / total_ms
        slack = 100 * row.calls * row.rounding("avg ms") / total_ms + row.rounding("%") + _SIX_DIGITS * share
        if abs(share - row.cells["%"]) > slack:
            what = f"{row.calls} x {row.cells['avg ms']} ms is {share:.3f}% of {total_ms} ms"
            raise log.error(f"{what}, not {row.cells['%']}%", row.at)
    for before, after in pairwise(rows):
        if after.cells.get("start", 0) < before.cells.get("start", 0):
            raise log.error("[start] is before the one above: not in run order", after.at)
    _check_cumulated(log, rows)
    if abs(rows[-1].cells["cdf%"] - 100) > 0.1:
        raise log.error(f"[%] sum to {rows[-1].cells['cdf%']}, should be 100 (operators counted twice?)", rows[-1].at)


def _check_cumulated(log: _Log, rows: Sequence[_Row]) -> None:
    above = 0.0
    for row in rows:
        cdf = row.cells["cdf%"]
        if cdf < above or abs(above + row.cells["%"] - cdf) > 2 * row.rounding("cdf%") + row.rounding("%"):
            raise log.error(f"[cdf%] {cdf} is not the {above} above plus {row.cells['%']}", row.at)
        above = cdf


def _check_top(log: _Log, rows: Sequence[_Row], title_at: int) -> None:
    def content(row: _Row) -> object:
        return row.type, row.name, {**row.cells, "cdf%": 0.0}

    top = _table(log, title_at, ("avg ms", "%", "cdf%", "times called", "name"))
    _check_cumulated(log, top)
    by_name = {row.name: content(row) for row in rows}
    for row in top:
        if by_name.get(row.name) != content(row):
            raise log.error(f"{_quoted(row.name)} is not the same as in run order", row.at)


def _check_types(log: _Log, rows: Sequence[_Row], title_at: int) -> None:
    by_type: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_type[row.type].append(row)
    summary = {row.type: row for row in _table(log, title_at, ("count", "avg ms", "times called"))}
    if summary.keys() != by_type.keys():
        other = min(summary.keys() ^ by_type.keys())
        raise log.error(f"the summary by type and the run order do not both have type {_quoted(other)}", title_at)
    for kind, row in summary.items():
        members = by_type[kind]
        sum_ms = sum(member.mean_ms for member in members)
        slack = sum(member.calls * member.rounding("avg ms") for member in members) + row.rounding("avg ms")
        least = sum_ms - slack - 0.001 * len(members)  # each is cut to whole microseconds before the sum
        same = row.cells["count"] == len(members) and row.calls == sum(member.calls for member in members)
        if not same or not least <= row.cells["avg ms"] <= sum_ms + slack:
            raise log.error(f"type {_quoted(kind)} is {len(members)} rows of {sum_ms:.3f} ms in run order", row.at)
