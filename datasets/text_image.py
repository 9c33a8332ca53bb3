"""Images with captions, whatever data set they come from: Records, TextImageDataset, Batch and the loaders.

Where the records come from is layout.py's business and that of the data sets' own files; captions.py cuts
words.
"""

import logging
import os
import signal
import traceback
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.captions import Vocabulary, shorten
from miscc.errors import ConfigError, DataError
from miscc.images import from_uint8, open_pixels
from miscc.randomness import stream

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What passes from here to training and evaluation.

    images: (N, 3, H, W) float32 in [-1, 1], or a list of them where several image sizes were asked for, in
    that order; uint8 until `to` where the data set gives bytes; captions: (N, T) int64, padded with 0; lengths:
    (N,) int64, 1 to T; class_ids: (N,) int64; keys: N names of images; indices: (N,) int64, positions in the
    records; caption_numbers: (N,) int64, which caption.
    """

    images: torch.Tensor | list[torch.Tensor]
    captions: torch.Tensor
    lengths: torch.Tensor
    class_ids: torch.Tensor
    keys: list[str]
    indices: torch.Tensor
    caption_numbers: torch.Tensor

    def images_at(self, size: int) -> torch.Tensor:
        """The images of this size in pixels, which must be one of those asked for: (N, 3, size, size)."""
        scales = [self.images] if isinstance(self.images, torch.Tensor) else self.images
        return next(images for images in scales if images.shape[-1] == size)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same with images, captions and class ids on `device`, images of bytes as floats.

        Lengths and numbers stay on the CPU, where packing and random streams read them without waiting for a GPU.
        """

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            return [move(item) for item in value]

        images = move(self.images)
        scales = [from_uint8(scale) if scale.dtype == torch.uint8 else scale for scale in _as_list(images)]
        images = scales if isinstance(images, list) else scales[0]
        return self._replace(images=images, captions=move(self.captions), class_ids=move(self.class_ids))


