"""Progress suited to where it is shown: a bar on a terminal, a line a minute in a file, a pipe or CI, nothing with --quiet.

The only place that makes bars. Works without torch.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, ClassVar, Generic, TextIO, TypeVar

T = TypeVar("T")
LINE_EVERY = 60  # seconds between lines, over all bars of a process together

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether this process leaves out progress and messages (--quiet); results, warnings and errors stay."""
    global _quiet
    _quiet = quiet
    logging.disable(logging.INFO if quiet else logging.NOTSET)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message (stream: stdout) past the open bars, unless --quiet was given."""
    if not _quiet:
        write(text, stream)


def write(text: str, stream: TextIO | None = None) -> None:
    """Print a line (stream: stdout) past the open bars, always."""
    from tqdm import tqdm

    stream = stream or sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()


def wants_colour() -> bool:
    """False where NO_COLOR is set and not empty (https://no-color.org), whatever the output is."""
    return not os.environ.get("NO_COLOR")


def has_bars(stream: TextIO) -> bool:
    """Whether a bar can be redrawn there: on a terminal. CI systems store what is written also where they imitate one."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


class ProgressBar(Generic[T]):
    """Progress over `items`, or over what `update` counts; to be iterated over, or used as a context manager.

    what: the name in front;
    total: None: the number of items;
    unit: of what is counted, in the plural;
    initial: how many are done already;
    leave: whether the bar stays on the terminal at its end;
    shown: False: nothing is written;
    stream: None: stderr;
    clock: monotonic, in seconds.
    """

    line_due: ClassVar[float | None] = None  # by the clock: when the next line may be written, whichever bar's it is

    def __init__(
        self,
        items: Iterable[T] = (),
        what: str = "",
        total: int | None = None,
        unit: str = "steps",
        *,
        initial: int = 0,
        leave: bool = False,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        # What is counted, and where it is shown.
        self.items, self.what, self.unit, self.clock = items, what, unit, clock
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.done, self.facts = initial, ""
        self.stream = stream or sys.stderr
        self.bar: Any = None  # tqdm's

        # A bar on a terminal alone, which needs tqdm.
        self.shown = shown and not _quiet
        if self.shown and has_bars(self.stream):
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total, initial=initial, desc=what, unit=f" {unit}", leave=leave, file=self.stream,
                dynamic_ncols=True, mininterval=0.5,
            )  # fmt: skip

        # Speed: from the last line on, here from the start.
        self._measured_from = (clock(), initial)
        if ProgressBar.line_due is None:
            ProgressBar.line_due = clock() + LINE_EVERY

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> "ProgressBar[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count

        # A terminal redraws its bar; elsewhere a line is due once a minute.
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and self.clock() >= (ProgressBar.line_due or 0):
            ProgressBar.line_due = self.clock() + LINE_EVERY
            print(self._line(), file=self.stream, flush=True)

    def set_facts(self, **facts: Any) -> None:
        """Numbers behind the bar, or at the end of the next line."""
        self.facts = ", ".join(f"{name}={value}" for name, value in facts.items())
        if self.bar is not None:
            self.bar.set_postfix_str(self.facts)

    def close(self) -> None:
        """The end of the bar; nothing where there are lines."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self) -> str:
        """What the bar would show: done, speed, time left, facts."""
        (since, before), now = self._measured_from, self.clock()
        self._measured_from = (now, self.done)
        rate = (self.done - before) / max(now - since, 1e-9)

        # How far, how fast, how long still.
        parts = [f"{self.done}{'' if self.total is None else f' of {self.total}'} {self.unit}"]
        parts.append(f"{rate:.3g} {self.unit}/s")
        if self.total is not None and rate > 0:
            parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        return f"{self.what}: {', '.join([*parts, self.facts] if self.facts else parts)}"
