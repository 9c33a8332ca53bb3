"""Training on from the folder of a published model: G by TRAIN.NET_G, the text encoder by TEXT.DAMSM_NAME or TRAIN.NET_E."""

import pytest
import torch
from conftest import DAMSM_YAML, settings

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from sampling.published import load_model
from training.damsm import pretrain
from training.dry_run import describe
from training.trainer import Trainer, train

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(params=["generator_ema", "generator"])
def published(request, tiny, tmp_path):
    """A published model of two steps, and the network in its checkpoint that it is: the average, or G itself."""
    decay = ("TRAIN.EMA_DECAY", "0.5" if request.param == "generator_ema" else "0")
    assert train(tiny(("TRAIN.MAX_STEPS", "2"), ("CONFIG_NAME", "first"), decay), CPU) == 0
    last = next((tmp_path / "output").glob("*first*")) / "checkpoints" / "last.pth"
    folder = TextToImage.load(last, device="cpu").save_pretrained(tmp_path / "model")
    return folder, load_checkpoint(last)["networks"][request.param]["state"]


def assert_equal(network, state):
    own = network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items()) and len(own) == len(state)


def test_the_gan_starts_from_its_generator(published, tiny, caplog):
    folder, state = published
    cfg = tiny(("TRAIN.NET_G", str(folder)), ("TRAIN.MAX_STEPS", "1"))
    trainer = Trainer(cfg, CPU)
    assert_equal(trainer.networks["generator"], state)
    assert "the discriminator starts anew" in caplog.text
    assert train(cfg, CPU) == 0
    assert "not there yet" not in describe(cfg)


def test_its_text_encoder_serves_a_gan_without_damsm(published, tiny):
    folder, _ = published
    start = (("TRAIN.NET_G", str(folder)), ("TEXT.DAMSM_NAME", str(folder)))
    trainer = Trainer(tiny(*start, ("TRAIN.DAMSM_WEIGHT", "0")), CPU)
    assert_equal(trainer.networks["text_encoder"], load_model(folder)["networks"]["text_encoder"]["state"])
    with pytest.raises(CheckpointError, match="^TEXT.DAMSM_NAME: .* beside .*model; train one .*KEEP_IMAGE"):
        Trainer(tiny(*start), CPU)


def test_encoders_go_on_from_its_text_encoder(published, drawn_folder, tmp_path):
    folder, _ = published

    def pretraining(*overrides):
        text = DAMSM_YAML.format(data=drawn_folder, epochs=1)
        return settings(tmp_path / "damsm.yml", text, "damsm", (("TRAIN.NET_E", str(folder)), *overrides))

    with pytest.raises(
        CheckpointError, match="model comes without an image encoder; .* DAMSM.KEEP_IMAGE_ENCODER False"
    ):
        pretrain(pretraining(), CPU.device, tmp_path / "out")
    assert pretrain(pretraining(("DAMSM.KEEP_IMAGE_ENCODER", "False")), CPU.device, tmp_path / "out") == 0
    before, after = load_encoders(folder), load_encoders(tmp_path / "out" / "best.pth")
    moved = (after.text_encoder.embedding.weight - before.text_encoder.embedding.weight).abs().max()
    assert before.image_encoder is None and after.image_encoder is not None
    assert 0 < moved < 0.1, "an epoch away from where it was, not anew"


def test_a_damaged_one_is_named(published, tiny):
    folder, _ = published
    cfg = tiny(("TRAIN.NET_G", str(folder)))
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.write(b"\xff" * 8)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read, its checksum differs"):
        Trainer(cfg, CPU)
