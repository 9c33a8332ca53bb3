"""Data sets by name: our layout and AttnGAN's metadata. CUB and COCO from their downloads: test_birds.py, test_coco.py."""

import json
import logging
import pickle

import numpy as np
import pytest
from dataset_samples import CUB_CLASSES, python2_pickle, write_class_lists, write_cub, write_image

from datasets import DATASETS, load_records
from datasets.layout import Entry, splits_present, write_layout
from datasets.pickles import load_legacy_pickle
from datasets.sources import birds
from datasets.sources.building import BuildOptions
from datasets.text_image import TextImageDataset
from miscc.errors import DataError
from miscc.vocabulary import Vocabulary

WORDS = ["<end>", "a", "red", "bird", "with", "wings"]


def write_metadata(root, train, test, words=WORDS, class_info=True):
    """AttnGAN's pickles as Python 2 wrote them; train, test: key to captions of word indices."""
    captions = [[caption for group in split.values() for caption in group] for split in (train, test)]
    index = dict(enumerate(words))
    (root / "captions.pickle").write_bytes(python2_pickle([*captions, index, {word: i for i, word in index.items()}]))
    for name, split in (("train", train), ("test", test)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "filenames.pickle").write_bytes(python2_pickle(list(split)))
        if class_info:
            numbers = [int(key[:3]) for key in split]
            (root / name / "class_info.pickle").write_bytes(python2_pickle(numbers))


@pytest.fixture
def cub(tmp_path):
    write_cub(tmp_path, CUB_CLASSES)
    return tmp_path


@pytest.fixture
def metadata(cub):
    train = {"001.Finch/Finch_0000": [[2, 3], [1, 3]], "003.Jay/Jay_0001": [[5, 4, 2], [3]]}
    write_metadata(cub, train, {"002.Gull/Gull_0001": [[1, 2, 3], [2]]})
    return cub


# Names


def test_an_unknown_name_gets_the_nearest(tmp_path):
    with pytest.raises(DataError, match="'bird'; did you mean birds"):
        load_records("bird", tmp_path, "train")
    with pytest.raises(DataError, match="there are birds, coco, flickr, folder, toybirds"):
        load_records("zzz", tmp_path, "train")


@pytest.mark.parametrize("name", list(DATASETS))
def test_what_is_not_there_names_the_command(tmp_path, name):
    command = f"python -m datasets.prepare {name} --root {tmp_path}"
    with pytest.raises(DataError, match=f"is not prepared; run `{command}`"):
        load_records(name, tmp_path, "train")
    with pytest.raises(DataError, match="does not exist"):
        load_records(name, tmp_path / "none", "train")


# Our layout


@pytest.fixture
def layout(tmp_path):
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.jpg", seed=number)
    entries = [Entry(f"k{n}", f"images/{n}.jpg", [f"a bird {n}", "Red  bird!"], n % 2) for n in range(3)]
    write_layout(tmp_path, {"train": entries[:2], "test": entries[2:]})
    return tmp_path


def test_our_layout_comes_back(layout):
    records, vocabulary = load_records("folder", layout, "train")
    assert vocabulary.words == ["<end>", "a", "bird", "0", "red", "1", "2"]  # the test captions' 2 is in it
    assert records.keys == ["k0", "k1"] and records.class_ids.tolist() == [0, 1]
    assert [[caption.tolist() for caption in group] for group in records.captions] == [
        [[1, 2, 3], [4, 2]],
        [[1, 2, 5], [4, 2]],
    ]
    assert records.texts == [["a bird 0", "Red  bird!"], ["a bird 1", "Red  bird!"]]
    assert records.boxes is None and records.image_paths[1] == layout / "images" / "1.jpg"
    assert (records.name, records.split, records.vocabulary) == ("folder", "train", vocabulary)
    assert load_records("folder", layout, "test")[0].keys == ["k2"]
    assert TextImageDataset(records, [32])[0].images[0].shape == (3, 32, 32)


def test_the_layout_is_readable_text(layout):
    line = json.loads((layout / "train.jsonl").read_text().splitlines()[0])
    assert line == {"key": "k0", "image": "images/0.jpg", "captions": ["a bird 0", "Red  bird!"], "class_id": 0}
    assert json.loads((layout / "vocabulary.json").read_text())[:3] == ["<end>", "a", "bird"]


def test_a_split_that_is_not_there(layout):
    assert splits_present(layout) == ["train", "test"]
    with pytest.raises(DataError, match="no split 'val', only train, test"):
        load_records("folder", layout, "val")


