"""Tokens, vocabulary, shortening, and captions that users type."""

import json
import tarfile

import numpy as np
import pytest
import torch
from dataset_samples import REAL_DATA, python2_pickle

from datasets.captions import encode_batch, load_captions_pickle
from miscc.errors import DataError
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary, shorten, tokenize, words_that_lose_letters

WORDS = ["<end>", "a", "small", "red", "bird", "with", "black", "wings"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (
            "This bird is Red, with a BLACK-ish bill.",
            ["this", "bird", "is", "red", "with", "a", "black", "ish", "bill"],
        ),
        ("the bird's eye_ring is 3.5 mm", ["the", "bird", "s", "eye_ring", "is", "3", "5", "mm"]),
        ("white\ufffd\ufffdbelly", ["white", "belly"]),  # a pair is a space
        ("white\ufffdbelly", ["white", "belly"]),  # one alone is no word character either
        ("a na\u00efve caf\u00e9 \u00e9\u00e9 bird", ["a", "nave", "caf", "bird"]),  # letters outside ASCII fall out
        ("\u9ce5", []),
        ("  .,! ", []),
        ("", []),
    ],
)
def test_tokens_by_hand(caption, words):
    assert tokenize(caption) == words


def test_tokens_are_those_of_nltk():
    regexp = pytest.importorskip("nltk.tokenize.regexp")
    caption = 'It\'s a rough-winged swallow (Stelgidopteryx) - 12cm_long; white/grey & "buff".'
    assert tokenize(caption) == regexp.RegexpTokenizer(r"\w+").tokenize(caption.lower())


def test_vocabulary_numbers_words_as_they_come():
    vocabulary = Vocabulary.build(["a red bird", "the red wings", "A bird!"])
    assert vocabulary.words == ["<end>", "a", "red", "bird", "the", "wings"]
    assert len(vocabulary) == 6
    assert vocabulary.encode("Red wings, a blue bird") == ([2, 5, 1, 3], ["blue"])
    assert vocabulary.decode([2, 5, 1, 3, 0, 0]) == "red wings a bird"
    assert "wings" in vocabulary and "blue" not in vocabulary


def test_padding_cannot_be_written_by_hand():
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.encode_words(["<end>", "a"]) == ([1], ["<end>"])
    assert vocabulary.encode("<end> a") == ([1], ["end"])


def test_vocabulary_survives_json(tmp_path):
    vocabulary = Vocabulary.build(["a red bird"])
    vocabulary.save(tmp_path / "vocabulary.json")
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == ["<end>", "a", "red", "bird"]
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    assert Vocabulary.load(tmp_path / "vocabulary.json") != Vocabulary(WORDS)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '["<end>", 3]', '["a", "bird"]', '["<end>", "a", "a"]', "[]"])
def test_a_damaged_vocabulary_is_refused(tmp_path, content):
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(DataError):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_missing_vocabulary_names_the_command(tmp_path):
    with pytest.raises(DataError, match="datasets.prepare"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_the_vocabulary_of_captions_pickle(tmp_path):
    index_to_word = dict(enumerate(WORDS))
    content = [[[1, 4]], [[3, 4]], index_to_word, {word: index for index, word in index_to_word.items()}]
    (tmp_path / "captions.pickle").write_bytes(python2_pickle(content))
    train, test, vocabulary = load_captions_pickle(tmp_path / "captions.pickle")
    assert (train, test, vocabulary.words) == ([[1, 4]], [[3, 4]], WORDS)
    assert load_captions_pickle(tmp_path / "captions.pickle")[2] == vocabulary


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, [[], [], {0: "<end>", 2: "a"}, {}]])
def test_another_pickle_is_no_captions_pickle(tmp_path, content):
    (tmp_path / "captions.pickle").write_bytes(python2_pickle(content))
    with pytest.raises(DataError, match="captions.pickle"):
        load_captions_pickle(tmp_path / "captions.pickle")


def test_shortening_keeps_the_order():
    indices = list(range(10, 40))
    for number in range(20):
        short = shorten(indices, 18, stream(1, "shorten", number))
        assert len(short) == 18 and short == sorted(short) and len(set(short)) == 18
    drawn = {tuple(shorten(indices, 18, stream(1, "shorten", number))) for number in range(20)}
    assert len(drawn) == 20
    assert {index for words in drawn for index in words} == set(indices)  # every position can be kept


def test_shortening_without_chance_keeps_the_first_words():
    assert shorten([5, 6, 7, 8], 3, None) == [5, 6, 7]
    assert shorten([5, 6, 7], 3, None) == [5, 6, 7]
    assert shorten([5, 6, 7], 3, np.random.default_rng(0)) == [5, 6, 7]


def test_typed_captions():
    captions = ["A small red bird!", "purple bird with shiny black wings", "red " * 20]
    encoded = encode_batch(captions, Vocabulary(WORDS), max_words=5)
    assert encoded.tokens.dtype == encoded.lengths.dtype == torch.int64
    assert encoded.tokens.tolist() == [[1, 2, 3, 4, 0], [4, 5, 6, 7, 0], [3, 3, 3, 3, 3]]
    assert encoded.lengths.tolist() == [4, 4, 5]
    assert encoded.unknown == [[], ["purple", "shiny"], []]


def test_a_caption_of_unknown_words_is_refused():
    with pytest.raises(DataError, match=r"'green frog'.*green, frog"):
        encode_batch(["a bird", "green frog"], Vocabulary(WORDS), 18)


@pytest.mark.parametrize("caption", ["", "  ", "...!"])
def test_an_empty_caption_is_refused(caption):
    with pytest.raises(DataError, match="holds no word"):
        encode_batch([caption], Vocabulary(WORDS), 18)


def test_the_vocabulary_of_cub():
    archive = REAL_DATA / "cub_captions.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    captions = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                captions += tar.extractfile(member).read().decode("utf-8").split("\n")
    captions = [caption for caption in captions if caption]
    assert len(captions) == 117_880
    assert any("\ufffd\ufffd" in caption for caption in captions)
    assert len(Vocabulary.build(captions)) == 5_450


def test_a_caption_that_is_not_utf8_is_refused():
    vocabulary = Vocabulary(["<end>", "bird"])
    with pytest.raises(DataError, match="holds bytes that are not UTF-8; save it as UTF-8"):
        encode_batch([b"bird \xff".decode("utf-8", "surrogateescape")], vocabulary, 5)


def test_a_caption_of_other_letters_says_so_and_long_ones_are_cut():
    vocabulary = Vocabulary(["<end>", "bird"])
    with pytest.raises(DataError, match="holds no word in Latin letters"):
        encode_batch(["赤い鳥"], vocabulary, 5)
    with pytest.raises(DataError, match="is in the model's vocabulary") as error:
        encode_batch(["fish " * 10_000], vocabulary, 5)
    assert len(str(error.value)) < 500


def test_words_that_lose_letters_by_hand():
    assert words_that_lose_letters("ein Grüner Vogel, 鳥 é") == {"grüner": "grner", "鳥": "", "é": ""}
    assert words_that_lose_letters("a red bird!") == {}
