"""Command line: parse, call one function of `api`, print."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from amc_hw import lines
from amc_hw.choices import (
    BUDGETS,
    DEFAULT_MODEL,
    FORMATS,
    LAYER_NORM_LR,
    MAX_MINUTES,
    METHODS,
    PRECISIONS,
    TOLERANCE_PCT,
    USUAL_LR,
)
from amc_hw.console import (
    PATH,
    POLICY,
    SUBJECT,
    TASK,
    Group,
    Progress,
    api,
    completing,
    devices,
    options,
    run,
    show,
    tables,
)
from amc_hw.errors import UserError
from amc_hw.settings import FILE, check_there, extend_settings, read_settings, record_settings, write_settings
from profilers.device import WAYS, device_names, load_device


def _subject(arguments: dict[str, Any], **more: Any) -> api.Subject:
    names = ("device", "serials", "model", "input_shape", "threads", "dtype", "channel_multiple", "floor", "keep")
    return api.open_subject(**{name: arguments.pop(name) for name in names}, **more)


def _flag(name: str) -> str:
    return f"--{name.removesuffix('_shape')}"


def _typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _with_data(arguments: dict[str, Any], *, needed: bool = True) -> None:
    """The default network's data where none are named.

    needed: UserError where another network has neither data nor functions of the user's own.
    """
    model, task = arguments["model"], [arguments[name] for name in TASK]
    if model != DEFAULT_MODEL and not any(task):
        if not needed:
            return
        api.load_graph(model, input_shape=arguments["input_shape"])  # where that is mistyped, too, that comes first
    arguments["data"] = api.data_for(model, *task)


def _leave_out(context: click.Context, policy: str, *names: str) -> None:
    """UserError where a flag says what a policy says."""
    for name in names:
        if _typed(context, name):
            kept = " (amc_hw.save_pruned keeps weights of your own training)" if name == "checkpoint" else ""
            raise UserError(f"{policy} says what the network is: leave {_flag(name)} out{kept}")


def _of_policy(context: click.Context, arguments: dict[str, Any], found: api.Policy) -> None:
    """What a command takes of a policy where no flag says otherwise."""
    _leave_out(context, "--from-policy", "model", "input_shape")
    arguments |= {"model": found.model, "input_shape": found.input_shape}
    arguments |= {} if _typed(context, "device") else {"device": found.device}
    arguments |= {} if _typed(context, "dtype") else {"dtype": found.dtype}
    if arguments["device"] == found.device and not _typed(context, "threads"):
        arguments["threads"] = found.threads
    if not any(_typed(context, name) for name in TASK):
        arguments |= {"data": found.data, "evaluate": found.evaluate, "calibrate": found.calibrate}


def _subject_and_widths(
    context: click.Context, arguments: dict[str, Any]
) -> tuple[api.Subject, tuple[int, ...] | None, Any]:
    """Subject, widths (None where neither --widths nor --policy was given), and the pruned module of a policy."""
    widths, policy = arguments.pop("widths"), arguments.pop("policy")
    if policy is None:
        subject = _subject(arguments)
        return subject, None if widths is None else subject.graph.parse_widths(widths), None
    arguments.pop("keep")
    _leave_out(context, "--policy", "model", "widths", "input_shape", "keep")
    chosen = {name: arguments.pop(name) for name in ("serials", "threads", "dtype", "channel_multiple", "floor")}
    return api.open_policy(policy, device=arguments["device"] if _typed(context, "device") else None, **chosen)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="amc-hw")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Channel pruning under a measured latency budget.

    \b
    amc-hw profile --device host                   build the latency table
    amc-hw search --latency-ratio 0.5              find a policy, time the winner
    amc-hw measure --policy runs/.../policy.json   its real speed-up
    """
    if context.invoked_subcommand != "init" and not {"-h", "--help"} & set(sys.argv):
        found = read_settings()
        found |= {"seeds": str(found["seed"])} if "seed" in found else {}
        found |= {"input_shape": found.pop("input")} if "input" in found else {}
        context.default_map = dict.fromkeys(cli.commands, found)


