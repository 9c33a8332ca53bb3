"""One picture of several models: the right image in the right place, the same noise for all."""

import numpy as np
import pytest
import torch
from PIL import Image

from miscc.checkpoint import save_checkpoint
from miscc.errors import UserError
from miscc.pictures import resize_pixels
from miscc.vocabulary import Vocabulary
from models.damsm import TextEncoder
from models.df_gan import DFGenerator
from models.registry import to_state
from models.ssa_gan import SSAGenerator
from sampling.pipeline import TextToImage
from sampling.side_by_side import main, side_by_side

WORDS = ["<end>", "a", "red", "blue", "bird"]
CAPTIONS = ["a red bird", "a blue bird"]
CELL, GAP, TEXT, TOP = 96, 6, 200, 22  # of miscc.images.caption_grid with headings


@pytest.fixture(scope="module")
def pipelines():
    torch.manual_seed(0)
    text_encoder = TextEncoder(len(WORDS)).eval()
    generators = {"SSA": SSAGenerator(nf=2, image_size=16), "DF": DFGenerator(nf=2, image_size=16)}
    return {name: TextToImage(net.eval(), text_encoder, Vocabulary(WORDS)) for name, net in generators.items()}


def tile(picture, row, position):
    """The tile at this place in the picture."""
    top, left = TOP + row * (CELL + GAP), TEXT + GAP + position * (CELL + GAP)
    return picture[top : top + CELL, left : left + CELL]


def test_rows_are_captions_and_columns_models(pipelines):
    picture = side_by_side(pipelines, CAPTIONS, per_caption=2, seed=4, masks=True)
    expected = {
        name: pipeline.generate([*CAPTIONS[:1] * 2, *CAPTIONS[1:] * 2], seed=4) for name, pipeline in pipelines.items()
    }
    for row in range(2):
        for sample in range(2):
            number = 2 * row + sample
            image = resize_pixels(expected["SSA"].images[number], CELL)
            assert np.array_equal(tile(picture, row, 2 * sample), image)
            mask = tile(picture, row, 2 * sample + 1)
            assert (mask == mask[..., :1]).all()  # grey; DF-GAN has none, and its images follow at once
            assert np.array_equal(tile(picture, row, 4 + sample), resize_pixels(expected["DF"].images[number], CELL))
    assert not np.array_equal(tile(picture, 0, 0), tile(picture, 0, 2))  # other noise for the second sample


def test_the_command(pipelines, tmp_path, monkeypatch, capsys):
    for name, pipeline in pipelines.items():
        networks = {"generator": to_state({"SSA": "ssa_gan", "DF": "df_gan"}[name], pipeline.generator),
                    "text_encoder": to_state("rnn", pipeline.text_encoder)}  # fmt: skip
        save_checkpoint(tmp_path / f"{name}.pth", {"networks": networks, "vocabulary": WORDS})
    models = [f"SSA={tmp_path / 'SSA.pth'}", str(tmp_path / "DF.pth")]
    arguments = [*models, "--caption", CAPTIONS[0], "--out", str(tmp_path / "out.png"), "--gpu", "-1"]
    monkeypatch.setattr("sys.argv", ["side_by_side", *arguments])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    drawn = pipelines["DF"].generate(CAPTIONS[:1], seed=0).images[0]
    assert np.array_equal(tile(picture, 0, 1), resize_pixels(drawn, CELL))


@pytest.mark.parametrize(("words", "message"), [
    ([], "out.png: exists already; give --overwrite or another file"),
    (["--per-caption", "65", "--overwrite"], "--per-caption 65: at most 64 images of a model"),
])  # fmt: skip
def test_no_file_is_replaced_unasked_and_no_picture_is_endless(tmp_path, monkeypatch, words, message):
    (tmp_path / "out.png").write_text("a user's")
    arguments = ["SSA=x", "--caption", "a bird", "--out", str(tmp_path / "out.png"), *words]
    monkeypatch.setattr("sys.argv", ["side_by_side", *arguments])
    with pytest.raises(UserError, match=message):
        main()
    assert (tmp_path / "out.png").read_text() == "a user's"


def test_a_model_without_its_name_gets_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["side_by_side", "A", "--caption", "a bird", "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="A: no such checkpoint; name each model as NAME=CKPT"):
        main()
