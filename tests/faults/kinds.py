"""The kinds of fault, a function each: when it comes, what it does, how the training must end, what is put right after.

A new kind is a function here and its line in KINDS. Nothing here starts or judges a training: harness.py does.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faults.trainings import Moment, Place, Training

# What a training prints to stderr as it ends; by `re.fullmatch`, over all lines that are not mere warnings.
STOPPING = "stopping after this step; once more to stop at once"
SAVED = r"; step \d+ is saved, go on with --resume"
UNWRITTEN = r"error: \S+: (the image cache )?cannot be (written|made) \(.*\).*|error: OUTPUT_DIR: .* cannot be made .*"
LOST = (
    r"error: process \d of 2: another process has ended, or cannot be reached \(.*\); the last checkpoint is kept, "
    r"go on with --resume"
)
BROKEN = rf"error: \S+/train\d+\.png: .*, or leave such files out: --set SKIP_BROKEN True({SAVED})?"
KILLED_WORKER = (
    rf"error: WORKERS: a process that reads images was killed, .*--set WORKERS 0, which needs none({SAVED})?"
)


def nothing(*_: object) -> None:
    """The act or the remedy of a fault that has none."""


@dataclass
class Fault:
    """One fault of one process of a training.

    moment: when it comes.
    act: what happens then, to the processes of the training; returns False where there was nothing to do it to.
    ends: {exit code: pattern of all that stderr then says}.
    after: what happens once the process has ended, e.g. to its files; False as above.
    undo: what a user would put right before going on.
    settings: of this process alone, as words behind --set.
    processes: that train together.
    loses_nothing: exit codes at which every step that was logged must be saved.
    newest_is_damaged: `after` damages last.pth, so that the one before it is what must be left.
    keeps_unfinished: the folder lets nothing be deleted, so that a temporary file may stay until the next start.
    said: by other processes that the act starts: exit code and stderr of each.
    """

    moment: Moment
    act: Callable[[Sequence[Training]], bool | None]
    ends: dict[int, str]
    after: Callable[[], bool | None] = nothing
    undo: Callable[[], None] = nothing
    settings: tuple[str, ...] = ()
    processes: int = 1
    loses_nothing: tuple[int, ...] = ()
    newest_is_damaged: bool = False
    keeps_unfinished: bool = False
    said: list[str] = field(default_factory=list)


def some_moment(rng: Random, events: Sequence[str] = ("start", "step", "write", "link", "keep", "replace")) -> Moment:
    """An event, mostly a step, and at most as long after it as a step or a checkpoint takes; half of them at once."""
    event = rng.choice(events)
    count = 1 if event == "start" else rng.randint(1, 3 if event == "step" else 2)
    longest = {"start": 0.6, "write": 0.15}.get(event, 0.06)
    return Moment(event, count, rng.choice((0.0, rng.uniform(0.001, longest))))


def send(number: int, *ranks: int) -> Callable[[Sequence[Training]], None]:
    """Send a signal to the processes of these ranks; to all without any."""
    return lambda trainings: (
        [t.signal(number) for rank, t in enumerate(trainings) if not ranks or rank in ranks] and None
    )


# -- signals -------------------------------------------------------------------------------------------------------


def kill(rng: Random, place: Place) -> Fault:
    """SIGKILL, also while a checkpoint is loaded or written."""
    events = ("start", "load", "step", "write", "link", "keep", "replace", "numbered", "picture", "config")
    return Fault(some_moment(rng, events), send(signal.SIGKILL), {-9: ""})


def stopping(number: int) -> Callable[[Random, Place], Fault]:
    """SIGTERM, SIGHUP, SIGINT: saved; before the first step and after the last as without a handler."""

    def kind(rng: Random, place: Place) -> Fault:
        ends = {128 + number: STOPPING, 0: f"({STOPPING})?", -number: ""}
        if number == signal.SIGINT:
            ends = ends | {130: f"{STOPPING}|interrupted"}
        return Fault(some_moment(rng), send(number), ends, loses_nothing=(128 + number,))

    return kind


def interrupted_twice(rng: Random, place: Place) -> Fault:
    """Ctrl-C, and once more before the step has ended: stops at once."""

    def act(trainings: Sequence[Training]) -> None:
        trainings[0].signal(signal.SIGINT)
        trainings[0].go_on()
        trainings[0].pause(rng.uniform(0, 0.02))
        trainings[0].signal(signal.SIGINT)

    ends = {130: rf"({STOPPING}\n)?interrupted|{STOPPING}", 0: f"({STOPPING})?"}
    return Fault(some_moment(rng, ("step", "write", "link", "replace")), act, ends)


# -- the disk ------------------------------------------------------------------------------------------------------


def disk_full(rng: Random, place: Place) -> Fault:
    """A full disk: a small file system without space, where one can be mounted; else a limit on the size of files."""
    room = rng.choice((0, rng.randint(0, 20_000), rng.randint(0, 18_000_000)))
    filler = place.disk / "filler"
    moment = some_moment(rng, ("start", "step", "write", "numbered"))
    if place.disk == place.folder:
        return size_limit(rng, place)

    def act(trainings: Sequence[Training]) -> None:
        # Until nothing fits, then give back what shall be left.
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(1 << 16)):
                pass
        os.truncate(filler, max(0, filler.stat().st_size - room))

    return Fault(moment, act, {2: UNWRITTEN, 0: ""}, undo=lambda: filler.unlink(missing_ok=True))


def size_limit(rng: Random, place: Place) -> Fault:
    """No file may grow beyond so many bytes: writing fails in the middle of a checkpoint."""
    most = rng.choice((0, rng.randint(0, 20_000), rng.randint(0, 18_000_000)))

    def act(trainings: Sequence[Training]) -> None:
        with contextlib.suppress(ProcessLookupError):
            _, hard = resource.prlimit(trainings[0].pid, resource.RLIMIT_FSIZE)
            resource.prlimit(trainings[0].pid, resource.RLIMIT_FSIZE, (most, hard))

    return Fault(some_moment(rng, ("start", "step", "write", "numbered")), act, {2: UNWRITTEN, 0: ""})


def read_only(rng: Random, place: Place) -> Fault:
    """The folder of the checkpoints takes no file: by chmod or, for root, by `chattr +i`."""
    changed: list[Path] = []

    def act(trainings: Sequence[Training]) -> bool:
        for run in place.runs()[-1:]:
            folder = run.last.parent if run.last.parent.is_dir() else run.path
            if os.geteuid():
                folder.chmod(0o555)
            elif (
                shutil.which("chattr") is None
                or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode
            ):
                continue
            changed.append(folder)
        return bool(changed)

    def undo() -> None:
        for folder in changed:
            if os.geteuid():
                folder.chmod(0o755)
            else:
                subprocess.run(["chattr", "-i", str(folder)], check=True)

    return Fault(
        some_moment(rng, ("step", "write", "link", "keep")),
        act,
        {2: UNWRITTEN, 0: ""},
        undo=undo,
        keeps_unfinished=True,
    )


def no_folder(rng: Random, place: Place) -> Fault:
    """A file in the place of the folder of checkpoints."""
    moved: list[Path] = []

    def act(trainings: Sequence[Training]) -> bool:
        for run in place.runs()[-1:]:
            if (folder := run.last.parent).is_dir():
                folder.rename(folder.with_name("away"))
                folder.touch()
                moved.append(folder)
        return bool(moved)

    def undo() -> None:
        for folder in moved:
            folder.unlink()
            folder.with_name("away").rename(folder)

    moment = some_moment(rng, ("step", "write"))
    return Fault(moment, act, {2: UNWRITTEN, 0: ""}, undo=undo, keeps_unfinished=True)


# -- damaged files -------------------------------------------------------------------------------------------------


def cut(path: Path, rng: Random) -> None:
    """Cut a file off somewhere."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: Random, start: float = 0.25, end: float = 0.75) -> None:
    """Flip a bit between these shares of a file."""
    size = path.stat().st_size
    with path.open("r+b") as stream:
        position = rng.randrange(int(start * size), max(int(end * size), int(start * size) + 1))
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ (1 << rng.randrange(8))]))