@cli.command()
@options("device", "model", "input", "checkpoint", *TASK, "seed", "json")
@click.pass_context
def init(context: click.Context, as_json: bool, **values: Any) -> None:
    """Write amc-hw.toml: what the commands take when a flag is not given.

    \b
    amc-hw init
    amc-hw init --device host-litert --model resnet56 --checkpoint w.pt --data imagefolder:PATH
    amc-hw init --model net.py:make --checkpoint w.pt --evaluate task.py:score --calibrate task.py:inputs
    """
    if not _typed(context, "data"):  # the default is that of one network, and of no other that is named later
        values["data"] = None
    offered = [device["name"] for device in devices.list_devices()["devices"]]
    if sys.stdin.isatty() and not as_json and not _typed(context, "device"):
        values["device"] = click.prompt("device", type=click.Choice(offered), default=values["device"])
    load_device(values["device"])
    check_there(**{name: values[name] for name in ("model", "checkpoint", *TASK)})
    values["checkpoint"] = str(values["checkpoint"]) if values["checkpoint"] else None
    typed = {key: value for key, value in values.items() if _typed(context, key)}
    values, typed = _with_input(values), _with_input(typed)
    if FILE.exists() and typed:  # as `profile` leaves it, perhaps
        extend_settings(typed)
    else:
        write_settings({key: value for key, value in values.items() if value is not None})
    show({"file": str(FILE)}, as_json, lambda r: [f"wrote {r['file']}; next: amc-hw profile"])


def _with_input(values: dict[str, Any]) -> dict[str, Any]:
    """As amc-hw.toml names it."""
    shape = values.pop("input_shape", None)
    return values if shape is None else values | {"input": "x".join(map(str, shape))}


@cli.group("devices", invoke_without_command=True)
@options("json")
@click.pass_context
def device(context: click.Context, as_json: bool) -> None:
    """List devices and their tables.

    \b
    amc-hw devices
    amc-hw devices check host
    """
    if context.invoked_subcommand is None:
        show(devices.list_devices(), as_json, lines.devices)


@device.command("check")
@click.argument("name", shell_complete=completing(device_names))
@options("serial", "json")
@click.pass_context
def check_device(context: click.Context, name: str, serials: tuple[str, ...], as_json: bool) -> None:
    """What is there and what is missing on a device.

    \b
    amc-hw devices check host-litert
    """
    result = devices.check_device(name, serials=serials)
    show(result, as_json, lines.probes)
    context.exit(0 if result["ok"] else 3)


@device.command("setup")
@click.argument("name", shell_complete=completing(device_names))
@click.option("--binary", type=PATH, help="The runner's program, built for the device.")
@options("serial", "json")
@click.pass_context
def setup_device(
    context: click.Context, name: str, binary: Path | None, serials: tuple[str, ...], as_json: bool
) -> None:
    """Put the runner on a phone or board, and check it.

    \b
    amc-hw devices setup pixel --binary android_aarch64_benchmark_model
    """
    result = devices.setup_device(name, binary=binary, serials=serials)
    show(result, as_json, lines.probes)
    context.exit(0 if result["ok"] else 3)


@device.command("clean")
@click.argument("name", shell_complete=completing(device_names))
@options("serial", "json")
def clean_device(name: str, serials: tuple[str, ...], as_json: bool) -> None:
    """Remove all that was put on a phone or board.

    \b
    amc-hw devices clean pixel
    """
    show(devices.clean_device(name, serials=serials), as_json, lambda r: [f"removed {r['removed']} from {r['device']}"])


@cli.command()
@options("model", "input", "keep", "device", "json")
def graph(model: str, input_shape: tuple[int, ...] | None, keep: tuple[str, ...], device: str, as_json: bool) -> None:
    """Channel groups, their order and widths; what is frozen, why, and how much of the latency it locks.

    The latency is predicted from the device's table; without one there is only the share of the MACs.

    \b
    amc-hw graph --model torchvision:resnet18
    amc-hw graph --model torchvision:resnet18 --keep 'layer1.*'
    """
    show(api.describe_graph(model, input_shape=input_shape, keep=keep, device=device), as_json, lines.graph)


@cli.command()
@options(*SUBJECT, "seed", "checkpoint", *TASK, "json")
@click.option("--episodes", default=400, show_default=True, type=click.IntRange(1), help="Policies to try later.")
@options("refit", "workers", "expect")
@click.pass_context
def check(context: click.Context, as_json: bool, checkpoint: Path | None, **arguments: Any) -> None:
    """In a minute what to know before a long run: accuracy, groups, what is frozen, what profile and search will take.

    \b
    amc-hw check --model resnet56 --checkpoint w.pt --data imagefolder:PATH
    amc-hw check --model net.py:make --evaluate task.py:score --calibrate task.py:inputs
    """
    _with_data(arguments, needed=False)
    names = (*TASK, "episodes", "refit", "workers", "expect_accuracy", "seed")
    task = {name: arguments.pop(name) for name in names}
    if any(task[name] for name in TASK):
        checkpoint = api.checkpoint_for(arguments["model"], task["data"], checkpoint, progress=Progress())
    show(api.check_network(_subject(arguments, checkpoint=checkpoint), **task), as_json, lines.check)


