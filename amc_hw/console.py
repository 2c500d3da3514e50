"""What all commands share: options by name, standard output kept for the result, progress on standard error."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from amc_hw.choices import DEFAULT_DATA, DEFAULT_MODEL
from amc_hw.errors import UserError
from profilers.device import DTYPES, device_names

if TYPE_CHECKING:
    from amc_hw import api, devices, tables
else:

    class _Later:
        """A module that is imported where it is first asked for something: torch takes seconds, for which help, a
        mistyped flag and a list of devices need not wait."""

        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._module), name)

    api, devices, tables = map(_Later, ("amc_hw.api", "amc_hw.devices", "amc_hw.tables"))


def _of_its_model(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """What amc-hw.toml says of its own model is of no other that is typed."""
    source = context.get_parameter_source(str(parameter.name))
    known = context.lookup_default("model")
    other = known is not None and context.params.get("model", known) != known
    return None if source is click.core.ParameterSource.DEFAULT_MAP and other else value


def _shape(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    value = _of_its_model(context, parameter, value)
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a shape such as 1x3x224x224") from None


PATH = click.Path(path_type=Path)


class PolicyFile(click.Path):
    """A policy.json, also by its folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return api.policy_file(Path(os.fsdecode(super().convert(value, param, ctx))))


POLICY = PolicyFile(path_type=Path)


