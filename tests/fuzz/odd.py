"""Odd values that the fuzzer's kinds share: texts, JSON values, damaged bytes."""

import random
import string
from collections.abc import Callable

Call = Callable[[], object]
ODD = [
    "", " ", "²", "-1", "0", "9" * 400, "9" * 5000, "1e400", "nan", ".inf", "12:30:45", "2024-13-45", "!!int x", "!!bool x",
    "&a [*a]", "*a", "{", "[[[[", "[" * 3000, "true", "~", "a\0b", "\ud800", "grüner", "鳥", "\u2028", "\ufffd\ufffd", "🐦",
    "../x", "x" * 5000, "!!python/object:os.system x", "<<: *a", "? [a]", "0x7f", "010", "1_000", "- 1", "a: b", "'", '"',
    "%", "\t",
]  # fmt: skip
WORDS = ["red", "bird", "with", "wings", *ODD]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, removed, doubled, or cut off."""
    content = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(content) + 1)
        what = rng.randrange(5)
        if what == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            del content[place : place + rng.choice([1, 4, 64])]
        elif what == 2:
            content[place:place] = rng.choice([b"\xff", b"\0", b"\n", b"[", b"\xff" * 8, content[place : place + 16]])
        elif what == 3:
            del content[place:]
        else:
            content[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff"])
    return bytes(content)


def odd_json(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value, odd ones often."""
    leaf = rng.choice([None, True, -1, 2**70, 1.5, 1e400, "", rng.choice(ODD), [], {}, "images/0.png", "a red bird"])
    if depth > 2 or rng.random() < 0.6:
        return leaf
    inside = [odd_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return inside if rng.random() < 0.5 else {rng.choice(["key", "image", "captions", "file"]): one for one in inside}


def scalar(rng: random.Random) -> str:
    return rng.choice([rng.choice(ODD), str(rng.randrange(-5, 10**6)), "".join(rng.choices(string.printable, k=6))])
