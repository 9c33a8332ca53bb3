"""Progress for people and for programs: one call hands each number to the screen, stats.jsonl and TensorBoard."""

import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from miscc.errors import WriteError
from miscc.progress import ProgressBar, say, write
from training.run_dir import RunDir
from training.tracker import Tracker

if TYPE_CHECKING:
    from training.trainer import Trainer

logger = logging.getLogger("training")


class Progress:
    """Progress an epoch, a line of stats at intervals, the log. Only the main process shows and writes anything."""

    def __init__(self, run: RunDir | None, start_step: int = 0, tracker: Tracker | None = None):
        self.run = run
        self.tracker = tracker
        self.bar: ProgressBar | None = None
        self.title, self.numbers = "", ""  # of the epoch: what its bar says
        self.board: SummaryWriter | None = None
        self.handler: logging.FileHandler | None = None
        self._failed: set[str] = set()  # what could not be written, and was warned of
        self._excepthook = threading.excepthook
        if run is None:
            return

        # The files. TensorBoard's are written by a thread of its own, which must not end in a traceback either.
        threading.excepthook = self._on_thread_error
        with self.optional("stats.jsonl"):
            run.truncate_stats(start_step)
        with self.optional("log.txt"):
            self.handler = _LogFile(run.log, self)
            logging.getLogger().addHandler(self.handler)
        with self.optional("TensorBoard's files"):
            self.board = SummaryWriter(run.path / "tensorboard", purge_step=start_step + 1)
        if run.note:
            self.say(f"warning: {run.note}")

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Inside, a file that cannot be written (a full disk, a folder that is gone) costs one warning, not the training."""
        try:
            yield
        except (OSError, WriteError) as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = error.strerror if isinstance(error, OSError) else error
                self.say(f"warning: {what} cannot be written ({reason}); the training goes on")

    def _warn_of_tracker(self, tracker: Tracker) -> None:
        """Its failure, once."""
        if tracker.failure and "tracker" not in self._failed:
            self._failed.add("tracker")
            self.warn(f"warning: TRAIN.TRACKER: {tracker.failure}; it gets no more numbers, the training goes on")

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Called when TensorBoard's thread has ended with an error: warns if the disk is the cause."""
        # Raised again inside `optional`, which warns of errors of the disk.
        with self.optional("TensorBoard's files"):
            if isinstance(error.exc_value, OSError):
                raise error.exc_value
            self._excepthook(error)

    def say(self, text: str) -> None:
        """One line in the log and, unless --quiet was given, on the screen."""
        if self.run is None:
            return
        with suppress(OSError):  # the terminal was closed
            say(text)

        self._write_to_log(text, logging.INFO)

    def warn(self, text: str) -> None:
        """One line in the log and on stderr, also with --quiet."""
        if self.run is None:
            return
        with suppress(OSError):
            write(text, sys.stderr)
        self._write_to_log(text, logging.WARNING)

    def _write_to_log(self, text: str, level: int) -> None:
        """One line in the log alone. Straight to its handler: INFO records are off with --quiet."""
        if self.handler is not None:
            self.handler.emit(logging.LogRecord("training", level, "", 0, text, None, None))

    def rewind(self, step: int) -> None:
        """Go on from an earlier step: what was written of later ones goes, as when a run is resumed."""
        self.end_epoch()
        if self.run is None:
            return
        with self.optional("stats.jsonl"):
            self.run.truncate_stats(step)
        with self.optional("TensorBoard's files"):
            if self.board is not None:
                self.board.close()
            self.board = SummaryWriter(self.run.path / "tensorboard", purge_step=step + 1)

    def start_epoch(self, title: str, done: int, total: int) -> None:
        """A new epoch: `done` of `total` steps are over already."""
        if self.run is None:
            return
        self.end_epoch()
        self.title = title
        self.bar = ProgressBar(what=title, total=total, initial=done, leave=True)

    def advance(self) -> None:
        """One step more."""
        if self.bar is not None:
            self.bar.update()

    def end_epoch(self) -> None:
        """Close the bar, if there is one; the log keeps its last numbers."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.numbers:
            self._write_to_log(f"{self.title}, {self.numbers}", logging.INFO)
            self.numbers = ""

    def log(self, step: int, epoch: float, values: Mapping[str, float], shown: tuple[str, ...] = ()) -> None:
        """Write all values under `step`; those named in `shown` also stand behind the bar."""
        if self.run is None:
            return

        # stats.jsonl: JSON has no NaN, so null is written; the trainer stops at such a number.
        plain = {name: float(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        with self.optional("stats.jsonl"), self.run.stats.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "epoch": round(epoch, 4), **line}) + "\n")

        # TensorBoard, the tracker and the bar.
        if self.board is not None:
            with self.optional("TensorBoard's files"):
                for name, value in plain.items():
                    self.board.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log(plain, step)
            self._warn_of_tracker(self.tracker)
        facts = {name.split("/")[-1]: f"{plain[name]:.3g}" for name in shown if name in plain}
        if self.bar is not None:
            self.bar.set_facts(**facts)
        if facts:
            self.numbers = f"step {step}: " + ", ".join(f"{name}={value}" for name, value in facts.items())

    def picture(self, name: str, pixels, step: int) -> None:
        """Show (H, W, 3) uint8 in TensorBoard."""
        with self.optional("TensorBoard's files"):
            if self.board is not None:
                self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """End bar, TensorBoard's file and the log."""
        self.end_epoch()
        if self.tracker is not None:
            self.tracker.close()
            self._warn_of_tracker(self.tracker)
        with self.optional("TensorBoard's files"):
            if self.board is not None:
                self.board.close()

        # Restore the hook for threads; close the log last.
        threading.excepthook = self._excepthook
        if self.handler is not None:
            logging.getLogger().removeHandler(self.handler)
            with suppress(OSError):
                self.handler.close()