@cli.command()
@options(*SUBJECT, "seed", "dry", "json")
@click.option(
    "--tolerance",
    default=TOLERANCE_PCT,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Percent that 90% of random networks should be predicted within.",
)
@click.option(
    "--max-minutes",
    default=MAX_MINUTES,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Stop then; the next run goes on.",
)
@click.option(
    "--way",
    default="auto",
    show_default=True,
    type=click.Choice(WAYS),
    help="How operators are measured: in context, alone, or whole networks only.",
)
@click.pass_context
def profile(
    context: click.Context,
    as_json: bool,
    seed: int,
    dry_run: bool,
    tolerance: float,
    max_minutes: float,
    way: str,
    **arguments: Any,
) -> None:
    """Measure what the latency table lacks; resumes where it stopped. Ends when predictions are within --tolerance.

    \b
    amc-hw profile --device host-litert --model mobilenet_v1
    """
    chosen = _with_input({name: arguments[name] for name in ("device", "model", "input_shape")})
    subject = _subject(arguments)
    if dry_run:
        show(api.plan_profile(subject, seed=seed, way=way), as_json, lines.profile_plan)
        return
    result = api.profile(subject, seed=seed, tolerance=tolerance, max_minutes=max_minutes, way=way, progress=Progress())
    if read_settings().get("model", chosen["model"]) != chosen["model"]:
        chosen.pop("input", None)  # of a model that the file does not name
    if recorded := record_settings(chosen):
        again = [_flag(name) for name in ("keep", "threads", "dtype") if _typed(context, name)]
        but = f" (repeat {', '.join(again)})" if again else ""
        names = f"{', '.join(recorded)} recorded in {FILE}"
        click.echo(f"{names}: the commands that follow need no flags for it{but}", err=True)
    show(result, as_json, lines.profile)


@cli.command()
@options(*SUBJECT, "seed", "dry", "json")
@click.option("--samples", default=20, show_default=True, help="Random networks to time.")
@click.option("--plot", type=PATH, help="A .svg or .png file: predicted against measured.")
def validate(as_json: bool, dry_run: bool, seed: int, samples: int, plot: Path | None, **arguments: Any) -> None:
    """Predicted against measured latency on fresh random pruned networks.

    \b
    amc-hw validate --device host --model mobilenet_v1 --samples 30
    """
    subject = _subject(arguments)
    if dry_run:
        show(api.plan_validate(subject, samples=samples, seed=seed), as_json, lines.validate_plan)
        return
    result = api.validate(subject, samples=samples, seed=seed, plot=plot, progress=Progress())
    show(result, as_json, lines.validate)


@cli.group()
def table() -> None:
    """Look at latency tables.

    \b
    amc-hw table list
    amc-hw table show pixel1
    """


@table.command("list")
@options("json")
def table_list(as_json: bool) -> None:
    """Every table there is: your own, then the shipped ones.

    \b
    amc-hw table list
    """
    show(tables.list_tables(), as_json, lines.tables)


@table.command("show")
@click.argument("name")
@options("json")
def table_show(name: str, as_json: bool) -> None:
    """What a table holds, and how well it predicts. NAME: a device, or a file.

    \b
    amc-hw table show pixel1
    """
    show(tables.show_table(name), as_json, lines.table)


@table.command("plot")
@click.argument("name")
@click.option("--op", help="A part of the operator's name in `table show`; default: the slowest.")
@click.option("--out", type=PATH, required=True, help="A .svg or .png file.")
@options("json")
def table_plot(name: str, op: str | None, out: Path, as_json: bool) -> None:
    """Latency of one operator against its width: the staircase.

    \b
    amc-hw table plot pixel1 --op "conv 14x14" --out staircase.svg
    """
    show(
        tables.plot_table(name, op=op, out=out),
        as_json,
        lambda r: [f"{r['file']}: {r['op']}, {r['points']} measured widths"],
    )


