"""Training on from the folder of a published model: G by TRAIN.NET_G, the text encoder by TEXT.DAMSM_NAME or TRAIN.NET_E."""

import json

import pytest
import torch
from conftest import DAMSM_YAML, settings

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from sampling.publish import main as publish_command
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


@pytest.mark.parametrize("half", [False, True])
def test_the_gan_goes_on_with_its_discriminators(tiny, tmp_path, caplog, capsys, half):
    """Both of them, as they were in the checkpoint, or rounded; the folder draws the same without them."""
    systems = (("GAN.DISCRIMINATOR", "both"), ("GAN.PROJECTED.INPUT", "32"), ("GAN.PROJECTED.WIDTH", "4"))
    assert train(tiny(("TRAIN.MAX_STEPS", "2"), ("CONFIG_NAME", "first"), *systems), CPU) == 0
    last, folder = next((tmp_path / "output").glob("*first*")) / "checkpoints" / "last.pth", tmp_path / "model"
    publish_command(
        ["--checkpoint", str(last), "--out", str(folder), "--with-discriminators", *(["--half"] if half else [])]
    )
    assert "for a training that goes on from this folder" in (folder / "README.md").read_text()
    assert "model.safetensors, discriminators.safetensors, config.json" in capsys.readouterr().out

    # A training from it.
    stored = load_checkpoint(last)["networks"]
    cfg = tiny(("TRAIN.NET_G", str(folder)), ("TRAIN.MAX_STEPS", "1"), *systems)
    networks = Trainer(cfg, CPU).networks
    assert "starts anew" not in caplog.text
    for part in ("discriminator", "projected"):
        for name, value in networks[part].state_dict().items():
            expected = stored[part]["state"][name]
            rounded = (
                expected.half().float() if half and expected.dim() > 1 and expected.is_floating_point() else expected
            )
            assert torch.equal(value, rounded), (part, name)
    assert train(cfg, CPU) == 0

    # Without the file they start anew; a damaged one is named; for drawing neither makes a difference.
    weights = folder / "discriminators.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\xff" * 4)
    with pytest.raises(CheckpointError, match="discriminators.safetensors: cannot be read, its checksum differs"):
        Trainer(cfg, CPU)
    weights.unlink()
    Trainer(cfg, CPU)
    assert "the discriminator starts anew" in caplog.text and "the projected discriminator starts anew" in caplog.text
    assert set(load_model(folder)["networks"]) <= {"generator", "generator_ema", "text_encoder"}
    assert TextToImage.from_pretrained(folder, "cpu").generate(["a bird"]).images.shape[0] == 1

    # Published again without them, the folder has none; from such a folder there are none to publish.
    weights.write_bytes(content)
    publish_command(["--checkpoint", str(folder), "--out", str(tmp_path / "both"), "--with-discriminators"])
    publish_command(["--checkpoint", str(last), "--out", str(folder), "--overwrite"])
    assert not weights.exists() and (tmp_path / "both" / weights.name).is_file()
    with pytest.raises(
        CheckpointError, match="holds no discriminator; publish the last.pth of a training, or leave out"
    ):
        publish_command(["--checkpoint", str(folder), "--out", str(tmp_path / "none"), "--with-discriminators"])
    assert not (tmp_path / "none").exists()


def test_a_folder_that_does_not_describe_its_discriminators_is_refused(published, tiny):
    folder, _ = published
    config = json.loads((folder / "config.json").read_text())
    for wrong in ([1], {"discriminator": {"name": 3}}, {"generator": config["generator"]}):
        (folder / "config.json").write_text(json.dumps({**config, "discriminators": wrong}))
        with pytest.raises(CheckpointError, match="config.json: does not describe the discriminator"):
            Trainer(tiny(("TRAIN.NET_G", str(folder))), CPU)


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
