"""CLIP's tokenizer: by hand on a small vocabulary, against transformers' where it is installed; captions reach it whole."""

import gzip
import json
import pickle

import pytest

from miscc.byte_pairs import (
    BytePairs,
    byte_characters,
    byte_values,
    clean,
    read_merges,
    vocabulary_of,
)
from miscc.errors import DataError
from miscc.vocabulary import Vocabulary, encode_rows

MERGES = ["a n", "an d</w>", "b i", "r d</w>", "bi rd</w>"]
FIRST_MERGE = 512
SIZE = 512 + len(MERGES) + 2


def byte_token(character, last):
    """The token of an ASCII character: `!` is 0, at a word's end 256."""
    return ord(character) - ord("!") + (256 if last else 0)


def test_merges_go_in_their_order():
    pairs = BytePairs.of_merges(MERGES)
    assert len(pairs) == SIZE
    start, stop = SIZE - 2, SIZE - 1
    assert pairs.encode("bird and") == ([start, FIRST_MERGE + 4, FIRST_MERGE + 1, stop], [])
    # "band": a+n comes first, so that b+i has no partner; then an+d.
    assert pairs.encode("band")[0] == [start, byte_token("b", False), FIRST_MERGE + 1, stop]
    assert pairs.encode("!")[0] == [start, byte_token("!", True), stop]


def test_pieces_are_cut_as_clip_cuts_them():
    pairs = BytePairs.of_merges([])
    assert pairs.decode(pairs.encode("The  BIRD's 12 wings!? don't")[0]) == "the bird 's 1 2 wings !? don 't"


def test_every_byte_has_a_character_of_its_own():
    assert len(set(byte_characters())) == 256 and sorted(byte_values().values()) == list(range(256))
    assert byte_values()["!"] == ord("!") and byte_values()["\u0100"] == 0


def test_nothing_is_lost():
    pairs = BytePairs.of_merges(MERGES)
    for caption in ("a café of naïve birds", "日本の鳥", "a 🐦 bird", "½ of a bird, very small"):
        tokens, unknown = pairs.encode(caption)
        assert unknown == [] and pairs.decode(tokens).replace(" ", "") == caption.replace(" ", "")


def test_cleaning():
    assert clean("  A\tbird&amp;amp;\n  “it’s” ４ ") == 'a bird& "it\'s" 4'
    assert clean("e\u0301") == "é"


def test_long_captions_keep_their_end_token():
    pairs = BytePairs.of_merges([])
    tokens, lengths, _ = encode_rows(["x" * 100, "ab"], pairs, 77)
    assert tokens.shape == (2, 77) and lengths.tolist() == [77, 4]
    assert tokens[0, 0] == 512 and tokens[0, 76] == 513 and (tokens[0, 1:76] == byte_token("x", False)).all()
    assert tokens[1].tolist()[:5] == [512, byte_token("a", False), byte_token("b", True), 513, 0]


def test_a_caption_without_a_character_is_named():
    with pytest.raises(DataError, match="holds no word"):
        encode_rows(["  \n"], BytePairs.of_merges([]), 77)


def test_both_kinds_come_back_from_a_checkpoint_and_from_another_process():
    pairs, words = BytePairs.of_merges(MERGES), Vocabulary(["<end>", "a", "bird"])
    for vocabulary in (pairs, words):
        again = vocabulary_of(json.loads(json.dumps(vocabulary.words)))
        assert type(again) is type(vocabulary) and again == vocabulary
        assert pickle.loads(pickle.dumps(vocabulary)).encode("a bird") == vocabulary.encode("a bird")
    assert pairs != words


def test_words_of_a_data_set_become_single_tokens():
    pairs = BytePairs.of_words(["red", "bird", "<end>", "a"])
    assert len(pairs.encode("a red bird")[0]) == 2 + 3
    assert len(pairs.encode("a red dog")[0]) == 2 + 2 + 3


def test_merges_are_read_from_all_three_files(tmp_path):
    lines = "#version: 0.2\n" + "\n".join(MERGES) + "\n"
    (tmp_path / "merges.txt").write_text(lines)
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": [m.split(" ") for m in MERGES]}}))
    for file in tmp_path.iterdir():
        assert read_merges(file) == MERGES
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: cannot be read"):
        read_merges(tmp_path / "bad.json")


def test_as_transformers():
    tokenizer_class = pytest.importorskip("transformers", reason="compares with transformers' tokenizer").CLIPTokenizer
    pairs = BytePairs.of_merges(MERGES)
    pieces = {piece: index for index, piece in enumerate(pairs._pieces)}
    theirs = tokenizer_class(vocab=pieces, merges=[tuple(merge.split(" ")) for merge in MERGES])
    for caption in ("A small bird's band, 12 and 3", "!'s ?'ll x'd", "naïve ½ 日本 🐦"):
        assert pairs.encode(caption)[0] == theirs(caption)["input_ids"]


def test_metadata_gives_captions_as_they_were_written(tmp_path, caplog):
    from dataset_samples import CUB_CLASSES, write_cub
    from test_datasets import write_metadata

    from datasets import load_records

    write_cub(tmp_path, CUB_CLASSES)
    write_metadata(tmp_path, {"001.Finch/Finch_0000": [[2, 3], [1, 3]], "003.Jay/Jay_0001": [[5, 4, 2], [3]]}, {})
    written = tmp_path / "text" / "001.Finch" / "Finch_0000.txt"
    written.write_text("A Red bird, isn't it?\n\n!?\nthe Bird's 2 wings.\na third one\n")
    pairs = BytePairs.of_merges(MERGES)
    records, vocabulary = load_records("birds", tmp_path, "train", pairs)
    assert vocabulary is pairs
    assert records.texts[0] == ["A Red bird, isn't it?", "the Bird's 2 wings."]
    assert records.captions[0][0].tolist() == pairs.encode("A Red bird, isn't it?")[0]
    # Where the file is missing, the pickle's words are all there is, and a warning says so.
    (tmp_path / "text" / "003.Jay" / "Jay_0001.txt").unlink()
    records, _ = load_records("birds", tmp_path, "train", pairs)
    words = load_records("birds", tmp_path, "train")[0]
    assert records.texts[1] == [words.text(1, 0), words.text(1, 1)]
    assert "1 of 2 images are read from captions.pickle" in caplog.text and "Jay_0001" in caplog.text


def test_merges_with_windows_line_ends_are_the_same(tmp_path):
    (tmp_path / "merges.txt").write_bytes(("\ufeff#version: 0.2\r\n" + "\r\n".join(MERGES) + "\r\n").encode("utf-8"))
    assert read_merges(tmp_path / "merges.txt") == MERGES


def test_packed_merges_with_damage_are_named(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    whole = gzip.compress(("#version: 0.2\n" + "\n".join(MERGES) * 50).encode())
    for position in range(10, len(whole) - 8):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(DataError, match=r"16e6\.txt\.gz: cannot be read as the merges"):
            read_merges(path)


def test_tokens_of_long_words_are_not_kept():
    pairs = BytePairs.of_merges(MERGES)
    short, long = "b" * 40, "b" * 41
    assert len(pairs.encode(short)[0]) == 42 and pairs._cached.cache_info().currsize == 1
    assert len(pairs.encode(f"{long} {short}")[0]) == 83 and pairs._cached.cache_info().currsize == 1