def completing(names: Callable[[], Sequence[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Names for the completion of a shell."""
    return lambda context, parameter, incomplete: [name for name in names() if name.startswith(incomplete)]


_OPTIONS = {
    "json": click.option("--json", "as_json", is_flag=True, help="JSON on stdout, messages on stderr."),
    "device": click.option(
        "--device",
        default="host",
        show_default=True,
        shell_complete=completing(device_names),
        help="A name from `amc-hw devices`.",
    ),
    "model": click.option("--model", default=DEFAULT_MODEL, show_default=True, help="NAME[?key=value], FILE.py:FN."),
    "input": click.option("--input", "input_shape", callback=_shape, help="Input shape, such as 1x3x224x224."),
    "threads": click.option(
        "--threads", type=click.IntRange(1), help="Threads of the runtime; default: the device's or policy's."
    ),
    "serial": click.option(
        "--serial",
        "serials",
        multiple=True,
        help="A phone's serial, or HOST:PORT; default: ANDROID_SERIAL, or the only one. Repeatable: profile uses all.",
    ),
    "dtype": click.option("--dtype", type=click.Choice(DTYPES), help="Numeric type of the network on the device."),
    "multiple": click.option("--channel-multiple", type=click.IntRange(1), help="Widths are multiples of it."),
    "floor": click.option("--floor", default=0.2, show_default=True, help="Smallest fraction of channels kept."),
    "keep": click.option("--keep", multiple=True, help="Modules left at full width, such as 'head.*'; repeatable."),
    "seed": click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**63 - 1),
        help="Random seed.",
    ),
    "widths": click.option("--widths", help="24,48,... one per group, conv1=24,..., or 0.5 of each."),
    "policy": click.option(
        "--policy", type=POLICY, help="A policy.json of a search or its folder, in place of --model and --widths."
    ),
    "checkpoint": click.option(
        "--checkpoint", type=PATH, callback=_of_its_model, help="Trained weights (a state dict)."
    ),
    "data": click.option(
        "--data", help=f"{DEFAULT_DATA} (of the default model), imagefolder:PATH, cifar10:PATH, npz:PATH, FILE.py:FN."
    ),
    "evaluate": click.option("--evaluate", help="file.py:fn, model -> score (higher is better): your own task."),
    "calibrate": click.option("--calibrate", help="file.py:fn, yields inputs of the network, to refit with."),
    "reward": click.option(
        "--reward", default="err", show_default=True, help="err or distortion; flops, params, latency need no budget."
    ),
    "refit": click.option(
        "--refit", default="faithful", show_default=True, help="How every policy tried is refitted: faithful or fast."
    ),
    "workers": click.option("--workers", default=1, show_default=True, help="Processes that score policies."),
    "expect": click.option(
        "--expect-accuracy", type=float, help="Stop where the unpruned held-out accuracy is more than 0.01 from this."
    ),
    "dry": click.option("--dry-run", is_flag=True, help="Say what would be done and how long it takes."),
}


def options(*names: str) -> Callable[[Any], Any]:
    """A decorator that adds options of `_OPTIONS` to a command."""

    def add(command: Any) -> Any:
        for name in reversed(names):
            command = _OPTIONS[name](command)
        return command

    return add


SUBJECT = ("device", "serial", "model", "input", "threads", "dtype", "multiple", "floor", "keep")
TASK = ("data", "evaluate", "calibrate")


_STDOUT = "amc_hw.stdout"


@contextmanager
def _result_alone() -> Iterator[TextIO]:
    """A file for the result on standard output; what a user's own code and libraries, in C too, print there is talk."""
    out = sys.stdout
    try:
        real = out.fileno() == 1
    except (OSError, ValueError):  # whoever calls us keeps it for himself
        real = False
    if not real:
        with redirect_stdout(sys.stderr):
            yield out
        return
    out.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            redirect_stdout(sys.stderr),
            os.fdopen(os.dup(kept), "w", encoding=out.encoding, errors=out.errors) as file,
        ):
            yield file
    finally:
        os.dup2(kept, 1)
        os.close(kept)


_SECTIONS = {
    "Network and data": "model input keep checkpoint data evaluate calibrate expect-accuracy from-policy eval-device",
    "Device": "device serial threads dtype channel-multiple",
    "Budget": "latency-ms latency-ratio flops-ratio params-ratio slack",
    "Search": "method methods matched reward refit floor episodes workers seed seeds",
    "Run": "out dry-run json help",
}
_MANY = 16  #: options and more are shown in sections


class _Command(click.Command):
    """Standard output holds the result alone; many options are shown in sections."""

    def invoke(self, ctx: click.Context) -> Any:
        with _result_alone() as ctx.meta[_STDOUT]:
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = {each.opts[-1].removeprefix("--"): each.get_help_record(ctx) for each in self.get_params(ctx)}
        if len(shown) < _MANY or set(shown) - set(" ".join(_SECTIONS.values()).split()):
            super().format_options(ctx, formatter)
            return
        for title, names in _SECTIONS.items():
            if rows := [record for name in names.split() if (record := shown.get(name)) is not None]:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Group(click.Group):
    command_class = _Command
    group_class = type


def show(result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    """A command's result on standard output, as JSON or as `lines` of text."""
    text = json.dumps(result) if as_json else "\n".join(lines(result))
    click.echo(text, file=click.get_current_context().meta.get(_STDOUT))


def run(command: click.Command, name: str, *, goes_on: bool = False) -> NoReturn:
    """A command as a program of that name: warnings and errors are one line each, and the exit code is the error's."""
    warnings.showwarning = lambda message, *_rest, **_more: click.echo(f"warning: {message}", err=True)
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    # what a scheduler sends, too: workers end, a phone is set back
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(command(standalone_mode=False))  # a command that ends with context.exit gives its code back here
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
        click.echo(f"{path}: {' '.join(error.format_message().split())} (see {path} -h)", err=True)
        sys.exit(error.exit_code)
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        click.echo(f"{name}: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"interrupted{': the same command goes on from here' if goes_on else ''}", err=True)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


class Progress:
    """A line on a terminal, with the time that is left; elsewhere what is said for the first time, and a line now and
    then."""

    FIRST_S, EVERY_S = 5.0, 30.0
    TELLING = 3  #: of the first ones, before what is left is told early: they take longer than others

    def __init__(self) -> None:
        self.start, self.said = time.monotonic(), ""
        self.wait = self.FIRST_S
        self.last, self.before, self.total = self.start, 0, 0
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        self.wait = self.FIRST_S if total != self.total else self.wait
        if done == 0 or total != self.total:  # another part of the work
            self.start, self.before, self.total = now, done or -1, total
        elif self.before < 0:  # what was done before the clock was set: a part may go on in its middle
            self.before = done - 1
        made = done - self.before if done else 0
        left = f"{(now - self.start) / made * (total - done):.0f} s left" if made else ""
        if not self.terminal:
            if done == 0 and text != self.said:
                self.said = text
                click.echo(text, err=True)
            elif done and now - self.last >= (self.wait if made >= self.TELLING else self.EVERY_S):
                self.wait = self.EVERY_S
                click.echo(f"{done}/{total}{left and f', {left}'}: {text}", err=True)
            else:
                return
            self.last = now
            return
        filled = 30 * done // max(total, 1)
        click.echo(f"\r\x1b[K[{'#' * filled:<30}] {done}/{total} {left} {text}", err=True, nl=False)
        if done == total:
            click.echo(err=True)
