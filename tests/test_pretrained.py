"""The model and the encoders that ship with the repository: they load as they lie there, are small, and do their work."""

import json
from pathlib import Path

import numpy as np
import torch

from datasets.toybirds.dataset import ToyBirds
from miscc.checkpoint import load_checkpoint
from miscc.vocabulary import encode_rows
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from training.retrieval import retrieval_at

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


def test_the_encoders_that_ship_find_the_captions_of_held_out_drawings():
    path = MODEL.parent / "toybirds-encoders" / "best.pth"
    checkpoint = load_checkpoint(path)
    assert "optimizers" not in checkpoint and path.stat().st_size < 6_000_000
    assert not any(text in repr(checkpoint["config"]) for text in ("/tmp", "/home", "/root", "/work"))

    # 100 test drawings, whose combinations of colours were never trained.
    encoders, birds = load_encoders(path), ToyBirds("test", 100, 32)
    images = torch.from_numpy(np.stack([birds[n].image for n in range(100)])).permute(0, 3, 1, 2) / 127.5 - 1
    tokens, lengths, _ = encode_rows(
        [birds.captions(n)[0] for n in range(100)], encoders.vocabulary, encoders.max_words
    )
    with torch.no_grad():
        codes = encoders.image_encoder(images)[1]
        sentences = encoders.text_encoder(torch.from_numpy(tokens), torch.from_numpy(lengths)).sentence
    assert retrieval_at(codes, sentences)["text_to_image_r5"] > 0.5
