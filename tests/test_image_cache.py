"""The cache of decoded images: equal to the uncached path, rebuilt when its source changes, whole or not there."""

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
import torch
from dataset_samples import make_records, noise_records, write_broken_image, write_image
from PIL import Image

from datasets import cache as cache_module
from datasets.cache import ImageCache
from datasets.loading import training_loader
from datasets.settings import DataSettings
from datasets.text_image import TextImageDataset, load_resized
from miscc.errors import DataError
from training.data import make_dataset

BOXES = np.array([[3.0 * number, 5.0, 20.0, 12.0] for number in range(6)])


@pytest.fixture
def records(tmp_path):
    return noise_records(tmp_path, 6, boxes=BOXES)


@pytest.fixture
def decoded(monkeypatch):
    """The paths that are decoded while a cache is built, in order."""
    paths = []

    def load(path, box, image_size):
        paths.append(path)
        return load_resized(path, box, image_size)

    monkeypatch.setattr(cache_module, "load_resized", load)
    return paths


def assert_equals_uncached(cache, records, image_size):
    for index, path in enumerate(records.image_paths):
        assert np.array_equal(cache.read(index), load_resized(path, records.boxes[index], image_size))


def test_it_equals_the_uncached_path_bit_for_bit(records, tmp_path):
    cache = ImageCache.open(records, 32, tmp_path / "cache")
    assert len(cache) == 6 and cache.image_size == 32
    assert_equals_uncached(cache, records, 32)
    for sizes in ([32], [16, 32]):
        plain, cached = TextImageDataset(records, sizes), TextImageDataset(records, sizes, cache=cache)
        for epoch, index in itertools.product(range(4), range(6)):
            pairs = zip(plain[epoch, index].images, cached[epoch, index].images, strict=True)
            assert all(torch.equal(first, second) for first, second in pairs)


def test_images_of_all_modes_are_cached(tmp_path):
    colors = {
        "a.png": ("L", 51),
        "b.png": ("RGBA", (9, 8, 7, 99)),
        "c.tif": ("CMYK", (1, 2, 3, 4)),
        "d.webp": ("RGB", 0),
    }
    for name, (mode, color) in colors.items():
        Image.new(mode, (50, 40), color).save(tmp_path / name)
    records = make_records(tmp_path, [tmp_path / name for name in colors])
    cache = ImageCache.open(records, 64, tmp_path / "cache")
    for index, path in enumerate(records.image_paths):
        assert cache.read(index).shape == (76, 95, 3)
        assert np.array_equal(cache.read(index), load_resized(path, None, 64))


def test_workers_read_it(records, tmp_path):
    dataset = TextImageDataset(records, [32], cache=ImageCache.open(records, 32, tmp_path / "cache"))
    alone = list(itertools.islice(training_loader(dataset, 3, seed=1), 4))
    helped = list(itertools.islice(training_loader(dataset, 3, seed=1, workers=2), 4))
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000  # the path, not the pixels
    assert torch.equal(pickle.loads(sent)[1, 2].images[0], dataset[1, 2].images[0])


def test_it_is_not_built_twice(records, tmp_path, decoded):
    ImageCache.open(records, 32, tmp_path / "cache")
    assert len(decoded) == 6
    ImageCache.open(records, 32, tmp_path / "cache")
    assert len(decoded) == 6


def test_it_is_rebuilt_when_an_image_changes(records, tmp_path, decoded):
    old = ImageCache.open(records, 32, tmp_path / "cache")
    before = old.read(2).copy()
    write_image(records.image_paths[2], 46, 48, seed=99)
    os.utime(records.image_paths[2], (1, 1))
    new = ImageCache.open(records, 32, tmp_path / "cache")
    assert len(decoded) == 12
    assert_equals_uncached(new, records, 32)
    assert not np.array_equal(new.read(2), before)
    assert np.array_equal(old.read(2), before)  # who has the old one open goes on with it
    assert len(list((tmp_path / "cache").glob("*.images"))) == 1


def test_it_is_rebuilt_when_a_box_changes(records, tmp_path, decoded):
    ImageCache.open(records, 32, tmp_path / "cache")
    records.boxes = records.boxes + [[1.0, 0.0, 0.0, 0.0]]
    assert_equals_uncached(ImageCache.open(records, 32, tmp_path / "cache"), records, 32)
    assert len(decoded) == 12


def test_sizes_and_selections_have_files_of_their_own(records, tmp_path, decoded):
    for _ in range(2):
        assert_equals_uncached(ImageCache.open(records, 32, tmp_path / "cache"), records, 32)
        assert_equals_uncached(ImageCache.open(records, 64, tmp_path / "cache"), records, 64)
        some = records.select([4, 1])
        assert_equals_uncached(ImageCache.open(some, 32, tmp_path / "cache"), some, 32)
    assert len(decoded) == 6 + 6 + 2


