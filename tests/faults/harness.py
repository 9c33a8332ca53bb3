"""Cases: one training each, with several faults one after the other, and the verdict on it after every process."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from faults.kinds import KINDS, Fault
from faults.trainings import STEPS, Ended, Material, Place, Training

from training.run_dir import RunDir

DISK = 128 << 20  # bytes of the small file system; a training writes 90 MB
WARNINGS = (
    r"WARNING: \S+\.images: is damaged; damaged images are read from their own files\. Delete it: it is built anew",
    r"cache folder train: .*",  # progress, after a minute
    r"epoch \d+/\d+: .*",
)
MOST_UNFINISHED = 3  # temporary files that a single SIGKILL may leave


@dataclass
class Outcome:
    """What became of one fault.

    kind: of KINDS
    struck: whether it came before the training had ended
    wrong: what is not as it must be; "": nothing
    """

    kind: str
    struck: bool
    wrong: str = ""


class Case:
    """One training that is hit several times, and then must end as if nothing had happened."""

    def __init__(self, material: Material, place: Place, rng: Random):
        self.material, self.place, self.rng = material, place, rng
        self.left: list[Path] = []  # temporary files that were there before a fault
        self.num_starts = 0
        self.saved = 0  # the step that --resume would go on from

    def hit(self, kind: str) -> Outcome:
        """Go on with the training until it ends by one fault of this kind; then put right what a user would."""
        fault = KINDS[kind][0](self.rng, self.place)
        log_before = log_state(self.place.runs())
        trainings = self.place.start(fault.settings, fault.moment, fault.processes, resume=self.saved > 0)

        # The fault, at its moment.
        struck = trainings[0].wait_for_moment()
        if struck:
            struck = fault.act(trainings) is not False
            trainings[0].go_on()
        ended = self.end_of(trainings, kind)

        # What was done while its cause lasts; then what a user puts right.
        fault.undo()
        wrong = self.verdict(fault, struck, ended, log_before != log_state(self.place.runs()))
        if struck and not wrong:
            struck = fault.after() is not False
            wrong = self.verdict_on_damage(fault) if struck else ""
        return Outcome(kind, struck, wrong)

    def finish(self, processes: int) -> str:
        """Let the training end. Returns what is wrong with it."""
        cached = (self.place.data / "cache").is_dir()
        trainings = self.place.start(("DATA_CACHE", str(cached)), None, processes, resume=self.saved > 0)
        for one in self.end_of(trainings, "finish"):
            if wrong := check_end(one, {0: ""}):
                return f"at its end: {wrong}"
        return self.verdict_at_the_end(processes)

    def end_of(self, trainings: Sequence[Training], name: str) -> list[Ended]:
        """Wait for the processes; what they say is written beside the data, for people."""
        ended = [training.wait() for training in trainings]
        for rank, one in enumerate(ended):
            path = self.place.folder / f"{self.num_starts:02d}-{name}-{rank}.txt"
            path.write_text(f"exit code {one.code}\n-- stdout\n{one.output}-- stderr\n{one.errors}")
        self.num_starts += 1
        return ended

    # -- verdicts --------------------------------------------------------------------------------------------------

    def verdict(self, fault: Fault, struck: bool, ended: Sequence[Ended], has_logged: bool) -> str:
        """What is wrong after a fault: with its exit codes, its words, what is saved, what is left.

        has_logged: whether this start wrote to the log; one that ends before its first step leaves an earlier one's lines.
        """
        # How the processes ended, and what they said.
        for one in ended:
            if wrong := check_end(one, fault.ends if struck else {0: ""}):
                return wrong
        codes = [one.code for one in ended]
        if fault.processes > 1 and 143 in codes and set(codes) != {143}:
            return f"the processes ended apart: {codes}"
        for said in fault.said:
            if not re.fullmatch(r"2: error: \S+: is being trained by process \d+ on .*\n", said):
                return f"a second process: {said}"

        # What is saved.
        before, self.saved = self.saved, self.place.step()
        if self.saved < before:
            return f"step {before} was saved, and --resume would go on from step {self.saved}"
        if 0 in codes and self.saved < STEPS:
            return f"exit code 0 after step {self.saved} of {STEPS}"
        logged = last_logged(self.place.runs())
        if has_logged and codes[0] in fault.loses_nothing and self.saved != logged:
            return f"step {logged} was logged, step {self.saved} is saved, exit code {codes[0]}"

        # What is left behind.
        left = [path for path in self.place.unfinished() if path not in self.left]
        self.left += left
        may_leave = fault.keeps_unfinished or any(code is not None and code < 0 for code in codes)
        if (left and not may_leave) or len(left) > MOST_UNFINISHED:
            return f"temporary files are left: {', '.join(path.name for path in left)}"
        return ""

    def verdict_on_damage(self, fault: Fault) -> str:
        """After damage to the newest checkpoint the one before it must be found, two checkpoints earlier at most."""
        saved, self.saved = self.saved, self.place.step()
        if not fault.newest_is_damaged:
            return (
                ""
                if self.saved == saved
                else f"step {saved} was saved, and --resume would go on from step {self.saved}"
            )
        if not self.saved:
            return f"last.pth of step {saved} was damaged, and --resume would find nothing"
        run = self.place.newest()
        run.load()
        if not 0 < saved - self.saved <= 4 or "goes on from" not in run.note:
            return (
                f"last.pth of step {saved} was damaged, and --resume would go on from step {self.saved}: {run.note!r}"
            )
        return ""

    def verdict_at_the_end(self, processes: int) -> str:
        """What is wrong with a training that has ended: its weights and moments, its stats, what is left behind."""
        run = self.place.newest()
        difference = first_difference(self.material.reference(processes), self.place.state(run))
        if difference:
            return f"the last checkpoint differs from an undisturbed training's: {difference}"
        steps = logged_steps(run)
        if steps != list(range(1, STEPS + 1)):
            return f"stats.jsonl holds the steps {steps}"
        if left := self.place.unfinished():
            return f"temporary files are left at the end: {', '.join(path.name for path in left)}"
        return ""


def check_end(ended: Ended, ends: dict[int, str]) -> str:
    """What is wrong with how a process ended. ends: as of a Fault."""
    lines = [line for line in ended.errors.splitlines() if line.strip()]
    words = "\n".join(line for line in lines if not any(re.fullmatch(warning, line) for warning in WARNINGS))
    if ended.code is None:
        return f"it hung: {words}"
    if "Traceback" in ended.output + ended.errors:
        return f"a traceback: {(ended.output + ended.errors).strip().splitlines()[-1]}"
    if ended.code not in ends:
        return f"exit code {ended.code}, not one of {list(ends)}: {words}"
    if not re.fullmatch(ends[ended.code], words):
        return f"exit code {ended.code}, and on stderr: {words!r}"
    return ""


def first_difference(expected: Any, actual: Any, where: str = "") -> str:
    """Where two states differ in a bit, a type, a shape or a name; "": nowhere."""
    if type(expected) is not type(actual):
        return f"{where}: {type(expected).__name__}, {type(actual).__name__}"
    if isinstance(expected, torch.Tensor):
        same = expected.dtype == actual.dtype and torch.equal(expected, actual)
        return "" if same else f"{where}: other numbers"
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return f"{where}: other names"
        pairs = ((f"{where}/{name}", expected[name], actual[name]) for name in expected)
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return f"{where}: other lengths"
        pairs = ((f"{where}/{n}", *pair) for n, pair in enumerate(zip(expected, actual, strict=True)))
    else:
        return "" if expected == actual else f"{where}: {expected!r}, {actual!r}"
    return next((found for name, one, other in pairs if (found := first_difference(one, other, name))), "")


def logged_steps(run: RunDir) -> list[int]:
    """The steps in stats.jsonl; a line that is none counts as step -1."""
    lines = run.stats.read_text().splitlines() if run.stats.is_file() else []
    found = [re.match(r'\{"step": (\d+), .*\}$', line) for line in lines]
    return [int(match[1]) if match else -1 for match in found]


def last_logged(runs: Sequence[RunDir]) -> int:
    """The last step that the newest run has logged."""
    return max(logged_steps(runs[-1]), default=0) if runs else 0


def log_state(runs: Sequence[RunDir]) -> tuple[str, int, int]:
    """(path, time of the last change, bytes) of the newest run's log; a training that writes to it changes one of them."""
    path = runs[-1].stats if runs else None
    if path is None or not path.is_file():
        return ("", 0, 0)
    status = path.stat()
    return (str(path), status.st_mtime_ns, status.st_size)