@table.command("merge")
@click.argument("paths", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, required=True, help="The new file.")
@options("json")
def table_merge(paths: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """One table of several of one identity.

    \b
    amc-hw table merge mine.jsonl yours.jsonl --out both.jsonl
    """
    show(tables.merge_tables(paths, out=out), as_json, lambda r: [f"{r['file']}: {r['rows']} rows"])


@table.command("export-csv")
@click.argument("name")
@click.option("--out", type=PATH, required=True, help="The file to write.")
@options("json")
def table_csv(name: str, out: Path, as_json: bool) -> None:
    """Every row as comma-separated values.

    \b
    amc-hw table export-csv pixel1 --out pixel1.csv
    """
    show(tables.export_csv(name, out=out), as_json, lambda r: [f"{r['file']}: {r['rows']} rows"])


@cli.command("import-log")
@click.argument("logs", nargs=-1, required=True, type=PATH)
@options(*SUBJECT, "widths", "json")
def import_log(as_json: bool, widths: str | None, logs: tuple[Path, ...], **arguments: Any) -> None:
    """Add rows to a table from logs of TFLite's benchmark_model, all of one network.

    \b
    amc-hw import-log --device pixel1 --model mobilenet_v1 run1.txt run2.txt
    amc-hw import-log --device pixel1 --model mobilenet_v1 --widths 24,48,... pruned.txt
    """
    subject = _subject(arguments)
    chosen = None if widths is None else subject.graph.parse_widths(widths)
    show(api.import_log(subject, chosen, logs), as_json, lines.import_log)


@cli.command()
@options(*SUBJECT, "widths", "policy", "json")
@click.pass_context
def predict(context: click.Context, as_json: bool, **arguments: Any) -> None:
    """End-to-end latency from the table alone.

    \b
    amc-hw predict --device host --model mobilenet_v1 --widths features.0=24
    """
    subject, widths, _ = _subject_and_widths(context, arguments)
    show(api.predict(subject, widths), as_json, lines.predict)


@cli.command()
@options(*SUBJECT, "widths", "policy", "seed", "json")
@click.option("--max-ms", type=click.FloatRange(0, min_open=True), help="Exit 4 where the pruned network is slower.")
@click.pass_context
def measure(context: click.Context, as_json: bool, seed: int, max_ms: float | None, **arguments: Any) -> None:
    """Time a pruned network on the device beside the unpruned one.

    \b
    amc-hw measure --policy runs/.../policy.json
    amc-hw measure --device host --model mobilenet_v1 --widths 24,48,96,80,192,200,328,352,368,360,328,400,736,752
    """
    subject, widths, module = _subject_and_widths(context, arguments)
    result = api.measure(subject, widths or subject.graph.full_widths, module=module, seed=seed)
    show(result, as_json, lines.measure)
    if max_ms is not None and result["pruned_ms"] > max_ms:
        click.echo(f"measured {result['pruned_ms']:.4f} ms, above --max-ms {max_ms}", err=True)
        context.exit(4)


@cli.command()
@options(*SUBJECT, "seed", "checkpoint", *TASK, "dry", "json")
@click.option("--latency-ms", type=float, help="Budget: measured milliseconds.")
@click.option("--latency-ratio", type=float, help="Budget: measured share of the unpruned latency.")
@click.option("--flops-ratio", type=float, help="Budget: share of the unpruned MACs.")
@click.option("--params-ratio", type=float, help="Budget: share of the unpruned parameters.")
@click.option(
    "--method",
    default="ddpg",
    show_default=True,
    shell_complete=completing(lambda: ("auto", *METHODS)),
    help=f"auto, or one of {', '.join(METHODS)}.",
)
@options("reward")
@click.option("--eval-device", default="cpu", show_default=True, help="Where networks are scored: cpu, cuda, cuda:1.")
@options("refit", "workers")
@click.option(
    "--episodes",
    default=400,
    show_default=True,
    type=click.IntRange(1),
    help="Policies to try; the agent wants 10 a group.",
)
@click.option("--slack", default=0.02, show_default=True, help="How far a measurement may exceed the budget.")
@options("expect")
@click.option("--from-policy", type=POLICY, help="Go on from a pruned, perhaps fine-tuned network: a policy.json.")
@click.option("--out", type=PATH, help="Folder of the run; an interrupted one goes on.")
@click.pass_context
def search(
    context: click.Context,
    as_json: bool,
    dry_run: bool,
    out: Path | None,
    checkpoint: Path | None,
    from_policy: Path | None,
    **arguments: Any,
) -> None:
    """Find a policy under a budget; time the winner.

    With --from-policy the budget is a share of that pruned network's cost, and the policy one of its unpruned network.

    \b
    amc-hw search --latency-ratio 0.5
    amc-hw search --device host-litert --model resnet56 --checkpoint w.pt --data imagefolder:PATH --latency-ratio 0.6
    """
    if from_policy is None:
        _with_data(arguments)
    else:
        _of_policy(context, arguments, api.load_policy(from_policy))
    model, names = arguments["model"], [field.name for field in fields(api.SearchConfig)]
    config = api.SearchConfig(out, **{name: arguments[name] for name in names if name in arguments})
    _ = config.budget, load_device(arguments["device"])  # mistakes come before a minute of training
    if from_policy is None:
        checkpoint = api.checkpoint_for(model, arguments["data"], checkpoint, progress=Progress())
    elif checkpoint is not None and _typed(context, "checkpoint"):
        raise UserError("--from-policy has weights of its own: leave --checkpoint out")
    subject = _subject(arguments, checkpoint=checkpoint, start=from_policy)
    if dry_run:
        show(api.plan_search(subject, config), as_json, lines.search_plan)
        return
    result = api.search(subject, config, progress=Progress())
    asked = {name: getattr(config, name) for name in ("method", "episodes", "slack")}
    show(result, as_json, lambda r: lines.search(r, start=from_policy, **asked))


@cli.command()
@options(*SUBJECT, "checkpoint", *TASK, "dry", "json")
@click.option("--latency-ms", "latency_ms", type=float, multiple=True, help="A budget; all of these are repeatable.")
@click.option("--latency-ratio", "latency_ratio", type=float, multiple=True, help="A budget.")
@click.option("--flops-ratio", "flops_ratio", type=float, multiple=True, help="A budget.")
@click.option("--params-ratio", "params_ratio", type=float, multiple=True, help="A budget.")
@click.option("--methods", default="all", show_default=True, help=f"all, or some of {', '.join(METHODS)}.")
@click.option("--seeds", default="0", show_default=True, help="0,1,2 for intervals.")
@click.option("--matched", is_flag=True, help="Beside each latency budget a FLOPs budget of equal measured latency.")
@click.option("--eval-device", default="cpu", show_default=True, help="Where networks are scored: cpu, cuda, cuda:1.")
@options("reward", "refit", "workers")
@click.option("--episodes", default=150, show_default=True, type=click.IntRange(1), help="Evaluations of each search.")
@click.option("--slack", default=0.02, show_default=True, help="How far a measurement may exceed the budget.")
@options("expect")
@click.option("--out", type=PATH, default=Path("runs/compare"), show_default=True, help="An interrupted one goes on.")
@click.pass_context
def compare(
    context: click.Context,
    as_json: bool,
    dry_run: bool,
    checkpoint: Path | None,
    methods: str,
    seeds: str,
    out: Path,
    **arguments: Any,
) -> None:
    """Search methods and budgets beside each other, every winner measured; what a latency budget earns over FLOPs.

    \b
    amc-hw compare --latency-ratio 0.5
    amc-hw compare --methods knapsack,ddpg --latency-ratio 0.5 --latency-ratio 0.7 --seeds 0,1,2 --matched
    """
    _with_data(arguments)
    budgets = tuple((name, value) for name in BUDGETS for value in arguments.pop(name))
    named = [part.strip() for part in methods.split(",") if part.strip()]
    chosen = tuple(METHODS if methods == "all" else named)
    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError:
        raise UserError(f"--seeds {seeds!r}: expected whole numbers such as 0,1,2") from None
    names = [
        "data",
        "evaluate",
        "calibrate",
        "reward",
        "refit",
        "eval_device",
        "workers",
        "episodes",
        "slack",
        "expect_accuracy",
    ]
    shared = api.SearchConfig(**{name: arguments.pop(name) for name in names})
    matched = arguments.pop("matched")
    config = api.CompareConfig(chosen, budgets, numbers, matched, shared, out)
    checkpoint = api.checkpoint_for(arguments["model"], shared.data, checkpoint, progress=Progress())
    subject = _subject(arguments, checkpoint=checkpoint)
    if dry_run:
        show(api.plan_compare(subject, config), as_json, lines.compare_plan)
        return
    result = api.compare(subject, config, progress=Progress())
    show(result, as_json, lines.compare)
    context.exit(0 if any(row["feasible"] for row in result["rows"]) else 4)


@cli.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@options("json")
@click.option("--out", type=PATH, help="The page to write, of one run; default: report.html in its folder.")
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """One HTML page per folder of a search or comparison: what was found, on which evidence, how to make it again.

    \b
    amc-hw report runs/mobilenet_v1-host-ort-latency_ratio0.5-1
    amc-hw report runs/compare --out compare.html
    """
    if out is not None and len(runs) > 1:
        raise UserError("--out names the page of one run, several are given: leave it out")
    files = [api.write_report(run, out)["file"] for run in runs]
    show({"file": files[0], "files": files}, as_json, lambda r: [f"wrote {file}" for file in r["files"]])


@cli.command()
@click.option("--policy", type=POLICY, help="A policy.json of a search, or its folder.")
@click.option("--unpruned", is_flag=True, help="The network that searches begin with, of --model and --checkpoint.")
@click.option("--format", "file_format", type=click.Choice(FORMATS), required=True, help="Format of the file.")
@click.option("--out", type=PATH, required=True, help="The file to write.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Images that the file takes.")
@click.option("--int8", is_flag=True, help="Quantized after training, calibrated on the data.")
@click.option("--int8-io", is_flag=True, help="Inputs and outputs in int8, too (of tflite).")
@options("model", "input", "checkpoint", *TASK, "json")
@click.pass_context
def export(context: click.Context, as_json: bool, policy: Path | None, unpruned: bool, **arguments: Any) -> None:
    """Write the pruned network, checked against PyTorch on images of its search's data, or of --data.

    \b
    amc-hw export --policy runs/.../policy.json --format onnx --out small.onnx
    amc-hw export --policy runs/.../policy.json --format tflite --int8 --out small.tflite
    amc-hw export --unpruned --format onnx --out whole.onnx
    """
    if (policy is None) != unpruned:
        raise UserError("give either --policy, for a pruned network, or --unpruned, with --model and --checkpoint")
    if policy is None:
        _with_data(arguments, needed=arguments["int8"])
        named = (arguments[name] for name in ("model", "data", "checkpoint"))
        arguments["checkpoint"] = api.checkpoint_for(*named, progress=Progress())
        result = api.export_unpruned(**arguments)
    else:
        known = ("model", "input_shape", "checkpoint", "evaluate", "calibrate")
        _leave_out(context, "--policy", *known)
        left = known if _typed(context, "data") else (*known, "data")
        result = api.export(policy, **{name: value for name, value in arguments.items() if name not in left})
    show(result, as_json, lines.export)


@cli.command()
@click.option("--policy", type=POLICY, required=True, help="A policy.json of a search, or its folder.")
@click.option("--data", help="Images with labels; default: those of the search.")
@click.option("--checkpoint", type=PATH, help="The unpruned network: reported beside, and teacher of --distill.")
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(1), help="Passes over the training split.")
@click.option(
    "--lr",
    type=float,
    help=f"Largest learning rate; a cosine takes it to zero.  [default: {USUAL_LR}; with layer-norms {LAYER_NORM_LR}]",
)
@click.option(
    "--batch", default=128, show_default=True, type=click.IntRange(2), help="Images of a step, on each process."
)
@click.option("--distill", default=0.0, show_default=True, help="Weight of the unpruned network's outputs in the loss.")
@click.option("--flip/--no-flip", default=False, show_default=True, help="Mirror images at random.")
@click.option(
    "--crop", default=0.125, show_default=True, type=click.FloatRange(0, 0.5), help="Shift them by this share."
)
@click.option("--precision", default="no", show_default=True, type=click.Choice(PRECISIONS), help="Mixed precision.")
@click.option("--out", type=PATH, help="Folder of the run; an interrupted one goes on.")
@options("seed", "dry", "json")
@click.pass_context
def finetune(context: click.Context, as_json: bool, dry_run: bool, policy: Path, **arguments: Any) -> None:
    """Train the pruned network to get accuracy back. Many GPUs: run it under torchrun or `accelerate launch`.

    \b
    amc-hw finetune --policy runs/.../policy.json --epochs 15
    amc-hw finetune --policy runs/.../policy.json --flip --distill 0.5 --checkpoint w.pt
    """
    for name in ("data", "checkpoint"):  # amc-hw.toml is of another network, perhaps: the policy says what it is
        arguments[name] = arguments[name] if _typed(context, name) else None
    config = api.FinetuneConfig(**arguments)
    if dry_run:
        show(api.plan_finetune(policy, config), as_json, lines.finetune_plan)
        return
    result = api.finetune(policy, config, progress=Progress())
    show(result, as_json, lines.finetune)


def main() -> None:
    run(cli, "amc-hw", goes_on=bool({"profile", "search", "compare", "finetune"} & set(sys.argv[1:3])))


if __name__ == "__main__":
    main()