def test_a_cache_of_something_else_is_refused(records, tmp_path):
    cache = ImageCache.open(records, 32, tmp_path / "cache")
    with pytest.raises(ValueError, match="other records"):
        TextImageDataset(records, [64], cache=cache)
    with pytest.raises(ValueError, match="other records"):
        TextImageDataset(records.select([0]), [32], cache=cache)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_what_is_cut_off_is_rebuilt(records, tmp_path, decoded, keep):
    path = ImageCache.open(records, 32, tmp_path / "cache").path
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert_equals_uncached(ImageCache.open(records, 32, tmp_path / "cache"), records, 32)
    assert len(decoded) == 12


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_while_it_is_written(records, tmp_path):
    folder = tmp_path / "cache"

    def build_slowly():
        def load(path, box, image_size):
            time.sleep(0.2)
            return load_resized(path, box, image_size)

        cache_module.load_resized = load
        ImageCache.open(records, 32, folder)

    child = multiprocessing.get_context("fork").Process(target=build_slowly)
    child.start()
    deadline = time.monotonic() + 10
    while not list(folder.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert list(folder.glob(".*.tmp")) and not list(folder.glob("*.images"))
    assert_equals_uncached(ImageCache.open(records, 32, folder), records, 32)
    assert not list(folder.glob(".*.tmp"))  # the rest of the killed one is cleared away


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and file locks")
def test_two_processes_build_it_once(records, tmp_path):
    context = multiprocessing.get_context("fork")
    count, answers = context.Value("i", 0), context.Queue()

    def build():
        def load(path, box, image_size):
            with count.get_lock():
                count.value += 1
            time.sleep(0.05)
            return load_resized(path, box, image_size)

        cache_module.load_resized = load
        cache = ImageCache.open(records, 32, tmp_path / "cache")
        answers.put([cache.read(index).sum().item() for index in range(6)])

    children = [context.Process(target=build) for _ in range(3)]
    for child in children:
        child.start()
    sums = [answers.get(timeout=20) for _ in children]
    for child in children:
        child.join()
    expected = [int(load_resized(path, box, 32).sum()) for path, box in zip(records.image_paths, BOXES, strict=True)]
    assert sums == [expected] * 3
    assert count.value == 6


def test_a_broken_image_is_named(records, tmp_path, caplog):
    write_broken_image(records.image_paths[3].with_suffix(".jpg"))
    records.image_paths[3] = records.image_paths[3].with_suffix(".jpg")
    records.boxes = None
    with pytest.raises(DataError, match=r"03\.jpg: cannot be read"):
        ImageCache.open(records, 32, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.images"))
    cache = ImageCache.open(records, 32, tmp_path / "cache", skip_broken=True)
    with pytest.raises(DataError, match=r"03\.jpg: cannot be read"):
        cache.read(3)
    with pytest.raises(DataError, match=r"03\.jpg: cannot be read"):
        TextImageDataset(records, [32], cache=cache)[3]
    with caplog.at_level(logging.WARNING):
        assert TextImageDataset(records, [32], cache=cache, skip_broken=True)[3].index == 4
    assert "03.jpg" in caplog.text


def test_a_full_disk_is_named(records, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(cache_module, "_BLOCK", 2)
    with pytest.raises(DataError, match="needs about"):
        ImageCache.open(records, 32, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.images"))


def test_a_folder_that_cannot_be_written_is_named(records, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="train without --cache"):
        ImageCache.open(records, 32, tmp_path / "file" / "cache")


def test_zeroed_pixels_are_read_from_the_image_itself(records, tmp_path, caplog):
    path = ImageCache.open(records, 32, tmp_path / "cache").path
    content = bytearray(path.read_bytes())
    content[:2000] = bytes(2000)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert_equals_uncached(ImageCache.open(records, 32, tmp_path / "cache"), records, 32)
    assert caplog.text.count("is damaged; damaged images are read from their own files") == 1


@pytest.mark.parametrize("offset", [0, 8, 16, 24])
def test_a_damaged_table_is_rebuilt(records, tmp_path, decoded, offset):
    path = ImageCache.open(records, 32, tmp_path / "cache").path
    content = bytearray(path.read_bytes())
    content[len(content) - cache_module._FOOTER.size - 2 * 32 + offset + 1] ^= 0x10
    path.write_bytes(content)
    assert_equals_uncached(ImageCache.open(records, 32, tmp_path / "cache"), records, 32)
    assert len(decoded) == 12


def test_the_cache_may_lie_on_another_disk(records, tmp_path):
    settings = DataSettings(keep_decoded=True, data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "large"))
    make_dataset(settings, records, [32], seed=1, augment=False)
    assert list((tmp_path / "large").glob("*.images")) and not (tmp_path / "data").exists()