def _as_list(images: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return images if isinstance(images, list) else [images]


class Sample(NamedTuple):
    """One row of a Batch: images (3, H, W) float32 in [-1, 1] or uint8, a list with one a size; caption (T,) int64."""

    images: list[torch.Tensor]
    caption: torch.Tensor
    length: int
    class_id: int
    key: str
    index: int
    caption_number: int


@dataclass
class Records:
    """One split of a data set in memory: for each of N images its key, path, captions, class and perhaps its box.

    captions: N lists of int64 arrays of word indices, no array empty, no list empty; texts: the captions as
    written, or None where only the indices are known; class_ids: (N,) int64; boxes: (N, 4) float64 of x, y,
    width, height in pixels, or None.
    """

    name: str
    split: str
    keys: list[str]
    image_paths: list[Path]
    captions: list[list[np.ndarray]]
    class_ids: np.ndarray
    vocabulary: Vocabulary
    texts: list[list[str]] | None = None
    boxes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def text(self, index: int, number: int) -> str:
        """Caption `number` of image `index` as it was written, or else the words that are known of it."""
        if self.texts is not None:
            return self.texts[index][number]
        return self.vocabulary.decode(self.captions[index][number])

    def fingerprint(self) -> dict[str, int]:
        """What tells one set from another: the number of its images, checksums of their keys and captions."""
        captions = zlib.crc32(b"".join(tokens.tobytes() for captions in self.captions for tokens in captions))
        return {"num_images": len(self), "keys": zlib.crc32("\n".join(self.keys).encode()), "captions": captions}

    def select(self, indices: Iterable[int]) -> "Records":
        """The records at these positions, in this order."""
        indices = [int(index) for index in indices]
        chosen = {}
        for member in fields(self):
            value = getattr(self, member.name)
            if isinstance(value, np.ndarray):
                value = value[indices]
            elif isinstance(value, list):
                value = [value[index] for index in indices]
            chosen[member.name] = value
        return Records(**chosen)


def box_edges(width: int, height: int, box: Sequence[float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the square around a bounding box (x, y, width, height) of half side 0.75 times its
    longer side, clipped to an image of width × height: how AttnGAN and its followers cut birds out."""
    x, y, box_width, box_height = box
    half = int(max(box_width, box_height) * 0.75)
    center_x, center_y = int((2 * x + box_width) / 2), int((2 * y + box_height) / 2)
    left, right = max(0, center_x - half), min(width, center_x + half)
    top, bottom = max(0, center_y - half), min(height, center_y + half)
    if right <= left or bottom <= top:
        raise DataError(f"bounding box {tuple(box)} is empty or outside the image of {width} x {height}")
    return left, top, right, bottom


def load_resized(path: str | Path, box: Sequence[float] | None, image_size: int) -> np.ndarray:
    """Read an image, cut out its box and scale it so that the shorter side is int(image_size * 76 / 64)
    pixels.

    Returns (h, w, 3) uint8, the whole rectangle: what random crops are taken from, and what the cache keeps.
    Bilinear with antialiasing, as torchvision's Resize: torch's own on uint8, three times as fast as PIL's and at most
    one level away from it, in a few pixels of a thousand. Raises DataError, naming the file.
    """
    pixels = open_pixels(path, upright=box is None)  # CUB's boxes belong to the pixels as they are stored
    if box is not None:
        try:
            left, top, right, bottom = box_edges(pixels.shape[1], pixels.shape[0], box)
        except DataError as error:
            raise DataError(f"{path}: {error}; mend it in bounding_boxes.txt") from None
        pixels = pixels[top:bottom, left:right]
    height, width = pixels.shape[:2]
    short = int(image_size * 76 / 64)
    size = (int(short * height / width), short) if width <= height else (short, int(short * width / height))
    scaled = F.interpolate(pixels.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


class TextImageDataset(Dataset):
    """Images with one caption each, drawn as a function of (seed, epoch, index) and of nothing else.

    An item is (epoch, index), (epoch, index, caption number) or index alone (epoch 0). With `augment` a
    random caption, crop and horizontal flip; without, caption 0 (or the number given), the crop in the
    middle, no flip. The crop has the largest of `image_sizes`; the other sizes are scaled from it.
    """

    def __init__(
        self,
        records: Records,
        image_sizes: Sequence[int],
        max_words: int = 18,
        seed: int = 100,
        augment: bool = True,
        cache=None,
        skip_broken: bool = False,
        as_bytes: bool = False,
    ):
        """as_bytes: images as uint8, a quarter of the memory; `Batch.to` makes floats of them on the device. cache: an
        ImageCache of the same records and largest size. skip_broken: a file that cannot be read
        is named once in a warning and the next good one takes its place, instead of a DataError."""
        if not len(records):
            raise DataError(f"{records.name}: the split {records.split!r} holds no image")
        if cache is not None and (cache.image_size != max(image_sizes) or len(cache) != len(records)):
            raise ValueError("the cache was opened for other records or another image size")
        self.records = records
        self.image_sizes = list(image_sizes)
        self.max_words = max_words
        self.seed = seed
        self.augment = augment
        self.cache = cache
        self.skip_broken = skip_broken
        self.as_bytes = as_bytes
        # Which broken files have been named: in shared memory, so that the workers name each of them only once.
        self._named = torch.zeros(len(records), dtype=torch.bool).share_memory_() if skip_broken else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | tuple[int, ...]) -> Sample:
        epoch, index, *number = item if isinstance(item, tuple) else (0, item)
        number = number[0] if number else None
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self.skip_broken:
            try:
                return self._sample(epoch, index, number)
            except DataError as error:
                raise DataError(f"{error}, or leave such files out: --set SKIP_BROKEN True") from None
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                return self._sample(epoch, candidate, number)
            except DataError as error:
                if not self._named[candidate]:
                    self._named[candidate] = True
                    logger.warning("skipped: %s", error)
        raise DataError(f"{self.records.name}: not one image of the split {self.records.split!r} can be read")

    def _sample(self, epoch: int, index: int, number: int | None) -> Sample:
        images = self._images(epoch, index)
        tokens, number = self._caption(epoch, index, number)
        caption = np.zeros(self.max_words, dtype=np.int64)
        caption[: len(tokens)] = tokens
        records = self.records
        return Sample(
            images,
            torch.from_numpy(caption),
            len(tokens),
            int(records.class_ids[index]),
            records.keys[index],
            index,
            number,
        )

    def _caption(self, epoch: int, index: int, number: int | None) -> tuple[list[int], int]:
        captions = self.records.captions[index]
        if not self.augment:
            number = 0 if number is None else number % len(captions)
            return shorten(captions[number].tolist(), self.max_words, None), number
        rng = stream(self.seed, "caption", epoch, index)
        drawn = int(rng.integers(len(captions)))
        number = drawn if number is None else number % len(captions)
        return shorten(captions[number].tolist(), self.max_words, rng), number

    def _images(self, epoch: int, index: int) -> list[torch.Tensor]:
        if self.cache is not None:
            pixels = self.cache.read(index)
        else:
            boxes = self.records.boxes
            box = None if boxes is None else boxes[index]
            pixels = load_resized(self.records.image_paths[index], box, max(self.image_sizes))
        crop = self._crop(pixels, epoch, index)
        scales = [_to_tensor(crop, size) for size in self.image_sizes]
        return scales if self.as_bytes else [from_uint8(scale) for scale in scales]

    def _crop(self, pixels: np.ndarray, epoch: int, index: int) -> np.ndarray:
        size = max(self.image_sizes)
        down, right = pixels.shape[0] - size, pixels.shape[1] - size
        if not self.augment:
            return pixels[down // 2 : down // 2 + size, right // 2 : right // 2 + size]
        rng = stream(self.seed, "crop", epoch, index)
        top, left, flip = rng.integers(down + 1), rng.integers(right + 1), rng.random() < 0.5
        crop = pixels[top : top + size, left : left + size]
        return crop[:, ::-1] if flip else crop


def _to_tensor(crop: np.ndarray, size: int) -> torch.Tensor:
    """(H, H, 3) uint8 -> (3, size, size) uint8."""
    if crop.shape[0] != size:
        crop = np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((size, size), Image.Resampling.BILINEAR))
    # A copy in any case: pixels of the cache are read-only, and PyTorch cannot take negative strides.
    return torch.from_numpy(crop.transpose(2, 0, 1).copy())


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
    """Batches of (epoch, index) without end; each epoch goes through a permutation drawn from (seed, epoch).

    What does not fill a batch at the end of an epoch is left out. Step s is the same batch whether one starts
    there or comes from step 0, and rank r of R has the r-th R-th of it: together they see the batch that one
    process would.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """batch_size counts all ranks together. Raises DataError if the data set is smaller than one
        batch."""
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
        self.batches_per_epoch = num_samples // batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        epoch, batch = divmod(self.start_step, self.batches_per_epoch)
        while True:
            order = stream(self.seed, "order", epoch).permutation(self.num_samples)
            for number in range(batch, self.batches_per_epoch):
                start = number * self.batch_size + self.rank * share
                yield [(epoch, int(index)) for index in order[start : start + share]]
            epoch, batch = epoch + 1, 0


class _Loader(DataLoader):
    """A DataLoader whose workers' DataErrors arrive as they were, one line, without the worker's traceback."""

    def __iter__(self):
        try:
            yield from super().__iter__()
            return
        except DataError as error:
            # PyTorch re-raises with the traceback as the message; its last entry is `miscc.errors.DataError: text`.
            marker = f"\n{DataError.__module__}.{DataError.__qualname__}: "
            message = str(error).rpartition(marker)[2].strip()
            # PyTorch's frame and this error hold each other, and the workers, which then end only after a time limit.
            traceback.clear_frames(error.__traceback__)
        raise DataError(message)


def _start_worker(worker: int) -> None:
    """Keep workers alive when Ctrl-C or a scheduler signals the whole process group: the main process finishes its
    step and saves, for which it needs them, and ends them itself. PyTorch has set one thread a worker by now."""
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
) -> DataLoader:
    """Batches without end, from `start_step` on; `loader.batch_sampler` is the EpochBatches, which knows
    `batches_per_epoch`. batch_size counts all ranks together. Workers stay from epoch to epoch and use one
    thread each.
    """
    batches = EpochBatches(len(dataset), batch_size, seed, start_step, rank, world_size)
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
        generator=torch.Generator(),  # or the seeds drawn for workers, unused here, would move the global one on
        **options,
    )
