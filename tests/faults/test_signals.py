"""Signals to one training and to several processes, and the loss of one of them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World, naming_lost_processes
from miscc.errors import TrainingError
from training.run_dir import RunDir
from training.trainer import Trainer, train

ROOT = Path(__file__).parents[2]
CPU = World(0, 1, torch.device("cpu"))
NAME = "00000-tiny-ssa_gan"


@pytest.fixture
def hang_up(monkeypatch):
    """The training's process gets a SIGHUP, as of a closed terminal, in its third step."""
    original = Trainer.train_step

    def step(self, *arguments):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", step)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_and_exits_with_129(tiny, tmp_path, hang_up, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert train(tiny(("TRAIN.SAVE_EVERY", "0")), CPU) == 129
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load_checkpoint(tmp_path / "output" / NAME / "checkpoints" / "last.pth")["step"] == 3
    assert capsys.readouterr().err.count("stopping after this step; once more to stop at once\n") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_changes_nothing(tiny, tmp_path, hang_up, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(tiny(("TRAIN.MAX_STEPS", "4")), CPU) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load_checkpoint(tmp_path / "output" / NAME / "checkpoints" / "last.pth")["step"] == 4
    assert "stopping" not in capsys.readouterr().err


# -- several processes ---------------------------------------------------------------------------------------------


def test_only_a_lost_message_to_another_process_is_named():
    two = World(1, 2, torch.device("cpu"))
    lost = "[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:\n1234"
    with pytest.raises(TrainingError, match=r"^process 1 of 2: another process has ended, .*--resume$") as error:
        with naming_lost_processes(two):
            raise RuntimeError(lost)
    assert "\n" not in str(error.value)

    # Other errors, and those of a process that trains alone, stay as they are.
    for world, text in ((two, "shapes do not fit"), (CPU, lost)):
        with pytest.raises(RuntimeError, match=re.escape(text[:15])), naming_lost_processes(world):
            raise RuntimeError(text)


def start_torchrun(yaml, tmp_path, *options):
    """Two processes under torchrun; returns it and their process numbers once they have taken three steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    command += ["main.py", "--cfg", str(yaml), "--gpu", "-1", "--continue", "--set", "TRAIN.MAX_EPOCH", "100"]
    command += ["TRAIN.MAX_STEPS", "60", "TRAIN.SAVE_EVERY", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    stats = tmp_path / "output" / NAME / "stats.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (stats.exists() and stats.read_text().count("\n") > 2):
            break
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(pid) for pid in children]


def ours(errors):
    """The lines on stderr that are not torchrun's own."""
    return [line for line in errors.splitlines() if line.startswith(("error:", "stopping", "Traceback"))]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(tiny_yaml, tmp_path):
    """Torchrun passes it on; both processes save and end in a line; then torchrun ends in a traceback of its own."""
    process, _ = start_torchrun(tiny_yaml, tmp_path)
    process.terminate()
    output, errors = process.communicate(timeout=300)
    run = RunDir(tmp_path / "output" / NAME)
    step = run.load()["step"]
    assert "go on with: the same command and --resume" in output, errors
    assert step % 10 == 0 and run.stats.read_text().count("\n") == step
    assert ours(errors).count("stopping after this step; once more to stop at once") == 2
    assert (
        "error:" not in errors
        and "SignalException" in errors
        and ours(errors).count("Traceback (most recent call last):") == 1
    )


@pytest.mark.slow
def test_torchrun_starts_lost_processes_again(tiny_yaml, tmp_path):
    """One of two is killed: torchrun ends the other and starts both again; --continue goes on from the last checkpoint."""
    process, children = start_torchrun(tiny_yaml, tmp_path, "--max-restarts=1")
    os.kill(children[-1], signal.SIGKILL)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    run = RunDir(tmp_path / "output" / NAME)
    assert run.load()["step"] == 60 and output.count("finished at step 60") == 1
    assert not [line for line in ours(errors) if line.startswith("Traceback")]
