"""Records: one split of a data set in memory. layout.py reads them from the disk, text_image.py reads their images."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from miscc.vocabulary import Vocabulary


@dataclass
class Records:
    """One split of a data set in memory, N images.

    name, split: of the data set
    keys: names of the images, unique
    image_paths: their files
    captions: N lists of int64 arrays of word indices; no array and no list is empty
    class_ids: (N,) int64
    vocabulary: what the indices mean
    texts: the captions as written, or None where only the indices are known
    boxes: (N, 4) float64 of x, y, width, height in pixels, or None
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
        """Caption `number` of image `index`: as it was written, or else its known words."""
        if self.texts is not None:
            return self.texts[index][number]
        return self.vocabulary.decode(self.captions[index][number])

    def with_captions(self, most: int | None) -> "Records":
        """The same with at most so many captions of each image; None: all."""
        texts = None if self.texts is None else [texts[:most] for texts in self.texts]
        return replace(self, captions=[captions[:most] for captions in self.captions], texts=texts)

    def examples(self, count: int, vocabulary: Vocabulary) -> list[str]:
        """The first captions of at most `count` evenly spaced images, each caption once.

        Without those of which the vocabulary, perhaps of encoders trained on other captions, has no word.
        """
        captions = dict.fromkeys(self.text(index, 0) for index in evenly_spaced(len(self), count))
        return [caption for caption in captions if vocabulary.encode(caption)[0]]

    def fingerprint(self) -> dict[str, int]:
        """Number of images and checksums of keys and captions: equal for equal data."""
        captions = zlib.crc32(b"".join(tokens.tobytes() for captions in self.captions for tokens in captions))
        return {"num_images": len(self), "keys": zlib.crc32("\n".join(self.keys).encode()), "captions": captions}

    def select(self, indices: Iterable[int]) -> "Records":
        """The records at these indices, in this order."""
        # Arrays and lists have a row for each image; everything else is the whole split's.
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


def evenly_spaced(length: int, most: int) -> list[int]:
    """At most `most` of the indices below `length`, from the first to the last: neighbours in a data set are often alike."""
    count = min(length, most)
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]
