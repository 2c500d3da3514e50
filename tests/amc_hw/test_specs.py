"""Specs: parsing, round trips, typed options, and the factories that they can name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amc_hw.errors import UserError
from amc_hw.specs import (
    Spec,
    call_factory,
    guess_options,
    parse_spec,
    positive_float,
    positive_int,
    read_options,
    unknown_name,
)


def one_line_error(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "name", "path", "options"),
    [
        ("digits", "digits", None, {}),
        ("mobilenet_v1?width=0.5", "mobilenet_v1", None, {"width": "0.5"}),
        ("torchvision:resnet18?num_classes=10", "torchvision", "resnet18", {"num_classes": "10"}),
        ("imagefolder:/data/a b?size=224&resize=256", "imagefolder", "/data/a b", {"size": "224", "resize": "256"}),
        (r"imagefolder:C:\data", "imagefolder", r"C:\data", {}),
        ("npz:/data/x.py:y", "npz", "/data/x.py:y", {}),
        ("net.py:make", "net.py", "make", {}),
        ("../nets/net.py:make?depth=3", "../nets/net.py", "make", {"depth": "3"}),
        ("/odd:folder/net.py:make", "/odd:folder/net.py", "make", {}),
        (r"C:\nets\net.py:make", r"C:\nets\net.py", "make", {}),
        ("net.py", "net.py", None, {}),
        ("package.module:make", "package.module", "make", {}),
        ("a?url=x=y:z?w", "a", None, {"url": "x=y:z?w"}),
        ("a?empty=", "a", None, {"empty": ""}),
    ],
)
def test_parse(text: str, name: str, path: str | None, options: dict[str, str]) -> None:
    spec = parse_spec(text)
    assert spec == Spec(name, path, options)
    assert str(spec) == text
    assert parse_spec(spec) is spec
    assert spec.is_file == name.endswith(".py")


@pytest.mark.parametrize("text", ["", ":x", "?a=1", "a:", "net.py:", "a?", "a?b", "a?=1", "a?b=1&", "a?b=1&b=2"])
def test_malformed(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_spec(text)
    assert repr(text) in one_line_error(caught)


@pytest.mark.parametrize(
    ("name", "path", "options"),
    [("a:b", None, {}), ("a", "b?c", {}), ("a", "", {}), ("a", None, {"k&": "v"}), ("a", None, {"k": "v&w=x"})],
)
def test_parts_that_would_read_back_differently_are_refused(name: str, path: str | None, options: dict) -> None:
    with pytest.raises(UserError) as caught:
        Spec(name, path, options)
    one_line_error(caught)


words = st.text(st.characters(exclude_characters=":?&="), min_size=1)
paths = st.text(st.characters(exclude_characters="?"), min_size=1)
options = st.dictionaries(words, st.text(st.characters(exclude_characters="&")), max_size=4)
files = st.builds("{}/{}.py".format, words, words)


@given(name=words, path=st.none() | paths, options=options)
def test_round_trip(name: str, path: str | None, options: dict[str, str]) -> None:
    try:
        spec = Spec(name, path, options)
    except UserError:
        # the only parts so built that read as something else: "x/" + ":a.py:b" is a file in an odd folder
        assert path is not None and ".py:" in f"{name}:{path}"
        return
    again = parse_spec(str(spec))
    assert again == spec
    assert list(again.options) == list(options)
    assert hash(again) == hash(spec)


@given(name=files, path=words, options=options)
def test_round_trip_of_files(name: str, path: str, options: dict[str, str]) -> None:
    spec = parse_spec(str(Spec(name, path, options)))
    assert (spec.name, spec.path, spec.options) == (name, path, options)


@given(st.text() | st.text(alphabet="ab.:?&=/py"))
def test_any_text_is_read_back_exactly_or_refused(text: str) -> None:
    try:
        spec = parse_spec(text)
    except UserError as exc:
        assert "\n" not in str(exc)
    else:
        assert str(spec) == text


def test_a_spec_keeps_its_own_options() -> None:
    given_options = {"width": "1"}
    spec = Spec("a", options=given_options)
    given_options["width"] = "2"
    assert spec.options == {"width": "1"}


def test_read_options() -> None:
    spec = parse_spec("a?width=0.5&depth=3")
    assert read_options(spec, {"width": positive_float, "depth": positive_int, "more": str}) == {
        "width": 0.5,
        "depth": 3,
    }


def test_unknown_option_lists_the_known() -> None:
    with pytest.raises(UserError) as caught:
        read_options(parse_spec("mobilenet_v1?widht=0.5"), {"width": positive_float, "num_classes": positive_int})
    message = one_line_error(caught)
    assert "'widht'" in message and "width, num_classes" in message
    with pytest.raises(UserError) as caught:
        read_options(parse_spec("digits?size=8"), {})
    assert "digits takes no options" in one_line_error(caught)


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", ""])
def test_bad_option_values(text: str) -> None:
    for convert in (positive_float, positive_int):
        with pytest.raises(UserError) as caught:
            read_options(Spec("a", options={"width": text}), {"width": convert})
        assert "'width'" in one_line_error(caught) and repr(text) in str(caught.value)


def test_guessed_options() -> None:
    spec = parse_spec("a?i=3&f=0.5&t=true&n=none&s=abc")
    assert guess_options(spec) == {"i": 3, "f": 0.5, "t": True, "n": None, "s": "abc"}


def test_unknown_name_offers_what_is_close() -> None:
    message = str(unknown_name("model", "resnet2O", ["resnet56", "resnet20"]))
    assert "did you mean resnet20" in message
    assert "resnet20, resnet56, file.py:factory" in message


def call(text: str) -> object:
    return call_factory(parse_spec(text), kind="model", known=["resnet20"])


@pytest.fixture
def factory_file(tmp_path: Path) -> Path:
    (tmp_path / "sibling_of_net.py").write_text("SIZE = 7\n")
    file = tmp_path / "net.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from sibling_of_net import SIZE\n"
        "@dataclass\n"
        "class Made:\n    depth: int\n    size: int\n"
        "def make(depth=1):\n    return Made(depth, SIZE)\n"
        "def broken():\n    raise OSError('first\\nsecond')\n"
    )
    return file


def test_a_factory_in_a_file(factory_file: Path) -> None:
    path_before = list(sys.path)
    made = call(f"{factory_file}:make?depth=3")
    assert (made.depth, made.size) == (3, 7)  # type: ignore[attr-defined]
    assert type(call(f"{factory_file}:make")) is type(made)  # the file ran once
    assert sys.path == path_before


def test_a_file_is_read_as_it_is_however_soon_it_was_changed(tmp_path: Path) -> None:
    """Not as Python compiled it before: of the same size, and in its clock of the same second, it would."""
    path = tmp_path / "net.py"

    def made(text: str) -> object:
        path.write_text(f"def make():\n    return {text}\n")
        os.utime(path, (1e9, 1e9))
        return call_factory(parse_spec(f"{path}:make"), kind="model", known=())

    assert [made(text) for text in ("'a'", "'b'", "'a'")] == ["a", "b", "a"]
    assert not list(tmp_path.glob("__pycache__/*"))


def test_a_factory_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("fractions:Fraction?numerator=3&denominator=4") * 4 == 3  # type: ignore[operator]
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("def make(): return 'made'\n")
    monkeypatch.chdir(tmp_path)  # the working directory is looked in, as `python -m` does
    assert call("package_of_mine.nets:make") == "made"
    assert call("fractions:Fraction.from_float?f=0.5") == 0.5


def test_factory_errors(factory_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    needy = tmp_path / "needy.py"
    needy.write_text("import no_such_module_at_all\n")
    for text, part in [
        (f"{tmp_path}/none.py:make", "there is no file"),
        (f"{factory_file}", f"write {factory_file}:FACTORY"),
        (f"{factory_file}:mak", "has no function 'mak': it has Made, make, broken"),
        (f"{factory_file}:SIZE", "has no function 'SIZE'"),
        (f"{factory_file}:Made.nothing", "has no function 'Made.nothing'"),
        ("fractions:Fraction.nothing.at_all", "has no function 'Fraction.nothing.at_all'"),
        (f"{factory_file}:make?width=3", "the options of make are depth"),
        (f"{factory_file}:broken", "raised OSError: first"),
        (f"{broken}:f", "cannot be imported: SyntaxError"),
        (f"{needy}:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("no_such_module_at_all.nets:f", "unknown model 'no_such_module_at_all.nets'"),
        ("resnet21:f", "did you mean resnet20?"),
        ("resnet21", "package.module:factory"),
        ("fractions:nothing", "has no function 'nothing'"),
        ("not/a module:f", "unknown model"),
    ]:
        with pytest.raises(UserError) as caught:
            call(text)
        assert part in one_line_error(caught)
