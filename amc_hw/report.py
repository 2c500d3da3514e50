"""One HTML page of a search or a comparison: what was found, on which evidence, and how to make it again.

The page holds everything: pictures are inside, nothing is fetched, no script runs.
"""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from amc_hw import plots
from amc_hw.errors import DeviceError, TableError, UserError
from amc_hw.lines import none_better
from amc_hw.policy import load_policy
from amc_hw.resources import CostModel, keeps, latency_model, macs_model, params_model
from amc_hw.runs import JOURNAL
from amc_hw.subject import Pruned, Subject, open_pruned, open_subject, read_predictor, read_table
from amc_hw.task import shown_gain
from profilers.files import check_replaceable, write_whole
from profilers.ops import OpSpec, digest
from profilers.predictor import Predictor
from profilers.store import table_files
from profilers.table import LatencyTable

SLOWEST = 4  #: operators whose staircase is drawn
SAME = 1.005  #: times as long is as fast: no table tells such policies apart
AROUND = (0.8, 0.9, 1.0, 1.1, 1.25)  #: latencies beside the winner's, of what another budget would have bought
GENERATOR = '<meta name="generator" content="amc-hw">'
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid #d5dae3; }
.lead { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1rem 0; }
.lead div { flex: 1 1 9rem; border: 1px solid #d5dae3; border-radius: 0.5rem; padding: 0.5rem 0.75rem; }
.lead b { display: block; font-size: 1.6rem; line-height: 1.3; }
.lead span, figcaption, .small { color: #566072; font-size: 0.875rem; }
figure { margin: 0.75rem 0; } img { width: 100%; max-width: 48rem; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #e6e9ef; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.best td { font-weight: 600; }
pre { background: #f4f6f9; padding: 0.6rem; font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { max-width: none; font-size: 11pt; } h2, figure, table { break-inside: avoid; } }
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _figure(picture: bytes, what: str) -> str:
    data = base64.b64encode(picture).decode()
    image = f'<img alt="{_text(what)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(what)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, best: int | None = None) -> str:
    lines = [
        f"<tr{' class=best' if number == best else ''}>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    ]
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _lead(*facts: tuple[str, str]) -> str:
    boxes = [f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in facts]
    return f'<div class="lead">{"".join(boxes)}</div>'


def _page(title: str, *sections: str) -> bytes:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{_text(title)}</h1>{''.join(sections)}</body></html>\n"
    ).encode()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where it is not there."""
    if not path.exists():
        return []
    data = path.read_bytes()
    try:
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except ValueError:
        raise UserError(f"{path} is damaged: it is no journal of a search") from None


def _result(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / name}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} holds no result")
    return found


def write_report(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """The page of a run's folder, in it by default; UserError where the folder holds no finished run."""
    if out is None:
        out = folder / "report.html"
    else:
        check_replaceable(out, GENERATOR.encode())
    if (folder / "compare.json").exists():
        page = _comparison(folder)
    elif (folder / "result.json").exists():
        page = _search(folder)
    elif not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder" if not folder.exists() else f"{folder} is no folder")
    else:
        raise UserError(f"{folder} holds no finished search or comparison: no result.json, no compare.json")
    write_whole(out, page)
    return {"file": str(out)}


# A search


def _search(folder: Path) -> bytes:
    result, (header, *journal) = _result(folder, "result.json"), _lines(folder / JOURNAL) or [{}]
    if "speedup" not in result:
        raise UserError(
            f"{folder} holds no search or comparison: of a fine-tuning, report the search that it began with"
        )
    pruned = open_pruned(folder / "policy.json")
    policy = pruned.policy
    subject = open_subject(
        device=policy.device,
        model=policy.model,
        unpruned=pruned,
        dtype=policy.dtype,
        channel_multiple=1,
        threads=header.get("threads"),
    )
    budget = " = ".join(map(str, header.get("budget") or ["no budget"])).replace("_", " ")
    title = f"{policy.model} on {policy.device}: {budget}"
    before = "before this search" if _staged(subject, header) else "unpruned"
    made_up = "<p>A made-up device: its milliseconds are a formula's.</p>" if header.get("runtime") == "formula" else ""
    sections = [made_up, _headline(result, policy.evaluate is not None, before), _kept_channels(pruned)]
    predictor: Predictor | None = None
    try:
        table = _table_of(subject, header)
        predictor = read_predictor(subject, table)
        sections += [
            _layers(subject, pruned, predictor),
            _staircases(subject, pruned, table, predictor),
            _more(subject, header, journal, result, predictor),
            _trust(subject, table, predictor, [] if _staged(subject, header) else journal),
        ]
    except (TableError, DeviceError) as error:
        predictor = None
        sections.append(_section("Latency per layer", f"<p>Not shown: {_text(error)}.</p>"))
    sections += [_learning(journal, header, _within(subject, header, result, predictor)), _made(folder, header)]
    return _page(title, *sections)


def _table_of(subject: Subject, header: dict[str, Any]) -> LatencyTable:
    """The device's table; where the device is away, the one that the search was made with."""
    try:
        return read_table(subject)
    except DeviceError:
        for table in map(LatencyTable.read, table_files(subject.device.name)):
            if all(header.get(part) == value for part, value in asdict(table.identity).items()):
                return table
        raise


def _staged(subject: Subject, header: dict[str, Any]) -> bool:
    """Whether the search began with a pruned network: its widths and times are relative to that one."""
    return tuple(grid[-1] for grid in header.get("grids", ())) != tuple(subject.graph.full_widths)


def _episodes(journal: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in journal if row.keys() >= {"widths", "accuracy"}]


def _speedup(result: dict[str, Any]) -> tuple[str, str]:
    if result["speedup"] is None:
        return f"{result['predicted_speedup']:.2f}x", "speed-up, predicted: the device is not here"
    low, high = result["speedup_ci95"]
    return f"{result['speedup']:.2f}x", f"measured speed-up (95%: {low:.2f} to {high:.2f})"


def _headline(result: dict[str, Any], own: bool, before: str) -> str:
    what = "score" if own else f"accuracy, {result['accuracy_split']}"
    facts = [_speedup(result), (f"{result['accuracy']:.4f}", f"{what}; {before} {result['baseline_accuracy']:.4f}")]
    if result["measured_ms"] is not None:
        facts.append((f"{result['measured_ms']:.4g} ms", f"measured; {before} {result['baseline_ms']:.4g} ms"))
    error = result.get("error_pct")
    within = "" if error is None else f"; 90% of networks within {error:.1f}%"
    facts.append((f"{result['predicted_ms']:.4g} ms", f"predicted by the table{within}"))
    share = result["macs"] / result["baseline_macs"]
    facts.append(
        (f"{share:.0%}", f"of the MACs: {result['macs'] / 1e6:.1f} of {result['baseline_macs'] / 1e6:.1f} million")
    )
    who = {
        "uniform": f"The winner is the best uniform policy, which always takes part: {none_better(result)}.",
        "demonstration": "The winner is a policy near uniform widths that the agent was shown: it found none better.",
    }.get(result.get("found_by", ""))
    return _lead(*facts) + (f"<p>{who}</p>" if who else "")


def _kept_channels(pruned: Pruned) -> str:
    names = [group.name for group in pruned.graph.groups]
    picture = plots.kept_channels(names, pruned.graph.full_widths, pruned.widths)
    rows = [
        (name, full, kept, f"{kept / full:.0%}")
        for name, full, kept in zip(names, pruned.graph.full_widths, pruned.widths, strict=True)
    ]
    frozen = "".join(f"<li>{_text(each.name)}: {_text(each.reason)}</li>" for each in pruned.graph.frozen)
    return _section(
        "Channels kept",
        _figure(picture, "Channels of every group: all of them, and those kept"),
        f"<details><summary>As a table</summary>{_table(('group', 'channels', 'kept', 'share'), rows)}</details>",
        f"<p class=small>Left at full width:</p><ul class=small>{frozen}</ul>" if frozen else "",
    )


def _layers(subject: Subject, pruned: Pruned, predictor: Predictor) -> str:
    """Predicted milliseconds of every operator, before and after."""
    before, after = (
        {node.name: (node.op, ms) for node, ms in zip(nodes, predictor.op_ms([node.op for node in nodes]), strict=True)}
        for nodes in (predictor.lower(subject.network_at(widths)).nodes for widths in (None, pruned.widths))
    )
    names = list(before)
    picture = plots.layer_latency(
        names, [float(before[name][1]) for name in names], [float(after[name][1]) for name in names]
    )
    saved = sorted(names, key=lambda name: after[name][1] - before[name][1])
    rows = [
        (
            name,
            before[name][0],
            f"{before[name][1]:.4f}",
            f"{after[name][1]:.4f}",
            f"{after[name][1] - before[name][1]:+.4f}",
        )
        for name in saved
    ]
    return _section(
        "Latency per layer",
        _figure(picture, "Predicted milliseconds of every operator: unpruned and pruned"),
        "<details><summary>As a table, what saves most first</summary>",
        _table(("layer", "operator", "ms before", "ms after", "difference"), rows),
        "</details>",
    )


def _staircases(subject: Subject, pruned: Pruned, table: LatencyTable, predictor: Predictor) -> str:
    """Latency against output width of the slowest operators, where the chosen width stands on it."""
    nodes = {node.name: node.op for node in predictor.lower(subject.network_at(pruned.widths)).nodes}
    full = {node.name: node.op for node in predictor.lower(subject.network_at(None)).nodes}
    order = np.argsort(-predictor.op_ms(list(full.values())), kind="stable")
    drawn: dict[OpSpec, str] = {}
    for name in (list(full)[index] for index in order):
        family = full[name].family()
        if name in nodes and family in predictor.families and len(drawn) < SLOWEST and full[name].macs:
            drawn.setdefault(family, name)
    pictures, known = [], predictor.measured_ops(table.of_type("op"))
    for family, name in drawn.items():
        op, chosen, cost = full[name], nodes[name], predictor.families[family]
        widths = np.arange(max(1, int(cost.low[-1])), op.axes[-1] + 1, dtype=float)
        others = np.tile(np.array(chosen.axes[:-1], float), (len(widths), 1))
        at = np.hstack([others, widths[:, None]])
        points: dict[int, list[float]] = {}
        for each, ms in known.items():
            if each.family() == family and np.allclose(each.axes[:-1], chosen.axes[:-1], rtol=0.1, atol=0):
                points.setdefault(each.axes[-1], []).extend(ms)
        measured = [(width, float(np.median(ms))) for width, ms in points.items()]
        here = (chosen.axes[-1], float(cost(np.array([chosen.axes], float))[0]))
        caption = f"{name}, {chosen}: predicted at every width, measured near its inputs, and the width chosen"
        pictures.append(_figure(plots.chosen_on_staircase(measured, widths, cost(at), here), caption))
    return _section("Where the widths stand on their staircases", *pictures) if pictures else ""


def _costs(subject: Subject, header: dict[str, Any], predictor: Predictor) -> CostModel:
    """Milliseconds on the grids of the search."""
    return latency_model(subject.graph, header["grids"], predictor, batch=subject.device.batch)


def _more(
    subject: Subject,
    header: dict[str, Any],
    journal: Sequence[dict[str, Any]],
    result: dict[str, Any],
    predictor: Predictor,
) -> str:
    """What another budget would have bought, as far as the policies tried tell."""
    accuracy = result["accuracy_split"] != "evaluate"
    tried = {tuple(row["widths"]): row["accuracy"] for row in _episodes(journal)}
    if not tried or _staged(subject, header):
        return ""
    costs = _costs(subject, header, predictor)
    points = [(costs.cost(widths), accuracy) for widths, accuracy in tried.items()]
    here = (
        costs.cost(tuple(result["widths"]))
        if all(width in grid for width, grid in zip(result["widths"], costs.grids, strict=True))
        else result["predicted_ms"]
    )

    def best(limit: float) -> float | None:
        return max((accuracy for cost, accuracy in points if cost <= limit * SAME), default=None)

    now, rows = best(here), []
    for share in AROUND:
        found = best(share * here)
        gain = "" if found is None or now is None else shown_gain(found - now, accuracy=accuracy)
        rows.append((f"{share * here:.4g} ms ({share:.0%})", "none" if found is None else f"{found:.4f}", gain))
    said = "Best held-out score among the policies that this search tried, by predicted latency."
    wider = best(here * AROUND[-1])
    if now is not None and wider is not None and wider > now:
        more = min(cost for cost, score in points if score == wider and cost > here) - here
        said += f" With {more:.3g} ms more, the best of them scores {shown_gain(wider - now, accuracy=accuracy)}."
    return _section(
        "What another millisecond would buy",
        f"<p>{_text(said)} It is a lower bound: the search looked near its own budget.</p>",
        _table(("latency", "best score", "difference"), rows, best=AROUND.index(1.0)),
        _figure(plots.tried_policies(points, here), "Every policy tried: predicted latency and held-out score"),
    )


def _trust(subject: Subject, table: LatencyTable, predictor: Predictor, journal: Sequence[dict[str, Any]]) -> str:
    """Predicted against measured: of validations, and of the policies that the search timed."""
    unpruned = digest(subject.network_at(None))
    found = [
        {"measured_ms": predictor.measured_ms(row), "predicted_ms": predictor.predict(row.graph)}
        for row in table.of_type("validation")
        if row.graph is not None and row.details.get("anchor") == unpruned
    ]
    reference = predictor.predict(subject.network_at(None))
    for row in journal:
        for widths, (measured, baseline) in zip(
            row.get("timed", ()), row.get("measured_and_baseline_ms", ()), strict=True
        ):
            predicted = predictor.predict(subject.network_at(widths))
            found.append({"measured_ms": measured / baseline * reference, "predicted_ms": predicted})
    if not found:
        return ""
    errors = [100 * abs(each["predicted_ms"] / each["measured_ms"] - 1) for each in found]
    said = f"median error {np.median(errors):.1f}%, worst {max(errors):.1f}%."
    said = f"{len(found)} networks, none of which calibrated: {said}"
    return _section(
        "How far the table can be trusted",
        f"<p>{said}</p>",
        _figure(plots.predictions("", found), "Predicted against measured"),
    )


def _within(
    subject: Subject, header: dict[str, Any], result: dict[str, Any], predictor: Predictor | None
) -> Callable[[Sequence[int]], bool]:
    """Whether a policy that was tried keeps the budget, or costs no more than the winner does; True where that is not
    known."""
    if header.get("budget") is None or _staged(subject, header):
        return lambda widths: True
    name, given = header["budget"]
    if name.startswith("latency"):
        if predictor is None:
            return lambda widths: True
        costs = _costs(subject, header, predictor)
    else:
        costs = (params_model if name.startswith("params") else macs_model)(subject.graph, header["grids"])
    limit = given if name.endswith("_ms") else given * costs.full_cost
    if all(width in grid for width, grid in zip(result["widths"], costs.grids, strict=True)):
        limit = max(limit, costs.cost(tuple(result["widths"])))
    return lambda widths: keeps(costs.cost(tuple(widths)), limit)


def _learning(
    journal: Sequence[dict[str, Any]], header: dict[str, Any], within: Callable[[Sequence[int]], bool]
) -> str:
    tried = _episodes(journal)
    if not tried:
        return ""
    curve = plots.learning_curve([float(row["accuracy"]) for row in tried], [within(row["widths"]) for row in tried])
    budget = " within the budget" if header.get("budget") else ""
    what = f"Held-out score of every policy tried by {header.get('method', 'the search')}, in order"
    return _section("The search", _figure(curve, f"{what}, and the best so far{budget}"))


def _made(folder: Path, header: dict[str, Any]) -> str:
    """The commands and the environment."""
    parts = []
    for row in _lines(folder / "commands.jsonl"):
        command = shlex.join(["amc-hw", *map(str, row["command"][1:])])
        packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items() if version)
        parts.append(
            f"<pre>{_text(command)}</pre><p class=small>{_text(row['date'])}, Python {_text(row['python'])}, "
            f"{_text(row['system'])}; {_text(packages)}</p>"
        )
    asked = {
        key: value
        for key, value in header.items()
        if key not in ("grids", "schema_version")
        and any(each is not None for each in (value if isinstance(value, list) else [value]))
    }
    if asked:
        parts.append(f"<details><summary>What was asked</summary>{_table(('', 'value'), asked.items())}</details>")
    return _section("How it was made", *parts)


# A comparison


def _comparison(folder: Path) -> bytes:
    found = _result(folder, "compare.json")
    rows = found["rows"]
    done = [row for row in rows if row["accuracy"] is not None]
    verdict = "".join(f"<li>{_text(line)}</li>" for line in found["verdict"])
    cells = [
        (
            row["budget"],
            row["method"],
            row["seed"],
            "none" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
            "" if row["measured_ms"] is None else f"{row['measured_ms']:.4g}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            "" if row["macs"] is None else f"{row['macs'] / 1e6:.1f}",
            row["reason"] or "",
        )
        for row in rows
    ]
    methods, budgets = (len({row[key] for row in rows}) for key in ("method", "budget"))
    title = f"{methods} method{'s' * (methods != 1)}, {budgets} budget{'s' * (budgets != 1)}"
    policies = [Path(row["policy"]) for row in done]
    loaded = [load_policy(path) for path in policies if path.exists()]
    models = {policy.model for policy in loaded}
    if len(models) == 1:
        title = f"{models.pop()}: {title}"
    score = "score" if any(policy.evaluate for policy in loaded) else "accuracy"
    picture = _figure(plots.pareto(title, rows, score=score), "Every winner, hollow: FLOPs budgets")
    if all(row["measured_ms"] is None for row in rows):
        picture = "<p>Nothing was measured: the device is not here.</p>"
    return _page(
        title,
        _section(
            "Verdict", f"<ul>{verdict}</ul>" if verdict else "<p>No budget has results of two methods to compare.</p>"
        ),
        _section(f"{score.capitalize()} against measured latency", picture),
        _section("Winners", _table(("budget", "method", "seed", score, "measured ms", "speed-up", "MMACs", ""), cells)),
        *(_made(path.parent, {}) for path in policies[:1] if path.exists()),
    )
