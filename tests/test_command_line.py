"""Options that commands share: one spelling, one meaning; former spellings; what a value may be."""

import argparse
from pathlib import Path

import pytest
import torch

from eval.features.statistics import default_cache
from eval.scripts import add_cache_arguments
from miscc.command_line import (
    add_data_dir_option,
    add_device_option,
    gpu_number,
    named_device,
    parser_with_settings,
    seed_number,
    settings_from,
)
from miscc.errors import ConfigError, run_command
from miscc.vocabulary import read_words


def parse(*words, former=()):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_device_option(parser)
    add_data_dir_option(parser, "the data", *former)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("value", "device", "number"),
    [
        ("-1", "cpu", -1),
        ("cpu", "cpu", -1),
        ("0", "cuda:0", 0),
        ("3", "cuda:3", 3),
        ("cuda:3", "cuda:3", 3),
        ("cuda", "cuda", 0),
    ],
)
def test_gpu_and_device_are_one_option(value, device, number):
    assert parse("--gpu", value).device == parse("--device", value).device == device
    assert gpu_number(device) == number


def test_devices_that_are_not_there_are_named():
    assert parse().device is None and gpu_number(None) is None
    assert named_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"--gpu \(--device\) cuda:77: cannot be used here"):
        named_device("cuda:77")
    with pytest.raises(ConfigError, match=r"--gpu \(--device\) mps: must be the number of a GPU"):
        gpu_number("mps")


def test_the_data_folder_has_one_name_and_its_former_ones():
    words = (("--data-dir", "x"), ("--root", "x"))
    assert [parse(*pair, former=["--root"]).data_dir for pair in words] == [Path("x"), Path("x")]


def test_the_folder_of_kept_statistics_has_one_name_and_its_former_one():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_cache_arguments(parser)
    assert [parser.parse_args([word, "x"]).cache_dir for word in ("--cache-dir", "--cache")] == [Path("x"), Path("x")]
    assert parser.parse_args(["--no-cache"]).cache_dir is None and parser.parse_args([]).cache_dir == default_cache()


def test_short_forms_come_after_set_and_win():
    parser = parser_with_settings("about", "cfg/bird.yml")
    options = parser.parse_args(["--set", "SEED", "1", "GPU_ID", "5", "--manualSeed", "2", "--gpu", "-1", "--cache"])
    pairs = settings_from(options)
    assert dict(pairs) == {"SEED": "2", "GPU_ID": "-1", "DATA_CACHE": "True"}
    for spelling in ("--data-dir", "--data_dir"):
        assert settings_from(parser.parse_args([spelling, "d"])) == [("DATA_DIR", "d")]


@pytest.mark.parametrize(("text", "valid"), [("0", True), ("4294967295", True), ("4294967296", False), ("-1", False)])
def test_seeds_are_what_numpy_takes(text, valid):
    if valid:
        assert seed_number(text) == int(text)
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            seed_number(text)


def test_what_the_system_says_of_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(SystemExit) as stopped:
            run_command(path.stat)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")

    # A file that may not be read is not damaged, so the way out is another one.
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "vocabulary.json"
    with monkeypatch.context() as patches, pytest.raises(SystemExit) as stopped:
        patches.setattr("miscc.vocabulary.read_json", forbidden)
        run_command(lambda: read_words(path))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {path}: Permission denied; change its permissions\n"

    # An error of the program keeps its traceback.
    with pytest.raises(OSError, match="ours"):
        run_command(lambda: (_ for _ in ()).throw(OSError("ours")))
