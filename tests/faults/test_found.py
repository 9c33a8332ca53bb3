"""What `make faults` has found. A test bears the name of the finding."""

import os
import signal

import pytest
import torch

from datasets.loading import _Loader
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import DataError
from miscc.files import write_atomically
from miscc.lock import FolderLock
from training.run_dir import RunDir
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))


def test_last_and_previous_are_two_files_at_each_moment(tmp_path, monkeypatch):
    """They were one while a checkpoint took its place: a bit that flipped after a kill there damaged both."""
    run, replace, seen = RunDir(tmp_path), os.replace, []

    def watched(source, target):
        replace(source, target)
        seen.append(run.last.stat().st_ino != run.previous.stat().st_ino)

    for step in (1, 2):
        run.save({"networks": {}, "step": step})
    monkeypatch.setattr(os, "replace", watched)
    run.save({"networks": {}, "step": 3})
    assert seen == [True, True]
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["last.pth", "previous.pth"]
    assert [load_checkpoint(path)["step"] for path in (run.previous, run.last)] == [2, 3]


def test_a_run_whose_last_and_previous_are_one_file_saves_without_leftovers(tmp_path):
    """As kills of earlier versions left them: a rename of a file to another of its names does nothing, without an error."""
    run = RunDir(tmp_path)
    run.save({"networks": {}, "step": 1})
    os.link(run.last, run.previous)
    run.save({"networks": {}, "step": 2})
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["last.pth", "previous.pth"]
    assert [load_checkpoint(path)["step"] for path in (run.previous, run.last)] == [1, 2]


def test_ctrl_c_in_the_middle_of_a_checkpoint_is_no_runtime_error(tmp_path):
    """Torch's zip writer cannot close half an archive, and hides the interruption under a RuntimeError."""

    class Interrupting:
        def __init__(self, stream):
            self.stream, self.written = stream, 0

        def write(self, data):
            self.written += len(data)
            if self.written > 100_000:
                raise KeyboardInterrupt
            return self.stream.write(data)

        def flush(self):
            self.stream.flush()

    content = {"networks": {}, "x": [torch.ones(50_000) for _ in range(4)]}
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "last.pth", lambda stream: torch.save(content, Interrupting(stream)))
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_beside_pictures_and_stats_goes_away(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    run = RunDir(tmp_path / "output" / "00000-tiny-ssa_gan")
    left = [folder / ".x.1234.tmp" for folder in (run.path, run.path / "pictures", run.last.parent)]
    for path in left:
        path.touch()
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU, resume=True)
    assert not any(path.exists() for path in left)


def test_what_a_kill_before_the_first_checkpoint_left_goes_away(tmp_path):
    left = tmp_path / "00000-x" / "checkpoints" / ".last.pth.1234.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    others = tmp_path / "00001-y" / "checkpoints" / ".last.pth.1234.tmp"
    others.parent.mkdir(parents=True)
    others.touch()
    RunDir.create(tmp_path, "x", "").release()
    assert not left.exists() and others.exists()


def test_a_process_that_writes_its_first_checkpoint_keeps_it(tmp_path):
    writes = tmp_path / "00000-x" / "checkpoints" / ".last.pth.1234.tmp"
    writes.parent.mkdir(parents=True)
    writes.touch()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        lock = FolderLock(tmp_path / "00000-x")
        os.write(write, b"x")
        signal.pause()
        lock.release()
    os.read(read, 1)
    try:
        RunDir.create(tmp_path, "x", "").release()
        assert writes.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), FileNotFoundError(2, "gone"), EOFError()])
def test_a_batch_whose_worker_was_killed_names_the_setting(monkeypatch, error):
    """The batch is announced, and fetched through a socket of the worker, which is gone."""

    def lost(self, timeout=0):
        for worker in self._workers:
            worker.kill()
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", lost)
    with pytest.raises(DataError, match="WORKERS: a process that reads images was killed"):
        next(iter(_Loader(torch.arange(8), num_workers=1)))


def test_the_same_error_of_a_worker_that_lives_is_passed_on(monkeypatch):
    def lost(self, timeout=0):
        raise ConnectionResetError(104, "reset")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", lost)
    with pytest.raises(ConnectionResetError):
        next(iter(_Loader(torch.arange(8), num_workers=1)))
