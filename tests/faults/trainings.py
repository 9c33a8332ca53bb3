"""The tiny trainings that the faults hit: their data, settings and processes. What is done to them is kinds.py's.

Torch is imported once, in a process that computes nothing and starts no thread; each training is a fork of it that calls
main.py's `main` as the command does. An audit hook in the fork sees which files it opens, links and renames, so that a
fault can be timed by what the training is doing, without a change of the program.
"""

import atexit
import contextlib
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import DAMSM_YAML, GAN_YAML, draw_folder
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import main as command
import training.damsm
import training.trainer  # noqa: F401  # every training needs it
from miscc.checkpoint import load_checkpoint
from miscc.errors import CheckpointError, run_command
from miscc.progress import ProgressBar
from training.run_dir import RunDir
from training.settings import load_config

STEPS = 12  # of a training: five to an epoch, a checkpoint after every second
NAME = "tiny-ssa_gan"
LONGEST = 90  # seconds of a process; then it hangs

# What a training does, as its audit hook sees it: {event: (audit event, the file's name, mode of opening)}.
EVENTS = {
    "step": ("open", r"stats\.jsonl", "a"),
    "write": ("open", r"\.last\.pth\..*\.tmp", "x"),
    "link": ("os.link", r"last\.pth", ""),
    "keep": ("os.rename", r"\.previous\.pth\..*\.tmp", ""),
    "replace": ("os.rename", r"\.last\.pth\..*\.tmp", ""),
    "load": ("open", r"last\.pth", "r"),
    "numbered": ("open", r"\.epoch_.*\.tmp", "x"),
    "cache": ("open", r"\..*\.images\..*\.tmp", "x"),
    "picture": ("open", r"\.step_.*\.tmp", "x"),
    "config": ("open", r"\.(config\.yml|stats\.jsonl)\..*\.tmp", "x"),
}


class Moment(NamedTuple):
    """When a fault comes: so many seconds after the `count`-th `event` of a process; "start": after its fork.

    At a delay of 0 the process stands still at that place of the program until the fault is there, so that the same seed
    hits the same place. With a delay it goes on, and what it does by then depends on the machine.
    """

    event: str
    count: int = 1
    delay: float = 0.0


class Ended(NamedTuple):
    """How a process ended.

    code: as a shell has it for its own exit; -N: killed by signal N; None: it hung and was killed
    """

    code: int | None
    output: str
    errors: str


# -- a process -----------------------------------------------------------------------------------------------------


class Training:
    """A process that trains. Its output is read while it runs, so that it never waits for us."""

    def __init__(self, arguments: Sequence[str], moment: Moment | None, environment: dict[str, str] | None = None):
        """
        arguments: of main.py
        moment: at which `wait_for_moment` returns
        environment: variables beside this process's
        """
        self.moment, self._seen, self._texts = moment, False, {}
        (out, self._out), (err, self._err), (event, self._event), (self._go, go) = (os.pipe() for _ in range(4))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.environ.update(environment or {})
            _be_command(arguments, moment, (self._out, self._err, self._event, self._go), (out, err, event, go))

        # Only the reading ends, so that their end is seen.
        for descriptor in (self._out, self._err, self._event, self._go):
            os.close(descriptor)
        self._streams, self._event, self._go = {out: "output", err: "errors"}, event, go
        self._texts = {"output": b"", "errors": b""}
        self._deadline = time.monotonic() + LONGEST

    def wait_for_moment(self) -> bool:
        """Return at the moment, True; or False, when the process ended before it came."""
        while self._streams and not self._seen and time.monotonic() < self._deadline:
            self._read(self._deadline - time.monotonic())
        if self._seen and self.moment is not None:
            self.pause(self.moment.delay)
        return self._seen and bool(self._streams)

    def go_on(self) -> None:
        """Let a process that stands still at its moment run."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")

    def wait(self) -> Ended:
        """Wait for the end."""
        hung = False
        while self._streams:
            self._read(max(0.0, self._deadline - time.monotonic()))
            if time.monotonic() >= self._deadline and not hung:
                hung, self._deadline = True, time.monotonic() + 5
                self.signal(signal.SIGKILL)
            elif time.monotonic() >= self._deadline:
                break  # a worker that outlives it holds the pipes

        # Its exit code.
        _, status = os.waitpid(self.pid, 0)
        for descriptor in (*self._streams, self._event, self._go):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        texts = {name: text.decode(errors="replace") for name, text in self._texts.items()}
        return Ended(None if hung else os.waitstatus_to_exitcode(status), **texts)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def pause(self, seconds: float) -> None:
        """Let so much time pass, or less where the process ends."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._streams:
            self._read(left)

    def children(self) -> list[int]:
        """Its worker processes."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def _read(self, seconds: float) -> None:
        """Take in what comes within so many seconds."""
        watched = [*self._streams] + ([] if self._seen else [self._event])
        for descriptor in select.select(watched, [], [], max(0.0, seconds))[0]:
            data = os.read(descriptor, 1 << 16)
            if descriptor == self._event:
                self._seen = self._seen or bool(data)
                if not data:  # it ended before the moment
                    self._drain()
            elif data:
                self._texts[self._streams[descriptor]] += data
            else:
                del self._streams[descriptor]
                os.close(descriptor)

    def _drain(self) -> None:
        """Read both streams to their end."""
        while self._streams and time.monotonic() < self._deadline:
            for descriptor in select.select(list(self._streams), [], [], 1)[0]:
                if data := os.read(descriptor, 1 << 16):
                    self._texts[self._streams[descriptor]] += data
                else:
                    del self._streams[descriptor]
                    os.close(descriptor)


def _be_command(
    arguments: Sequence[str], moment: Moment | None, used: tuple[int, ...], foreign: tuple[int, ...]
) -> None:
    """In a fork: be `python main.py ARGUMENTS`, and end as the interpreter would."""
    code = 1
    try:
        # Streams and signals as a shell would hand them on.
        out, err, event, go = used
        for descriptor in foreign:
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ProgressBar.line_due = None
        run_command(lambda: _run_main(arguments, moment, event, go))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()

    # The interpreter's end: threads, then exit handlers.
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            code = code or 1
        os._exit(code)


def _run_main(arguments: Sequence[str], moment: Moment | None, event: int, go: int) -> int:
    """main.py's main; a signal while it stands still at its start must find what main.py would be in by then."""
    if moment is not None:
        _report(moment, event, go)
    return command.main(list(arguments))


