"""Caption files with mistakes: quotes, columns, values that are no captions, encodings. Those without: test_folder_dataset.py."""

import json
import logging
import os

import pytest
from dataset_samples import write_image
from test_folder_dataset import captions_of, options

from datasets.sources import coco, flickr, folder
from miscc.errors import DataError

NAMES = ("cat.jpg", "dog.jpg", "cow.jpg")
CAPTIONS = {"cat": ["a cat"], "dog": ["a dog"], "cow": ["a cow"]}
TABLE = "image,caption\ncat.jpg,a cat\ndog.jpg,a dog\ncow.jpg,a cow\n"


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(NAMES):
        write_image(tmp_path / "images" / name, seed=number)
    return tmp_path


# Quotes and columns


@pytest.mark.parametrize("line", ['cat.jpg,"a cat', 'cat.jpg,"a "grey" cat"'])
def test_a_quote_takes_no_lines_after_it_in_silence(root, line):
    (root / "a.csv").write_text(TABLE.replace("cat.jpg,a cat", line))
    with pytest.raises(DataError, match="a.csv: cannot be read as a table .*look in or before line"):
        folder.build(root, options())


def test_a_quote_in_flickrs_captions_ends_with_its_line(root):
    (root / "captions.txt").write_text(TABLE.replace("a cat", '"a cat'))
    assert captions_of(flickr.build(root, options())) == CAPTIONS
    (root / "captions.txt").write_text(TABLE.replace("a cat", "a" * 200_000))
    with pytest.raises(DataError, match="captions.txt: cannot be read as a table .*field"):
        flickr.build(root, options())


def test_columns_of_one_name_are_refused(root):
    (root / "a.csv").write_text(TABLE.replace("\n", ",x\n").replace("caption,x", "caption,caption"))
    with pytest.raises(DataError, match="a.csv: two columns are called caption; rename one"):
        folder.build(root, options())
    (root / "a.csv").write_text(TABLE.replace("\n", ",,\n"))  # columns without a name, as spreadsheets leave them
    assert captions_of(folder.build(root, options())) == CAPTIONS


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_cell_is_no_class(root, empty):
    lines = [line + (",kind" if number == 0 else f",{empty}") for number, line in enumerate(TABLE.splitlines())]
    (root / "a.csv").write_text("\n".join(lines))
    splits = folder.build(root, options(class_column="kind"))
    assert len({entry.class_id for entries in splits.values() for entry in entries}) == 3


# Values


def test_captions_in_objects_are_their_texts(root):
    records = [
        {"filename": "cat.jpg", "sentences": [{"raw": "a cat", "tokens": ["a", "cat"]}]},
        {"filename": "dog.jpg", "sentences": {"caption": "a dog"}},
        {"filename": "cow.jpg", "sentences": ["a cow", None, 7]},
    ]
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert captions_of(folder.build(root, options())) == {**CAPTIONS, "cow": ["a cow", "7"]}


@pytest.mark.parametrize("value", [[{"tokens": ["a", "cat"]}], {"raw": ["a", "cat"]}, [["a", "cat"]]], ids=str)
@pytest.mark.parametrize("columns", [(), ("caption+image",)])
def test_what_is_no_text_is_no_caption(root, value, columns):
    (root / "a.jsonl").write_text(json.dumps({"image": "cat.jpg", "caption": value}))
    with pytest.raises(DataError, match="a.jsonl: 'caption' holds .* which is no caption; write captions as texts"):
        folder.build(root, options(caption_columns=columns))


# Encodings


def coco_json():
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    captions = [{"image_id": number, "caption": f"a {name[:3]}"} for number, name in enumerate(NAMES)]
    return json.dumps({"images": images, "annotations": captions})


def test_windows_mark_is_no_part_of_a_file(root):
    mark = "\ufeff"
    tokens = "".join(f"{name}#0\ta {name[:3]}\n" for name in NAMES)
    lists = {"Flickr_8k.trainImages.txt": "cat.jpg\ndog.jpg\n", "Flickr_8k.testImages.txt": "cow.jpg\n"}
    for name, text in {"captions.txt": TABLE, "Flickr8k.token.txt": tokens}.items():
        (root / name).write_text(mark + text, encoding="utf-8")
        for other, names in lists.items():
            (root / other).write_text(mark + names, encoding="utf-8")
        splits = flickr.build(root, options())
        assert [entry.key for entry in splits["train"]] == ["cat", "dog"] and captions_of(splits) == CAPTIONS

    # COCO's JSON, found and read.
    for path in root.glob("*.txt"):
        path.unlink()
    (root / "labels.json").write_text(mark + coco_json(), encoding="utf-8")
    assert captions_of(folder.build(root, options())) == CAPTIONS
    assert coco.read_coco_captions(root / "labels.json")["cow.jpg"] == ["a cow"]


def test_flickrs_lists_in_another_encoding_are_named(root):
    (root / "captions.txt").write_text(TABLE)
    (root / "Flickr_8k.testImages.txt").write_text("cow.jpg\n", encoding="utf-16")
    with pytest.raises(DataError, match="testImages.txt: is not UTF-8 .*save it as UTF-8"):
        flickr.build(root, options())


def test_a_name_that_is_not_utf8_can_be_drawn_and_shown(tmp_path, caplog):
    first, second, bare = (os.fsdecode(name) for name in (b"cup.png", b"caf\xe9.png", b"th\xe9.png"))
    for name in (first, second, bare):
        write_image(tmp_path / name)
    for name in (first, second):
        (tmp_path / name).with_suffix(".txt").write_text("a cup")
    with caplog.at_level(logging.WARNING):
        splits = folder.build(tmp_path, options())
    assert sum(len(entries) for entries in splits.values()) == 2
    assert r"th\udce9.png" in caplog.text and caplog.text.encode("utf-8")