# -- the loop ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of DISK bytes, mounted on a folder while inside; None where this user may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "faults", str(folder)]
    try:
        mounted = not subprocess.run(mount, capture_output=True).returncode
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def run_case(material: Material, folder: Path, disk: Path | None, kinds: Sequence[str], seed: str) -> list[Outcome]:
    """Train once with faults of these kinds, in order; stop at the first that goes wrong.

    disk: of the output; None: the folder's own. The folder is removed unless something went wrong.
    """
    place = Place(material, folder, disk or folder)
    case = Case(material, place, Random(seed))
    outcomes: list[Outcome] = []
    for kind in kinds:
        outcomes.append(case.hit(kind))
        if outcomes[-1].wrong or not outcomes[-1].struck and case.saved == STEPS:
            break

    # The end; what is wrong with it counts for the last fault.
    if not outcomes[-1].wrong:
        outcomes[-1].wrong = case.finish(2 if is_of_two(kinds[0]) else 1)
    if outcomes[-1].wrong and disk is not None:
        shutil.copytree(place.output, folder / "output", dirs_exist_ok=True)
    if disk is not None:
        shutil.rmtree(place.output, ignore_errors=True)
    if not outcomes[-1].wrong:
        shutil.rmtree(folder)
    return outcomes


def is_of_two(kind: str) -> bool:
    """Whether two processes train together."""
    return kind in ("one of two killed", "SIGTERM to two")


def each_kind(names: Sequence[str], rng: Random) -> Iterator[list[str]]:
    """Kinds for several cases, so that each comes once; those of two processes do not mix with the others."""
    for of_two in (False, True):
        fitting = [name for name in names if is_of_two(name) == of_two]
        rng.shuffle(fitting)
        yield from (fitting[start : start + 4] for start in range(0, len(fitting), 4))


def chosen_kinds(names: Sequence[str], rng: Random) -> list[str]:
    """The kinds of one case: 2 to 5, by their shares; those of two processes do not mix with the others."""
    weights = [KINDS[name][1] for name in names]
    first = rng.choices(names, weights)[0]
    fitting = [name for name in names if is_of_two(name) == is_of_two(first)]
    number = rng.randint(1, 2) if is_of_two(first) else rng.randint(2, 5)
    return [first, *rng.choices(fitting, [KINDS[name][1] for name in fitting], k=number - 1)]
