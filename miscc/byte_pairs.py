"""CLIP's tokenizer: captions as byte pairs between a start and an end token. Works without torch.

A caption reaches the text encoder whole: every character has a token, so no word is unknown and nothing is dropped. As OpenAI's
`clip.tokenize` and transformers' CLIPTokenizer, but for text in a broken encoding, which OpenAI's mends with the package ftfy.
"""

import functools
import gzip
import html
import io
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import regex

from miscc.errors import DataError
from miscc.files import MOST_BYTES, read_bytes, read_json
from miscc.vocabulary import Vocabulary

START, STOP = "<|startoftext|>", "<|endoftext|>"  # the last two entries
LONGEST_CACHED = 40  # letters of a word whose tokens are kept
WORD_END = "</w>"  # marks the last piece of a word
NUM_BYTES = 256
OPENAI_MERGES = 49152 - NUM_BYTES - 2  # of the 262,143 lines in OpenAI's file CLIP uses so many
FILES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer.json")  # where a folder may have the merges

_PIECE = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
_PLAIN = {0xFF01 + n: chr(0x21 + n) for n in range(94)}  # full-width letters, digits and signs, as ftfy narrows them
_PLAIN |= str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})  # and straightens quotes


def byte_characters() -> list[str]:
    """A printable character for each of the 256 bytes, in the order in which CLIP's vocabulary begins: those that are
    printable in Latin-1, then the others as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(NUM_BYTES + n) for n in range(NUM_BYTES - len(printable))]


def byte_values() -> dict[str, int]:
    """`byte_characters` -> the bytes that they stand for."""
    characters = byte_characters()
    printable = [ord(character) for character in characters if ord(character) < NUM_BYTES]

    # What Latin-1 cannot print, in the order of the bytes.
    others = [byte for byte in range(NUM_BYTES) if byte not in set(printable)]
    return dict(zip(characters, [*printable, *others], strict=True))


class BytePairs(Vocabulary):
    """CLIP's vocabulary: 256 bytes, the same at a word's end, the merges of two pieces in order, start and end token.

    words: all entries in this order, a merge as its two pieces with a space between; checkpoints keep it so. Index 0 is the
    padding; it is also the token of an exclamation mark, but only padding stands behind the end token.
    """

    reads_whole_captions = True

    def __init__(self, words: Iterable[str]):
        self.words = list(words)

        # Refuse another list before anything is indexed by it.
        if not is_byte_pairs(self.words):
            raise DataError(f"vocabulary: the last entries must be {START} and {STOP}, not {self.words[-2:]}")
        merges = [tuple(entry.split(" ")) for entry in self.words[2 * NUM_BYTES : -2]]
        if any(len(pair) != 2 for pair in merges):
            raise DataError("vocabulary: a merge of byte pairs must be two pieces with a space between")

        # Rank of each merge, index of each piece; words that occur often are merged once.
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        pieces = [*self.words[: 2 * NUM_BYTES], *("".join(pair) for pair in merges), START, STOP]
        self._pieces = pieces
        self._indices = {piece: index for index, piece in enumerate(pieces)}
        self._characters = {value: character for character, value in byte_values().items()}
        self._cached = functools.lru_cache(maxsize=2**16)(self._merge)

    def __getstate__(self) -> dict:
        """For the processes that read images: without the cache, which cannot be pickled."""
        return {"words": self.words}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["words"])

    @classmethod
    def of_merges(cls, merges: Iterable[str]) -> "BytePairs":
        """merges: "i n", "t h", ... in their order."""
        characters = byte_characters()
        return cls([*characters, *(character + WORD_END for character in characters), *merges, START, STOP])

    @classmethod
    def of_words(cls, words: Iterable[str]) -> "BytePairs":
        """A small vocabulary whose merges join ASCII words as far as they can, for untrained networks and tests."""
        merges: dict[str, None] = {}
        for word in words:
            pieces = [*word[:-1], word[-1] + WORD_END] if word.isascii() and word.isalnum() else []
            for number in range(1, len(pieces)):
                merges["".join(pieces[:number]) + " " + pieces[number]] = None
        return cls.of_merges(merges)

    def __contains__(self, word: str) -> bool:
        """Every word is known, letter by letter if need be."""
        return bool(word.strip())

    def encode(self, caption: str) -> tuple[list[int], list[str]]:
        """A caption -> its tokens between start and end, [] for one without a character; there are no unknown words."""
        indices = [index for piece in _PIECE.findall(clean(caption)) for index in self._word(piece)]
        return ([self._indices[START], *indices, self._indices[STOP]] if indices else []), []

    def encode_words(self, words: Iterable[str]) -> tuple[list[int], list[str]]:
        return self.encode(" ".join(words))

    def decode(self, indices: Iterable[int]) -> str:
        """Tokens -> the caption as it was read: lower case, one space between pieces."""
        values, text = byte_values(), b""
        for index in indices:
            piece = self._pieces[int(index)]
            if piece == STOP:
                break

            # A word's end becomes a space.
            if piece != START:
                text += bytes(values[c] for c in piece.removesuffix(WORD_END)) + b" " * piece.endswith(WORD_END)
        return text.decode("utf-8", errors="replace").strip()

    def shorten(self, indices: Sequence[int], max_words: int, rng: np.random.Generator | None) -> list[int]:
        """The first tokens, and the end token; rng has no effect."""
        return list(indices) if len(indices) <= max_words else [*indices[: max_words - 1], self._indices[STOP]]

    def _word(self, word: str) -> tuple[int, ...]:
        """One word -> its tokens. The cache holds no long words: a server's clients could fill the memory with them."""
        return self._cached(word) if len(word) <= LONGEST_CACHED else self._merge(word)

    def _merge(self, word: str) -> tuple[int, ...]:
        """One word -> its tokens: of all neighbours that may be joined, the earliest merge goes first."""
        if word in (START, STOP):
            return (self._indices[word],)

        # Byte by byte, the last one marked as the word's end.
        pieces = [self._characters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += WORD_END

        # Join until no neighbours have a merge.
        while len(pieces) > 1:
            pair = min(zip(pieces, pieces[1:], strict=False), key=lambda pair: self._ranks.get(pair, np.inf))
            if pair not in self._ranks:
                break
            pieces = list(_joined(pieces, pair))
        return tuple(self._indices[piece] for piece in pieces)


def clean(caption: str) -> str:
    """A caption as CLIP reads it: HTML's entities resolved, straight quotes, composed characters, lower case."""
    text = html.unescape(html.unescape(caption)).translate(_PLAIN)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def is_byte_pairs(words: Sequence[str]) -> bool:
    """Whether the words of a checkpoint are byte pairs, not words."""
    return list(words[-2:]) == [START, STOP] and len(words) >= 2 * NUM_BYTES + 2


def vocabulary_of(words: Sequence[str]) -> Vocabulary:
    """The vocabulary that a checkpoint or vocabulary.json keeps as a list, of either kind. Raises DataError."""
    return BytePairs(words) if is_byte_pairs(words) else Vocabulary(words)


def read_merges(path: Path) -> list[str]:
    """The merges in one of FILES. Raises DataError for something else."""
    try:
        if path.suffix == ".json":
            merges = read_json(path)["model"]["merges"]
            return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]

        # Text, packed or not: a line of comment, then a merge a line, more than CLIP uses.
        text = read_bytes(path)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(text)) as stream:
                text = stream.read(MOST_BYTES + 1)
            if len(text) > MOST_BYTES:
                raise ValueError(f"it unpacks to more than {MOST_BYTES >> 20} MiB")
        lines = text.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        return [line for line in lines[1 : OPENAI_MERGES + 1] if line]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as the merges of CLIP's tokenizer ({error}); copy it again") from None


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> Iterator[str]:
    """The pieces with every occurrence of the pair as one."""
    position = 0
    while position < len(pieces):
        found = tuple(pieces[position : position + 2]) == pair
        yield "".join(pair) if found else pieces[position]
        position += 2 if found else 1
