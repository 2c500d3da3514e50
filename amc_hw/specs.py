"""Specs: the strings `NAME[:PATH][?key=value&...]` that name models and data sets, and the factories behind them.

    mobilenet_v1?width=0.5            a name of ours, with an option
    imagefolder:/data/pets?size=64    a source and where it lies
    nets/mine.py:factory?depth=3      a function in a file
    package.module:factory            a function in an importable module

Nothing is escaped: a path holds no `?`, an option's value no `&`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from amc_hw.choices import DATA_SETS
from amc_hw.errors import UserError

FACTORY_FORMS = ("file.py:factory", "package.module:factory")


@dataclass(frozen=True)
class Spec:
    """A parsed spec. `str(spec)` is the text that `parse_spec` reads back to an equal spec.

    For a factory, `name` is the file or module and `path` the function in it.
    Raises UserError when the parts cannot be written as a spec, such as a path with `?` in it.
    """

    name: str
    path: str | None = None
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        if _split(str(self)) != (self.name, self.path, self.options):
            raise UserError(f"{str(self)!r} would not be read back as it was meant: no ':' or '?' inside its parts")

    def __str__(self) -> str:
        path = "" if self.path is None else f":{self.path}"
        query = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}{path}{'?' if query else ''}{query}"

    @property
    def is_file(self) -> bool:
        """Whether the name is a Python file."""
        return self.name.endswith(".py")


def parse_spec(text: str | Spec) -> Spec:
    """Parse `NAME[:PATH][?key=value&...]`. Raises UserError on an empty part, an option without `=` or given twice."""
    return text if isinstance(text, Spec) else Spec(*_split(text))


def named_path(spec: Spec) -> str | None:
    """The Python file, or the file or folder of a data set, that a spec names; None where it names none."""
    return spec.name if spec.is_file else spec.path if spec.name in DATA_SETS else None


def _split(text: str) -> tuple[str, str | None, dict[str, str]]:
    head, question, query = text.partition("?")
    left, colon, attribute = head.rpartition(":")
    first = left.partition(":")[0]
    # A file may hold ':' itself (a drive, an odd folder): then it is the last one that counts.
    if colon and left.endswith(".py") and (len(first) == 1 or any(mark in first for mark in "/\\.")):
        name, path = left, attribute
    else:
        name, colon, path = head.partition(":")
    if not name:
        raise UserError(f"spec {text!r} has no name: write NAME[:PATH][?key=value&...]")
    if colon and not path:
        raise UserError(f"spec {text!r} has nothing after ':': write NAME:PATH")
    options: dict[str, str] = {}
    for item in query.split("&") if question else ():
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise UserError(f"spec {text!r}: {item!r} is not key=value")
        if key in options:
            raise UserError(f"spec {text!r} gives {key!r} twice")
        options[key] = value
    return name, path if colon else None, options


def positive_int(text: str) -> int:
    """Converter for `read_options`: a whole number of at least 1."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise ValueError("a whole number of at least 1")


def positive_float(text: str) -> float:
    """Converter for `read_options`: a finite number above 0."""
    with suppress(ValueError):
        if math.isfinite(value := float(text)) and value > 0:
            return value
    raise ValueError("a number above 0")


