"""Captions as word indices: how a caption is cut, which words a model knows; vocabulary.json. Works without torch."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from miscc.errors import DataError, shown
from miscc.files import read_json, write_json

END = "<end>"  # word 0: the padding
_WORD = re.compile(r"\w+")  # as the originals give it to nltk's RegexpTokenizer; importing nltk takes two seconds


def tokenize(caption: str) -> list[str]:
    """A caption's words as AttnGAN makes them.

    Pairs of U+FFFD (a lost character) become a space; the rest is lower-cased and split into runs of letters, digits and
    underscores. Characters outside ASCII are removed from each word, and words that are then empty.
    """
    words = _WORD.findall(caption.replace("\ufffd\ufffd", " ").lower())
    if caption.isascii():
        return words

    # Outside ASCII: removed, as the originals do.
    plain = (word.encode("ascii", "ignore").decode("ascii") for word in words)
    return [word for word in plain if word]


def words_that_lose_letters(caption: str) -> dict[str, str]:
    """The words of a caption that `tokenize` changes by more than capitals, as {"grüner": "grner"}; "" where none is left."""
    if caption.isascii():
        return {}
    words = _WORD.findall(caption.lower())
    return {word: word.encode("ascii", "ignore").decode("ascii") for word in words if not word.isascii()}


class Vocabulary:
    """The words that an encoder knows, each at its index; index 0 is `<end>`, the padding.

    reads_whole_captions: whether capitals, signs and unknown words make a difference, so that captions are wanted as written.
    """

    reads_whole_captions = False

    def __init__(self, words: Iterable[str]):
        """words: in the order of their indices, `<end>` first. Raises DataError if it is not, or a word occurs twice."""
        self.words = list(words)
        if not self.words or self.words[0] != END:
            raise DataError(f"vocabulary: the first entry must be {END}, not {shown(self.words[:1])}")

        # Lookup by word.
        self._indices = {word: index for index, word in enumerate(self.words)}
        if len(self._indices) != len(self.words):
            twice = next(word for index, word in enumerate(self.words) if self._indices[word] != index)
            raise DataError(f"vocabulary: {shown(twice)} is there twice")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._indices

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    __hash__ = None

    def encode(self, caption: str) -> tuple[list[int], list[str]]:
        """A caption -> the indices of its words in order, and the words that are not in the vocabulary."""
        return self.encode_words(tokenize(caption))

    def encode_words(self, words: Iterable[str]) -> tuple[list[int], list[str]]:
        """As `encode`, for a caption that is already split. `<end>` counts as an unknown word."""
        indices: list[int] = []
        unknown: list[str] = []
        for word in words:
            index = self._indices.get(word, 0)
            if index:
                indices.append(index)
            else:
                unknown.append(word)
        return indices, unknown

    def decode(self, indices: Iterable[int]) -> str:
        """Indices -> the words with spaces between them; the padding is left out."""
        return " ".join(self.words[int(index)] for index in indices if index)

    def shorten(self, indices: Sequence[int], max_words: int, rng: np.random.Generator | None) -> list[int]:
        """At most `max_words` of a caption's indices, see `shorten`."""
        return shorten(indices, max_words, rng)

    @classmethod
    def build(cls, captions: Iterable[str]) -> "Vocabulary":
        """Every word of the captions, in the order of their first occurrence, as in AttnGAN's code."""
        words: dict[str, None] = {END: None}
        for caption in captions:
            words.update(dict.fromkeys(tokenize(caption)))
        return cls(words)

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read vocabulary.json. Raises DataError when it is missing or something else."""
        return cls(read_words(path))

    def save(self, path: str | Path) -> None:
        """Write vocabulary.json, whole or not at all."""
        write_json(path, self.words)


def read_words(path: str | Path) -> list[str]:
    """The list of words in a vocabulary.json. Raises DataError when it is missing or something else."""
    path = Path(path)
    try:
        words = read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such vocabulary; write it with `python -m datasets.prepare`") from None
    except PermissionError:  # nothing is wrong with the file
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); write it again with datasets.prepare") from None

    # The words, not yet a vocabulary: byte pairs are kept in such a file, too.
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{path}: must be a list of words")
    return words


def shorten(indices: Sequence[int], max_words: int, rng: np.random.Generator | None) -> list[int]:
    """At most `max_words` of a caption's words, in their order.

    rng: draws which, as in AttnGAN and SSA-GAN; None: the first `max_words`
    """
    if len(indices) <= max_words:
        return list(indices)
    if rng is None:
        return list(indices[:max_words])
    kept = np.sort(rng.permutation(len(indices))[:max_words])
    return [indices[word] for word in kept]


def encode_rows(
    captions: Sequence[str], vocabulary: Vocabulary, max_words: int
) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """Captions of a user -> tokens (N, max_words) int64 padded with 0, lengths (N,) int64, unknown words (N lists).

    Unknown words are left out and returned, so that the caller can name them; longer captions keep their first
    `max_words` known words. Raises DataError for a caption that is empty or of which no word is known.
    """
    tokens = np.zeros((len(captions), max_words), dtype=np.int64)
    lengths = np.zeros(len(captions), dtype=np.int64)
    unknown = []
    for row, caption in enumerate(captions):
        # Lone surrogates: bytes that a terminal or form handed over undecoded.
        if re.search("[\ud800-\udfff]", caption):
            raise DataError(f"caption {shown(caption)} holds bytes that are not UTF-8; save it as UTF-8")
        indices, missing = vocabulary.encode(caption)
        if not indices:
            raise DataError(_nothing_known(caption, missing))

        # One row, padded.
        indices = vocabulary.shorten(indices, max_words, rng=None)
        tokens[row, : len(indices)] = indices
        lengths[row] = len(indices)
        unknown.append(missing)
    return tokens, lengths, unknown


def _nothing_known(caption: str, missing: list[str]) -> str:
    if not missing:
        return f"caption {shown(caption)} holds no word in Latin letters; write one such as 'a small red bird with black wings'"
    return (
        f"caption {shown(caption)}: none of its words ({', '.join(missing[:8])[:200]}) is in the model's vocabulary; "
        f"use words that occur in the captions of its training set"
    )
