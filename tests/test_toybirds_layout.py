"""ToyBirds' files: CUB's layout, boxes and lists, and what an interrupted, killed or second process leaves."""

import json
import os
import re
import signal

import numpy as np
import pytest
from PIL import Image
from test_toybirds import run_python

from datasets.toybirds import dataset as toybirds
from datasets.toybirds.dataset import ToyBirds
from miscc.errors import DataError, UserError
from miscc.lock import FolderLock


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("toybirds") / "made" / "here"
    assert toybirds.write_cub_layout(root, 12, 5, image_size=64, progress=False) == root
    return root


def test_layout_lists(layout):
    cub = layout / "CUB_200_2011"
    images = [line.split(" ") for line in lines(cub / "images.txt")]
    assert [number for number, _ in images] == [str(n) for n in range(1, 18)]
    names = [name for _, name in images]
    assert names == sorted(names) and all(re.fullmatch(r"\d{3}\.\w+/\w+_\d{5}\.jpg", name) for name in names)
    classes = dict(line.split(" ") for line in lines(cub / "classes.txt"))
    assert list(classes) == [str(n) for n in range(1, 201)]
    labels = dict(line.split(" ") for line in lines(cub / "image_class_labels.txt"))
    assert all(name.split("/")[0] == classes[labels[number]] for number, name in images)
    trainval, test = lines(layout / "trainvalclasses.txt"), lines(layout / "testclasses.txt")
    assert (len(trainval), len(test)) == (150, 50) and sorted(trainval + test) == list(classes.values())
    assert sum(name.split("/")[0] in trainval for name in names) == 12


def test_layout_files_hold_the_drawings(layout):
    cub = layout / "CUB_200_2011"
    boxes = [line.split(" ") for line in lines(cub / "bounding_boxes.txt")]
    entries = [json.loads(line) for line in lines(layout / "attributes.jsonl")]
    images = [line.split(" ")[1] for line in lines(cub / "images.txt")]
    assert [entry["key"] + ".jpg" for entry in entries] == images
    assert sorted((e["split"], e["index"]) for e in entries) == (
        [("test", i) for i in range(5)] + [("train", i) for i in range(12)]
    )
    for (number, *box), entry in zip(boxes, entries, strict=True):
        bird = ToyBirds(entry["split"], 12, 64)[entry["index"]]
        assert entry["attributes"] == bird.attributes
        with Image.open(cub / "images" / f"{entry['key']}.jpg") as image:
            assert image.format == "JPEG" and image.layer[0][1:3] == (1, 1)  # no chroma subsampling
            assert np.abs(np.asarray(image).astype(int) - bird.image).mean() < 3
        mask = np.asarray(Image.open(layout / "segmentations" / f"{entry['key']}.png"))
        assert (mask == bird.mask).all()
        assert lines(layout / "text" / f"{entry['key']}.txt") == bird.captions
        x, y, width, height = map(float, box)
        inside = bird.mask > 127
        left, top, right, bottom = int(x), int(y), int(x + width), int(y + height)
        assert inside[top:bottom, left:right].sum() == inside.sum()  # nothing sticks out …
        edges = (inside[top], inside[bottom - 1], inside[:, left], inside[:, right - 1])
        assert all(edge.any() for edge in edges)  # … and nothing is left over
        assert number == str(images.index(entry["key"] + ".jpg") + 1)


def test_bounding_box_by_hand():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 1:7] = 255
    mask[5, 3] = 127  # less than half inside
    mask[1, 3] = 128
    assert toybirds.bounding_box(mask) == (1.0, 1.0, 6.0, 4.0)


def test_finished_layout_is_left_alone(layout, capsys):
    image = next((layout / "CUB_200_2011" / "images").rglob("*.jpg"))
    before = image.stat().st_mtime_ns
    toybirds.write_cub_layout(layout, 12, 5, image_size=64)
    assert "already there" in capsys.readouterr().out
    assert image.stat().st_mtime_ns == before
    assert not (layout / toybirds.UNFINISHED).exists()


def test_other_parameters_are_refused(layout):
    with pytest.raises(DataError, match="remove the folder or choose another root"):
        toybirds.write_cub_layout(layout, 12, 6, image_size=64, progress=False)
    assert len(lines(layout / "attributes.jsonl")) == 17


