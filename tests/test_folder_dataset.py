"""Folders of anybody's images: every form of captions, matching of names, splits. Flickr's files with them."""

import json
import logging

import pytest
from dataset_samples import write_image

from datasets.sources import flickr, folder
from datasets.sources.building import BuildOptions
from miscc.errors import DataError

NAMES = ["cat.jpg", "dog.png", "sub/cow.jpg", "sub/fox.webp"]


def options(**given):
    return BuildOptions(name="folder", **given)


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(NAMES):
        write_image(tmp_path / "images" / name, seed=number)
    (tmp_path / "train.txt").write_text("cat.jpg\ndog\n")
    (tmp_path / "test.txt").write_text("sub/cow.jpg\nfox.webp\n\n")
    return tmp_path


def captions_of(splits):
    return {entry.key: entry.captions for entries in splits.values() for entry in entries}


EXPECTED = {"cat": ["a cat", "a grey cat"], "dog": ["a dog"], "sub/cow": ["a cow"], "sub/fox": ["a fox, red"]}


def check(splits):
    assert {split: [entry.key for entry in entries] for split, entries in splits.items()} == {
        "train": ["cat", "dog"],
        "test": ["sub/cow", "sub/fox"],
    }
    assert captions_of(splits) == EXPECTED
    assert splits["test"][1].image == "images/sub/fox.webp" and splits["test"][1].box is None
    assert len({entry.class_id for entries in splits.values() for entry in entries}) == 4


CSV = 'image,caption\ncat.jpg,a cat\ndog.png,a dog\ncat.jpg,"a grey cat"\nsub/cow.jpg,a cow\nfox,"a fox, red"\n'


def test_csv(root):
    (root / "captions.csv").write_text(CSV)
    check(folder.build(root, options()))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", CSV.replace('"a fox, red"', "a fox; red").replace(",", "\t").replace(";", ",")),
        ("a.csv", CSV.replace("image,caption", "\ufeffFile , Text ")),  # Excel's mark, other names, spaces
        ("a.csv", CSV.replace(",", ";").replace("a fox; red", "a fox, red").replace("sub/", "sub\\")),  # Windows
        ("a.csv", CSV.replace("cat.jpg", "images/cat.jpg").replace("\n", "\r\n")),
    ],
)
def test_tables_as_people_write_them(root, name, content):
    (root / name).write_bytes(content.encode("utf-8"))
    check(folder.build(root, options()))


def test_jsonl(root):
    lines = [
        {"file_name": "cat.jpg", "captions": ["a cat", "a grey cat"]},
        {"file_name": "dog.png", "captions": "a dog"},
        {"file_name": "sub/cow.jpg", "captions": ["a cow"]},
        {"file_name": "sub/fox.webp", "captions": ["  a fox,\n red "]},
    ]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    check(folder.build(root, options()))


def test_text_files(root):
    for key, captions in EXPECTED.items():
        (root / "images" / f"{key}.txt").write_text("\n".join(captions) + "\n\n")
    check(folder.build(root, options()))


def test_coco_json(root):
    content = {
        "images": [{"id": 10 + number, "file_name": name} for number, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": 10 + number, "caption": caption}
            for number, captions in enumerate(EXPECTED.values())
            for caption in captions
        ],
    }
    (root / "labels.json").write_text(json.dumps(content))
    (root / "other.json").write_text("{}")  # some JSON of another kind is no reason to ask
    check(folder.build(root, options()))


def test_flickr8k_in_a_folder(root):
    lines = [
        f"{name}#{number}\t{c}\n"
        for name, cs in zip(NAMES, EXPECTED.values(), strict=True)
        for number, c in enumerate(cs)
    ]
    (root / "Flickr8k.token.txt").write_text("".join(lines) + "gone.jpg#0\tnot here\n")
    (root / "Flickr_8k.trainImages.txt").write_text("cat.jpg\ndog.png\n")
    (root / "Flickr_8k.testImages.txt").write_text("cow.jpg\nfox.webp\n")
    check(folder.build(root, options()))
    check(flickr.build(root, options()))


def test_flickr8k_of_the_mirror(root):
    (root / "captions.txt").write_text(CSV)
    check(folder.build(root, options()))
    splits = flickr.build(root, options())  # train.txt is not one of Flickr's lists: a seeded split
    assert captions_of(splits) == EXPECTED
    assert set(splits) == {"train", "test"}


