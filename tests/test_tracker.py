"""Experiment trackers: each number that goes to TensorBoard goes there, too; a missing package is said before training."""

import json
import sys
import types

import pytest
import torch

from miscc.distributed import World
from miscc.errors import ConfigError
from training.trainer import train


class FakeTracker(types.ModuleType):
    """As wandb and trackio look from here; notes what it is given."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_logged_goes_to_the_tracker(tiny, tmp_path, monkeypatch, name):
    package = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, package)
    train(tiny(("TRAIN.MAX_STEPS", "2"), ("TRAIN.TRACKER", name)), World(0, 1, torch.device("cpu")))
    run = tmp_path / "output" / "00000-tiny-ssa_gan"
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [step for step, _ in package.logged] == [line["step"] for line in lines]
    for (_, values), line in zip(package.logged, lines, strict=True):
        assert values == {key: value for key, value in line.items() if key not in ("step", "epoch")}
    started = package.started[0]
    assert started["name"] == run.name and started["config"]["TRAIN"]["NF"] == 1 and package.finished == 1
    assert ("id" in started) == (name == "wandb")

    # Resumed, it goes on under the same name.
    train(tiny(("TRAIN.MAX_STEPS", "3"), ("TRAIN.TRACKER", name)), World(0, 1, torch.device("cpu")), resume=True)
    assert package.started[1]["name"] == run.name and package.started[1]["resume"] == "allow"
    assert package.logged[-1][0] == 3


def test_a_tracker_that_cannot_start_is_said(tiny, monkeypatch):
    package = FakeTracker("wandb")

    def init(**options):
        raise RuntimeError("api_key not configured")

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(
        ConfigError, match="TRAIN.TRACKER: wandb cannot start .*api_key not configured.*; log in, or set"
    ):
        train(tiny(("TRAIN.TRACKER", "wandb")), World(0, 1, torch.device("cpu")))


def test_a_tracker_that_is_lost_costs_one_warning_and_not_the_training(tiny, tmp_path, monkeypatch, capsys):
    package = FakeTracker("wandb")
    plain = package.log

    def log(values, step):
        plain(values, step)
        raise ConnectionError("no route to host")

    package.log = log
    monkeypatch.setitem(sys.modules, "wandb", package)
    assert train(tiny(("TRAIN.MAX_STEPS", "3"), ("TRAIN.TRACKER", "wandb")), World(0, 1, torch.device("cpu"))) == 0
    assert len(package.logged) == 1 and package.finished == 1
    lines = (tmp_path / "output" / "00000-tiny-ssa_gan" / "stats.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert (
        capsys.readouterr().err.count("TRAIN.TRACKER: ConnectionError: no route to host; it gets no more numbers") == 1
    )


def test_a_missing_package_is_said_before_anything_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match="TRAIN.TRACKER: wandb is not installed; pip install wandb, or set it to none"
    ):
        train(tiny(("TRAIN.TRACKER", "wandb")), World(0, 1, torch.device("cpu")))
    assert not (tmp_path / "output").exists()


def test_other_trackers_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"TRAIN.TRACKER"):
        tiny(("TRAIN.TRACKER", "os"))
