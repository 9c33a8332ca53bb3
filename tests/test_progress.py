"""Progress where it is shown: bars on a terminal, a line a minute elsewhere, nothing with --quiet; the same in every command."""

import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miscc import progress
from miscc.command_line import CommandParser
from miscc.progress import ProgressBar, say, set_quiet, wants_colour, write

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    """What calls itself a terminal."""

    def isatty(self):
        return True


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No line is due yet, nothing is quiet, and this is no CI."""
    monkeypatch.setattr(ProgressBar, "line_due", None)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    yield
    set_quiet(False)


def work(stream, clock, seconds=10, steps=30, **options):
    """`steps` steps of so many seconds each, shown there."""
    with ProgressBar(what="epoch 1/2", total=steps, stream=stream, clock=clock, **options) as bar:
        for step in range(steps):
            bar.set_facts(D=f"{step}.5", G="7")
            clock.now += seconds
            bar.update()
    return stream.getvalue()


def test_a_terminal_gets_a_bar():
    shown = work(Terminal(), Clock(), steps=3)
    assert "\r" in shown and "epoch 1/2:   0%" in shown and "0/3" in shown
    assert "epoch 1/2: 3 of 3 steps" not in shown


def test_a_file_gets_a_line_a_minute_with_the_same_facts():
    lines = work(io.StringIO(), Clock()).splitlines()
    assert lines[:2] == [  # 300 seconds: after 60, 120, ...
        "epoch 1/2: 6 of 30 steps, 0.1 steps/s, 0:04:00 left, D=5.5, G=7",
        "epoch 1/2: 12 of 30 steps, 0.1 steps/s, 0:03:00 left, D=11.5, G=7",
    ]
    assert len(lines) == 5


def test_the_speed_is_that_since_the_last_line():
    stream, clock = io.StringIO(), Clock()
    with ProgressBar(what="x", total=100, unit="images", initial=10, stream=stream, clock=clock) as bar:
        clock.now += 60
        bar.update(30)
        clock.now += 60
        bar.update(6)
    assert stream.getvalue().splitlines() == [
        "x: 40 of 100 images, 0.5 images/s, 0:02:00 left",
        "x: 46 of 100 images, 0.1 images/s, 0:09:00 left",
    ]


def test_many_short_bars_share_the_minute():
    stream, clock = io.StringIO(), Clock()
    for _ in range(60):  # an epoch of 3 seconds each: 3 minutes
        work(stream, clock, seconds=1, steps=3)
    assert len(stream.getvalue().splitlines()) == 3


def test_items_are_counted_and_need_no_length():
    stream, clock = io.StringIO(), Clock()
    for _ in ProgressBar(iter("abc"), "letters", unit="letters", stream=stream, clock=clock):
        clock.now += 60
    assert stream.getvalue().splitlines()[0] == "letters: 1 letters, 0.0167 letters/s"
    assert ProgressBar([1, 2, 3], stream=stream).total == 3


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_ci_and_dumb_terminals_get_lines(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    shown = work(Terminal(), Clock())
    assert "\r" not in shown and len(shown.splitlines()) == 5


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_leaves_out_progress_and_messages_and_nothing_else(stream, caplog):
    set_quiet(True)
    assert work(stream(), Clock()) == "" and work(stream(), Clock(), shown=False) == ""
    target = io.StringIO()
    say("under way", target)
    write("stopping", target)
    assert target.getvalue() == "stopping\n"
    progress.logging.getLogger("x").info("left out")
    progress.logging.getLogger("x").warning("kept")
    assert caplog.messages == ["kept"]

    set_quiet(False)
    say("under way", target)
    assert target.getvalue() == "stopping\nunder way\n"
    assert work(stream(), Clock()) != "" and work(stream(), Clock(), shown=False) == ""


def test_quiet_holds_from_the_moment_it_is_read():
    CommandParser().parse_args(["--quiet"])
    assert work(io.StringIO(), Clock()) == ""
    CommandParser().parse_args([])
    assert work(io.StringIO(), Clock()) != ""


def test_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour()
    monkeypatch.setenv("NO_COLOR", "")
    assert wants_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour()


def test_bars_and_parsers_are_made_in_one_place():
    """So every command has --quiet, and no log gets thousands of bars."""
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        if room in ("tests", "docs") or room.startswith("."):
            continue
        text = path.read_text(encoding="utf-8")
        assert path.name == "progress.py" and room == "miscc" or not re.search(r"^\s*(from|import) tqdm", text, re.M), (
            path
        )
        assert path.name == "command_line.py" or "ArgumentParser(" not in text, path


def test_commands_have_quiet():
    for name, make in [("main", lambda m: m.parser_of(())), ("eval.evaluate", lambda m: m.arguments())]:
        assert "--quiet" in make(importlib.import_module(name)).format_help()


def test_a_redirected_command_writes_no_bar_and_quiet_leaves_the_result(tmp_path):
    command = [sys.executable, "-m", "datasets.prepare", "toybirds", "--root", tmp_path / "toys", "--image-size", "32"]
    command += ["--train-size", "4", "--test-size", "2"]

    def run(*options):
        return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True)

    first, second, quiet = run(), run(), run("--quiet")
    assert first.stderr == "" and "ready: " in first.stdout
    assert "already there" in second.stdout
    assert "already there" not in quiet.stdout and quiet.stdout.splitlines()[-1].startswith("ready: ")