def test_flickr_says_what_is_missing(tmp_path):
    with pytest.raises(DataError) as caught:
        flickr.build(tmp_path, options())
    for name in ("Flickr8k.token.txt", "trainImages", "devImages", "testImages", "prepare folder"):
        assert name in str(caught.value)


# Columns


def test_labels_and_tags_make_one_caption(root, caplog):
    (root / "a.csv").write_text(
        "file,label,tags,group\ncat.jpg,cat,pet|grey,8\ndog.png,dog,,8\ncow.jpg,cow,moo,7\nfox.webp,fox,x,7\n"
    )
    with caplog.at_level(logging.INFO):
        splits = folder.build(root, options())
    assert captions_of(splits) == {
        "cat": ["cat, pet, grey"],
        "dog": ["dog"],
        "sub/cow": ["cow, moo"],
        "sub/fox": ["fox, x"],
    }
    assert "image from column 'file', captions from 'label+tags'" in caplog.text


def test_columns_can_be_chosen(root):
    (root / "a.csv").write_text(
        "image,what,where,who,caption\ncat.jpg,a,b,dog.png,x\ndog.png,c,d,cat.jpg,y\n"
        "cow.jpg,e,f,fox.webp,z\nfox.webp,g,h,cow.jpg,w\n"
    )
    chosen = options(caption_columns=("what", "where"), image_column="who", class_column="image")
    splits = folder.build(root, chosen)
    assert captions_of(splits) == {"dog": ["a", "b"], "cat": ["c", "d"], "sub/fox": ["e", "f"], "sub/cow": ["g", "h"]}
    assert captions_of(folder.build(root, options(caption_columns=("what+where",))))["cat"] == ["a, b"]
    assert captions_of(folder.build(root, options()))["cat"] == ["x"]


def test_several_caption_columns_give_several_captions(root):
    (root / "a.csv").write_text(
        "image,caption_1,caption_2\ncat.jpg,one,two\ndog.png,three,\ncow.jpg,four,five\nfox.webp,six,...\n"
    )
    captions = captions_of(folder.build(root, options()))
    assert captions == {"cat": ["one", "two"], "dog": ["three"], "sub/cow": ["four", "five"], "sub/fox": ["six"]}