class _LogFile(logging.FileHandler):
    """log.txt; where it cannot be written, `progress` warns of it, once."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(path, encoding="utf-8")
        self.progress = progress
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        """Called by logging inside its `except`."""
        with self.progress.optional("log.txt"):
            raise


def introduce(trainer: "Trainer", run: RunDir | None, progress: Progress) -> None:
    """Say what begins, and warn of settings that come to nothing in it."""
    for line in introduction(trainer, run):
        progress.say(line)
    for remark in trainer.system.remarks(trainer.last_step):
        progress.warn(f"warning: {remark}")


def introduction(trainer: "Trainer", run: RunDir | None) -> list[str]:
    """What is trained, from which step on, and what differs from the run's start; a line each."""
    lines = [
        f"run: {run.path if run else '-'}",
        f"{trainer.chosen.name} on {trainer.device}, {trainer.world.size} process(es): {len(trainer.records)} images, "
        f"{trainer.steps_per_epoch} steps an epoch, step {trainer.step} of {max(trainer.step, trainer.last_step)}",
    ]

    # What bounds the training, and what has changed.
    if trainer.settings.max_minutes:
        used = trainer.budget.seconds / 60
        lines.append(f"time: {used:.1f} of {trainer.settings.max_minutes:g} minutes used, whatever the steps")
    lines += trainer.changes
    return lines + (trainer.evaluation.introduction() if trainer.evaluation is not None else [])


class StopSignal:
    """`with StopSignal() as stop:` SIGINT, SIGTERM and SIGHUP only set `stop.received`; a second one ends the program.

    SIGHUP, which a closed terminal sends, stays ignored where it is ignored already, as under nohup.
    """

    def __init__(self):
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        # The former handlers come back in __exit__.
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt

        # The first time: the loop looks at `received` after each step.
        self.received = number
        with suppress(OSError):  # the terminal was closed
            write("stopping after this step; once more to stop at once", sys.stderr)
