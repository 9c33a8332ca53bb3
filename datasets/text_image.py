"""Images with captions, whatever data set they come from: Records, TextImageDataset, Batch and the loaders.

Where the records come from is layout.py's business and that of the data sets' own files; captions.py cuts
words.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from datasets.records import Records
from miscc.errors import DataError
from miscc.images import from_uint8, open_pixels
from miscc.randomness import stream
from miscc.vocabulary import shorten

logger = logging.getLogger(__name__)


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
