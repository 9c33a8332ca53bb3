"""Odd inputs: a short form of `make fuzz`, and properties that hold for every text (hypothesis)."""

import asyncio
import json
import random
import signal
import string
import time

import pytest
from fuzz import server
from fuzz.cases import KINDS
from fuzz.run import LIMIT, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from miscc.config import flatten, to_yaml
from miscc.errors import ConfigError, DataError
from miscc.files import stays_inside
from miscc.settings import lookup
from miscc.vocabulary import Vocabulary, encode_rows, tokenize, words_that_lose_letters
from miscc.yaml_reader import read_yaml_text
from training.settings import load_config

few = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_inputs_are_read_or_refused_in_one_line(kind, tmp_path):
    if kind == "http" and server.is_missing():
        pytest.skip("the server: pip install -r requirements-serve.txt")
    before = signal.signal(signal.SIGALRM, LIMIT.stop)
    try:
        for number in range(20):
            folder = tmp_path / str(number)
            folder.mkdir()
            assert outcome(kind, f"test-{number}", folder) in ("success", "refused"), number
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    def changes(rng: random.Random, folder):
        return lambda: (folder / "x").touch()

    def hangs(rng: random.Random, folder):
        return lambda: time.sleep(60)

    monkeypatch.setattr("fuzz.run.SECONDS", 2)
    monkeypatch.setitem(KINDS, "hangs", (hangs, 1))
    before = signal.signal(signal.SIGALRM, LIMIT.stop)
    assert outcome("hangs", "1", tmp_path).startswith("TooLongError at test_fuzz.py")
    signal.signal(signal.SIGALRM, before)
    monkeypatch.setitem(KINDS, "fails", (lambda rng, folder: lambda: 1 / 0, 1))
    monkeypatch.setitem(KINDS, "changes", (changes, 1))
    assert outcome("fails", "1", tmp_path).startswith("ZeroDivisionError at test_fuzz.py")
    assert outcome("changes", "1", tmp_path) == "changed a file"


@few
@given(st.text())
def test_any_text_is_a_yaml_value_or_a_config_error(text):
    try:
        read_yaml_text(text)
    except ConfigError as error:
        assert "\n" not in str(error)


@few
@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.text(string.ascii_letters, min_size=1), inner)))
def test_flattened_settings_can_be_looked_up(tree):
    if isinstance(tree, dict):
        assert all(lookup(tree, key) == value for key, value in flatten(tree).items())


@few
@given(st.text(max_size=60))
def test_tokens_are_ascii_and_lost_letters_are_found(caption):
    words = tokenize(caption)
    assert all(word.isascii() and word == word.lower() for word in words)
    assert caption.isascii() or not set(words_that_lose_letters(caption)) & set(words)


@few
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=30), max_size=3), st.integers(1, 9))
def test_typed_captions_are_encoded_or_refused(captions, max_words):
    try:
        tokens, lengths, unknown = encode_rows(captions, Vocabulary(["<end>", *"abcdefghij"]), max_words)
    except DataError as error:
        assert len(str(error)) < 1000
        return
    assert tokens.shape == (len(captions), max_words) and len(unknown) == len(captions)
    assert all(1 <= length <= max_words for length in lengths)
    assert ((tokens != 0).sum(1) == lengths).all()


@few
@given(st.text(string.ascii_letters + "./\\ \0é", max_size=20))
def test_names_that_stay_inside_do(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp()
    if stays_inside(name):
        assert (root / name).resolve().is_relative_to(root.resolve()) and (root / name) != root


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4096), st.text(string.printable + "äß鳥", min_size=1, max_size=30))
def test_settings_survive_their_own_yaml(tmp_path_factory, seed, nf, folder):
    path = tmp_path_factory.mktemp("yaml") / "x.yml"
    path.write_text("DATASET_NAME: birds\n")
    cfg = load_config(path, [("SEED", str(seed)), ("TRAIN.NF", str(nf)), ("DATA_DIR", folder)])
    path.write_text(to_yaml(cfg), encoding="utf-8")
    assert load_config(path) == cfg


def test_addresses_with_bytes_beyond_ascii_are_a_400():
    """Starlette fails to decode them: a parser other than h11 lets them through."""
    if server.is_missing():
        pytest.skip("the server: pip install -r requirements-serve.txt")
    path = "/api/v1.0/images"
    asked = {"captions": ["a red bird"]}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 5),
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "server": ("127.0.0.1", 7860),
    }  # fmt: skip
    body = [json.dumps(asked).encode()]
    assert asyncio.run(server.ask(server.app(""), scope, body))[0] == 200
    for odd in ({"query_string": b"\xff=%"}, {"raw_path": b"/\xff"}):
        status, _, answer = asyncio.run(server.ask(server.app(""), scope | odd, body))
        assert status == 400 and json.loads(answer)["error"].startswith("address: holds bytes beyond ASCII")
