"""Images with captions: reading, cropping, what is drawn, batches and loaders."""

import itertools
import logging
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from dataset_samples import make_records, noise_records, position_image, write_broken_image, write_image
from PIL import Image

from datasets.loading import EpochBatches, collate, ordered_loader, training_loader
from datasets.text_image import TextImageDataset, box_edges, load_resized
from miscc.errors import ConfigError, DataError
from miscc.images import from_uint8, open_pixels, open_rgb

WHITE, RED = (1.0, 1.0, 1.0), (1.0, -1.0, -1.0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return noise_records(tmp_path_factory.mktemp("noise"), 14)


def position_records(tmp_path, width=76, height=80):
    path = tmp_path / "position.png"
    position_image(width, height).save(path)
    return make_records(tmp_path, [path])


def equal(first, second) -> bool:
    """Whether two batches or samples hold the same, tensors included."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


# Reading


def images_of_all_modes():
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    transparent = palette.copy()
    transparent.info["transparency"] = 1
    return {
        "grey.png": (Image.new("L", (20, 20), 51), (-0.6, -0.6, -0.6)),  # 51 / 127.5 - 1
        "grey_alpha.png": (Image.new("LA", (20, 20), (51, 0)), WHITE),
        "bits.png": (Image.new("1", (20, 20), 0), (-1.0, -1.0, -1.0)),
        "rgba.png": (Image.new("RGBA", (20, 20), (255, 0, 0, 255)), RED),
        "clear.png": (Image.new("RGBA", (20, 20), (255, 0, 0, 0)), WHITE),
        "palette.png": (palette, (-1.0, -1.0, 1.0)),
        "palette_clear.png": (transparent, WHITE),
        "palette.gif": (palette, (-1.0, -1.0, 1.0)),
        "cmyk.tif": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), RED),
        "cmyk.jpg": (Image.new("CMYK", (20, 20), (0, 0, 0, 0)), WHITE),
        "lossless.webp": (Image.new("RGBA", (20, 20), (255, 0, 0, 255)), RED),
        "clear.webp": (Image.new("RGBA", (20, 20), (0, 0, 0, 0)), WHITE),
    }


@pytest.mark.parametrize("name", list(images_of_all_modes()))
def test_every_mode_comes_out_right(tmp_path, name):
    image, color = images_of_all_modes()[name]
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    dataset = TextImageDataset(make_records(tmp_path, [tmp_path / name]), [32])
    pixels = dataset[0].images[0]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert torch.allclose(pixels, torch.tensor(color)[:, None, None].expand(3, 32, 32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (200, 151), (76, 76), (10, 12)])
def test_resizing_is_that_of_torchvision(tmp_path, size):
    functional = pytest.importorskip("torchvision.transforms.functional")
    path = write_image(tmp_path / "image.png", *size)
    expected = np.asarray(functional.resize(Image.open(path), 76)).astype(int)
    found = load_resized(path, None, 64)
    assert found.dtype == np.uint8 and found.shape == expected.shape and min(expected.shape[:2]) == 76
    apart = np.abs(found - expected)  # torch's arithmetic on bytes and PIL's round differently
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_files_decode_as_by_pil(tmp_path, subsampling, orientation):
    """Also where a photograph is stored on its side, which only images without a box are turned for."""
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (31, 45, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image.jpg", subsampling=subsampling, exif=exif)
    for upright in (True, False):
        found = open_pixels(tmp_path / "image.jpg", upright)
        assert np.array_equal(found.numpy(), np.asarray(open_rgb(tmp_path / "image.jpg", upright)))
        assert found.shape[:2] == ((45, 31) if upright and orientation == 6 else (31, 45))


def test_a_jpeg_that_is_cut_off_is_named(tmp_path):
    path = write_image(tmp_path / "image.jpg", 300, 200)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="image.jpg: cannot be read as an image"):
        load_resized(path, None, 64)


def test_bytes_become_the_same_floats_on_their_way_to_the_device(records):
    floats, raw = (TextImageDataset(records, [16, 32], as_bytes=as_bytes) for as_bytes in (False, True))
    assert [image.dtype for image in raw[1, 2].images] == [torch.uint8] * 2
    batch = collate([raw[1, index] for index in range(3)]).to("cpu")
    assert equal(batch, collate([floats[1, index] for index in range(3)]))
    single = collate([TextImageDataset(records, [32], as_bytes=True)[4]])
    assert single.images.dtype == torch.uint8 and single.to("cpu").images.dtype == torch.float32


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 20, 30, 40), (0, 10, 55, 70)),  # half side 30 around (25, 40), clipped on the left
        ((40, 30, 10, 20), (30, 25, 60, 55)),  # half side 15 around (45, 40)
        ((80, 60, 20, 20), (75, 55, 100, 80)),  # clipped right and below
        ((41.5, 30.2, 9.7, 20.9), (31, 25, 61, 55)),  # int(0.75 * 20.9) = 15 around (int(46.35), int(40.65))
    ],
)
def test_the_square_around_a_box(box, expected):
    left, top, right, bottom = expected
    assert box_edges(100, 80, box) == expected
    crop = np.asarray(position_image(100, 80).crop(box_edges(100, 80, box)))
    assert crop.shape == (bottom - top, right - left, 3)
    assert crop[0, 0].tolist() == [left, top, 7] and crop[-1, -1].tolist() == [right - 1, bottom - 1, 7]


def test_a_box_outside_the_image_is_named(tmp_path):
    path = write_image(tmp_path / "image.png", 40, 30)
    with pytest.raises(DataError, match=r"image.png: bounding box .* outside the image of 40 x 30"):
        load_resized(path, (100, 100, 10, 10), 64)


def test_boxes_are_cut_out_before_scaling(tmp_path):
    path = tmp_path / "position.png"
    position_image(100, 80).save(path)
    dataset = TextImageDataset(make_records(tmp_path, [path], boxes=np.array([[40, 30, 10, 20]])), [32], augment=False)
    pixels = (dataset[0].images[0] + 1) * 127.5
    assert 30 <= pixels[0].min() and pixels[0].max() <= 59  # columns of the square, not of the image


# What is drawn


def test_the_crop_in_the_middle(tmp_path):
    dataset = TextImageDataset(position_records(tmp_path), [64], augment=False)
    pixels = ((dataset[0].images[0] + 1) * 127.5).round().int()
    assert pixels[:, 0, 0].tolist() == [6, 8, 7]  # (76 - 64) / 2, (80 - 64) / 2
    assert pixels[:, 63, 63].tolist() == [69, 71, 7]
    assert equal(dataset[0], dataset[5, 0])


def test_random_crops_and_flips_reach_everything(tmp_path):
    dataset = TextImageDataset(position_records(tmp_path), [64])
    lefts, tops, flips = set(), set(), []
    for epoch in range(200):
        pixels = ((dataset[epoch, 0].images[0] + 1) * 127.5).round().int()
        first, last = pixels[0, 0, 0].item(), pixels[0, 0, 63].item()
        assert abs(first - last) == 63  # 64 neighbouring columns
        lefts.add(min(first, last))
        tops.add(pixels[1, 0, 0].item())
        flips.append(first > last)
    assert lefts == set(range(13)) and tops == set(range(17))
    assert 70 < sum(flips) < 130


def test_every_caption_is_drawn_and_shortened(records):
    dataset = TextImageDataset(records, [32], max_words=10)
    samples = [dataset[epoch, 3] for epoch in range(30)]
    assert {sample.caption_number for sample in samples} == {0, 1, 2}
    for sample in samples:
        full = records.captions[3][sample.caption_number].tolist()
        assert len(full) == 17 and sample.length == 10 and sample.caption.shape == (10,)
        kept = sample.caption.tolist()
        assert any(list(choice) == kept for choice in itertools.combinations(full, 10))


def test_captions_are_padded(records):
    dataset = TextImageDataset(records, [32], max_words=20, augment=False)
    sample = dataset[2]
    assert sample.caption.tolist() == [*records.captions[2][0].tolist(), 0, 0, 0]
    assert (sample.length, sample.class_id, sample.key, sample.index) == (17, 1, "images/02", 2)


def test_a_caption_can_be_chosen(records):
    plain = TextImageDataset(records, [32], max_words=10, augment=False)
    for number in range(3):
        sample = plain[0, 4, number]
        assert sample.caption_number == number
        assert sample.caption.tolist() == records.captions[4][number].tolist()[:10]
    assert plain[4].caption_number == 0
    augmented = TextImageDataset(records, [32])
    assert {augmented[epoch, 4, 2].caption_number for epoch in range(5)} == {2}


def test_draws_depend_on_seed_epoch_and_index_alone(records):
    dataset = TextImageDataset(records, [32], max_words=10, seed=5)
    before = dataset[3, 7]
    _ = [dataset[1, index] for index in range(5)]
    assert equal(before, dataset[3, 7])
    assert equal(dataset[7], dataset[0, 7])
    assert equal(before, TextImageDataset(records, [32], max_words=10, seed=5)[3, 7])
    assert not equal(before.images, dataset[4, 7].images)
    assert not equal(before.images, TextImageDataset(records, [32], max_words=10, seed=6)[3, 7].images)


def test_smaller_sizes_are_scaled_from_the_largest(records):
    dataset = TextImageDataset(records, [16, 32, 64])
    for epoch in range(4):  # flipped and not
        small, middle, large = dataset[epoch, 1].images
        assert [image.shape for image in (small, middle, large)] == [(3, 16, 16), (3, 32, 32), (3, 64, 64)]
        assert torch.equal(large, TextImageDataset(records, [64])[epoch, 1].images[0])
        crop = Image.fromarray(((large + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
        expected = np.asarray(crop.resize((16, 16), Image.Resampling.BILINEAR))
        assert torch.equal(small, from_uint8(torch.tensor(expected).permute(2, 0, 1)))


def test_an_empty_split_is_refused(records):
    with pytest.raises(DataError, match="holds no image"):
        TextImageDataset(records.select([]), [32])


# Records and batches


def test_selecting_records(records):
    some = records.select([5, 2])
    assert len(some) == 2 and some.keys == ["images/05", "images/02"]
    assert some.class_ids.tolist() == [2, 1] and some.texts[1] == records.texts[2]
    assert some.text(0, 1).startswith("word5 caption1 and")
    some.texts = None
    assert some.text(0, 1) == "word5 caption1" + " and" * 15  # from the indices


def test_a_batch(records):
    dataset = TextImageDataset(records, [32], max_words=18, augment=False)
    batch = collate([dataset[index] for index in (3, 0, 6)])
    assert batch.images.shape == (3, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.captions.shape == (3, 18) and batch.captions.dtype == torch.int64
    assert batch.lengths.tolist() == [17, 17, 17]
    assert batch.class_ids.tolist() == [1, 0, 3]
    assert batch.keys == ["images/03", "images/00", "images/06"]
    assert batch.indices.tolist() == [3, 0, 6] and batch.indices.dtype == torch.int64
    assert batch.caption_numbers.tolist() == [0, 0, 0]


def test_a_batch_moves_but_for_what_the_cpu_reads(records):
    batch = collate([TextImageDataset(records, [16, 32])[index] for index in (0, 1)])
    moved = batch.to("meta")
    assert [image.device.type for image in moved.images] == ["meta", "meta"]
    assert all(getattr(moved, name).is_meta for name in ("captions", "class_ids"))
    assert not any(getattr(moved, name).is_meta for name in ("lengths", "indices", "caption_numbers"))
    assert moved.keys == batch.keys
    assert equal(batch.to("cpu"), batch)


# Order


def test_each_epoch_is_a_permutation():
    batches = EpochBatches(10, 3, seed=1)
    assert batches.batches_per_epoch == 3
    first = list(itertools.islice(batches, 6))
    epochs = [[pair for batch in first[:3] for pair in batch], [pair for batch in first[3:] for pair in batch]]
    for epoch, pairs in enumerate(epochs):
        assert {number for number, _ in pairs} == {epoch}
        assert len({index for _, index in pairs}) == 9  # one of ten is left out
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]
    assert first == list(itertools.islice(EpochBatches(10, 3, seed=1), 6))
    assert first != list(itertools.islice(EpochBatches(10, 3, seed=2), 6))


@pytest.mark.parametrize("start", [0, 1, 3, 7, 20])
def test_starting_in_the_middle(start):
    whole = list(itertools.islice(EpochBatches(10, 3, seed=1), 25))
    assert list(itertools.islice(EpochBatches(10, 3, seed=1, start_step=start), 5)) == whole[start : start + 5]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_batch_of_one_process(world_size):
    whole = list(itertools.islice(EpochBatches(20, 6, seed=1), 7))
    ranks = [
        list(itertools.islice(EpochBatches(20, 6, 1, rank=rank, world_size=world_size), 7))
        for rank in range(world_size)
    ]
    assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == whole


def test_a_batch_larger_than_the_data_is_refused():
    EpochBatches(24, 24, seed=1)
    with pytest.raises(DataError, match=r"23 images.*batch of 24"):
        EpochBatches(23, 24, seed=1)
    with pytest.raises(ConfigError, match="24 cannot be divided among 5"):
        EpochBatches(100, 24, seed=1, world_size=5)


# Loaders


def test_captions_are_drawn_for_each_image_by_itself(records):
    """Not one number for all images of an epoch."""
    dataset = TextImageDataset(records, [32], seed=3)
    numbers = [[dataset[epoch, index].caption_number for index in range(len(records))] for epoch in range(4)]
    assert all(len(set(row)) > 1 for row in numbers) and len(set(map(tuple, numbers))) == 4


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(records, workers):
    dataset = TextImageDataset(records, [32], max_words=10)
    alone = list(itertools.islice(training_loader(dataset, 4, seed=3), 8))
    assert alone[0].images.shape == (4, 3, 32, 32)
    helped = list(itertools.islice(training_loader(dataset, 4, seed=3, workers=workers), 8))
    assert equal(alone, helped)
    resumed = list(itertools.islice(training_loader(dataset, 4, seed=3, start_step=5, workers=workers), 3))
    assert equal(alone[5:], resumed)


def test_processes_share_a_batch(records):
    dataset = TextImageDataset(records, [32])
    loader = training_loader(dataset, 6, seed=3)
    assert loader.batch_sampler.batches_per_epoch == 2
    whole = list(itertools.islice(loader, 5))
    ranks = [itertools.islice(training_loader(dataset, 6, seed=3, rank=rank, world_size=2), 5) for rank in range(2)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
        assert torch.equal(batch.captions, torch.cat([share.captions for share in shares]))
        assert batch.keys == shares[0].keys + shares[1].keys


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ordered_loader_leaves_nothing_out(records, workers):
    batches = list(ordered_loader(TextImageDataset(records, [32], augment=False), 4, workers))
    assert [len(batch.keys) for batch in batches] == [4, 4, 4, 2]
    assert [key for batch in batches for key in batch.keys] == records.keys


def test_loading_leaves_the_global_generator_alone(records):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(training_loader(TextImageDataset(records, [32]), 4, seed=3)))
    assert torch.equal(torch.rand(3), expected)


class _Threads(TextImageDataset):
    def __getitem__(self, item):
        sample = super().__getitem__(item)
        return sample._replace(class_id=torch.get_num_threads(), caption_number=os.getpid())


def test_workers_use_one_thread_and_outlive_signals_to_the_group(records):
    batches = iter(training_loader(_Threads(records, [32]), 4, seed=3, workers=1))
    batch = next(batches)
    assert batch.class_ids.tolist() == [1, 1, 1, 1]
    worker = batch.caption_numbers[0].item()
    assert worker != os.getpid() and os.getpgid(worker) != os.getpgid(os.getpid())
    os.kill(worker, signal.SIGINT)
    for _ in range(5):
        assert next(batches).caption_numbers[0].item() == worker


def test_a_dataset_can_be_sent_to_a_worker(records):
    dataset = TextImageDataset(records, [32])
    assert equal(pickle.loads(pickle.dumps(dataset))[2, 3], dataset[2, 3])


# Broken files


@pytest.fixture
def broken(tmp_path):
    paths = [write_image(tmp_path / f"{number}.jpg", seed=number) for number in range(4)]
    write_broken_image(paths[1])
    paths[3].unlink()
    return make_records(tmp_path, paths)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_in_one_line(broken, workers):
    loader = ordered_loader(TextImageDataset(broken, [32]), 2, workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"{broken.image_paths[1]}: cannot be read as an image")
    assert "\n" not in message and "Traceback" not in message


def test_a_missing_file_is_named(broken):
    with pytest.raises(DataError, match=r"3\.jpg: no such image"):
        TextImageDataset(broken, [32])[3]


def test_broken_files_are_skipped_on_request(broken, caplog):
    dataset = TextImageDataset(broken, [32], skip_broken=True)
    good = TextImageDataset(broken, [32])
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            shown = [dataset[epoch, index] for index in range(4)]
            assert [sample.index for sample in shown] == [0, 2, 2, 0]
            assert equal(shown[1], good[epoch, 2])  # image, caption and key of the next good one
    assert [record.message.split(": ")[1].rpartition("/")[2] for record in caplog.records] == ["1.jpg", "3.jpg"]


def test_skipping_is_the_same_with_workers(broken):
    dataset = TextImageDataset(broken, [32], skip_broken=True)
    alone = list(itertools.islice(training_loader(dataset, 2, seed=1), 4))
    assert equal(alone, list(itertools.islice(training_loader(dataset, 2, seed=1, workers=2), 4)))


def test_nothing_but_broken_files(broken):
    with pytest.raises(DataError, match="not one image"):
        TextImageDataset(broken.select([1, 3]), [32], skip_broken=True)[0]


@pytest.mark.parametrize("box", [[float("nan"), 0, 1, 1], [0, 0, float("inf"), 1], [1e300, 0, 1, 1]])
def test_a_box_of_no_numbers_is_named(tmp_path, box):
    write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: bounding box .* is no number of pixels"):
        load_resized(tmp_path / "a.png", box, 16)


def test_an_image_that_is_too_narrow_to_be_scaled_is_refused(tmp_path):
    Image.new("L", (1, 65_000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: is 1 x 65000, too narrow"):
        load_resized(tmp_path / "a.png", None, 256)
