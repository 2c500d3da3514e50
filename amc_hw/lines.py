"""What a command's result is as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MUCH_LEFT = 0.9  #: of a budget is used, or less: worth a word


def devices(r: dict[str, Any]) -> list[str]:
    return [f"{d['name']:<14}{d['runtime']:<14}{len(d['tables'])} tables  {d['description']}" for d in r["devices"]]


def probes(r: dict[str, Any]) -> list[str]:
    return [f"{'ok' if p['ok'] else 'MISSING':<8}{p['name']}: {p['text']}" for p in r["probes"]]


def graph(r: dict[str, Any]) -> list[str]:
    return [
        *(["channels, the group that they are of -> what reads them"] if r["groups"] else []),
        *(f"{g['width']:>6}  {g['name']} -> {', '.join(g['consumers'])}{_blocks(g)}" for g in r["groups"]),
        *(f"frozen {f['name']} ({f['width']}): {f['reason']}{_locked(f)}" for f in r["frozen"]),
        f"{r['macs'] / 1e6:.1f} MMACs, {r['params'] / 1e6:.2f} M parameters (batch-norms folded)",
        *([] if r["groups"] else ["nothing can be pruned"]),
    ]


def _blocks(group: dict[str, Any]) -> str:
    each = f"; {group['each']} channels each" if group["each"] > 1 else ""
    return each + (f"; {group['block']} at a time" if group["block"] > 1 else "")


def _locked(frozen: dict[str, Any]) -> str:
    text = f"; it is read or written by {frozen['macs_share']:.1%} of the MACs"
    return text if frozen["latency_share"] is None else f"{text}, {frozen['latency_share']:.1%} of the latency"


def check(r: dict[str, Any]) -> list[str]:
    if r["table"] is None:
        table = "the device is not here: its table is all there is"
    elif r["measurements_missing"]:
        table = f"{r['measurements_missing']} measurements to make, about {r['profile_minutes']:.0f} minutes of profile"
    else:
        table = f"{r['table']} has all that a search needs"
    lines = [
        f"groups      {r['groups']} to prune, {len(r['frozen'])} frozen{_most_locked(r['frozen'])}",
        f"MMACs       {r['macs'] / 1e6:.1f}; {r['smallest_macs'] / 1e6:.1f} with all groups at their smallest",
        f"table       {table}",
    ]
    if r["accuracy"] is None:
        return [*lines, "accuracy    not known, nor what a search takes: no --data, nor --evaluate and --calibrate"]
    where = "" if r["metric"] == "score" else ", on held-out data"
    return [
        f"{r['metric']:<11} {r['accuracy']:.4f} unpruned{where}",
        *lines,
        f"search      {_search_time(r)}: {r['search_minutes']:.0f} minutes",
    ]


def _most_locked(frozen: list[dict[str, Any]]) -> str:
    """Which frozen group locks most, but for outputs: that cannot be helped."""
    helped = [each for each in frozen if each["reason"] != "network output"]
    if not helped:
        return " (amc-hw graph says why)"
    most = max(helped, key=lambda each: float(each["macs_share"]))
    return f", most of all {most['name']}: {most['reason']}{_locked(most)} (amc-hw graph tells all)"


def _search_time(r: dict[str, Any]) -> str:
    workers = f" by {r['workers']} workers" if r["workers"] > 1 else ""
    return f"{r['episodes']} episodes, one in {r['seconds_per_episode']:.1f} s{workers}, then the candidates' refits"


def profile_plan(r: dict[str, Any]) -> list[str]:
    return [f"{r['table']}: {r['steps']} measurements to make, about {r['minutes']:.1f} minutes"]


def profile(r: dict[str, Any]) -> list[str]:
    error = (
        "not calibrated yet" if r["error_pct"] is None else f"90% of networks predicted within {r['error_pct']:.1f}%"
    )
    lines = [f"{r['table']}: {r['rows_new']} new rows, {r['rows_total']} in all, {r['seconds']:.0f} s; {error}"]
    if r["time_up"]:
        lines.append("its time is up (--max-minutes): the same command goes on from here")
    if r["exhausted"]:
        lines.append(
            "that is more than --tolerance, and no more is measured: a new table on a quieter device may do better"
        )
    if r["channel_multiple"] is not None:
        multiple = r["channel_multiple"]
        lines.append(
            f"channel multiple that this device and runtime show: {multiple} (of groups below {8 * multiple} channels "
            "an eighth of their width)"
        )
    return lines


def validate_plan(r: dict[str, Any]) -> list[str]:
    return [f"{r['samples']} random networks to time, about {r['minutes']:.1f} minutes"]


def validate(r: dict[str, Any]) -> list[str]:
    within = f"{r['within_5pct']:.0%} within 5%, {r['within_10pct']:.0%} within 10%"
    ranks = "" if r["spearman"] is None else f", Spearman {r['spearman']:.3f}"
    return [
        *(
            f"{s['predicted_ms']:9.4f} ms predicted {s['measured_ms']:9.4f} measured {s['pct_error']:+6.1f}%"
            for s in r["samples"]
        ),
        f"median error {r['median_abs_pct_error']:.1f}%, {within}{ranks}",
    ]


def tables(r: dict[str, Any]) -> list[str]:
    return [
        f"{t['file']}: {t['identity']['soc']}, {t['identity']['runtime']} {t['identity']['runtime_version']}, "
        f"{t['identity']['threads']} thread(s), {t['identity']['dtype']}, batch {t['identity']['batch']}, "
        f"{_counted(t['rows'])}"
        for t in r["tables"]
    ]


def _counted(rows: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind} rows" for kind, count in rows.items()) or "empty"


def table(r: dict[str, Any]) -> list[str]:
    multiple = r["channel_multiple"]
    return [
        r["file"],
        *(f"  {key}: {value}" for key, value in (r["identity"] | r["provenance"]).items()),
        f"  rows: {_counted(r['rows'])}",
        "  error: " + ("unknown" if r["error_pct"] is None else f"90% of networks within {r['error_pct']:.1f}%"),
        f"  channel multiple: {'not enough widths to tell' if multiple is None else multiple}",
        *(
            f"{o['points']:6} points  {o['op']}, widths "
            + " by ".join(f"{low:.0f}-{high:.0f}" for low, high in zip(o["low"], o["high"], strict=True))
            for o in r["operators"]
        ),
    ]


def import_log(r: dict[str, Any]) -> list[str]:
    return [
        *(
            f"{log['file']}: {log['mean_ms']:.4g} ms, {log['operators']} operators"
            + (f", {'partly ' if log['partial'] else ''}run by {log['delegate']}" if log["delegate"] else "")
            for log in r["logs"]
        ),
        f"{r['table']}: {r['rows_new']} new rows, {r['rows_total']} in all",
    ]


def predict(r: dict[str, Any]) -> list[str]:
    error = "unknown error" if r["error_pct"] is None else f"90% within {r['error_pct']:.1f}%"
    return [f"{r['predicted_ms']:.4f} ms predicted ({error}): {r['predicted_speedup']:.2f}x on {_where(r)}"]


def _where(r: dict[str, Any]) -> str:
    batch = f", batch {r['batch']}" if r["batch"] > 1 else ""
    return f"{r['device']}, {r['runtime']}, {r['dtype']}, {r['threads']} thread(s){batch}"


def measure(r: dict[str, Any]) -> list[str]:
    low, high = r["speedup_ci95"]
    speedup = f"{r['speedup']:.2f}x (95%: {low:.2f} to {high:.2f})"
    return [f"{r['baseline_ms']:.4f} ms -> {r['pruned_ms']:.4f} ms: {speedup} on {_where(r)}"]


def search_plan(r: dict[str, Any]) -> list[str]:
    return [f"{r['groups']} groups, {_search_time(r)}: about {r['minutes']:.1f} minutes"]


def search(r: dict[str, Any], *, start: Path | None, method: str, episodes: int, slack: float) -> list[str]:
    """Beside the result what was asked for. start: the policy that the search began with."""
    if r["policy"] is None:
        return [r["message"]]
    error = "" if r["error_pct"] is None else f", 90% within {r['error_pct']:.1f}%"
    if r["measured_ms"] is None:
        latency = [
            f"latency     {r['predicted_ms']:.4f} ms predicted{error}; not measured: the device is not here",
            f"speed-up    {r['predicted_speedup']:.2f}x predicted",
        ]
    else:
        low, high = r["speedup_ci95"]
        predicted = f"(predicted {r['predicted_ms']:.4f}{error})"
        latency = [
            f"latency     {r['baseline_ms']:.4f} -> {r['measured_ms']:.4f} ms {predicted}",
            f"speed-up    {r['speedup']:.2f}x (95%: {low:.2f} to {high:.2f})",
        ]
    return [
        f"{_metric(r):<11} {r['baseline_accuracy']:.4f} -> {r['accuracy']:.4f} ({r['accuracy_split']})",
        *latency,
        *([f"on          {_where(r)}"] if "device" in r else []),  # results of old have none
        f"MMACs       {r['baseline_macs'] / 1e6:.2f} -> {r['macs'] / 1e6:.2f}",
        *_budget(r, method=method, episodes=episodes, slack=slack),
        *([] if start is None else [f"beside      {start}, not its unpruned network"]),
        f"policy      {r['policy']}",
    ]


def _budget(r: dict[str, Any], *, method: str, episodes: int, slack: float) -> Iterator[str]:
    if r["budget"] is not None:
        name, value = r["budget"]
        ended = 2 * r["episodes"] < episodes  # by itself, as it would again
        more = "; more --episodes may find a wider policy" if r["budget_used"] < MUCH_LEFT and not ended else ""
        over = f", within its slack of {slack:.0%}" if r["budget_used"] >= 1.005 else ""
        yield f"budget      {name.replace('_', ' ')} {value:g}, {r['budget_used']:.0%} used{over}{more}"
    if r["found_by"] not in ("method", method):
        who = {
            "uniform": "the best uniform policy",
            "demonstration": "one near uniform widths that the agent was shown",
        }
        yield f"winner      {who[r['found_by']]}: {none_better(r)}"


def none_better(r: dict[str, Any]) -> str:
    """Why uniform widths won a search."""
    if over := r.get("over"):
        return f"the method's better ones were over the budget, by {over - 1:.1%} or more"
    return "the method found none better"


def _metric(r: dict[str, Any]) -> str:
    return "score" if r["accuracy_split"] == "evaluate" else "accuracy"


def compare_plan(r: dict[str, Any]) -> list[str]:
    ended = f", {r['ended']} of them ended" if r["ended"] else ""
    return [f"at most {r['searches']} searches{ended}; {_search_time(r)}: at most {r['minutes']:.1f} minutes"]


def compare(r: dict[str, Any]) -> list[str]:
    def line(row: dict[str, Any]) -> str:
        head = f"{row['method']:<12} {row['budget']:<36} {row['seed']:>4} "
        if row["accuracy"] is None:
            return f"{head} {row['reason']}"
        latency = f"{row['measured_ms']:9.4f} ms {row['speedup']:.2f}x" if row["measured_ms"] else "not measured"
        return f"{head} {row['accuracy']:.4f} {latency} {row['macs'] / 1e6:9.2f} MMACs {row['reason'] or ''}".rstrip()

    return [*map(line, r["rows"]), *r["verdict"], r["plot"]]


def export(r: dict[str, Any]) -> list[str]:
    several = f" ({', '.join(r['outputs'])})" if len(r.get("outputs", ())) > 1 else ""
    own = "" if r.get("on_others", True) else " that it was calibrated on"
    line = f"{r['file']}: {r['bytes']} bytes; on {r['images']} inputs{own} outputs{several},"
    line += f" as large as {r['largest']:.3g}, differ from PyTorch's by {r['max_abs_diff']:.2g} at most"
    line += f", {100 * r['rms_diff']:.2g}% in the root mean square" if "rms_diff" in r else ""
    if "accuracy" in r:
        line += f"; {_metric(r)} {r['float_accuracy']:.4f} -> {r['accuracy']:.4f} ({r['accuracy_split']})"
    stored = [
        f"{name} is int8: (q - {zero}) * {scale:.6g}" for name, (scale, zero) in r.get("quantization", {}).items()
    ]
    if "mean" not in r:
        return [line, *stored]
    mean, std = (" ".join(f"{value:.4g}" for value in r[name]) for name in ("mean", "std"))
    layout = r["layout"].replace("_", " ")
    shapes = " and ".join("x".join(map(str, shape)) for shape in r["inputs"].values())
    what = "images x in [0, 1]" if "range" in r else f"inputs x, as {shapes}"
    return [line, f"it reads (x - mean) / std of {what}, {layout}: mean {mean}, std {std}", *stored]


def finetune_plan(r: dict[str, Any]) -> list[str]:
    return [f"{r['epochs']} epochs, {r['steps']} steps of {r['batch']} images: about {r['minutes']:.1f} minutes"]


def finetune(r: dict[str, Any]) -> list[str]:
    unpruned = "" if r["baseline_accuracy"] is None else f"; unpruned {r['baseline_accuracy']:.4f}"
    return [
        f"accuracy    {r['accuracy_before']:.4f} -> {r['accuracy_after']:.4f} ({r['accuracy_split']}{unpruned})",
        f"policy      {r['policy']}",
    ]
