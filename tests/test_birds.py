"""CUB from its downloads: splits, boxes, what is missing, and the counts of the real one."""

import logging
import tarfile

import pytest
from dataset_samples import CUB_CLASSES, REAL_DATA, python2_pickle, write_class_lists, write_cub

from datasets import load_records
from datasets.layout import write_layout
from datasets.sources import birds
from datasets.sources.building import BuildOptions
from miscc.errors import DataError


def options(name="toybirds", **given):
    return BuildOptions(name=name, **given)


@pytest.fixture
def cub(tmp_path):
    write_cub(tmp_path, CUB_CLASSES)
    return tmp_path


def test_birds_split_by_the_lists_of_classes(cub):
    write_class_lists(cub)
    splits = birds.build(cub, options())
    assert [entry.key for entry in splits["test"]] == ["002.Gull/Gull_0000", "002.Gull/Gull_0001"]
    assert len(splits["train"]) == 5
    third = splits["train"][2]
    assert third.image == "CUB_200_2011/images/001.Finch/Finch_0002.jpg" and third.class_id == 1
    assert third.captions == [f"bird 2 says {number}" for number in range(10)] and third.box == [3.0, 5.0, 20.0, 10.0]


def test_birds_split_by_filenames(cub):
    for name, keys in (("train", ["002.Gull/Gull_0001"]), ("test", ["001.Finch/Finch_0000", "003.Jay/Jay_0000"])):
        (cub / name).mkdir()
        (cub / name / "filenames.pickle").write_bytes(python2_pickle(keys))
    splits = birds.build(cub, options())
    assert [entry.key for entry in splits["test"]] == ["001.Finch/Finch_0000", "003.Jay/Jay_0000"]
    assert [entry.class_id for entry in splits["test"]] == [1, 3]
    write_class_lists(cub)  # the lists come first
    assert {entry.class_id for entry in birds.build(cub, options())["test"]} == {2}


def test_a_class_in_both_lists_is_refused(cub):
    write_class_lists(cub, test=("001.Finch",))
    with pytest.raises(DataError, match="001.Finch"):
        birds.build(cub, options())


def test_birds_from_our_layout_have_their_boxes(cub):
    write_class_lists(cub)
    write_layout(cub, birds.build(cub, options()))
    records, vocabulary = load_records("toybirds", cub, "test")
    assert records.boxes.tolist() == [[4.0, 5.0, 20.0, 10.0], [5.0, 5.0, 20.0, 10.0]]
    assert records.class_ids.tolist() == [2, 2] and len(vocabulary) == 1 + 2 + 10  # bird, says, the digits


def test_birds_list_everything_missing_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        birds.build(tmp_path, options("birds"))
    for place in ("CUB_200_2011/images:", "images.txt:", "bounding_boxes.txt:", "text/<class>"):
        assert place in str(caught.value)


def test_birds_name_single_missing_files(cub):
    write_class_lists(cub)
    (cub / "CUB_200_2011/images/001.Finch/Finch_0001.jpg").unlink()
    for number in range(2):
        (cub / f"text/003.Jay/Jay_000{number}.txt").unlink()
    with pytest.raises(DataError) as caught:
        birds.build(cub, options())
    assert "no image for 001.Finch/Finch_0001\n" in str(caught.value)
    assert "no captions for 003.Jay/Jay_0000, 003.Jay/Jay_0001\n" in str(caught.value)
    splits = birds.build(cub, options(allow_partial=True))
    assert [entry.key for entry in splits["train"]] == ["001.Finch/Finch_0000", "001.Finch/Finch_0002"]


def test_the_counts_of_cub_are_checked(cub, caplog):
    write_class_lists(cub)
    with pytest.raises(DataError) as caught:
        birds.build(cub, options("birds"))
    assert "train: 5 images instead of 8,855" in str(caught.value)
    assert "test: 2 images instead of 2,933" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(birds.build(cub, options("birds", allow_partial=True))["train"]) == 5
    assert "5 images instead of 8,855" in caplog.text


def test_without_any_split_the_lists_are_asked_for(cub):
    with pytest.raises(DataError, match="trainvalclasses.txt and .*testclasses.txt"):
        birds.build(cub, options())


