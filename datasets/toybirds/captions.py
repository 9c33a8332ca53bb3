"""Captions of toy birds: written from attributes in the manner of CUB's, and parsed back into attributes.

They use about a hundred different words. They never say which way the bird faces, because training flips the images.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from datasets.toybirds.attributes import COLORS

CAPTIONS_PER_IMAGE = 10
MAX_WORDS = 18  # WORDS_NUM of the bird settings: a caption of ours is never shortened

# Topics of a caption with their weights in the random choice. Evaluation reads the colours of crown, wing and belly.
_TOPICS = {"crown": 1.0, "wing": 1.0, "belly": 1.0, "beak": 0.45, "size": 0.45, "pattern": 0.3, "background": 0.3}
_COLORED = ("crown", "wing", "belly")

_NOUNS = {
    "crown": ("crown", "cap", "head"),
    "wing": ("wings",),
    "belly": ("belly", "breast", "chest", "underside"),
    "beak": ("beak", "bill"),
}
_COLOR_WORDS = {color: (color,) for color in COLORS} | {"grey": ("grey", "gray")}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_LENGTH_WORDS = {"short": ("short", "stubby"), "long": ("long",)}
_PATTERN_ADJECTIVES = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "barred"),
    "spotted": ("spotted", "speckled"),
}
_PATTERN_NOUNS = {"striped": ("stripes", "bars"), "spotted": ("spots", "dots")}
_PLACES = {
    "sky": ("against the sky", "in front of clouds", "below a cloudy sky"),
    "leaves": ("among leaves", "in front of foliage", "near leaves", "in a leafy bush"),
    "water": ("by the water", "near the sea", "in front of waves", "on a rock in a lake"),
    "sunset": ("at sunset", "at dusk", "in the evening", "in front of a sunset"),
    "snow": ("in the snow", "in winter", "on snowy ground"),
}
_PLACE_WORDS = {
    "sky": ("sky", "clouds", "cloudy"),
    "leaves": ("leaves", "foliage", "leafy", "bush"),
    "water": ("water", "sea", "waves", "lake"),
    "sunset": ("sunset", "dusk", "evening"),
    "snow": ("snow", "winter", "snowy"),
}


def write_captions(attributes: Mapping[str, str], rng: np.random.Generator) -> list[tuple[str, dict[str, str]]]:
    """Ten captions, each with the attributes that it names: two to four topics in any order."""
    return [_write_caption(attributes, rng) for _ in range(CAPTIONS_PER_IMAGE)]


def named_attributes(caption: str) -> dict[str, str]:
    """The attributes that a caption names, e.g. {"belly_color": "red", "size": "small"}.

    Exact for captions of our own; in others a colour counts for the part right after it ("red wings") or for the
    part that "is" or "are" of that colour, and words that we do not use are ignored.
    """
    named: dict[str, str] = {}
    color: str | None = None  # a colour whose part comes later: "red wings"
    subject: str | None = None  # a part whose colour comes later: "wings are red"
    told = False  # after "is" or "are", until the clause about `subject` ends

    for word in re.findall(r"\w+", caption.lower()):
        # Words that name an attribute on their own: "striped", "tiny", "dusk".
        if word in _UNIQUE:
            attribute, value = _UNIQUE[word]
            named[attribute] = value

        # Colours and parts, in either order.
        elif word in _COLOR_OF:
            color = _COLOR_OF[word]
            if told:
                named[f"{subject}_color"], color = color, None
        elif word in _PART_OF:
            subject, told = _PART_OF[word], False
            if color:
                named[f"{subject}_color"] = color
                color = subject = None

        # Verbs open a clause; anything but "and" ends it.
        elif word in ("is", "are"):
            told = subject is not None
        elif word != "and":
            told = False
    return named


def _invert(words: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {word: meaning for meaning, synonyms in words.items() for word in synonyms}


_COLOR_OF = _invert(_COLOR_WORDS)
_PART_OF = _invert(_NOUNS) | {"wing": "wing"}
_UNIQUE = {
    word: (attribute, value)
    for attribute, words in (
        ("size", _SIZE_WORDS),
        ("beak_length", _LENGTH_WORDS),
        ("wing_pattern", _PATTERN_ADJECTIVES),
        ("wing_pattern", _PATTERN_NOUNS),
        ("background", _PLACE_WORDS),
    )
    for word, value in _invert(words).items()
}


def _write_caption(attributes: Mapping[str, str], rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    # Which attributes the caption names: those of its topics.
    topics = _choose_topics(rng)
    said = {f"{part}_color": attributes[f"{part}_color"] for part in _COLORED if part in topics}
    if "beak" in topics:
        for key in _pick(rng, (("beak_color",), ("beak_length",), ("beak_length", "beak_color"))):
            said[key] = attributes[key]
    for topic, key in (("size", "size"), ("pattern", "wing_pattern"), ("background", "background")):
        if topic in topics:
            said[key] = attributes[key]

    # Some wordings of four topics are too long; every choice of topics also has short ones, so this ends.
    while True:
        caption = _Wording(said, topics, rng).caption()
        if len(re.findall(r"\w+", caption)) <= MAX_WORDS:
            return caption, said


def _choose_topics(rng: np.random.Generator) -> list[str]:
    """Two to four topics in random order, at least one of them a colour of crown, wing or belly."""
    # 2, 3 or 4 topics with probability 0.25, 0.4, 0.35.
    count = 2 + int(np.searchsorted((0.25, 0.65), rng.random()))

    # A weighted random order (Efraimidis and Spirakis 2006): sort by u^(1/weight).
    keys = rng.random(len(_TOPICS)) ** (1 / np.array(list(_TOPICS.values())))
    order = [topic for _, topic in sorted(zip(keys, _TOPICS, strict=True), reverse=True)]
    if not set(order[:count]) & set(_COLORED):
        order.insert(0, next(topic for topic in order if topic in _COLORED))
    return order[:count]


def _pick(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.random() * len(choices))]


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


class _Wording:
    """Writes one caption for the attributes in `said`; each method for a phrase picks its words at random."""

    def __init__(self, said: Mapping[str, str], topics: Sequence[str], rng: np.random.Generator):
        self.said, self.rng = said, rng
        self.parts = [t for t in topics if t in _NOUNS]
        if "pattern" in topics and "wing" not in topics:
            self.parts.append("wing")

    def caption(self) -> str:
        """Subject, parts and background joined in one of several orders."""
        styles = [self._plain, self._plain, self._plain, self._told, self._on]
        if len(self.parts) > 1:
            styles += [self._mixed, self._mixed]
        text = _pick(self.rng, styles)()
        return text + self._pick(("", "", "."))

    def _plain(self) -> str:
        """this small bird has a yellow belly and blue wings in the snow"""
        link = self._pick(("has", "with", "that has"))
        subject, parts, place = self._subject(sentence=link == "has"), self._list(self.parts), self._place()
        if not place:
            return f"{subject} {link} {parts}"
        return self._pick((f"{subject} {place} {link} {parts}", f"{subject} {link} {parts}, {place}"))

    def _told(self) -> str:
        """the belly of this small bird is yellow and its wings are blue"""
        first, *rest = self.parts
        bird = self._pick(("this", "the")) + " " + self._bird()
        text = f"the {self._clause(first, owner=f' of {bird}')}"

        # The other parts: as clauses of their own, or as a list.
        if rest and self._pick((True, False)):
            text += ", " + self._join([f"its {self._clause(part)}" for part in rest])
        elif rest:
            text += self._pick((", it has ", " and it has ")) + self._list(rest)
        place = self._place()
        return f"{text}, {place}" if place else text

    def _on(self) -> str:
        """a yellow belly and blue wings on a small bird"""
        text = f"{self._list(self.parts)} on {self._pick(('this', 'a'))} {self._bird()}"
        return " ".join(filter(None, (text, self._place())))

    def _mixed(self) -> str:
        """a small bird whose belly is yellow, with blue wings"""
        first, *rest = self.parts
        subject, place = self._subject(sentence=False), self._place()
        text = " ".join(filter(None, (subject, place, f"whose {self._clause(first)}")))
        if self._pick((True, False)):
            return f"{text}, with {self._list(rest)}"
        return f"{text} " + self._join([f"and whose {self._clause(part)}" for part in rest], last=" ")

    def _bird(self) -> str:
        words = _SIZE_WORDS.get(self.said.get("size", ""))
        extra = self._pick((*[""] * 12, "pretty", "colorful", "lovely", "wild"))
        return " ".join(filter(None, (extra, self._pick(words) if words else "", "bird")))

    def _subject(self, sentence: bool) -> str:
        if sentence:
            return self._pick(("this", "this", "the", "a")) + " " + self._bird()
        bird = self._bird()
        return self._pick(
            (_with_article(bird), f"this is {_with_article(bird)}", bird, f"there is {_with_article(bird)}")
        )

    def _place(self) -> str:
        if "background" not in self.said:
            return ""
        verb = self._pick(("", "sitting", "standing", "perched", "resting", "seen"))
        return f"{verb} {self._pick(_PLACES[self.said['background']])}".strip()

    def _list(self, parts: Sequence[str]) -> str:
        return self._join([self._noun_phrase(part) for part in parts])

    def _join(self, phrases: Sequence[str], last: str | None = None) -> str:
        loose = (", and ", ", ") if len(phrases) > 2 else ()
        last = last or self._pick((" and ", " and ", " as well as ", *loose))
        return last.join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))

    def _noun_phrase(self, part: str) -> str:
        """a long black beak; striped blue wings; blue wings with stripes"""
        noun, adjectives = self._pick(_NOUNS[part]), self._adjectives(part)
        if part != "wing":
            return _with_article(" ".join([*adjectives, noun]))

        # A wing's pattern: as a noun behind it, or as an adjective before or after the colour.
        marks, pattern = self._marks(), []
        if "wing_pattern" in self.said and not marks:
            pattern = [self._pick(_PATTERN_ADJECTIVES[self.said["wing_pattern"]])]
        if self._pick((True, False)):
            adjectives, pattern = pattern, adjectives
        phrase = " ".join([*adjectives, *pattern, noun])
        return f"{phrase} with {marks}" if marks else phrase

    def _clause(self, part: str, owner: str = "") -> str:
        """belly is yellow; wings are blue and striped; bill of this bird is long and black"""
        adjectives = self._adjectives(part)
        if part == "wing" and "wing_pattern" in self.said:
            adjectives = [*adjectives, self._pick(_PATTERN_ADJECTIVES[self.said["wing_pattern"]])]
        verb = "are" if part == "wing" else "is"
        return f"{self._pick(_NOUNS[part])}{owner} {verb} {' and '.join(adjectives)}"

    def _adjectives(self, part: str) -> list[str]:
        words = []
        if part == "beak" and "beak_length" in self.said:
            words.append(self._pick(_LENGTH_WORDS[self.said["beak_length"]]))
        if f"{part}_color" in self.said:
            words.append(self._pick(_COLOR_WORDS[self.said[f"{part}_color"]]))
        return words

    def _marks(self) -> str:
        """Stripes or spots as a noun, half of the time; "" where the pattern is an adjective or not to be said."""
        nouns = _PATTERN_NOUNS.get(self.said.get("wing_pattern", ""))
        return self._pick(nouns) if nouns and self._pick((True, False)) else ""

    def _pick(self, choices: Sequence):
        return _pick(self.rng, choices)