def damaged_checkpoint(damage: Callable[[Path, Random], None]) -> Callable[[Random, Place], Fault]:
    """SIGKILL, then damage to last.pth, where the one before it is whole and can take its place."""

    def kind(rng: Random, place: Place) -> Fault:
        fault = Fault(Moment("replace", 2, rng.uniform(0.001, 0.1)), send(signal.SIGKILL), {-9: ""})

        def after() -> bool:
            runs = [run for run in place.runs() if run.last.is_file() and run.previous.is_file()]
            for run in runs[-1:]:
                damage(run.last, rng)
                fault.newest_is_damaged = True
            return bool(runs)

        fault.after = after
        return fault

    return kind


def removed(path: Path, rng: Random) -> None:
    """Delete a file."""
    path.unlink()


def broken_image(damage: Callable[[Path, Random], None]) -> Callable[[Random, Place], Fault]:
    """Damage to an image of the training data, which is put back afterwards."""

    def kind(rng: Random, place: Place) -> Fault:
        path = place.data / "images" / f"train{rng.randrange(40):03d}.png"
        kept = path.with_suffix(".kept")

        def act(trainings: Sequence[Training]) -> None:
            shutil.copy2(path, kept)
            damage(path, rng)

        def undo() -> None:
            if kept.exists():
                os.replace(kept, path)

        settings = ("DATA_CACHE", "True") if rng.random() < 0.3 else ("WORKERS", str(rng.choice((0, 0, 1))))
        return Fault(
            some_moment(rng, ("start", "step", "write")),
            act,
            {2: BROKEN, 0: ""},
            undo=undo,
            settings=settings,
            loses_nothing=(2,),
        )

    return kind


