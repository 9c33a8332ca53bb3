"""The batcher: what waits is joined, the queue is bounded, what was given up is dropped, nothing is lost at the end."""

import threading
import time

import numpy as np
import pytest

from miscc.vocabulary import Vocabulary
from serve.batcher import Batcher, Call, ClosedError, Job, QueueFullError
from serve.models import Drawn, Model


class Echo(Model):
    """Draws the noise's first value, notes the batches, and waits for `gate` before each."""

    def __init__(self, name="echo"):
        super().__init__(name, "echo", 1, 1, 4, Vocabulary(["<end>", "bird"]), [], False)
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def draw(self, tokens, lengths, noise):
        self.gate.wait(10)
        self.batches.append(len(noise))
        if (noise < 0).any():
            raise ValueError("negative noise")
        return Drawn([noise[:, :, None, None].astype(np.uint8)], [], [])


def job(model, value):
    return Job(model, np.ones(4, dtype=np.int64), 1, np.array([value], dtype=np.float32))


def value(future):
    return int(future.result(10).images[0].ravel()[0])


@pytest.fixture
def batcher():
    made = Batcher(batch_size=4, queue_size=8, wait_seconds=0.05)
    yield made
    assert made.close(10)


def test_what_waits_is_joined_and_each_gets_its_own(batcher):
    model = Echo()
    futures = [batcher.submit([job(model, number)])[0] for number in range(6)]
    assert [value(future) for future in futures] == list(range(6))
    assert model.batches == [4, 2]
    assert batcher.num_images == 6 and batcher.num_batches == 2 and batcher.waiting == 0


def test_a_single_job_waits_for_company_for_a_moment_only(batcher):
    model, start = Echo(), time.monotonic()
    assert value(batcher.submit([job(model, 5)])[0]) == 5
    assert 0.04 < time.monotonic() - start < 1


def test_a_full_batch_does_not_wait():
    patient, model = Batcher(batch_size=2, queue_size=8, wait_seconds=30), Echo()
    assert [value(future) for future in patient.submit([job(model, 1), job(model, 2)])] == [1, 2]
    patient.close(10)


def test_models_are_not_mixed(batcher):
    one, two = Echo("one"), Echo("two")
    futures = batcher.submit([job(one, 1), job(two, 2), job(one, 3), job(two, 4)])
    assert [value(future) for future in futures] == [1, 2, 3, 4]
    assert one.batches == [2] and two.batches == [2]


def test_a_full_queue_takes_all_or_nothing(batcher):
    model = Echo()
    model.gate.clear()
    running = batcher.submit([job(model, number) for number in range(4)])
    while batcher.waiting:
        time.sleep(0.001)
    waiting = batcher.submit([job(model, number) for number in range(6)])
    with pytest.raises(QueueFullError, match="6 of 8 images wait"):
        batcher.submit([job(model, number) for number in range(3)])
    assert batcher.waiting == 6
    more = batcher.submit([job(model, number) for number in range(2)])
    model.gate.set()
    assert [value(future) for future in [*running, *waiting, *more]] == [*range(4), *range(6), *range(2)]


def test_what_was_given_up_is_dropped_and_makes_room(batcher):
    model = Echo()
    model.gate.clear()
    batcher.submit([job(model, 0)])
    time.sleep(0.1)
    given_up = batcher.submit([job(model, number) for number in range(8)])
    assert all(future.cancel() for future in given_up) and batcher.waiting == 0
    last = batcher.submit([job(model, 9)])[0]
    model.gate.set()
    assert value(last) == 9
    assert sum(model.batches) == 2 and batcher.num_dropped == 8


def test_an_error_ends_its_batch_and_not_the_thread(batcher):
    model = Echo()
    with pytest.raises(ValueError, match="negative noise"):
        value(batcher.submit([job(model, -1)])[0])
    assert value(batcher.submit([job(model, 7)])[0]) == 7 and batcher.alive


def test_calls_take_their_turn_alone_and_count_in_the_queue(batcher):
    model = Echo()
    with pytest.raises(QueueFullError):
        batcher.submit([Call(lambda: "never", images=9)])
    futures = batcher.submit([job(model, 1), Call(lambda: "walked", images=3), job(model, 2)])
    assert futures[1].result(10) == "walked" and [value(futures[0]), value(futures[2])] == [1, 2]


def test_closing_finishes_what_waits_and_takes_nothing_new():
    batcher, model = Batcher(batch_size=2, queue_size=8), Echo()
    futures = batcher.submit([job(model, number) for number in range(7)])
    assert batcher.close(10)
    assert [value(future) for future in futures] == list(range(7))
    with pytest.raises(ClosedError, match="shutting down"):
        batcher.submit([job(model, 1)])
    assert not batcher.alive
