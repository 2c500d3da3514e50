"""Command line: parse, call one function of `api`, print."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from amc_hw import api
from amc_hw.errors import UserError
from amc_hw.pretrain import DEFAULT_DATA, DEFAULT_MODEL


def _shape(_context: Any, _parameter: Any, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a shape such as 1x3x224x224") from None


def _options(*names: str) -> Callable[[Any], Any]:
    known = {
        "json": click.option("--json", "as_json", is_flag=True, help="Data on stdout, talk on stderr."),
        "device": click.option("--device", default="host", show_default=True, help="A name from `amc-hw devices`."),
        "model": click.option("--model", default=DEFAULT_MODEL, show_default=True, help="NAME[?key=value]."),
        "input": click.option("--input", "input_shape", callback=_shape, help="Input shape, such as 1x3x224x224."),
        "threads": click.option("--threads", type=click.IntRange(1), help="Of the runtime; default: the device's."),
        "multiple": click.option("--channel-multiple", type=click.IntRange(1), help="Widths are multiples of it."),
        "floor": click.option("--floor", default=0.2, show_default=True, help="Smallest fraction of channels kept."),
        "seed": click.option("--seed", default=0, show_default=True, type=click.IntRange(0)),
        "widths": click.option("--widths", help="24,48,... one per group, or conv1=24,..."),
    }

    def add(command: Any) -> Any:
        for name in reversed(names):
            command = known[name](command)
        return command

    return add


SUBJECT = ("device", "model", "input", "threads", "multiple", "floor")


def _print(result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    click.echo(json.dumps(result) if as_json else "\n".join(lines(result)))


def _progress(done: int, total: int, _detail: float) -> None:
    if sys.stderr.isatty() and total:
        click.echo(f"\r  {done} of {total}   ", err=True, nl=False)


def _subject(arguments: dict[str, Any]) -> api.Subject:
    names = ("device", "model", "input_shape", "threads", "channel_multiple", "floor")
    return api.open_subject(**{name: arguments.pop(name) for name in names})


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="amc-hw")
def cli() -> None:
    """Channel pruning under a measured latency budget.

    \b
    amc-hw profile --device host --model mobilenet_v1     build the latency table
    amc-hw validate --device host --model mobilenet_v1    how far can it be trusted?
    amc-hw measure --model mobilenet_v1 --widths 24,48,96,80,192,200,328,352,368,360,328,400,736,752
    """


@cli.group(invoke_without_command=True)
@_options("json")
@click.pass_context
def devices(context: click.Context, as_json: bool) -> None:
    """List devices and their tables.

    \b
    amc-hw devices
    amc-hw devices check host
    """
    if context.invoked_subcommand is None:
        _print(
            api.list_devices(),
            as_json,
            lambda r: [f"{d['name']:<14}{d['runtime']:<14}{d['description']}" for d in r["devices"]],
        )


@devices.command("check")
@click.argument("name")
@_options("json")
@click.pass_context
def check(context: click.Context, name: str, as_json: bool) -> None:
    """What is there and what is missing on a device.

    \b
    amc-hw devices check host-litert
    """
    result = api.check_device(name)
    _print(
        result,
        as_json,
        lambda r: [f"{'ok' if p['ok'] else 'MISSING':<8}{p['name']}: {p['text']}" for p in r["probes"]],
    )
    context.exit(0 if result["ok"] else 3)


@cli.command()
@_options("model", "input", "json")
def graph(model: str, input_shape: tuple[int, ...] | None, as_json: bool) -> None:
    """Channel groups, their order and widths; what is frozen, and why.

    \b
    amc-hw graph --model torchvision:resnet18
    """
    _print(
        api.describe_graph(model, input_shape=input_shape),
        as_json,
        lambda r: [
            *(f"{g['width']:>6}  {g['name']} -> {', '.join(g['consumers'])}" for g in r["groups"]),
            *(f"frozen {f['name']} ({f['width']}): {f['reason']}" for f in r["frozen"]),
            f"{r['macs'] / 1e6:.1f} MMACs, {r['params'] / 1e6:.2f} M parameters (batch-norms folded)",
        ],
    )


@cli.command()
@_options(*SUBJECT, "seed", "json")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Stop then; the next run goes on.")
def profile(as_json: bool, seed: int, max_minutes: float | None, **arguments: Any) -> None:
    """Measure what the latency table lacks; resumes where it stopped.

    \b
    amc-hw profile --device host-litert --model mobilenet_v1
    """
    result = api.profile(_subject(arguments), seed=seed, max_minutes=max_minutes, progress=_progress)
    _print(
        result,
        as_json,
        lambda r: [f"{r['table']}: {r['rows_new']} new rows, {r['rows_total']} in all, {r['seconds']:.0f} s"],
    )


@cli.command()
@_options(*SUBJECT, "seed", "json")
@click.option("--samples", default=20, show_default=True)
def validate(as_json: bool, seed: int, samples: int, **arguments: Any) -> None:
    """Predicted against measured latency on fresh random pruned networks.

    \b
    amc-hw validate --device host --model mobilenet_v1 --samples 30
    """
    result = api.validate(_subject(arguments), samples=samples, seed=seed, progress=_progress)
    _print(
        result,
        as_json,
        lambda r: [
            *(f"{s['predicted_ms']:9.4f} ms predicted {s['measured_ms']:9.4f} measured" for s in r["samples"]),
            f"median error {r['median_abs_pct_error']:.1f}%, {r['within_5pct']:.0%} within 5%, "
            f"{r['within_10pct']:.0%} within 10%, Spearman {r['spearman']:.3f}",
        ],
    )


@cli.command()
@_options(*SUBJECT, "widths", "json")
def predict(as_json: bool, widths: str | None, **arguments: Any) -> None:
    """End-to-end latency from the table alone.

    \b
    amc-hw predict --device host --model mobilenet_v1 --widths features.0=24
    """
    subject = _subject(arguments)
    result = api.predict(subject, subject.graph.parse_widths(widths) if widths else None)
    error = "unknown error" if result["error_pct"] is None else f"90% within {result['error_pct']:.1f}%"
    _print(result, as_json, lambda r: [f"{r['predicted_ms']:.4f} ms predicted ({error})"])


@cli.command()
@_options(*SUBJECT, "widths", "seed", "json")
@click.option("--max-ms", type=click.FloatRange(0, min_open=True), help="Exit 4 where the pruned network is slower.")
@click.pass_context
def measure(
    context: click.Context, as_json: bool, widths: str | None, seed: int, max_ms: float | None, **arguments: Any
) -> None:
    """Time a pruned network on the device beside the unpruned one.

    \b
    amc-hw measure --device host --model mobilenet_v1 --widths 24,48,96,80,192,200,328,352,368,360,328,400,736,752
    """
    subject = _subject(arguments)
    full = subject.graph.full_widths
    result = api.measure(subject, subject.graph.parse_widths(widths) if widths else full, seed=seed)
    low, high = result["speedup_ci95"]
    _print(
        result,
        as_json,
        lambda r: [
            f"{r['baseline_ms']:.4f} ms -> {r['pruned_ms']:.4f} ms: {r['speedup']:.2f}x (95%: {low:.2f} to {high:.2f})"
            f" on {r['device']}, {r['runtime']}, {r['threads']} thread(s)"
        ],
    )
    if max_ms is not None and result["pruned_ms"] > max_ms:
        click.echo(f"measured {result['pruned_ms']:.4f} ms, above --max-ms {max_ms}", err=True)
        context.exit(4)


@cli.command()
@_options(*SUBJECT, "seed", "json")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Trained weights (a state dict).")
@click.option("--data", default=DEFAULT_DATA, show_default=True, help="digits, imagefolder:PATH, cifar10:PATH, ...")
@click.option("--latency-ms", type=float, help="Budget: measured milliseconds.")
@click.option("--latency-ratio", type=float, help="Budget: measured share of the unpruned latency.")
@click.option("--flops-ratio", type=float, help="Budget: share of the unpruned MACs.")
@click.option("--params-ratio", type=float, help="Budget: share of the unpruned parameters.")
@click.option("--episodes", default=400, show_default=True, type=click.IntRange(1))
@click.option("--slack", default=0.02, show_default=True, help="How far a measurement may exceed the budget.")
@click.option("--expect-accuracy", type=float, help="Refuse to go on where the unpruned accuracy differs.")
@click.option("--out", type=click.Path(path_type=Path), help="The run; an interrupted one goes on.")
def search(as_json: bool, out: Path | None, **arguments: Any) -> None:
    """Find a policy under a budget; time the winner.

    \b
    amc-hw search --latency-ratio 0.5
    amc-hw search --device host-litert --model resnet56 --checkpoint w.pt --data imagefolder:PATH --latency-ratio 0.6
    """
    model = arguments["model"]
    subject = _subject(arguments)
    given = [f"{name}{arguments[name]:g}" for name in api.BUDGETS if arguments[name] is not None]
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in model)
    folder = Path("runs") / f"{safe}-{subject.device.name}-{'-'.join(given)}-{arguments['seed']}"
    result = api.search(subject, model, api.SearchConfig(out or folder, **arguments), progress=_progress)
    _print(
        result,
        as_json,
        lambda r: [
            f"accuracy   {r['baseline_accuracy']:8.4f} -> {r['accuracy']:8.4f} (test)",
            f"latency ms {r['baseline_ms']:8.4f} -> {r['measured_ms']:8.4f} (predicted {r['predicted_ms']:.4f})",
            f"speed-up   {r['speedup']:.2f}x",
            f"MMACs      {r['baseline_macs'] / 1e6:8.2f} -> {r['macs'] / 1e6:8.2f}",
            r["policy"],
        ],
    )


def main() -> None:
    warnings.showwarning = lambda message, *_rest, **_more: click.echo(f"warning: {message}", err=True)
    try:
        sys.exit(cli(standalone_mode=False))  # a command that ends with context.exit gives its code back here
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"amc-hw: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: the same command goes on from here", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