def cache(rng: Random, place: Place) -> Fault:
    """SIGKILL, also while the image cache is built, then damage to it: it is built anew, or read around, with a warning."""
    fault = Fault(
        some_moment(rng, ("cache", "step", "write")), send(signal.SIGKILL), {-9: ""}, settings=("DATA_CACHE", "True")
    )

    def after() -> bool:
        paths = sorted((place.data / "cache").glob("*.images"))
        for path in paths:
            damage = rng.choice((cut, flip, lambda p, r: flip(p, r, 0.999, 1), removed))
            damage(path, rng)
        return bool(paths)

    fault.after = after
    return fault


# -- processes -----------------------------------------------------------------------------------------------------


def worker(rng: Random, place: Place) -> Fault:
    """A process that reads images is killed."""

    def act(trainings: Sequence[Training]) -> bool:
        workers = trainings[0].children()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(workers)

    moment = some_moment(rng, ("step", "write", "replace"))
    return Fault(moment, act, {2: KILLED_WORKER, 0: ""}, settings=("WORKERS", "1"), loses_nothing=(2,))


def second_process(rng: Random, place: Place) -> Fault:
    """A second process goes on with the run while the first trains: it must refuse. Then the first is killed."""
    said: list[str] = []

    def act(trainings: Sequence[Training]) -> None:
        for one in place.start(resume=True) if place.step() else []:
            ended = one.wait()
            said.append(f"{ended.code}: {ended.errors}")
        trainings[0].signal(signal.SIGKILL)

    moment = Moment("step", rng.randint(1, 3), 0.0)
    return Fault(moment, act, {-9: ""}, said=said)


def one_of_two(rng: Random, place: Place) -> Fault:
    """One of two processes that train together is killed: the other ends in one line."""
    lost = rng.randrange(2)
    return Fault(
        some_moment(rng, ("step", "write", "replace")),
        send(signal.SIGKILL, lost),
        {-9: "", 2: LOST, 0: ""},
        processes=2,
    )


def both_stopped(rng: Random, place: Place) -> Fault:
    """SIGTERM to both of two processes, as torchrun sends it, or to one: both stop after the same step."""
    ranks = rng.choice(((), (0,), (1,)))
    ends = {143: f"({STOPPING})?", 0: f"({STOPPING})?"}
    return Fault(some_moment(rng, ("step", "write")), send(signal.SIGTERM, *ranks), ends, processes=2)


# {kind: (its function, its share of the faults)}
KINDS: dict[str, tuple[Callable[[Random, Place], Fault], int]] = {
    "SIGKILL": (kill, 6),
    "SIGTERM": (stopping(signal.SIGTERM), 4),
    "SIGHUP": (stopping(signal.SIGHUP), 3),
    "SIGINT": (stopping(signal.SIGINT), 3),
    "SIGINT twice": (interrupted_twice, 2),
    "disk full": (disk_full, 5),
    "limit on file size": (size_limit, 3),
    "folder read-only": (read_only, 3),
    "file in the folder's place": (no_folder, 2),
    "newest checkpoint cut": (damaged_checkpoint(cut), 4),
    "newest checkpoint flipped": (damaged_checkpoint(flip), 4),
    "newest checkpoint deleted": (damaged_checkpoint(removed), 2),
    "image deleted": (broken_image(removed), 3),
    "image cut": (broken_image(cut), 3),
    "image cache damaged": (cache, 4),
    "data worker killed": (worker, 3),
    "second process": (second_process, 2),
    "one of two killed": (one_of_two, 2),
    "SIGTERM to two": (both_stopped, 1),
}
