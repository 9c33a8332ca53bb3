"""Captions as tensors, and AttnGAN's captions.pickle. Words and vocabularies are miscc/vocabulary.py's.

Which captions belong to which image is read in layout.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from datasets.pickles import load_legacy_pickle
from miscc.errors import DataError
from miscc.vocabulary import Vocabulary, encode_rows

METADATA_NAMES = ("captions.pickle", "captions_DAMSM.pickle")  # AttnGAN's name, and the one of later systems


def load_captions_pickle(path: str | Path) -> tuple[list, list, Vocabulary]:
    """AttnGAN's captions.pickle -> captions of train, captions of test (lists of index lists), vocabulary.

    Raises DataError when the file is missing, unsafe or of another form.
    """
    # Four parts; the last, word to index, is the inverse of the third.
    content = load_legacy_pickle(path)
    if not isinstance(content, (list, tuple)) or len(content) < 3 or not isinstance(content[2], dict):
        raise DataError(f"{path}: is not AttnGAN's [train captions, test captions, index to word, word to index]")
    train, test, index_to_word = content[:3]

    # The words in the order of their indices.
    try:
        words = [index_to_word[index] for index in range(len(index_to_word))]
    except KeyError as missing:
        raise DataError(f"{path}: the vocabulary has {len(index_to_word)} words but none at {missing}") from None
    if not all(isinstance(word, str) for word in words):
        raise DataError(f"{path}: the vocabulary holds something that is no word; copy the file again")
    try:
        vocabulary = Vocabulary(words)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return train, test, vocabulary


class EncodedCaptions(NamedTuple):
    """Captions as the text encoder takes them.

    tokens: (N, T) int64, padded with 0
    lengths: (N,) int64, from 1 to T
    unknown: for each caption the words that were left out
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    unknown: list[list[str]]


def encode_batch(captions: Sequence[str], vocabulary: Vocabulary, max_words: int) -> EncodedCaptions:
    """`miscc.vocabulary.encode_rows` as tensors. Raises DataError for a caption that is empty or of which no word is known."""
    tokens, lengths, unknown = encode_rows(captions, vocabulary, max_words)
    return EncodedCaptions(torch.from_numpy(tokens), torch.from_numpy(lengths), unknown)
