"""COCO from its downloads: what is built, and what is said where something is missing or of another form."""

import json
import logging

import pytest
from dataset_samples import write_image

from datasets.sources import coco
from datasets.sources.building import BuildOptions
from miscc.errors import DataError


def write_coco(root, counts, nested=True, image_folder=None):
    folder = root / "annotations" if nested else root
    folder.mkdir(exist_ok=True)
    for part, count in counts.items():
        names = [f"COCO_{part}_{number:012d}.jpg" for number in range(count)]
        content = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [
                {"image_id": number, "caption": f" Photo {number}\nno. {caption} "}
                for caption in range(6)
                for number in range(count)
            ],
        }
        (folder / f"captions_{part}.json").write_text(json.dumps(content))
        for name in names:
            write_image(root / (image_folder or part) / name, 4, 4)


@pytest.mark.parametrize(("nested", "image_folder"), [(True, None), (False, "images")])
def test_coco_from_its_downloads(tmp_path, monkeypatch, nested, image_folder):
    write_coco(tmp_path, {"train2014": 3, "val2014": 2}, nested, image_folder)
    monkeypatch.setattr(coco, "COUNTS", {"train": 3, "test": 2})
    splits = coco.build(tmp_path, BuildOptions(name="coco"))
    assert {split: len(entries) for split, entries in splits.items()} == {"train": 3, "test": 2}
    entry = splits["test"][1]
    assert entry.key == "COCO_val2014_000000000001" and entry.class_id == 1 and entry.box is None
    assert entry.image == f"{image_folder or 'val2014'}/COCO_val2014_000000000001.jpg"
    assert entry.captions == [f"Photo 1 no. {number}" for number in range(5)]  # the first five, in one line each


def test_the_counts_of_coco_are_checked(tmp_path, caplog):
    write_coco(tmp_path, {"train2014": 3, "val2014": 2})
    with pytest.raises(DataError) as caught:
        coco.build(tmp_path, BuildOptions(name="coco"))
    assert "train: 3 images instead of 82,783" in str(caught.value)
    assert "test: 2 images instead of 40,504" in str(caught.value)
    assert "--allow-partial" in str(caught.value)
    (tmp_path / "train2014/COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 images that captions_train2014.json lists \(COCO_train2014_000000000001.jpg\)"
    ):
        coco.build(tmp_path, BuildOptions(name="coco"))
    with caplog.at_level(logging.WARNING):
        splits = coco.build(tmp_path, BuildOptions(name="coco", allow_partial=True))
    assert len(splits["train"]) == 2 and "2 images instead of 82,783" in caplog.text
    assert [entry.class_id for entry in splits["train"]] == [0, 1]


def test_coco_lists_everything_missing_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        coco.build(tmp_path, BuildOptions(name="coco"))
    for name in ("captions_train2014.json", "captions_val2014.json", "train2014:", "val2014:"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"images": [], "annotations": [{}]}', '{"images": 3, "annotations": []}']
)
def test_another_json_is_not_cocos(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(DataError, match="is not COCO's caption JSON"):
        coco.read_coco_captions(tmp_path / "captions.json")