def test_interrupted_run_is_redone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(toybirds, "_write_lists", stop)
        toybirds.write_cub_layout(tmp_path, 6, 4, image_size=32, progress=False)
    assert not (tmp_path / toybirds.MARKER).exists()
    assert len(list(tmp_path.rglob("*.jpg"))) == 10
    toybirds.write_cub_layout(tmp_path, 3, 2, image_size=32, progress=False)  # other parameters: nothing stays
    assert (tmp_path / toybirds.MARKER).exists() and not (tmp_path / toybirds.UNFINISHED).exists()
    for pattern in ("*.jpg", "*.png", "text/*/*.txt"):
        assert len(list(tmp_path.rglob(pattern))) == 5


def test_killed_run_is_redone(tmp_path):
    """kill -9 from inside, after a few files: nothing claims to be complete, and the next run completes it."""
    code = (
        "import os, signal; from datasets.toybirds import dataset as toybirds\n"
        "draw = toybirds.draw; count = []\n"
        "def deadly(*args):\n"
        "    count.append(1)\n"
        "    if len(count) > 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(*args)\n"
        "toybirds.draw = deadly\n"
        f"toybirds.write_cub_layout({str(tmp_path)!r}, 5, 3, image_size=32, progress=False)\n"
    )
    assert run_python(code).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.jpg"))) == 4 and not (tmp_path / toybirds.MARKER).exists()
    toybirds.write_cub_layout(tmp_path, 5, 3, image_size=32, progress=False)
    assert len(lines(tmp_path / "CUB_200_2011" / "images.txt")) == 8 == len(list(tmp_path.rglob("*.jpg")))


def test_other_data_is_not_touched(tmp_path):
    mine = tmp_path / "CUB_200_2011" / "images.txt"
    mine.parent.mkdir()
    mine.write_text("1 001.Black_footed_Albatross/a.jpg\n")
    with pytest.raises(DataError, match="another data set; choose another root"):
        toybirds.write_cub_layout(tmp_path, 2, 2, image_size=32, progress=False)
    assert lines(mine) == ["1 001.Black_footed_Albatross/a.jpg"]


def test_lists_of_a_prepared_folder_are_not_replaced(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"key": "mine"}\n')
    with pytest.raises(DataError, match="train.jsonl: belongs to another data set"):
        toybirds.write_cub_layout(tmp_path, 2, 2, image_size=32, progress=False)
    assert lines(tmp_path / "train.jsonl") == ['{"key": "mine"}']


def test_unusable_root_and_marker(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        toybirds.write_cub_layout(tmp_path / "file", 2, 2, image_size=32, progress=False)
    with pytest.raises(DataError, match="file"):
        toybirds.write_cub_layout(tmp_path / "file" / "below", 2, 2, image_size=32, progress=False)
    (tmp_path / toybirds.MARKER).write_text("{")
    with pytest.raises(DataError, match="toybirds.json"):
        toybirds.write_cub_layout(tmp_path, 2, 2, image_size=32, progress=False)
    with pytest.raises(DataError, match="0 drawings"):
        toybirds.write_cub_layout(tmp_path / "new", 0, 2, image_size=32, progress=False)
    assert not (tmp_path / "new").exists()


def test_several_processes_write_the_same(tmp_path):
    for workers in (0, 2):
        toybirds.write_cub_layout(tmp_path / str(workers), 480, 40, image_size=32, progress=False, workers=workers)
    files = [sorted(p for p in (tmp_path / w).rglob("*") if p.is_file()) for w in "02"]
    assert len(files[0]) == 3 * 520 + 9  # the lists, the marker and the lock
    assert [p.relative_to(tmp_path / "0") for p in files[0]] == [p.relative_to(tmp_path / "2") for p in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_a_second_process_leaves_the_drawings_of_the_first_alone(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        lock = FolderLock(tmp_path)
        (tmp_path / toybirds.UNFINISHED).touch()
        (tmp_path / "text").mkdir()
        os.write(write, b"x")
        signal.pause()
        lock.release()
    os.read(read, 1)
    try:
        with pytest.raises(UserError, match=f"is being drawn by process {child} .*; wait .* or choose another root"):
            toybirds.write_cub_layout(tmp_path, 2, 2, image_size=32, progress=False)
        assert (tmp_path / "text").is_dir()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    # The first one was killed: the next one draws.
    toybirds.write_cub_layout(tmp_path, 2, 2, image_size=32, progress=False)
    assert (tmp_path / toybirds.MARKER).exists()
