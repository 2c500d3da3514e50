"""The page of a run: everything is inside, and what it says is what the run's files say."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from amc_hw import plots

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SUBJECT = ("--device", "fake", "--model", "nets.py:tiny", "--data", "npz:images.npz")
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def runs(profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search and a finished comparison; to be read, not changed."""
    folder = tmp_path_factory.mktemp("reported") / "here"
    shutil.copytree(profiled, folder)
    script = "import sys; from amc_hw.cli import main; sys.argv[0] = 'amc-hw'; main()"
    for arguments in (
        ("validate", *SUBJECT[:4], "--samples", "5"),
        ("search", *SUBJECT, "--latency-ratio", "0.6", "--episodes", "12", "--out", "run"),
        (
            "compare",
            *SUBJECT,
            *["--latency-ratio", "0.6", "--methods", "random,uniform", "--episodes", "6", "--matched", "--out", "both"],
        ),
    ):
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(runs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what is shown and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    def pictures(self) -> list[ET.Element]:
        found = [
            each.removeprefix("data:image/svg+xml;base64,") for each in self.references if each.startswith("data:image")
        ]
        return [ET.fromstring(base64.b64decode(each)) for each in found]


@pytest.mark.slow
def test_the_page_of_a_search_says_what_its_files_say(here: Path, amc_hw: Callable) -> None:
    done = amc_hw("report", "run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"file": "run/report.html", "files": ["run/report.html"]}
    done = amc_hw("report", "run", "both", "--out", "page.html")
    assert done.code == 2 and "--out names the page of one run" in done.mistake
    page = Page(Path("run/report.html").read_text())
    result = json.loads(Path("run/result.json").read_text())
    assert (
        "A made-up device" in page.text
        and f"{result['speedup']:.2f}x" in page.text
        and f"{result['accuracy']:.4f}" in page.text
    )
    for title in (
        "Channels kept", "Latency per layer", "Where the widths stand on their staircases",
        "What another millisecond would buy", "How far the table can be trusted", "The search", "How it was made",
    ):  # fmt: skip
        assert title in page.text, title
    assert "amc-hw search --device fake --model nets.py:tiny" in page.text and "None" not in page.text
    assert len(page.pictures()) >= 7
    assert all(each.startswith("data:") for each in page.references)  # nothing is fetched
    assert not re.search(r"https?://(?!www\.w3\.org)", Path("run/report.html").read_text())
    first = Path("run/report.html").read_bytes()
    assert amc_hw("report", "run").code == 0 and Path("run/report.html").read_bytes() == first


@pytest.mark.slow
def test_the_page_of_a_comparison_says_who_won(here: Path, amc_hw: Callable) -> None:
    assert amc_hw("report", "both", "--out", "page.html").code == 0
    page, found = Page(Path("page.html").read_text()), json.loads(Path("both/compare.json").read_text())
    assert all(line in page.text for line in found["verdict"]) and found["verdict"]
    assert page.text.count("flops, as fast as") >= 2 and len(page.pictures()) == 1


@pytest.mark.slow
def test_the_page_of_a_second_round_says_what_its_numbers_are_relative_to(here: Path, amc_hw: Callable) -> None:
    staged = ("search", "--from-policy", "run/policy.json", "--flops-ratio", "0.9", "--method", "uniform")
    assert amc_hw(*staged, "--out", "more").code == 0
    assert amc_hw("report", "more").code == 0
    page, result = Page(Path("more/report.html").read_text()), json.loads(Path("more/result.json").read_text())
    assert f"before this search {result['baseline_accuracy']:.4f}" in page.text
    assert "; unpruned " not in page.text.split("Channels kept")[0]


def test_what_is_over_the_budget_is_not_the_best_so_far() -> None:
    picture = ET.fromstring(plots.learning_curve([0.9, 0.5, 0.8, 0.7], [False, True, False, True]))
    (line,) = [each.get("d") for each in picture.iter() if each.get("d") and "clip-path" in each.attrib]
    heights = [float(each) for each in re.findall(r"[ML] \S+ (\S+)", line)]
    assert len(heights) == 3 and heights[0] == heights[1] > heights[2]  # a page is measured from its top


@pytest.mark.slow
def test_without_the_table_the_rest_is_shown(here: Path, amc_hw: Callable) -> None:
    shutil.rmtree("latency_tables")
    assert amc_hw("report", "run").code == 0
    page = Page(Path("run/report.html").read_text())
    assert "Not shown: no latency table" in page.text and "Channels kept" in page.text


@pytest.mark.slow
def test_with_another_networks_table_the_rest_is_shown(here: Path, amc_hw: Callable) -> None:
    table = Path("latency_tables/fake.jsonl")
    lines = [line for line in table.read_text().splitlines() if '"kind":"linear"' not in line]
    table.write_text("\n".join(lines) + "\n")
    assert amc_hw("report", "run").code == 0
    page = Page(Path("run/report.html").read_text())
    assert "Not shown: " in page.text and "has no measurement for linear" in page.text and "The search" in page.text


def test_a_page_replaces_no_file_of_something_else(here: Path, amc_hw: Callable) -> None:
    Path("net.py").write_text("def make(): ...\n")
    done = amc_hw("report", "run", "--out", "net.py")
    assert done.code == 2 and "net.py is there already, and not of amc-hw" in done.mistake
    assert Path("net.py").read_text() == "def make(): ...\n"
    for _ in range(2):
        assert amc_hw("report", "run", "--out", "page.html").code == 0
    Path("run/report.html").write_text("<html>by an earlier version</html>")  # the run's own
    assert amc_hw("report", "run").code == 0 and "amc-hw" in Path("run/report.html").read_text()


def test_a_folder_that_is_no_run_is_a_line(tmp_path: Path, amc_hw: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    done = amc_hw("report", "nothing")
    assert done.code == 2 and "nothing holds no finished search or comparison" in done.mistake
    assert "nowhere: there is no such folder" in amc_hw("report", "nowhere").mistake
    Path("file").touch()
    assert "file is no folder" in amc_hw("report", "file").mistake
    Path("torn").mkdir()
    Path("torn/result.json").write_text('{"policy": ')
    done = amc_hw("report", "torn")
    assert done.code == 2 and "cannot read torn/result.json" in done.mistake and not Path("torn/report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page is not opened in a browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_an_error_or_a_request(here: Path, amc_hw: Callable, width: int) -> None:
    assert amc_hw("report", "run").code == 0
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000",
        "--enable-logging=stderr", "--log-level=0", "--disable-background-networking",
        f"--user-data-dir={here}/browser", f"--log-net-log={here}/net.json", f"--screenshot={here}/page.png", f"file://{here}/run/report.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (here / "page.png").stat().st_size > 10_000, done.stderr
    assert "CONSOLE" not in done.stderr
    asked = re.findall(r'"url":"(https?://[^"]+)"', (here / "net.json").read_text())
    assert not [url for url in asked if "report" in url or "w3.org" in url]