def test_classes_from_a_column(root):
    (root / "a.csv").write_text("image,caption,kind\ncat.jpg,a,pet\ndog.png,b,pet\ncow.jpg,c,farm\nfox.webp,d,wild\n")
    splits = folder.build(root, options(class_column="kind"))
    classes = {entry.key: entry.class_id for entries in splits.values() for entry in entries}
    assert classes == {"cat": 1, "dog": 1, "sub/cow": 0, "sub/fox": 2}


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("who,caption\ncat.jpg,a\n", {}, "who, caption names the image.*--image-column"),
        ("image,who\ncat.jpg,a\n", {}, "--caption-column"),
        ("image,caption\ncat.jpg,a\n", {"image_column": "x"}, "--image-column x.*image, caption"),
        ("image,caption\ncat.jpg,a\n", {"caption_columns": ("x",)}, "--caption-column x"),
        ("image,caption\ncat.jpg,a\n", {"class_column": "x"}, "--class-column x"),
        ("cat.jpg,a cat\ndog.png,a dog\n", {}, "first line"),
        ("image,caption\n", {}, "holds no captions"),
        ("image,caption\nlion.jpg,a lion\n", {}, "not one image with a caption: 4 images .* 1 names"),
        ("image,caption\ncat.jpg,...\n", {}, "not one image with a caption"),
    ],
)
def test_tables_that_say_too_little(root, content, given, message):
    (root / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        folder.build(root, options(**given))


def test_other_letters_than_utf8_are_named(root):
    (root / "a.csv").write_bytes(b"image,caption\ncat.jpg,caf\xe9\n")
    with pytest.raises(DataError, match="a.csv: is not UTF-8"):
        folder.build(root, options())


@pytest.mark.parametrize("line", ["{", "[1]", '"text"'])
def test_broken_jsonl_names_the_line(root, line):
    (root / "a.jsonl").write_text('{"image": "cat.jpg", "caption": "a cat"}\n' + line)
    with pytest.raises(DataError, match="a.jsonl, line 2"):
        folder.build(root, options())


# Where things are


def test_several_caption_files_must_be_chosen(root):
    (root / "one.csv").write_text(CSV)
    (root / "two.csv").write_text(CSV.replace("a cat", "no cat"))
    with pytest.raises(DataError, match="one.csv, two.csv.*--captions"):
        folder.build(root, options())
    check(folder.build(root, options(captions=root / "one.csv")))
    (root / "two.csv").rename(root / "captions.csv")  # the name that speaks for itself
    assert captions_of(folder.build(root, options()))["cat"][0] == "no cat"


def test_images_elsewhere(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for number, name in enumerate(NAMES):
        write_image(elsewhere / name, seed=number)
    (root / "captions.csv").write_text(CSV)
    splits = folder.build(root, options(images=elsewhere))
    assert captions_of(splits) == EXPECTED
    assert splits["train"][0].image == str(elsewhere.resolve() / "cat.jpg")


def test_images_beside_the_captions(tmp_path):
    for name in ("cat.jpg", "dog.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "captions.csv").write_text("image,caption\ncat.jpg,a cat\ndog.jpg,a dog\n")
    splits = folder.build(tmp_path, options())
    assert {entry.image for entries in splits.values() for entry in entries} == {"cat.jpg", "dog.jpg"}


def test_the_same_name_twice(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg", "2.png", "2.jpg"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "captions.csv").write_text("image,caption\na/1.jpg,x\nb/1.jpg,y\n1.jpg,which\n2.png,z\n2.jpg,w\n")
    captions = captions_of(folder.build(tmp_path, options()))
    assert captions == {"a/1.jpg": ["x"], "b/1.jpg": ["y"], "2.png": ["z"], "2.jpg": ["w"]}  # keys need suffixes


def test_what_does_not_fit_is_counted_and_named(root, caplog):
    (root / "captions.csv").write_text(CSV.replace("dog.png", "wolf.png") + "bear.jpg,a bear\n")
    (root / "train.txt").write_text("cat.jpg\nyak.jpg\n")
    with caplog.at_level(logging.WARNING):
        splits = folder.build(root, options())
    assert captions_of(splits).keys() == {"cat", "sub/cow", "sub/fox"}
    assert "2 names with captions, but no such image (or several): wolf.png, bear.jpg" in caplog.text
    assert "1 images without a caption are left out: dog.png" in caplog.text
    assert "1 names in the split lists without an image and caption: yak.jpg" in caplog.text


def test_no_captions_at_all(root, tmp_path):
    with pytest.raises(DataError, match="no captions found"):
        folder.build(root, options())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        folder.build(tmp_path / "empty", options())
    with pytest.raises(DataError, match="no such folder"):
        folder.build(tmp_path / "none", options())


# Splits


def test_images_in_no_list_are_left_out(root, caplog):
    (root / "captions.csv").write_text(CSV)
    (root / "test.txt").write_text("sub/cow.jpg\n")
    (root / "dev.txt").write_text("fox\n")
    assert {split: len(entries) for split, entries in folder.build(root, options()).items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    (root / "dev.txt").unlink()
    with caplog.at_level(logging.WARNING):
        assert captions_of(folder.build(root, options())).keys() == {"cat", "dog", "sub/cow"}
    assert "1 images are in no split list and are left out: sub/fox.webp" in caplog.text


def test_a_missing_list_is_what_the_other_leaves(root):
    (root / "captions.csv").write_text(CSV)
    (root / "train.txt").unlink()
    check(folder.build(root, options()))


def test_an_image_in_two_lists_is_refused(root):
    (root / "captions.csv").write_text(CSV)
    (root / "test.txt").write_text("cat.jpg\ncow.jpg\n")
    with pytest.raises(DataError, match="cat.jpg is in the list of train and in that of test"):
        folder.build(root, options())


@pytest.fixture
def many(tmp_path):
    write_image(tmp_path / "images" / "first.png", 2, 2)
    content = (tmp_path / "images" / "first.png").read_bytes()
    for number in range(400):
        (tmp_path / "images" / f"{number:03d}.png").write_bytes(content)
    (tmp_path / "images" / "first.png").unlink()
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{n:03d}.png,a {n}\n" for n in range(400)))
    return tmp_path


def test_a_seeded_split(many, caplog):
    with caplog.at_level(logging.INFO):
        first = folder.build(many, options(test_fraction=0.2, val_fraction=0.1))
    assert "80 test and 40 val images, the other 280 train" in caplog.text
    assert {split: len(entries) for split, entries in first.items()} == {"train": 280, "val": 40, "test": 80}
    assert len({entry.key for entries in first.values() for entry in entries}) == 400
    assert first == folder.build(many, options(test_fraction=0.2, val_fraction=0.1))
    other = folder.build(many, options(test_fraction=0.2, val_fraction=0.1, seed=7))
    assert first["test"] != other["test"]


def test_images_added_later_move_hardly_an_other(many):
    for number in range(10):
        (many / "images" / f"{number:03d}.png").rename(many / f"{number:03d}.png")
    before = folder.build(many, options())
    for number in range(10):
        (many / f"{number:03d}.png").rename(many / "images" / f"{number:03d}.png")
    after = folder.build(many, options())
    assert len(before["test"]) == 39 and len(after["test"]) == 40
    kept = {entry.key for entry in before["test"]} & {entry.key for entry in after["test"]}
    assert len(kept) >= 36


@pytest.mark.parametrize(("number", "fraction", "tests"), [(40, 0.1, 4), (12, 0.1, 1), (3, 0.01, 1), (3, 0.99, 2)])
def test_few_images_give_as_many_test_images_as_the_fraction_says(tmp_path, number, fraction, tests):
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{n}.png,a {n}\n" for n in range(number)))
    for n in range(number):
        write_image(tmp_path / f"{n}.png", 2, 2)
    splits = folder.build(tmp_path, options(test_fraction=fraction))
    assert len(splits["test"]) == tests and len(splits["train"]) == number - tests


def test_two_images_are_one_for_each_split(tmp_path):
    for name in ("cat.jpg", "dog.jpg"):
        write_image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("an animal")
    assert {split: len(entries) for split, entries in folder.build(tmp_path, options()).items()} == {
        "train": 1,
        "test": 1,
    }
    (tmp_path / "dog.jpg").unlink()
    with pytest.raises(DataError, match="would hold no image"):
        folder.build(tmp_path, options())


def test_commas_without_quotes(root):
    (root / "a.csv").write_text(
        "image,caption\ncat.jpg,a cat, a grey cat\ndog.png,a dog\ncow.jpg,a cow\nfox,a fox, red\n"
    )
    assert captions_of(folder.build(root, options())) == {**EXPECTED, "cat": ["a cat, a grey cat"]}
    (root / "a.csv").write_text("caption,image\na cat,cat.jpg\na dog, black,dog.png\n")
    with pytest.raises(DataError, match="a.csv, line 3: has 3 fields under 2 names"):
        folder.build(root, options())


def test_a_quote_that_is_not_closed(root):
    (root / "a.csv").write_text('image,caption\ncat.jpg,"a cat\n' + "dog.png,a dog, another dog\n" * 10_000)
    with pytest.raises(DataError, match="a.csv: cannot be read as a table .*quote"):
        folder.build(root, options())


def test_a_missing_image_gives_its_captions_to_no_other(tmp_path, caplog):
    """images/a/ is there, without 001.png, which only b/ has."""
    for name in ("a/002.png", "b/001.png", "b/003.png"):
        write_image(tmp_path / "images" / name)
    rows = ["a/001.png,a cat", "images/a/001.png,a cat", "images/001.png,a cat", "a/002.png,a dog"]
    rows += ["b/001.png,a cow", "D:\\photos\\003.png,a fox"]  # a folder that is not here: the name decides
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    with caplog.at_level(logging.WARNING):
        captions = captions_of(folder.build(tmp_path, options()))
    assert captions == {"a/002": ["a dog"], "b/001": ["a cow"], "b/003": ["a fox"]}
    assert "3 names with captions, but no such image (or several): a/001.png" in caplog.text


def test_without_a_list_of_test_images_it_is_asked_for(root):
    (root / "captions.csv").write_text(CSV)
    (root / "train.txt").rename(root / "val.txt")
    (root / "test.txt").unlink()
    with pytest.raises(DataError, match=r"'test' would hold no image; add images, or add a test\.txt"):
        folder.build(root, options())
    (root / "test.txt").write_text("yak\n")
    with pytest.raises(DataError, match=r"'test' would hold no image; add images, or correct test\.txt"):
        folder.build(root, options())
