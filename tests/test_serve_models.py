"""Models behind the server's interface: odd settings, names, walks. Needs no package of the server's."""

import numpy as np
import pytest
import torch
from tiny_models import CAPTIONS, tiny_pipeline

from miscc.errors import UserError
from sampling.pipeline import TextToImage
from serve.batcher import Batcher
from serve.drawing import WALK_STEPS, Studio
from serve.models import truncation_of
from serve.onnx_model import OnnxModel
from serve.torch_model import TorchModel, load_torch_model


@pytest.fixture(scope="module")
def model():
    return TorchModel("ssa_gan", tiny_pipeline())


@pytest.fixture
def studio(model):
    made = Studio({"ssa_gan": model}, Batcher())
    yield made
    assert made.batcher.close(20)


# -- settings --------------------------------------------------------------------------------------------------------------


def test_truncation_is_read_from_settings_that_may_be_anything():
    assert truncation_of({"GAN": {"TRUNCATION": 0.8}}) == 0.8 and truncation_of({"GAN": {"TRUNCATION": 2}}) == 2
    for gan in (
        "x",
        None,
        [],
        {},
        {"TRUNCATION": "0.8"},
        {"TRUNCATION": True},
        {"TRUNCATION": 0},
        {"TRUNCATION": None},
    ):
        assert truncation_of({"GAN": gan}) is None
    assert truncation_of({}) is None


@pytest.mark.parametrize("settings", [{"GAN": "x"}, {"GAN": {"TRUNCATION": "x"}}])
def test_models_load_with_odd_settings(settings):
    pipeline = tiny_pipeline()
    pipeline.origin["config"] = settings
    assert TorchModel("x", pipeline).truncation is None

    class Session:
        """Draws black images."""

        def run(self, outputs, inputs):
            return [np.zeros((len(inputs["noise"]), 4, 4, 3), np.uint8) for _ in outputs]

    about = {"system": "x", "image_size": 4, "noise_dim": 2, "max_words": 3}
    for odd in (settings, "x"):
        assert OnnxModel("x", Session(), {**about, "settings": odd}, pipeline.vocabulary, ["stage0"]).truncation is None


# -- names -----------------------------------------------------------------------------------------------------------------


def test_names_of_models_and_which_are_online(tmp_path, monkeypatch, model):
    asked = []
    monkeypatch.setattr(TextToImage, "load", lambda path, device: asked.append("disk") or model.pipeline)
    monkeypatch.setattr(TextToImage, "from_pretrained", lambda path, device: asked.append("online") or model.pipeline)
    run = tmp_path / "00003-bird"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.pth").touch()
    (tmp_path / "birds-1.5").mkdir()
    monkeypatch.chdir(run)
    cpu = torch.device("cpu")
    expected = {
        "checkpoints/last.pth": ("disk", "00003-bird"),
        "./checkpoints/../checkpoints/last.pth": ("disk", "00003-bird"),
        str(run / "checkpoints" / "last.pth"): ("disk", "00003-bird"),
        "../birds-1.5": ("disk", "birds-1.5"),
        "owner/bird-1.5": ("online", "bird-1.5"),
        "owner/bird": ("online", "bird"),
        "folder/missing.pth": ("disk", "missing.pth"),
        "folder/missing.pt": ("disk", "missing.pt"),
    }
    found = {path: (load_torch_model(path, cpu).name, asked[-1])[::-1] for path in expected}
    assert found == expected

    # From inside the folder.
    monkeypatch.chdir(run / "checkpoints")
    assert load_torch_model("last.pth", cpu).name == "00003-bird"


# -- walks and captions ----------------------------------------------------------------------------------------------------


def test_a_walk_names_the_words_that_it_leaves_out_and_keeps_none(model, studio, caplog):
    future, unknown = studio.submit_walk("a small zyzzyva bird", f"{CAPTIONS[1]} qwerty zyzzyva", 3)
    assert unknown == ["zyzzyva", "qwerty"]
    images = future.result(20)
    expected, none = studio.submit_walk("a small bird", CAPTIONS[1], 3)
    assert none == [] and len(images) == WALK_STEPS
    assert all(np.array_equal(one, other) for one, other in zip(images, expected.result(20), strict=True))
    assert not model.pipeline._named and "zyzzyva" not in caplog.text


def test_what_a_walk_cannot_be_is_refused_before_it_is_queued(model, studio, monkeypatch):
    for truncation in (0, -3, 1e30):
        with pytest.raises(UserError, match="truncation: give a number above 0 and up to"):
            studio.submit_walk(*CAPTIONS[:2], truncation=truncation)
    with pytest.raises(UserError, match="seed: give a whole number"):
        studio.submit_walk(*CAPTIONS[:2], seed=-1)
    monkeypatch.setattr(model, "mixes_captions", False)
    with pytest.raises(UserError, match=f"model: {model.name}, an exported one, cannot mix two captions"):
        studio.submit_walk(*CAPTIONS[:2])


def test_a_caption_is_encoded_once_however_many_images_it_gets(model, studio, monkeypatch):
    encoded, plain = [], model.vocabulary.encode
    monkeypatch.setattr(model.vocabulary, "encode", lambda caption: encoded.append(caption) or plain(caption))
    pictures = studio.submit([CAPTIONS[0], f"{CAPTIONS[1]} zyzzyva"], 3, seed=5).pictures()
    assert encoded == [CAPTIONS[0], f"{CAPTIONS[1]} zyzzyva"]
    assert [picture.unknown for picture in pictures] == [[]] * 3 + [["zyzzyva"]] * 3
    assert [picture.words for picture in pictures] == [CAPTIONS[0].split()] * 3 + [CAPTIONS[1].split()] * 3
    drawn = model.pipeline.generate([CAPTIONS[0]] * 3 + [CAPTIONS[1]] * 3, seed=5).images.astype(int)
    assert np.abs(np.stack([picture.image for picture in pictures]) - drawn).max() <= 1
