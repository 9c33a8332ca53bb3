"""IoU of masks and outlines by hand, with a segmenter whose outlines are known."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from toybirds_help import write_checkpoint

import eval.mask_iou as mask_iou_module
from eval.mask_iou import iou, mask_iou, mean_shape, resized
from eval.toybirds.classifiers import Drawings, Recipe
from eval.toybirds.samples import captions_of_test_birds, generate_birds, read_birds
from miscc.errors import DataError, run_command
from miscc.pictures import unit_to_uint8
from sampling.folders import sample
from sampling.pipeline import TextToImage
from sampling.requests import Request, caption_requests


@dataclasses.dataclass
class KnownSegmenter:
    """Outlines image i as `outlines[i]` says."""

    outlines: np.ndarray
    mean_shape: np.ndarray
    ceiling: float = 0.97
    mean_shape_ceiling: float = 0.5

    def outline(self, images):
        return self.outlines[: len(images)]


def half(side: str, size: int = 8) -> np.ndarray:
    """(size, size) bool: the left, right or upper half."""
    shape = np.zeros((size, size), dtype=bool)
    shape[{"left": np.s_[:, : size // 2], "right": np.s_[:, size // 2 :], "upper": np.s_[: size // 2]}[side]] = True
    return shape


RECIPE = Recipe("outline-segmenter", 32, epochs=1, width=4, most_noise=0.0, most_blur=0.0)
IMAGES = np.zeros((2, 8, 8, 3), dtype=np.uint8)


def test_iou_by_hand():
    left, right, upper = half("left"), half("right"), half("upper")
    nothing, everything = np.zeros_like(left), np.ones_like(left)
    first = np.stack([left, left, left, left, nothing, nothing])
    second = np.stack([left, right, upper, everything, everything, nothing])
    assert iou(first, second) == pytest.approx([1, 0, 16 / 48, 32 / 64, 0, 1])
    assert iou(upper, np.stack([left, upper])) == pytest.approx([1 / 3, 1])


def test_masks_against_outlines_by_hand():
    """One bird is the left half, the other the upper half; the mask says left for both."""
    segmenter = KnownSegmenter(np.stack([half("left"), half("upper")]), half("right"))
    masks = np.where(np.stack([half("left")] * 2), 0.9, 0.2).astype(np.float32)
    report = mask_iou(IMAGES, [masks], segmenter)
    (stage,) = report.stages
    assert (stage.size, stage.inverted) == (8, False)
    assert stage.iou == pytest.approx((1 + 1 / 3) / 2)
    assert stage.other_iou == pytest.approx((0 + 1 / 3) / 2)  # the right half
    assert stage.shuffled_iou == pytest.approx((1 / 3 + 1) / 2)
    assert report.mean_shape_iou == pytest.approx((0 + 1 / 3) / 2)
    assert report.whole_frame_iou == pytest.approx(0.5)
    assert (report.num_images, report.without_bird) == (2, 0)
    assert (report.ceiling, report.mean_shape_ceiling) == (0.97, 0.5)


def test_the_better_polarity_is_taken_and_said_for_each_stage_but_not_for_each_image():
    segmenter = KnownSegmenter(np.stack([half("left"), half("left")]), half("left"))
    dark = np.where(np.stack([half("left"), half("left")]), 0.1, 0.8).astype(np.float32)
    report = mask_iou(IMAGES, [dark, 1 - dark], segmenter)
    assert [(stage.iou, stage.inverted, stage.other_iou) for stage in report.stages] == [(1, True, 0), (1, False, 0)]
    assert any("(inverted)" in line for line in report.lines())
    mixed = np.stack([dark[0], 1 - dark[0], 1 - dark[0]])
    three = KnownSegmenter(np.stack([half("left")] * 3), half("left"))
    (stage,) = mask_iou(np.zeros((3, 8, 8, 3), np.uint8), [mixed], three).stages
    assert (stage.iou, stage.inverted, stage.other_iou) == (pytest.approx(2 / 3), False, pytest.approx(1 / 3))


def test_a_mask_that_knows_its_image_beats_the_same_masks_shuffled():
    birds = np.stack([half("left"), half("right")])
    (stage,) = mask_iou(IMAGES, [birds.astype(np.float32)], KnownSegmenter(birds, half("upper"))).stages
    assert (stage.iou, stage.shuffled_iou) == (1.0, 0.0)
    narrow = np.stack([half("left"), np.zeros((8, 8), dtype=bool)])
    narrow[1, :, 6:] = True
    (stage,) = mask_iou(IMAGES, [(~narrow).astype(np.float32)], KnownSegmenter(narrow, half("upper"))).stages
    assert (stage.inverted, stage.iou, stage.shuffled_iou) == (True, 1.0, 0.0)
    assert stage.other_iou == 0
    (single,) = mask_iou(IMAGES[:1], [birds[:1].astype(np.float32)], KnownSegmenter(birds, half("upper"))).stages
    assert single.shuffled_iou is None


def test_coarse_masks_are_enlarged_between_pixel_centres_and_fine_ones_shrunk():
    coarse = np.array([[[0.0, 1.0], [0.0, 1.0]]], dtype=np.float32)
    assert resized(coarse, 4)[0, 0] == pytest.approx([0, 0.25, 0.75, 1])
    assert resized(np.repeat(np.repeat(coarse, 4, 1), 4, 2), 2)[0].mean() == pytest.approx(0.5)
    segmenter = KnownSegmenter(half("right")[None], half("right"))
    (stage,) = mask_iou(IMAGES[:1], [coarse], segmenter).stages
    assert (stage.size, stage.iou) == (2, 1.0)
    exactly = np.full((1, 8, 8), 0.5, dtype=np.float32)  # what is at the threshold is inside
    (stage,) = mask_iou(IMAGES[:1], [exactly], segmenter).stages
    assert (stage.iou, stage.inverted, stage.other_iou) == (0.5, False, 0)


def test_images_without_a_bird_are_left_out_and_counted():
    nothing = np.zeros((8, 8), dtype=bool)
    speck = nothing.copy()
    speck[0, 0] = True  # one pixel of 64 is 1.6 %
    outlines = np.stack([nothing, speck, half("left")])
    masks = np.stack([half("upper"), half("right"), half("left")]).astype(np.float32)
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    report = mask_iou(images, [masks], KnownSegmenter(outlines, half("left")))
    assert (report.num_images, report.without_bird, report.stages[0].iou) == (3, 2, 1.0)
    assert report.lines()[-1].startswith("left out: 2 of 3")
    with pytest.raises(DataError, match="in none of the 3 images"):
        mask_iou(images, [masks], KnownSegmenter(np.zeros((3, 8, 8), dtype=bool), half("left")))


def test_masks_that_are_not_there_or_do_not_fit_are_refused():
    segmenter = KnownSegmenter(np.stack([half("left")] * 2), half("left"))
    with pytest.raises(DataError, match="come without masks"):
        mask_iou(IMAGES, [], segmenter)
    with pytest.raises(DataError, match=r"2 images, \[3\] masks"):
        mask_iou(IMAGES, [np.zeros((3, 8, 8), dtype=np.float32)], segmenter)


def test_the_mean_shape_is_where_half_of_the_birds_are():
    """Drawings as large as the crop, so that only the flip is drawn by lot: what is symmetric stays."""
    rows = np.zeros((32, 32), dtype=np.uint8)
    rows[:10] = 255
    wider, narrow = rows.copy(), rows.copy()
    wider[:20], narrow[:4] = 255, 255
    narrow[4:] = 0
    pixels = [np.zeros((32, 32, 3), dtype=np.uint8)] * 3
    drawings = Drawings(pixels, [rows, wider, narrow], np.zeros((3, 9), dtype=np.int64))
    expected = np.zeros((32, 32), dtype=bool)
    expected[:10] = True
    assert np.array_equal(mean_shape(drawings, RECIPE), expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "last.pth")


def test_captions_are_drawn_by_the_seed_and_come_again_only_after_all():
    captions, keys = captions_of_test_birds(30, seed=1, per_caption=3)
    assert len(captions) == len(keys) == 30 and len(set(captions)) == 10
    assert captions[0] == captions[2] != captions[3] and keys[0].startswith("test/")
    assert captions_of_test_birds(30, 1, 3)[0] == captions != captions_of_test_birds(30, 2, 3)[0]
    assert captions_of_test_birds(10, 1)[0] == captions[::3]  # fewer are the first of more
    assert len(captions_of_test_birds(7, 0, 3)[0]) == 7


def test_a_folder_of_samples_is_read_as_it_was_drawn(checkpoint, tmp_path):
    pipeline = TextToImage.load(checkpoint, "cpu")
    drawn = generate_birds(pipeline, 5, seed=2, batch_size=2)
    assert drawn.images.shape == (5, 32, 32, 3) and [m.shape[1] for m in drawn.masks] == [4, 8, 16, 32]
    assert drawn.origin["seed"] == 2 and drawn.origin["step"] == 0 and drawn.warnings == ()
    again = pipeline.generate(drawn.captions, seed=2)
    assert np.array_equal(drawn.images, again.images) and np.allclose(drawn.masks[2], again.masks[2], atol=1e-5)
    requests = [Request(i, drawn.captions[i], f"key{i}", 0, 0) for i in range(5)]
    sample(pipeline, requests, tmp_path / "out", seed=2, with_masks=True)
    read = read_birds(tmp_path / "out")
    assert np.array_equal(read.images, drawn.images) and read.captions == drawn.captions
    assert read.keys == [f"key{i}" for i in range(5)] and read.origin["seed"] == 2
    for found, made in zip(read.masks, drawn.masks, strict=True):
        expected = unit_to_uint8(made) / np.float32(255)
        assert np.array_equal(found, expected)
    (tmp_path / "out" / "masks" / "key3_c0_s0_16px.png").unlink()
    assert read_birds(tmp_path / "out").masks == []
    assert read_birds(tmp_path / "out", with_masks=False).masks == []
    Image.new("RGB", (32, 40)).save(tmp_path / "out" / "key4_c0_s0.png")
    with pytest.raises(DataError, match="key4_c0_s0.png: is 32 x 40"):
        read_birds(tmp_path / "out")


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["mask_iou.py", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        run_command(mask_iou_module.main)
    return stopped.value.code


def test_the_script_on_a_checkpoint_and_on_one_without_masks(checkpoint, tmp_path, monkeypatch, capsys):
    segmenter = KnownSegmenter(np.stack([half("left", 32)] * 12), half("left", 32))
    segmenter.recipe = RECIPE
    monkeypatch.setattr(mask_iou_module, "load_segmenter", lambda *_: segmenter)
    out = tmp_path / "out.json"
    assert run(monkeypatch, "--checkpoint", checkpoint, "--num-images", 12, "--json", out) == 0
    written = json.loads(out.read_text())
    assert [stage["size"] for stage in written["masks"]["stages"]] == [4, 8, 16, 32]
    assert written["masks"]["mean_shape_iou"] == 1.0 and written["masks"]["whole_frame_iou"] == 0.5
    assert written["origin"]["checkpoint"] == str(checkpoint) and written["reader"]["kind"] == "outline-segmenter"
    assert "mask of 32 px" in capsys.readouterr().out

    whole = TextToImage.generate
    monkeypatch.setattr(TextToImage, "generate", lambda *a, **k: replace(whole(*a, **k), masks=[]))
    assert run(monkeypatch, "--checkpoint", checkpoint, "--num-images", 12) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {checkpoint}: there are no masks; SSA-GAN predicts them")


def test_a_generator_of_other_data_is_warned_of(tmp_path):
    path = write_checkpoint(tmp_path / "last.pth", dataset="birds")
    drawn = generate_birds(TextToImage.load(path, "cpu"), 3)
    assert drawn.warnings == (
        "this generator was trained on birds, not on toybirds; what is read off its images means little",
    )
    requests = caption_requests(["a bird with a red crown", "a bird with a blue crown"])
    for data_set, number in (("birds", 1), ("toybirds", 0), (None, 0)):
        folder = tmp_path / f"of-{data_set}"
        sample(TextToImage.load(path, "cpu"), requests, folder, about={"dataset": data_set})
        assert len(read_birds(folder).warnings) == number
    with pytest.raises(DataError, match="0 images"):
        generate_birds(TextToImage.load(path, "cpu"), 0)
