"""TextImageDataset: records -> samples of an image and a caption; reading, cutting out, scaling and cropping images.

Batches of samples are made by loading.py; images that are decoded already come from cache.py.
"""

import logging
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from datasets.records import Records
from miscc.errors import DataError
from miscc.images import from_uint8, open_pixels
from miscc.randomness import stream

logger = logging.getLogger(__name__)

MOST_PIXELS = 1 << 27  # of a scaled image; 400 MB


class Sample(NamedTuple):
    """One row of a Batch.

    images: one a size, (3, H, W) float32 in [-1, 1] or uint8
    caption: (T,) int64, padded with 0
    length: number of its words
    class_id: of the image
    key: the image's name
    index: of the image in the records
    caption_number: which of the image's captions
    """

    images: list[torch.Tensor]
    caption: torch.Tensor
    length: int
    class_id: int
    key: str
    index: int
    caption_number: int


def box_edges(width: int, height: int, box: Sequence[float]) -> tuple[int, int, int, int]:
    """The square that is cut out around a bounding box, as in AttnGAN: left, top, right, bottom in pixels.

    Half its side is 0.75 times the longer side of the box; it is clipped to the image.

    width, height: of the image
    box: x, y, width, height

    Raises DataError for a box that is empty or outside.
    """
    x, y, box_width, box_height = box
    if not all(abs(number) < 1e9 for number in box):  # false for NaN, too
        raise DataError(f"bounding box {tuple(box)} holds something that is no number of pixels")
    half = int(max(box_width, box_height) * 0.75)
    center_x, center_y = int((2 * x + box_width) / 2), int((2 * y + box_height) / 2)
    left, right = max(0, center_x - half), min(width, center_x + half)
    top, bottom = max(0, center_y - half), min(height, center_y + half)
    if right <= left or bottom <= top:
        raise DataError(f"bounding box {tuple(box)} is empty or outside the image of {width} x {height}")
    return left, top, right, bottom


def load_resized(path: str | Path | BytesIO, box: Sequence[float] | None, image_size: int) -> np.ndarray:
    """Read an image, cut out its box and scale its shorter side to int(image_size * 76 / 64) pixels.

    Returns (h, w, 3) uint8, the whole rectangle: random crops are taken from it, and the cache stores it. Raises
    DataError, naming the file.
    """
    # Cut out the box.
    pixels = open_pixels(path, upright=box is None)  # CUB's boxes belong to the pixels as they are stored
    if box is not None:
        try:
            left, top, right, bottom = box_edges(pixels.shape[1], pixels.shape[0], box)
        except DataError as error:
            raise DataError(f"{path}: {error}; correct it in bounding_boxes.txt") from None
        pixels = pixels[top:bottom, left:right]

    # Scale, bilinear with antialiasing as torchvision's Resize. torch on uint8 is three times as fast as PIL and differs
    # from it by at most one level, in a few pixels of a thousand.
    height, width = pixels.shape[:2]
    short = int(image_size * 76 / 64)
    size = (int(short * height / width), short) if width <= height else (short, int(short * width / height))
    if size[0] * size[1] > MOST_PIXELS:
        raise DataError(
            f"{path}: is {width} x {height}, too narrow to be scaled to {size[1]} x {size[0]}; crop or remove it"
        )
    scaled = F.interpolate(pixels.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


class ImageReader(Protocol):
    """What TextImageDataset needs of a cache (cache.ImageCache)."""

    image_size: int

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """What load_resized returns for this image."""
        ...


class TextImageDataset(Dataset):
    """Images with one caption each; crop, flip and caption are a function of (seed, epoch, index) alone.

    An item is (epoch, index), (epoch, index, caption number) or index alone (epoch 0).
    """

    def __init__(
        self,
        records: Records,
        image_sizes: Sequence[int],
        max_words: int = 18,
        seed: int = 100,
        augment: bool = True,
        cache: ImageReader | None = None,
        skip_broken: bool = False,
        as_bytes: bool = False,
        remedy: str = "--set SKIP_BROKEN True",
    ):
        """
        records: a split
        image_sizes: in pixels; the crop has the largest, the others are scaled from it
        max_words: of a caption; longer ones are shortened
        seed: of crops, flips and captions
        augment: random caption, crop and horizontal flip; else caption 0 (or the number given), the middle, no flip
        cache: an ImageCache of the same records and largest size
        skip_broken: replace a file that cannot be read by the next good one, with one warning, instead of a DataError
        as_bytes: images as uint8, a quarter of the memory; `Batch.to` converts them on the device
        remedy: how the command at hand leaves out files that cannot be read
        """
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
        self.remedy = remedy

        # Which broken files have been named: in shared memory, so that the workers name each of them only once.
        self._named = torch.zeros(len(records) if skip_broken else 0, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, ...]) -> Sample:
        epoch, index, *rest = index if isinstance(index, tuple) else (0, index)
        number = rest[0] if rest else None
        if not 0 <= index < len(self):
            raise IndexError(index)

        # One image, or an error that says how to go on without it.
        if not self.skip_broken:
            try:
                return self._sample(epoch, index, number)
            except DataError as error:
                raise DataError(f"{error}, or leave such files out: {self.remedy}") from None

        # The next image that can be read.
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
        """Image `index` as this epoch crops and flips it, with its caption `number` or, for None, one that is drawn."""
        images = self._images(epoch, index)
        tokens, number = self.caption(epoch, index, number)
        caption = np.zeros(self.max_words, dtype=np.int64)
        caption[: len(tokens)] = tokens
        return Sample(
            images=images,
            caption=torch.from_numpy(caption),
            length=len(tokens),
            class_id=int(self.records.class_ids[index]),
            key=self.records.keys[index],
            index=index,
            caption_number=number,
        )

    def caption(self, epoch: int, index: int, number: int | None = None) -> tuple[list[int], int]:
        """A caption of image `index`, and which of its captions it is.

        number: which caption; None: the one that the epoch draws.

        Returns (indices of its words, at most max_words; the caption's index).
        """
        captions = self.records.captions[index]
        if not self.augment:
            number = 0 if number is None else number % len(captions)
            return self.records.vocabulary.shorten(captions[number].tolist(), self.max_words, None), number

        # Drawn even where the number is given, so that the choice of words does not depend on it.
        rng = stream(self.seed, "caption", epoch, index)
        drawn = int(rng.integers(len(captions)))
        number = drawn if number is None else number % len(captions)
        return self.records.vocabulary.shorten(captions[number].tolist(), self.max_words, rng), number

    def _images(self, epoch: int, index: int) -> list[torch.Tensor]:
        """The image at every size."""
        if self.cache is not None:
            pixels = self.cache.read(index)
        else:
            boxes = self.records.boxes
            box = None if boxes is None else boxes[index]
            pixels = load_resized(self.records.image_paths[index], box, max(self.image_sizes))

        # One crop, of the largest size; smaller images are scaled from it.
        crop = self._crop(pixels, epoch, index)
        scales = [_to_tensor(crop, size) for size in self.image_sizes]
        return scales if self.as_bytes else [from_uint8(scale) for scale in scales]

    def _crop(self, pixels: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """(h, w, 3) uint8 -> (H, H, 3) of the largest size, perhaps flipped."""
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
