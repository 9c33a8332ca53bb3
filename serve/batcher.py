"""One queue under page and API: a thread joins what waits within 20 ms into batches. Knows nothing of HTTP."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.models import Drawn, Model

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More is waiting than the queue takes."""


class ClosedError(Exception):
    """The server is shutting down and takes nothing new."""


@dataclass(frozen=True)
class Job:
    """One image to draw. It depends on its own words and noise alone, not on its batch (but for rounding).

    tokens: (T,) int64.
    length: words of them.
    noise: (noise_dim,) float32
    """

    model: Model
    tokens: np.ndarray
    length: int
    noise: np.ndarray


@dataclass(frozen=True)
class Call:
    """Work that joins no batch, such as a walk between captions: run alone in its turn; counts as `images` in the queue."""

    function: Callable[[], Any]
    images: int


@dataclass(eq=False)
class _Waiting:
    work: Job | Call
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def images(self) -> int:
        return self.work.images if isinstance(self.work, Call) else 1


class Batcher:
    """A thread that draws, and the bounded queue before it.

    batch_size: most images of a batch.
    queue_size: most images that may wait.
    wait_seconds: how long the first job of a batch waits for others.
    """

    def __init__(self, batch_size: int = 16, queue_size: int = 256, wait_seconds: float = 0.02):
        self.batch_size, self.queue_size, self.wait_seconds = batch_size, queue_size, wait_seconds
        self.num_images = self.num_batches = self.num_dropped = 0
        self.seconds = 0.0  # spent drawing
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anything submitted now would be drawn."""
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Images in the queue, those that were given up left out."""
        with self._changed:
            return self._count()

    def submit(self, works: Sequence[Job | Call]) -> list[Future]:
        """Queue all of them or none; a future each, of a Drawn without its first dimension, or of what a Call returns.

        Cancelling a future drops its job if it has not begun. Raises QueueFullError, or ClosedError after `close`.
        """
        items = [_Waiting(work) for work in works]
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down; ask again when it is back")
            if self._count() + sum(item.images for item in items) > self.queue_size:
                raise QueueFullError(
                    f"the queue is full ({self._count()} of {self.queue_size} images wait); ask again soon"
                )
            self._queue.extend(items)
            self._changed.notify()
        return [item.future for item in items]

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, finish what waits; True when all is done within `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _count(self) -> int:
        return sum(item.images for item in self._queue if not item.future.cancelled())

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            # Jobs that were given up meanwhile are left out.
            batch = [item for item in batch if item.future.set_running_or_notify_cancel()]
            if not batch:
                continue

            # Drawing; an error is this batch's alone, and the thread goes on for the others.
            start = time.monotonic()
            try:
                results = _results(batch)
            except Exception as error:  # of one batch; the thread goes on for the others
                logger.exception("drawing failed")
                for item in batch:
                    item.future.set_exception(error)
                continue

            # Counted before the futures are done: a client that has its answer finds it in the counts.
            self.num_batches += 1
            self.num_images += sum(item.images for item in batch)
            self.seconds += time.monotonic() - start
            for item, result in zip(batch, results, strict=True):
                item.future.set_result(result)
            del batch, results  # or they would stay in memory until the next request

    def _next_batch(self) -> list[_Waiting] | None:
        """The next batch, once it is full or its time is up; None after `close`, when the queue is empty."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._queue:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue

                # Due: a call, a full batch, one whose first job has waited long enough, or the last ones.
                batch = self._fitting()
                left = self._queue[0].since + self.wait_seconds - time.monotonic()
                if isinstance(batch[0].work, Call) or len(batch) == self.batch_size or left <= 0 or self._closed:
                    taken = set(map(id, batch))
                    self._queue = deque(item for item in self._queue if id(item) not in taken)
                    return batch
                self._changed.wait(left)

    def _drop_cancelled(self) -> None:
        kept = [item for item in self._queue if not item.future.cancelled()]
        self.num_dropped += len(self._queue) - len(kept)
        self._queue = deque(kept)

    def _fitting(self) -> list[_Waiting]:
        """The oldest job and those of the same model behind it, at most a batch; a Call alone."""
        first = self._queue[0]
        if isinstance(first.work, Call):
            return [first]
        same = (item for item in self._queue if isinstance(item.work, Job) and item.work.model is first.work.model)
        return [item for item, _ in zip(same, range(self.batch_size), strict=False)]


def _results(batch: Sequence[_Waiting]) -> list[Any]:
    """What each of a batch gets."""
    work = batch[0].work
    if isinstance(work, Call):
        return [work.function()]
    jobs = [item.work for item in batch if isinstance(item.work, Job)]
    tokens, noise = np.stack([job.tokens for job in jobs]), np.stack([job.noise for job in jobs])
    drawn: Drawn = work.model.draw(tokens, np.array([job.length for job in jobs], dtype=np.int64), noise)
    return [drawn.row(index) for index in range(len(jobs))]
