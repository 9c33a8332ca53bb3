"""Small files from outside are read within bounds: of size, depth and kind. A pipe or device is not waited for."""

import gzip
import json
import os
import signal

import pytest
import torch
from fuzz.run import LIMIT
from fuzz.weights import published_files

from eval.R_precision import CandidateLists
from eval.report import Run
from miscc.byte_pairs import read_merges
from miscc.checkpoint import check_tensors
from miscc.errors import CheckpointError, DataError
from miscc.files import MOST_BYTES, read_json
from models.clip_files import cached_folders, read_description
from sampling.convert import describe
from sampling.published import load_model


@pytest.fixture(autouse=True)
def seconds():
    """Each test ends within 20 seconds; what hangs fails."""
    before = signal.signal(signal.SIGALRM, LIMIT.stop)
    LIMIT.start()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny published model."""
    for name, content in published_files().items():
        (tmp_path / name).write_bytes(content)
    assert load_model(tmp_path)["step"] == 3
    return tmp_path


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 600, error.value
    return str(error.value)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_vocabulary_that_is_a_pipe_or_a_device_is_refused(model, make):
    (model / "vocabulary.json").unlink()
    make(model / "vocabulary.json")
    with pytest.raises(CheckpointError, match="vocabulary.json: .*it is no ordinary file") as error:
        load_model(model)
    one_line(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_device_in_the_place_of_weights_or_settings_is_refused_by_all_readers(model, name):
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    for read in (load_model, describe):
        with pytest.raises(CheckpointError, match="a folder without config.json and model.safetensors") as error:
            read(model)
        one_line(error)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
@pytest.mark.parametrize("content", [b" " * (MOST_BYTES + 1), b"[" * 100_000, b"\xff\xfe[]", b"9" * 5000])
def test_a_published_models_json_has_bounds(model, name, content):
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read as JSON") as error:
        load_model(model)
    one_line(error)


def test_odd_networks_of_the_training_and_examples_are_left_out(model):
    """Scores and pages read them."""
    config = json.loads((model / "config.json").read_text())
    whole = config["trained_with"]
    odd = [3, {}, {"network": "a"}, {"network": "a", "role": 3, "weights_hash": "", "file": ""}, *whole]
    for examples in (0.5, 3, "a", {"a": 1}, [3]):
        (model / "config.json").write_text(json.dumps(config | {"examples": examples, "trained_with": odd}))
        read = load_model(model)
        assert read["examples"] == [] and read["trained_with"] == whole and whole


def test_json_of_the_largest_size_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b" " * (MOST_BYTES - 2) + b"[]")
    assert read_json(path) == []
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json")


def test_merges_that_unpack_to_gigabytes_are_refused(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(64):
            stream.write(b"a b\n" * (1 << 18))
    with pytest.raises(DataError, match="unpacks to more than 16 MiB") as error:
        read_merges(path)
    one_line(error)
    path.write_bytes(gzip.compress(b"# version\na b\nc d\n"))
    assert read_merges(path) == ["a b", "c d"]


def test_descriptions_and_references_of_clip_have_bounds(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(b"[" * 100_000)
    os.mkfifo(tmp_path / "open_clip_config.json")
    assert read_description(tmp_path) == {}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--a--b" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="main: names no snapshot"):
        cached_folders("a/b")
    reference.write_bytes(b"abc\n")
    assert cached_folders("a/b") == [tmp_path / "models--a--b" / "snapshots" / "abc"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, json.dumps({"images": [{"file": "a", "true": 2**70}], "pool": ["x"]})]
)
def test_odd_candidate_lists_are_refused(tmp_path, content):
    (tmp_path / "lists.json").write_text(content)
    with pytest.raises(DataError, match="holds no candidate lists for these images") as error:
        CandidateLists.load(tmp_path / "lists.json", ["a"], ["x"])
    one_line(error)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{one}: &{one} [{', '.join([f'*{other}'] * 9)}]" for other, one in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("content", [BOMB, "[" * 5000, "- 1", "a: &a [*a]", "\xff"])
def test_a_runs_settings_have_bounds_in_the_report(tmp_path, content):
    (tmp_path / "config.yml").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="config.yml: (cannot be read|holds no settings)") as error:
        Run(tmp_path)
    one_line(error)


def test_names_of_tensors_are_cut_in_messages(tmp_path):
    for value in (torch.zeros(2), torch.tensor(float("nan")), None):
        torch.save({"x" * 5000: value, "y": torch.zeros(1)}, tmp_path / "netG.pth")
        with pytest.raises(CheckpointError) as error:
            describe(tmp_path / "netG.pth")
        one_line(error)
    with pytest.raises(CheckpointError) as error:
        check_tensors({"x" * 5000: None}, "a file")
    one_line(error)
