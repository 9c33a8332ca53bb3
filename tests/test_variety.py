"""Variety of images of one caption: pairs, distances of outlines and the drawings that they are compared with."""

import numpy as np
import pytest

from datasets.toybirds.dataset import named_attributes
from eval.variety import caption_pairs, drawings_of, outline_distances, variety
from miscc.errors import DataError


class RedSegmenter:
    """Takes full red for the bird."""

    def outline(self, images: np.ndarray) -> np.ndarray:
        return images[..., 0] == 255


def image(rows: range, columns: range) -> np.ndarray:
    """A red rectangle in a black image of 32 px."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[rows.start : rows.stop, columns.start : columns.stop, 0] = 255
    return pixels


def test_pairs_are_of_one_caption():
    assert caption_pairs(["a", "b", "a", "a"]).tolist() == [[0, 2], [0, 3], [2, 3]]
    assert caption_pairs(["a", "b"]).shape == (0, 2)


def test_distances_by_hand():
    outlines = np.stack([image(range(8), range(8)), image(range(8), range(4, 12)), image(range(8), range(16, 24))])
    empty = np.zeros((1, 32, 32), dtype=bool)
    outlines = np.concatenate([outlines[..., 0] == 255, empty])

    distances, left_out = outline_distances(outlines, np.array([[0, 0], [0, 1], [0, 2], [0, 3]]))

    # 32 of 96 pixels in common; nothing in common; the last shows no bird.
    assert distances.tolist() == pytest.approx([0, 1 - 32 / 96, 1]) and left_out == 1


def test_images_that_are_alike_have_no_variety(monkeypatch):
    same, other = image(range(8), range(8)), image(range(16, 24), range(8))
    monkeypatch.setattr("eval.variety.drawings_of", lambda captions, size, seed: np.stack([same, other] * 2))
    captions = ["a red bird", "a red bird", "a blue bird", "a blue bird"]

    report = variety(np.stack([same, same, same, other]), captions, RedSegmenter())

    assert (report.generated, report.drawings, report.num_pairs) == (0.5, 1.0, 2)
    with pytest.raises(DataError, match="--per-caption 2"):
        variety(np.stack([same, other]), ["a", "b"], RedSegmenter())


def test_drawings_show_what_the_caption_names_and_vary_in_the_rest():
    captions = ["a small bird with a red crown in front of the sky"] * 6
    assert named_attributes(captions[0])["background"] == "sky"

    drawings = drawings_of(captions, 32)

    assert drawings.shape == (6, 32, 32, 3) and drawings.dtype == np.uint8
    assert np.array_equal(drawings, drawings_of(captions, 32)), "a function of caption, size and seed"
    assert not np.array_equal(drawings, drawings_of(captions, 32, seed=1))
    assert len({drawing.tobytes() for drawing in drawings}) == 6
    tops = drawings[:, 0].mean(axis=(0, 1))
    assert tops[2] > tops[0] + 20, "the sky is blue in all of them"
