"""Every command in README.md, CONTRIBUTING.md, SECURITY.md and docs/*.md is one that the programs take.

Commands are parsed by the programs' own parsers, settings read as a training would, and nothing is run. Of commands with
placeholders only what is literal is checked; a line that begins with "..." goes on from the command before it.
"""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import main as main_program
from eval.protocol.protocols import find_protocol
from miscc.command_line import setting_pairs, settings_from
from miscc.config import read_given
from miscc.errors import UserError
from training.settings import load_config, schema

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
BEGINNINGS = r"(?:(?:\.venv/bin/)?python|make|torchrun|pip|bench/\S+\.sh|\.\.\.)(?: |$)"
EXTERNAL = ("pytest", "venv")  # modules that are not ours
PLACEHOLDERS = ("…", "x", "data/x", "cfg/x.yml", "eval/x.py", "tests/test_x.py")


class ParsedError(Exception):
    """Raised in place of running a program: its options."""


def commands_of(text):
    """The commands in fenced blocks and between backquotes, in their order; continued lines joined."""
    found = []
    for block, inline in re.findall(r"```\w*\n(.*?)```|`([^`]+)`", text, re.S):
        lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines() or [" ".join(inline.split())]
        parts = [part.strip().replace("\\|", "|") for line in lines for part in line.split("&&")]
        found += [part.partition(" | ")[0] for part in parts if re.match(BEGINNINGS, part)]
    return found


def completed(commands):
    """The same, with "... OPTIONS" behind the command that it goes on from, and without a "..." at the end."""
    whole = []
    for command in commands:
        words = command.split(maxsplit=1)
        if words[0] != "...":
            whole.append(command.removesuffix(" ..."))
        elif whole and len(words) == 2:
            base = next(one for one in reversed(whole) if " --" in one)
            whole.append(f"{base} {words[1]}")
    return list(dict.fromkeys(whole))


COMMANDS = [(name, one) for name in DOCUMENTS for one in completed(commands_of((ROOT / name).read_text("utf-8")))]


def check_make(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\$[({{]{name}[)}}]" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), f"make knows no {word}"


def parsed(name, words, monkeypatch):
    """The options that a program's own parser makes of these words. Raises ValueError with what argparse has against them."""
    whole = argparse.ArgumentParser.parse_args

    def parse(parser, arguments=None, namespace=None):
        raise ParsedError(whole(parser, arguments, namespace))

    def refuse(parser, message):
        raise ValueError(f"{name}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(sys, "argv", [name, *words])
    package = (ROOT / name.replace(".", "/")).is_dir()
    with pytest.raises(ParsedError) as stopped:
        importlib.import_module(f"{name}.__main__" if package else name).main()
    return stopped.value.args[0]


def check_settings(name, options, words):
    """That file and `--set` are settings of the command, and that main.py's options go together."""
    if not options.cfg.startswith("cfg/"):  # a run's own file
        read_given(ROOT / "cfg/bird.yml", setting_pairs(options.set), schema())
        return
    cfg = load_config(ROOT / options.cfg, settings_from(options), command="gan" if name == "main" else "damsm")
    if name == "main":
        main_program.parse(main_program.mode_of(options, cfg), words)


def check(command, monkeypatch):
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        return check_make(words)
    if program == "pip":
        needed = [words[index + 1] for index, word in enumerate(words) if word == "-r"]
        return [(ROOT / name).stat() for name in needed]
    if program.endswith(".sh"):
        return (ROOT / program).stat()

    # The program: a script or a module.
    words = [word for word in words if not word.startswith("--nproc_per_node=")]
    is_module = words[0] == "-m"
    name, words = (words[1], words[2:]) if is_module else (words[0].removesuffix(".py").replace("/", "."), words[1:])
    if name in EXTERNAL or any(word in PLACEHOLDERS for word in command.split()):
        return None
    place = ROOT / name.replace(".", "/")
    assert place.is_dir() or place.with_suffix(".py").is_file(), f"there is no {name}"
    if not words:
        return None  # the program's name alone

    # Its options, and what their values name.
    options = parsed(name, words, monkeypatch)
    if name in ("main", "pretrain_DAMSM"):
        check_settings(name, options, words)
    return find_protocol(options.protocol) if hasattr(options, "protocol") else None


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{name}: {one}"[:80] for name, one in COMMANDS])
def test_a_documented_command_is_one_that_the_programs_take(document, command, monkeypatch):
    check(command, monkeypatch)


def test_the_documents_hold_as_many_commands_as_they_seem_to():
    found = [one for name, one in COMMANDS if name == "README.md"]
    assert len(found) > 60 and any("--protocol df-gan" in one for one in found)
    text = "a `make demo` b\n```bash\npython main.py \\\n  --cfg cfg/bird.yml && make x  # y\n```\n`... --resume`"
    assert completed(commands_of(text)) == [
        "make demo", "python main.py --cfg cfg/bird.yml", "make x  # y", "python main.py --cfg cfg/bird.yml --resume"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "make no_such_target",
        "make demo NO_SUCH_VARIABLE=1",
        "python main.py --cfg cfg/bird.yml --captoin a",
        "python main.py --cfg cfg/brid.yml --dry-run",
        "python main.py --cfg cfg/bird.yml --set TRAIN.BATCH_SIZ 8",
        "python main.py --cfg cfg/bird.yml --set TRAIN.BATCH_SIZE many",
        "python main.py --cfg cfg/bird.yml --caption a --each-split 3 --split test",
        "python -m eval.evaluate --checkpoint CKPT --protocol no-such-protocol",
        "python -m eval.no_such_module --checkpoint CKPT",
        "python eval/IS.py IMAGES --no-such-option",
        "bench/no_such_script.sh",
        "pip install -r no_such_file.txt",
    ],
)
def test_a_wrong_command_is_found(command, monkeypatch):
    with pytest.raises((UserError, ValueError, AssertionError, FileNotFoundError)):
        check(command, monkeypatch)
