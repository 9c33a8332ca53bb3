"""The phrases of a training set: the words, and pairs of neighbouring words, that tell its captions apart.

Which of them a caption has, and which an image has in one of its captions. What is learned from that: models/phrases.py.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

import numpy as np
from scipy import sparse

from miscc.errors import DataError

Phrase = tuple[int, ...]  # indices of one word, or of two neighbouring ones

# Shares of the captions. Rarer phrases cannot be learned, more frequent ones say nothing.
RAREST, MOST_FREQUENT = 0.001, 0.5


def phrases_in(words: Sequence[int]) -> set[Phrase]:
    """The words of a caption and its pairs of neighbouring words.

    Pairs, since "red wings" and "a red head" share no more than a colour.

    words: indices.
    """
    return {*((word,) for word in words), *zip(words, words[1:], strict=False)}


class Phrases:
    """P phrases of a training set of N images.

    caption_rates: (P,) float32, the share of the captions that have each phrase.
    image_rates: (P,) float32, the share of the images that have it in one of their captions.
    """

    def __init__(self, captions: Sequence[Sequence[np.ndarray]]):
        """
        captions: of each image, arrays of word indices.

        Raises DataError where no phrase tells the captions apart.
        """
        # The phrases that are neither too rare nor too frequent. Counted without keeping those of all captions (COCO: a GB).
        counts: Counter[Phrase] = Counter()
        for caption in chain.from_iterable(captions):
            counts.update(phrases_in(caption.tolist()))
        num_captions = sum(map(len, captions))
        kept = [phrase for phrase, count in counts.items() if RAREST <= count / num_captions <= MOST_FREQUENT]
        if not kept:
            raise DataError(
                "DAMSM.PHRASES: all captions have the same words, so that no phrase tells them apart; set it to 0"
            )
        self._columns = {phrase: column for column, phrase in enumerate(sorted(kept))}

        # Which image has which, in one of its captions.
        of_images = ([phrases_in(caption.tolist()) for caption in of_image] for of_image in captions)
        self._of_images = self._rows(set().union(*found) for found in of_images)
        self.caption_rates = np.array([counts[phrase] / num_captions for phrase in self._columns], dtype=np.float32)
        self.image_rates = np.asarray(self._of_images.mean(axis=0), dtype=np.float32).reshape(-1)

    def __len__(self) -> int:
        return len(self._columns)

    def of_images(self, indices: Sequence[int]) -> np.ndarray:
        """(N, P) float32: 1 where an image has a phrase in one of its captions.

        indices: N images of the training set.
        """
        return cast(sparse.csr_matrix, self._of_images[indices]).toarray()

    def of_captions(self, captions: Sequence[Sequence[int]], whole: Sequence[Sequence[int]]) -> np.ndarray:
        """(N, P) float32: 1 where a caption has a phrase, as it was read and as a whole.

        captions: N lists of word indices, as they are read.
        whole: the same before any words were left out.
        """
        pairs = zip(captions, whole, strict=True)
        return self._rows([phrases_in(caption) & phrases_in(full) for caption, full in pairs]).toarray()

    def _rows(self, found: Iterable[set[Phrase]]) -> sparse.csr_matrix:
        """(N, P) float32 of N sets of phrases."""
        columns = [[self._columns[phrase] for phrase in phrases if phrase in self._columns] for phrases in found]
        ends = np.cumsum([0, *map(len, columns)])
        indices = np.fromiter(chain.from_iterable(columns), dtype=np.int64, count=ends[-1])
        return sparse.csr_matrix((np.ones(len(indices), np.float32), indices, ends), shape=(len(columns), len(self)))