def test_the_test_classes_are_fifty():
    assert len(birds.REED_TEST_CLASSES) == 50
    assert min(birds.REED_TEST_CLASSES) == 1 and max(birds.REED_TEST_CLASSES) == 197


def test_cub_with_its_real_captions(tmp_path):
    archive = REAL_DATA / "cub_captions.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "cub_captions/text").rename(tmp_path / "text")
    base = tmp_path / "CUB_200_2011"
    keys = sorted(
        path.relative_to(tmp_path / "text").with_suffix("").as_posix() for path in tmp_path.glob("text/*/*.txt")
    )
    for key in keys:  # no image is opened here
        (base / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (base / "images" / f"{key}.jpg").touch()
    (base / "images.txt").write_text("".join(f"{n} {key}.jpg\n" for n, key in enumerate(keys, 1)))
    (base / "bounding_boxes.txt").write_text("".join(f"{n} 1 2 30 40\n" for n in range(1, len(keys) + 1)))
    splits = birds.build(tmp_path, options("birds"))  # Reed's classes; the counts are checked inside
    assert {split: len(entries) for split, entries in splits.items()} == {"train": 8_855, "test": 2_933}
    assert len(write_layout(tmp_path, splits)) == 5_450
    records, _ = load_records("birds", tmp_path, "train")
    assert len(set(records.class_ids.tolist())) == 150
    assert sum(len(group) for group in records.captions) == 88_550


# Originals with mistakes


def test_what_loading_would_refuse_is_not_prepared(cub):
    write_class_lists(cub)
    names, boxes = cub / "CUB_200_2011" / "images.txt", cub / "CUB_200_2011" / "bounding_boxes.txt"
    text = cub / "text" / "001.Finch" / "Finch_0000.txt"

    # A file of captions without one, an image that is named twice, a box without a place.
    for path, content, message in (
        (text, "\n \n", "Finch_0000.txt: holds no caption; write one a line, or remove the file"),
        (names, names.read_text() + "9 001.Finch/Finch_0000.jpg\n", "images.txt: names 001.Finch/Finch_0000 twice"),
        (boxes, boxes.read_text().replace("1.0 5.0", "nan 5.0"), "'001.Finch/Finch_0000' of train: box must be four"),
    ):
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            write_layout(cub, birds.build(cub, options()))
        assert not (cub / "train.jsonl").exists()
        path.write_text(before)

    # Without them.
    write_layout(cub, birds.build(cub, options()))
    assert len(load_records("toybirds", cub, "train")[0]) == 5


LISTS = ["CUB_200_2011/images.txt", "CUB_200_2011/bounding_boxes.txt", "testclasses.txt"]


@pytest.mark.parametrize("name", [*LISTS, "text/002.Gull/Gull_0000.txt"])
def test_windows_mark_is_no_part_of_a_list(cub, name):
    write_class_lists(cub)
    expected = birds.build(cub, options())
    (cub / name).write_text((cub / name).read_text(), encoding="utf-8-sig")
    assert birds.build(cub, options()) == expected


@pytest.mark.parametrize("name", LISTS)
def test_lists_in_another_encoding_are_named(cub, name):
    write_class_lists(cub)
    (cub / name).write_text((cub / name).read_text(), encoding="utf-16")
    with pytest.raises(DataError, match=f"{name}: is not UTF-8 .*save it as UTF-8"):
        birds.build(cub, options())


def test_a_pickle_of_names_that_is_no_list(cub):
    for name in ("train", "test"):
        (cub / name).mkdir()
        (cub / name / "filenames.pickle").write_bytes(python2_pickle(5))
    with pytest.raises(DataError, match=r"train/filenames\.pickle: must hold a list, not int"):
        birds.build(cub, options())


def test_a_power_is_no_number_of_a_class(tmp_path):
    write_cub(tmp_path, {"².Finch": 1, "7.Jay": 1, "Gull": 1})
    write_class_lists(tmp_path, ("².Finch", "Gull"), ("7.Jay",))
    splits = birds.build(tmp_path, options())
    assert [entry.class_id for entries in splits.values() for entry in entries] == [1, 0, 7]