def test_a_split_of_an_earlier_build_goes(layout):
    entries = [Entry("k0", "images/0.jpg", ["one"], 0)]
    write_layout(layout, {"train": entries, "val": entries, "test": entries})
    assert splits_present(layout) == ["train", "val", "test"]
    write_layout(layout, {"train": entries, "test": entries})
    assert splits_present(layout) == ["train", "test"]
    with pytest.raises(DataError, match="no image in the split 'test'"):
        write_layout(layout, {"train": entries, "test": []})


def test_a_checkpoints_vocabulary_wins(layout, caplog):
    other = Vocabulary(["<end>", "red", "bird", "a"])
    with caplog.at_level(logging.WARNING):
        records, vocabulary = load_records("folder", layout, "train", vocabulary=other)
    assert vocabulary is other and records.vocabulary is other
    assert [[caption.tolist() for caption in group] for group in records.captions] == [[[3, 2], [1, 2]]] * 2
    assert "2 of 8 words in its captions are not in the vocabulary of 4" in caplog.text  # 0 and 1; `red bird` once
    assert records.texts[0] == ["a bird 0", "Red  bird!"]


def test_captions_without_a_known_word_are_left_out(layout, caplog):
    with caplog.at_level(logging.WARNING):
        records, _ = load_records("folder", layout, "train", vocabulary=Vocabulary(["<end>", "red", "1"]))
    assert [[caption.tolist() for caption in group] for group in records.captions] == [[[1]], [[2], [1]]]
    assert records.texts == [["Red  bird!"], ["a bird 1", "Red  bird!"]]
    with caplog.at_level(logging.WARNING):
        records, _ = load_records("folder", layout, "train", vocabulary=Vocabulary(["<end>", "1"]))
    assert records.keys == ["k1"] and records.class_ids.tolist() == [1]
    assert "1 images left out" in caplog.text and "(k0)" in caplog.text
    with pytest.raises(DataError, match="belongs to another data set"):
        load_records("folder", layout, "train", vocabulary=Vocabulary(["<end>", "fish"]))


@pytest.mark.parametrize("line", ["{", '{"key": "k"}', '{"unknown": 1}', "[]"])
def test_a_damaged_layout_names_the_line(layout, line):
    with (layout / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="train.jsonl, line 3"):
        load_records("folder", layout, "train")


RECORD = {"key": "k9", "image": "images/0.jpg", "captions": ["a bird"], "class_id": 0}


@pytest.mark.parametrize(
    "changed",
    [
        {"key": 1}, {"key": ""}, {"key": "k0"}, {"image": None}, {"captions": "a bird"}, {"captions": []},
        {"captions": [1]}, {"class_id": "0"}, {"class_id": 2**70}, {"class_id": True}, {"box": [1, 2, 3]},
        {"box": [1, 2, 3, "4"]}, {"box": [1, 2, 3, 1e400]}, {"captions": ["half \ud800"]}, {"image": "a\0b.jpg"},
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_edited_by_hand_names_file_and_line(layout, changed):
    with (layout / "train.jsonl").open("a") as file:
        file.write(json.dumps(RECORD | changed) + "\n")
    with pytest.raises(DataError, match="train.jsonl, line 3: is not a valid record") as error:
        load_records("folder", layout, "train")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b"\xff", b"[" * 100_000, b'{"key": ' + b"9" * 5000 + b"}"])
