"""Data loaders: endless batches in an order that depends on seed and epoch alone, read by worker processes."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from datasets.similar import with_similar_batches
from datasets.text_image import Sample, TextImageDataset
from miscc.batch import Batch
from miscc.errors import ConfigError, DataError
from miscc.randomness import stream

Arrange = Callable[[int, np.ndarray], np.ndarray]  # epoch, shuffled indices -> the indices in the epoch's order


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> one Batch; a single image size comes as a tensor, several as a list of tensors."""
    images = [torch.stack(scale) for scale in zip(*(sample.images for sample in samples), strict=True)]
    return Batch(
        images=images if len(images) > 1 else images[0],
        captions=torch.stack([sample.caption for sample in samples]),
        lengths=torch.tensor([sample.length for sample in samples]),
        class_ids=torch.tensor([sample.class_id for sample in samples]),
        keys=[sample.key for sample in samples],
        indices=torch.tensor([sample.index for sample in samples]),
        caption_numbers=torch.tensor([sample.caption_number for sample in samples]),
    )


class EpochBatches(Sampler):
    """Endless batches of (epoch, index); each epoch is a permutation drawn from (seed, epoch).

    The images that do not fill a batch at the end of an epoch are left out. Step s is the same batch whether a run starts
    there or at step 0. Rank r of R gets the r-th share of it: together they see the batch of a single process.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        arrange: Arrange | None = None,
    ):
        """
        num_samples: of the data set
        batch_size: of all ranks together
        seed: of the order
        start_step: the first batch
        rank, world_size: of this process, and the number of processes
        arrange: (epoch, permutation) -> the order to use, a function of (seed, epoch) alone; None: the permutation

        Raises DataError if the data set is smaller than one batch, ConfigError if ranks cannot share a batch equally.
        """
        if num_samples < batch_size:
            raise DataError(
                f"the training split holds {num_samples} images, fewer than one batch of {batch_size}; "
                f"lower TRAIN.BATCH_SIZE or add images"
            )
        if batch_size % world_size:
            raise ConfigError(f"TRAIN.BATCH_SIZE: {batch_size} cannot be divided among {world_size} processes")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size
        self.arrange = arrange
        self.batches_per_epoch = num_samples // batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Where the first batch lies, and this rank's share of each.
        share = self.batch_size // self.world_size
        epoch, batch = divmod(self.start_step, self.batches_per_epoch)

        while True:
            order = stream(self.seed, "order", epoch).permutation(self.num_samples)
            if self.arrange is not None:
                order = self.arrange(epoch, order)
            for index in range(batch, self.batches_per_epoch):
                start = index * self.batch_size + self.rank * share
                yield [(epoch, int(image)) for image in order[start : start + share]]
            epoch, batch = epoch + 1, 0


class _Loader(DataLoader):
    """A DataLoader that passes a worker's DataError on as one line, without the worker's traceback.

    A worker that was killed is a DataError, too, raised where the next batch is requested: PyTorch's own handler would
    raise in the middle of a step.
    """

    def __iter__(self):  # pyrefly: ignore[bad-override]  # a generator over the iterator that PyTorch returns
        batches, is_main = None, threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if is_main and hasattr(signal, "SIGCHLD") else None
        try:
            batches = super().__iter__()
            if before is not None:
                signal.signal(signal.SIGCHLD, before)
            yield from batches
            return

        # A worker has ended. Either PyTorch has noticed that, or the worker's batch can no longer be received from it.
        except (RuntimeError, OSError, EOFError) as error:
            if "DataLoader worker" not in str(error) and not _has_lost_worker(batches, error):
                raise
            message = (
                f"WORKERS: a process that reads images was killed, as happens when memory runs short; use fewer than "
                f"{self.num_workers}, or --set WORKERS 0, which needs none"
            )
            traceback.clear_frames(error.__traceback__)
        except DataError as error:
            # PyTorch re-raises with the traceback as the message; its last entry is `miscc.errors.DataError: text`.
            marker = f"\n{DataError.__module__}.{DataError.__qualname__}: "
            message = str(error).rpartition(marker)[2].strip()

            # PyTorch's frame and this error hold each other, and the workers, which then end only after a time limit.
            traceback.clear_frames(error.__traceback__)
        batches = None  # so that this frame does not hold the workers either
        raise DataError(message)


def _has_lost_worker(batches: object, error: Exception) -> bool:
    """Whether an error comes from receiving a batch of a worker that has ended."""
    if not isinstance(error, (ConnectionError, FileNotFoundError, EOFError)):
        return False
    workers = getattr(batches, "_workers", [])
    end = time.monotonic() + 5  # a killed process takes a moment to end
    while not (lost := any(worker.exitcode is not None for worker in workers)) and time.monotonic() < end:
        time.sleep(0.02)
    return lost


def _start_worker(worker: int) -> None:
    """Shield a worker from signals to the process group (Ctrl-C, a scheduler's).

    The main process needs its workers to finish the step and save, and ends them itself. PyTorch has already limited the
    worker to one thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def training_loader(
    dataset: TextImageDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    similar: float = 0.0,
) -> DataLoader:
    """Endless batches from `start_step` on; see EpochBatches, which is the loader's `batch_sampler`.

    workers: reading processes, which stay from epoch to epoch and use one thread each; 0: the main process reads
    pin_memory: page-locked batches, for a GPU
    similar: share of the batches whose captions resemble each other, in [0, 1]
    """

    def arrange(epoch: int, order: np.ndarray) -> np.ndarray:
        rng = stream(seed, "similar", epoch)
        return with_similar_batches(order, lambda index: dataset.caption(epoch, index)[0], batch_size, similar, rng)

    options = (len(dataset), batch_size, seed, start_step, rank, world_size)
    batches = EpochBatches(*options, arrange=arrange if similar else None)
    return _loader(dataset, workers, batch_sampler=batches, pin_memory=pin_memory)


def ordered_loader(dataset: TextImageDataset, batch_size: int, workers: int = 0) -> DataLoader:
    """Every image once, in order, the last short batch included."""
    return _loader(dataset, workers, batch_size=batch_size, shuffle=False)


def _loader(dataset: TextImageDataset, workers: int, **options) -> DataLoader:
    return _Loader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # for the workers' seeds, which are not used here; else the global one would change
        **options,
    )
