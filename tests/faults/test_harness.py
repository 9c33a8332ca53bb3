"""A short form of `make faults`, and whether its harness sees what is wrong."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import harness
from faults.harness import Case, check_end, first_difference
from faults.kinds import KINDS, STOPPING
from faults.trainings import Ended, Place

from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from training.run_dir import RunDir
from training.settings import load_config
from training.trainer import train

ROOT = Path(__file__).parents[2]
CPU = World(0, 1, torch.device("cpu"))

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and prlimit")


def can_be_immutable(folder):
    """Whether `chattr +i` works on this file system."""
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["chattr", "-i", str(folder)], check=True)
    return True


def test_trainings_that_are_hit_by_each_kind_of_fault_end_as_if_undisturbed(tmp_path):
    # What this machine can do: root needs a file system that knows `chattr +i`.
    kinds = [name for name in KINDS if not harness.is_of_two(name)]
    if not os.geteuid() and not can_be_immutable(tmp_path):
        kinds.remove("folder read-only")

    # Which of them come too late, each time, depends on the machine's speed; few do.
    command = [sys.executable, "tests/faults/run.py", "--each", "--seed", "5", "--kinds", *kinds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(": 0 wrong")
    missed = [kind for kind in kinds if not re.search(rf"^\| {kind} \| [1-9]", done.stdout, re.MULTILINE)]
    assert len(missed) <= 2, f"{missed}\n{done.stdout}"


# -- whether it can fail -------------------------------------------------------------------------------------------


@pytest.fixture
def case(drawn_folder, encoders, tmp_path, monkeypatch):
    """A case whose training has ended after three steps."""
    monkeypatch.setattr(harness, "STEPS", 3)
    material = SimpleNamespace(seed=1, data=drawn_folder, encoders=encoders)
    place = Place(material, tmp_path / "case", tmp_path / "case")
    train(load_config(place.yaml, [("TRAIN.MAX_STEPS", "3")]), CPU)
    state = place.state(place.newest())
    material.reference = lambda processes: state
    return Case(material, place, None)


def test_an_undisturbed_training_is_found_right(case):
    assert case.verdict_at_the_end(1) == ""


@pytest.mark.parametrize("part", ["generator", "generator_ema", "discriminator", "moments"])
def test_a_weight_that_was_changed_by_the_last_bit_is_found(case, part):
    run = case.place.newest()
    checkpoint = load_checkpoint(run.last)
    state = checkpoint["optimizers"]["generator"]["state"][0] if part == "moments" else None
    tensors = state or checkpoint["networks"][part]["state"]
    value = next(tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim()).view(-1)
    value[0] = torch.nextafter(value[0], torch.tensor(9.0))
    save_checkpoint(run.last, checkpoint)
    assert "differs from an undisturbed training's: /" in case.verdict_at_the_end(1)


def test_lost_stats_and_temporary_files_are_found(case):
    run = case.place.newest()
    half = run.path / "pictures" / ".x.png.1234.tmp"
    half.touch()
    assert case.verdict_at_the_end(1) == "temporary files are left at the end: .x.png.1234.tmp"
    half.unlink()
    run.stats.write_text("".join(run.stats.read_text().splitlines(True)[1:]))
    assert case.verdict_at_the_end(1) == "stats.jsonl holds the steps [2, 3]"


def test_a_lost_checkpoint_is_found(case):
    case.saved = 3
    run = RunDir(case.place.newest().path)
    run.last.unlink()
    fault = KINDS["SIGKILL"][0](harness.Random(1), case.place)
    said = case.verdict(fault, True, [Ended(-9, "", "")], True)
    assert said == "step 3 was saved, and --resume would go on from step 2"


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (Ended(143, "", STOPPING + "\n"), ""),
        (Ended(0, "", ""), "exit code 0, not one of [143]: "),
        (Ended(None, "", ""), "it hung: "),
        (Ended(143, "", ""), "exit code 143, and on stderr: ''"),
        (Ended(143, "", f"{STOPPING}\nmore\n"), f"exit code 143, and on stderr: '{STOPPING}\\nmore'"),
        (Ended(143, "", f"{STOPPING}\nTraceback (most recent call last):\nE: x\n"), "a traceback: E: x"),
    ],
)
def test_other_ends_than_expected_are_found(ended, said):
    assert check_end(ended, {143: STOPPING}) == said


def test_first_difference_by_hand():
    state = {"a": [1, {"b": torch.tensor([1.0, 2.0])}], "c": 3}
    assert first_difference(state, {"a": [1, {"b": torch.tensor([1.0, 2.0])}], "c": 3}) == ""
    assert first_difference(state, {"a": [1, {"b": torch.tensor([1.0, 2.5])}], "c": 3}) == "/a/1/b: other numbers"
    assert first_difference(state, {"a": [1, {"b": torch.tensor([1.0, 2.0])}], "c": 4}) == "/c: 3, 4"
    assert first_difference(state, {"a": [1], "c": 3}) == "/a: other lengths"
    assert first_difference(state, {"c": 3}) == ": other names"
    assert first_difference(1, 1.0) == ": int, float"