def _report(moment: Moment, event: int, go: int) -> None:
    """Tell the harness of the moment, and stand still there where it has no delay."""
    pid, left, is_open = os.getpid(), moment.count, True

    def tell() -> None:
        nonlocal is_open
        is_open = False
        os.write(event, b"!")
        if not moment.delay:
            os.read(go, 1)

    if moment.event == "start":
        tell()
        return
    kind, name, mode = EVENTS[moment.event]
    pattern = re.compile(name)

    def hook(what: str, arguments: tuple) -> None:
        nonlocal left
        if what != kind or not is_open or os.getpid() != pid or not isinstance(arguments[0], (str, Path)):
            return
        if mode and (not isinstance(arguments[1], str) or mode not in arguments[1]):
            return
        if pattern.fullmatch(os.path.basename(arguments[0])):
            left -= 1
            if left == 0:
                tell()

    sys.addaudithook(hook)


# -- the training --------------------------------------------------------------------------------------------------


class Material:
    """What all trainings of a harness share: drawings, encoders, and the states that undisturbed trainings end in."""

    def __init__(self, folder: Path, seed: int):
        """Draw the images and train the encoders, in a fork: this process must compute nothing."""
        self.folder, self.seed = folder, seed
        self.data, self.encoders = folder / "data", folder / "encoders" / "best.pth"
        self._references: dict[int, dict] = {}
        _in_fork(self._make)

    def _make(self) -> None:
        draw_folder(self.data)
        path = self.folder / "damsm.yml"
        path.write_text(DAMSM_YAML.format(data=self.data, epochs=1))
        training.damsm.pretrain(load_config(path, [], command="damsm"), torch.device("cpu"), self.folder / "encoders")

    def reference(self, processes: int) -> dict:
        """The last checkpoint of a training that nothing disturbs, of one or of several processes."""
        if processes not in self._references:
            place = Place(self, self.folder / f"undisturbed{processes}", self.folder / f"undisturbed{processes}")
            ended = [one.wait() for one in place.start(processes=processes)]
            if any(one.code != 0 for one in ended):
                raise RuntimeError(f"an undisturbed training has failed: {ended}")
            self._references[processes] = place.state(place.newest())
        return self._references[processes]


class Place:
    """The folders of one training: its own copy of the data, and its output, perhaps on a disk of its own."""

    def __init__(self, material: Material, folder: Path, disk: Path):
        """
        folder: of settings and data
        disk: where the output folder is made
        """
        self.folder, self.disk, self.seed = folder, disk, material.seed
        self.data, self.output = folder / "data", disk / "output"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(material.data, self.data)
        self.yaml = folder / "tiny.yml"
        self.yaml.write_text(GAN_YAML.format(data=self.data, output=self.output, encoders=material.encoders))

    def start(
        self, settings: Sequence[str] = (), moment: Moment | None = None, processes: int = 1, resume: bool = False
    ) -> list[Training]:
        """Start a training, or go on with it. moment: of the first process."""
        fixed = (
            "TRAIN.MAX_EPOCH",
            "100",
            "TRAIN.MAX_STEPS",
            str(STEPS),
            "TRAIN.SAVE_EVERY",
            "2",
            "SEED",
            str(self.seed),
        )
        arguments = ["--cfg", str(self.yaml), "--gpu", "-1", *(["--resume"] if resume else [])]
        arguments += ["--set", *fixed, *settings]
        if processes == 1:
            return [Training(arguments, moment)]

        # Several, as torchrun would start them.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
        return [Training(arguments, None if int(rank["RANK"]) else moment, shared | rank) for rank in ranks]

    def runs(self) -> list[RunDir]:
        """All run directories, the newest last."""
        return [RunDir(path) for path in sorted(self.output.glob(f"*-{NAME}"))] if self.output.is_dir() else []

    def newest(self) -> RunDir:
        """The newest run that can go on."""
        return next(run for run in reversed(self.runs()) if run.has_state())

    def step(self) -> int:
        """The step from which `--resume` would go on; 0: there is no checkpoint that it could read."""
        try:
            return self.newest().load()["step"]
        except (StopIteration, CheckpointError):
            return 0

    def unfinished(self) -> list[Path]:
        """Temporary files, wherever they are."""
        return [path for folder in (self.output, self.data) if folder.is_dir() for path in folder.rglob(".*.tmp")]

    @staticmethod
    def state(run: RunDir) -> dict:
        """Everything in last.pth but the settings, which name folders."""
        return {key: value for key, value in load_checkpoint(run.last).items() if key != "config"}


def quicken() -> None:
    """Let PyTorch look for ended workers five times a second instead of every five seconds."""
    _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)


def _in_fork(work: Callable[[], None]) -> None:
    """Do some work in a fork. Raises RuntimeError where it fails."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("drawing the data or training the encoders has failed; see above")
