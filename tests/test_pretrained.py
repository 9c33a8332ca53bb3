"""The model that ships with the repository: it loads as it lies there, is small, and draws what captions say."""

import json
from pathlib import Path

import numpy as np

from sampling.pipeline import TextToImage

MODEL = Path(__file__).parents[1] / "pretrained" / "toybirds-ssa"


def test_it_is_small_and_tells_of_no_machine():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 15_000_000
    about = json.loads((MODEL / "config.json").read_text())
    assert about["averaged"] and about["image_size"] == 64
    assert not [text for text in ("/tmp", "/home", "/root", "/work") if text in (MODEL / "config.json").read_text()]
    assert "FD[efficientnet-lite2]" in (MODEL / "README.md").read_text()


def test_it_draws_the_colours_that_captions_name():
    model = TextToImage.from_pretrained(MODEL, "cpu")
    captions = [
        f"a bird with {color} wings, a {color} head and a {color} belly in the snow" for color in ("red", "blue")
    ]
    drawn = model.generate([caption for caption in captions for _ in range(4)], seed=1)

    # (8, 64, 64, 3): the birds stand in the middle.
    middle = drawn.images[:, 20:44, 20:44].astype(np.float64).mean(axis=(1, 2))
    redness = middle[:, 0] - middle[:, 2]
    assert redness[:4].min() > 40 and redness[4:].max() < -40
    assert len({image.tobytes() for image in drawn.images}) == 8