def test_bytes_that_are_no_json_name_file_and_line(layout, line):
    with (layout / "train.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match="train.jsonl, line 3"):
        load_records("folder", layout, "train")


def test_an_empty_layout_is_refused(layout):
    (layout / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="train.jsonl: holds no record; run prepare again"):
        load_records("folder", layout, "train")


@pytest.mark.parametrize("image", ["/etc/passwd", "../secret.png", "images/../../secret.png", "..\\secret.png", "."])
def test_an_image_outside_the_data_folder_is_refused(layout, image):
    with (layout / "train.jsonl").open("a") as file:
        file.write(json.dumps(RECORD | {"image": image}) + "\n")
    with pytest.raises(DataError, match="line 3: .*is outside the data folder; a link in the folder may lead there"):
        load_records("folder", layout, "train")


def test_keys_of_metadata_stay_inside_the_data_folder(metadata):
    names = metadata / "train" / "filenames.pickle"
    keys = load_legacy_pickle(names)
    for bad in ("../../secret", "/etc/passwd", ["nested"], None):
        names.write_bytes(pickle.dumps([bad, *keys[1:]], protocol=2))
        with pytest.raises(DataError, match="filenames.pickle: .* names no image inside the data folder"):
            load_records("birds", metadata, "train")


@pytest.mark.parametrize("caption", [[[1]], ["red"], [-1], None, [2**70]], ids=str)
def test_captions_in_the_pickle_that_are_none(metadata, caption):
    path = metadata / "captions.pickle"
    train, test, *vocabularies = load_legacy_pickle(path)
    path.write_bytes(pickle.dumps([[caption, *train[1:]], test, *vocabularies], protocol=2))
    with pytest.raises(DataError, match="captions.pickle: (a caption is no list|word -1 is beyond)"):
        load_records("birds", metadata, "train")


def test_moved_images_show_before_training(layout):
    (layout / "images").rename(layout / "pictures")
    with pytest.raises(DataError, match="0.jpg: no such image"):
        load_records("folder", layout, "train")


def test_boxes_for_some_images_only_are_refused(layout):
    lines = (layout / "train.jsonl").read_text().splitlines()
    first = {**json.loads(lines[0]), "box": [0, 0, 5, 5]}
    (layout / "train.jsonl").write_text(json.dumps(first) + "\n" + lines[1] + "\n")
    with pytest.raises(DataError, match="some have none"):
        load_records("folder", layout, "train")
    (layout / "train.jsonl").write_text(json.dumps(first) + "\n")
    assert np.array_equal(load_records("folder", layout, "train")[0].boxes, [[0.0, 0.0, 5.0, 5.0]])


# AttnGAN's metadata


def test_metadata_of_birds(metadata):
    records, vocabulary = load_records("birds", metadata, "train")
    assert vocabulary.words == WORDS
    assert records.keys == ["001.Finch/Finch_0000", "003.Jay/Jay_0001"]
    assert [[caption.tolist() for caption in group] for group in records.captions] == [
        [[2, 3], [1, 3]],
        [[5, 4, 2], [3]],
    ]
    assert records.class_ids.tolist() == [1, 3]
    assert records.image_paths[1] == metadata / "CUB_200_2011/images/003.Jay/Jay_0001.jpg"
    assert records.boxes.tolist() == [[1.0, 5.0, 20.0, 10.0], [7.0, 5.0, 20.0, 10.0]]
    assert records.texts is None and records.text(1, 0) == "wings with red"
    assert TextImageDataset(records, [32])[1].images[0].shape == (3, 32, 32)
    test, _ = load_records("birds", metadata, "test")
    assert [caption.tolist() for caption in test.captions[0]] == [[1, 2, 3], [2]]


def test_images_directly_below_the_root(metadata):
    for name in ("images", "images.txt", "bounding_boxes.txt"):
        (metadata / "CUB_200_2011" / name).rename(metadata / name)
    records, _ = load_records("birds", metadata, "train")
    assert records.image_paths[0] == metadata / "images/001.Finch/Finch_0000.jpg"


def test_metadata_without_classes(metadata):
    (metadata / "train/class_info.pickle").unlink()
    assert load_records("birds", metadata, "train")[0].class_ids.tolist() == [0, 1]  # the key's folders


def test_metadata_in_a_checkpoints_words(metadata):
    other = Vocabulary(["<end>", "wings", "bird", "red", "with", "a"])
    records, vocabulary = load_records("birds", metadata, "train", vocabulary=other)
    assert vocabulary is other
    assert [[caption.tolist() for caption in group] for group in records.captions] == [
        [[3, 2], [5, 2]],
        [[1, 4, 3], [2]],
    ]
    assert records.text(1, 0) == "wings with red"


def test_metadata_comes_before_our_layout_and_says_so(metadata, caplog):
    write_class_lists(metadata)
    write_layout(metadata, birds.build(metadata, BuildOptions(name="toybirds")))
    with caplog.at_level(logging.WARNING):
        _, vocabulary = load_records("birds", metadata, "train")
    assert vocabulary.words == WORDS
    assert "captions.pickle and a vocabulary.json: the pickle" in caplog.text
    (metadata / "captions.pickle").rename(metadata / "captions_DAMSM.pickle")  # what later systems call it
    assert load_records("birds", metadata, "train")[1].words == WORDS
    (metadata / "captions_DAMSM.pickle").unlink()
    assert load_records("birds", metadata, "train")[1].words[:3] == ["<end>", "bird", "0"]


def test_pickles_that_do_not_belong_together(metadata):
    (metadata / "train/filenames.pickle").write_bytes(python2_pickle(["001.Finch/Finch_0000"] * 3))
    with pytest.raises(DataError, match="4 captions for train, which is no multiple of the 3 images"):
        load_records("birds", metadata, "train")
    (metadata / "train/filenames.pickle").unlink()
    with pytest.raises(DataError, match="has no split 'train', only test"):
        load_records("birds", metadata, "train")
    (metadata / "test/filenames.pickle").unlink()
    with pytest.raises(DataError, match="captions but not test/filenames.pickle"):
        load_records("birds", metadata, "test")


def test_words_beyond_the_vocabulary_are_refused(cub):
    write_metadata(cub, {"001.Finch/Finch_0000": [[1, 6]]}, {"002.Gull/Gull_0001": [[1]]})
    with pytest.raises(DataError, match="word 6 is beyond its vocabulary of 6"):
        load_records("birds", cub, "train")


def test_empty_captions_in_the_pickle_are_left_out(cub):
    write_metadata(
        cub, {"001.Finch/Finch_0000": [[1, 2], []], "003.Jay/Jay_0001": [[], []]}, {"002.Gull/Gull_0001": [[1]]}
    )
    records, _ = load_records("birds", cub, "train")
    assert records.keys == ["001.Finch/Finch_0000"] and len(records.captions[0]) == 1


def test_metadata_lists_all_that_is_missing(metadata):
    for name in ("images.txt", "bounding_boxes.txt"):
        (metadata / "CUB_200_2011" / name).unlink()
    with pytest.raises(DataError) as caught:
        load_records("birds", metadata, "train")
    assert "images.txt" in str(caught.value) and "bounding_boxes.txt" in str(caught.value)
    assert f"{metadata / 'CUB_200_2011/images'}:" not in str(caught.value)


def test_metadata_of_coco(tmp_path):
    train = {f"COCO_train2014_{number:012d}": [[1, number + 1]] * 5 for number in range(2)}
    write_metadata(tmp_path, train, {"COCO_val2014_000000000007": [[3]] * 5}, class_info=False)
    for folder, key in (
        ("images", list(train)[0]),
        ("images", list(train)[1]),
        ("val2014", "COCO_val2014_000000000007"),
    ):
        write_image(tmp_path / folder / f"{key}.jpg")
    records, _ = load_records("coco", tmp_path, "train")
    assert records.class_ids.tolist() == [0, 1] and records.boxes is None
    assert records.image_paths[0] == tmp_path / "images/COCO_train2014_000000000000.jpg"
    test, _ = load_records("coco", tmp_path, "test")
    assert test.image_paths == [tmp_path / "val2014/COCO_val2014_000000000007.jpg"] and len(test.captions[0]) == 5
    (tmp_path / "val2014").rename(tmp_path / "elsewhere")
    (tmp_path / "images").rename(tmp_path / "images_elsewhere")
    with pytest.raises(DataError, match="val2014"):
        load_records("coco", tmp_path, "test")


def test_metadata_of_images_of_ones_own(tmp_path):
    write_metadata(tmp_path, {"a/cat": [[1]], "a/dog": [[2]]}, {"b/cow": [[3]]}, class_info=False)
    for name in ("a/cat.png", "a/dog.jpg", "b/cow.webp"):
        write_image(tmp_path / "images" / name)
    records, _ = load_records("folder", tmp_path, "train")
    assert [path.name for path in records.image_paths] == ["cat.png", "dog.jpg"]
    (tmp_path / "images/a/dog.jpg").unlink()
    with pytest.raises(DataError, match="no image for a/dog"):
        load_records("folder", tmp_path, "train")


def test_the_pickle_has_no_captions_of_other_splits(metadata):
    (metadata / "val").mkdir()
    (metadata / "val/filenames.pickle").write_bytes(python2_pickle(["002.Gull/Gull_0001"]))
    assert splits_present(metadata) == ["train", "test"]
    with pytest.raises(DataError, match="has no split 'val', only train, test"):
        load_records("birds", metadata, "val")


def test_a_pickle_without_captions_is_refused(metadata):
    path = metadata / "captions.pickle"
    path.write_bytes(pickle.dumps([[], *load_legacy_pickle(path)[1:]], protocol=2))
    with pytest.raises(DataError, match="captions.pickle: holds 0 captions for train"):
        load_records("birds", metadata, "train")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": "../pics/a.png"}, "is outside the data folder"),
        ({"captions": []}, "captions a list of at least one"),
        ({"key": "k0"}, "its name is there twice"),
        ({"box": [0.0, 0.0, float("nan"), 1.0]}, "box must be four numbers"),
        ({"key": "k\udcff"}, "is not UTF-8; rename the file"),
    ],
    ids=str,
)
def test_what_loading_would_refuse_is_not_written(layout, changed, message):
    before = (layout / "train.jsonl").read_text()
    entries = [Entry("k0", "images/0.jpg", ["one"], 0), Entry(**RECORD | changed)]
    with pytest.raises(DataError, match=message):
        write_layout(layout, {"train": entries, "test": entries[:1]})
    assert (layout / "train.jsonl").read_text() == before