def read_options(spec: Spec, kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The options that were given, converted by `kinds` (a converter's ValueError says what it wants).

    Raises UserError on an option that is not in `kinds`, listing those that are, and on a bad value.
    """
    values = {}
    for key, text in spec.options.items():
        if key not in kinds:
            known = f"the options of {spec.name} are {', '.join(kinds)}" if kinds else f"{spec.name} takes no options"
            raise UserError(f"unknown option {key!r} in {str(spec)!r}: {known}")
        try:
            values[key] = kinds[key](text)
        except ValueError as exc:
            raise UserError(f"option {key!r} in {str(spec)!r} must be {exc}, not {text!r}") from exc
    return values


def guess_options(spec: Spec) -> dict[str, Any]:
    """The options for a callee whose types are not known: int, float, true, false, none where they read so, or str."""
    return {key: _guess(text) for key, text in spec.options.items()}


def _guess(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, forms: Iterable[str] = FACTORY_FORMS, listed: bool = True
) -> UserError:
    """The error for a name that nothing answers to: close matches first, then, where they are to be `listed`, `known`
    names and other `forms`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    if not listed:
        return UserError(f"unknown {kind} {name!r}{f': {hint.strip()}' if hint else ''}")
    return UserError(f"unknown {kind} {name!r}: {hint}known are {', '.join([*known, *forms])}")


def one_line(exc: BaseException) -> str:
    """An exception as `Type: first line of its message`, for the one line that a user's mistake gets."""
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__


def call_factory(spec: Spec, *, kind: str, known: Iterable[str]) -> Any:
    """Call what a `file.py:factory` or `package.module:factory` spec names, with the spec's options as keywords.

    `kind` ("model", "data set") and `known` (registered names) serve the message when nothing answers to the name.
    Raises UserError when file, module or function is missing or fails, or does not take an option.
    """
    factory = _resolve(spec, kind=kind, known=known)
    options = guess_options(spec)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-in callables have none
        signature = None
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as exc:
            known = ", ".join(signature.parameters) or "none"
            raise UserError(f"{str(spec)!r}: {exc}; the options of {spec.path} are {known}") from exc
    try:
        return factory(**options)
    except UserError:
        raise
    except Exception as exc:
        called = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(f"{spec.name}:{spec.path}{called and f' ({called})'} raised {one_line(exc)}") from exc


def load_function(spec: Spec, *, kind: str) -> Callable[..., Any]:
    """The function that a `file.py:function` or `package.module:function` spec names, its options filled in.

    Raises UserError as `call_factory` does where it is missing.
    """
    found = _resolve(spec, kind=kind, known=())
    options = guess_options(spec)
    return functools.partial(found, **options) if options else found


def source_sha256(text: str) -> str | None:
    """Of the Python file that a spec names, None where it names none."""
    spec = parse_spec(text)
    path = Path(spec.name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if spec.is_file and path.is_file() else None


def _resolve(spec: Spec, *, kind: str, known: Iterable[str]) -> Callable[..., Any]:
    if spec.path is None:
        if spec.is_file:
            raise UserError(f"{spec.name!r} does not say which function: write {spec.name}:FACTORY")
        raise unknown_name(kind, spec.name, known)
    try:
        module = _import_file(Path(spec.name)) if spec.is_file else _import_module(spec.name)
    except UserError:
        raise
    except Exception as exc:
        raise UserError(f"{spec.name} cannot be imported: {one_line(exc)}") from exc
    if module is None:
        raise unknown_name(kind, spec.name, known)
    factory: Any = module
    for name in spec.path.split("."):
        factory = getattr(factory, name, None)
    if not callable(factory):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        listed = f"it has {', '.join(own[:10])}" if own else "it defines none"
        raise UserError(f"{spec.name} has no function {spec.path!r}: {listed}")
    return factory


class _Source(importlib.machinery.SourceFileLoader):
    """Without what Python compiled before, which it takes for any file of the same second and size."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(path: Path) -> ModuleType:
    """The module in a file, run once for each version of the file; its folder is importable while it runs."""
    file = path.expanduser().resolve()
    if not file.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    key = hashlib.sha256(f"{file}\n".encode() + file.read_bytes()).hexdigest()[:16]
    name = f"_amc_hw_{file.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, file, loader=_Source(name, str(file)))
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        with _importable(file.parent):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType | None:
    """An importable module, the working directory included; None when there is no such module."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        with _importable(Path(os.getcwd())):
            return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name and (name == exc.name or name.startswith(f"{exc.name}.")):
            return None
        raise


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
