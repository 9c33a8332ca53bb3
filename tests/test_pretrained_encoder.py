"""The image encoder on frozen features: shapes, what trains and what is stored, pretraining with it, a GAN beside it."""

import pytest
import torch
from conftest import DAMSM_YAML, GAN_YAML, settings
from test_trainer import assert_same_state

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError
from models import networks_of
from models.backbones import efficientnet_lite_file
from models.clip_features import untrained_clip
from models.damsm import SmallImageEncoder
from models.pretrained_encoder import PretrainedImageEncoder, to_grid
from models.registry import from_state, to_state
from sampling.encoders import load_encoders
from sampling.trained_with import networks_in_training
from training.damsm import pretrain
from training.evaluation import Evaluation
from training.settings import EvaluationSettings
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))


def test_to_the_grid_by_hand():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert to_grid(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5], "means of 2×2"
    corner = torch.zeros(1, 1, 6, 6)
    corner[..., 0, 0] = 9.0
    assert to_grid(corner, 2).flatten().tolist() == [1.0, 0.0, 0.0, 0.0], (
        "a mean of all nine, not the one in the middle"
    )
    coarse = torch.tensor([[0.0, 4.0]]).expand(1, 1, 2, 2)
    assert to_grid(coarse, 4)[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert torch.equal(to_grid(x, 4), x)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_regions_are_the_grid_of_the_small_encoder(size):
    encoder = PretrainedImageEncoder(image_size=size, nf=2).eval()
    for actual in (size, 2 * size):  # other images are resized
        regions, code = encoder(torch.rand(2, 3, actual, actual))
        assert regions.shape == (2, 256, 8, 8) and code.shape == (2, 256)


def test_it_starts_as_the_small_encoder_that_it_is_given():
    small = SmallImageEncoder(image_size=32, nf=2).eval()
    encoder = PretrainedImageEncoder.from_small(small, "efficientnet-lite0", "").eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(encoder(images), small(images), strict=True))


def test_training_makes_it_use_the_frozen_features():
    encoder = PretrainedImageEncoder.from_small(SmallImageEncoder(image_size=32, nf=2), "efficientnet-lite0", "")
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    encoder(images)[0].square().sum().backward()
    scale = encoder.added[1].weight
    assert scale.grad.abs().min() > 0, "from zero on, it is trained"

    with torch.no_grad():
        scale.fill_(1.0)
    images.grad = None
    both = encoder(images)[0]
    both.square().sum().backward()
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        encoder.added[0].weight[:, 16:] = 0  # without the frozen features
    assert not torch.equal(encoder(images)[0], both)


def test_nothing_of_the_backbone_trains_or_is_stored_but_its_hash():
    encoder = PretrainedImageEncoder(image_size=32, nf=2)
    encoder.train().requires_grad_(True)
    assert not [name for name, _ in encoder.named_parameters() if name.startswith("backbone")]
    assert {id(p) for p in encoder.head_parameters()} == {id(p) for p in encoder.parameters()}
    entry = to_state("pretrained", encoder.eval())
    assert not [name for name in entry["state"] if name.startswith("backbone")]

    again, images = from_state(entry, networks_of("image_encoder")).eval(), torch.rand(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(again(images), encoder(images), strict=True))
    other = entry | {"arguments": entry["arguments"] | {"weights_hash": "0123"}}
    with pytest.raises(CheckpointError, match="DAMSM.BACKBONE_WEIGHTS: the encoder was trained on .* hash 0123"):
        from_state(other, networks_of("image_encoder"))


def test_weights_of_another_structure_are_refused():
    entry = to_state("pretrained", PretrainedImageEncoder(image_size=32, nf=2))
    entry["state"] = {name.replace("added.", "join."): value for name, value in entry["state"].items()}
    with pytest.raises(CheckpointError, match=r"added\."):
        from_state(entry, networks_of("image_encoder"))


@pytest.fixture
def damsm(drawn_folder, tmp_path):
    def load(*overrides):
        text = DAMSM_YAML.format(data=drawn_folder, epochs=2)
        return settings(tmp_path / "damsm.yml", text, "damsm", (("DAMSM.IMAGE_ENCODER", "pretrained"), *overrides))

    return load


def content_of(folder):
    return {key: value for key, value in load_checkpoint(folder / "last.pth").items() if key != "config"}


def test_pretraining_resumes_and_a_gan_trains_beside_it(damsm, drawn_folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(damsm(), torch.device("cpu"), whole)
    pretrain(damsm(("TRAIN.MAX_EPOCH", "1")), torch.device("cpu"), parts)
    pretrain(damsm(), torch.device("cpu"), parts, resume=True)
    assert_same_state(content_of(whole), content_of(parts))
    with pytest.raises(ConfigError, match="DAMSM.BACKBONE: the run was started with efficientnet-lite0"):
        pretrain(damsm(("DAMSM.BACKBONE", "efficientnet-lite2")), torch.device("cpu"), parts, resume=True)

    # A GAN whose images it matches to captions knows which network took part.
    assert load_encoders(whole / "best.pth").image_size == 16
    text = GAN_YAML.format(data=drawn_folder, output=tmp_path / "output", encoders=whole / "best.pth")
    train(settings(tmp_path / "gan.yml", text, overrides=(("TRAIN.MAX_STEPS", "5"),)), CPU)
    checkpoint = load_checkpoint(tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth")
    (entry,) = [one for one in networks_in_training(checkpoint) if one["network"] == "efficientnet-lite0"]
    assert entry["role"] == "image encoder" and len(entry["weights_hash"]) >= 8

    # So does its checkpoint for drawing, which holds no image encoder.
    numbered = load_checkpoint(tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "epoch_0001.pth")
    assert "image_encoder" not in numbered["networks"] and entry in networks_in_training(numbered)


def test_pretraining_goes_on_from_small_encoders(damsm, encoders, tmp_path):
    pretrain(damsm(("TRAIN.NET_E", str(encoders)), ("TRAIN.MAX_EPOCH", "1")), torch.device("cpu"), tmp_path / "wider")
    before, after = load_encoders(encoders), load_encoders(tmp_path / "wider" / "best.pth")
    assert type(before.image_encoder) is SmallImageEncoder and type(after.image_encoder) is PretrainedImageEncoder
    assert after.vocabulary.words == before.vocabulary.words and after.image_encoder.added[1].weight.abs().sum() > 0
    moved = (after.text_encoder.embedding.weight - before.text_encoder.embedding.weight).abs().max()
    assert 0 < moved < 0.1, "an epoch away from where they were, not anew"


def test_encoders_of_another_kind_than_the_settings_are_refused(damsm, encoders, tmp_path):
    def start(*overrides):
        pretrain(damsm(*overrides, ("TRAIN.MAX_EPOCH", "1")), torch.device("cpu"), tmp_path / "out", overwrite=True)

    with pytest.raises(
        ConfigError, match="TRAIN.NET_E: .* is small, .* say inception; --set DAMSM.IMAGE_ENCODER small"
    ):
        start(("TRAIN.NET_E", str(encoders)), ("DAMSM.IMAGE_ENCODER", "inception"))
    with pytest.raises(CheckpointError, match="^TRAIN.NET_E: .*missing.pth: no such encoders; give the best.pth"):
        start(("TRAIN.NET_E", str(tmp_path / "missing.pth")))
    assert not (tmp_path / "out" / "best.pth").exists()

    start()
    stored = ("TRAIN.NET_E", str(tmp_path / "out" / "best.pth"))
    with pytest.raises(ConfigError, match="stands on efficientnet-lite0, .* --set DAMSM.BACKBONE efficientnet-lite0"):
        start(stored, ("DAMSM.BACKBONE", "efficientnet-lite2"))
    with pytest.raises(ConfigError, match="is pretrained, the settings say small"):
        start(stored, ("DAMSM.IMAGE_ENCODER", "small"))


def test_encoders_that_do_not_fit_the_settings_or_their_words_are_refused(damsm, encoders, tmp_path):
    stored = load_checkpoint(encoders)

    def refused(match, *overrides, file=encoders):
        cfg = damsm(("TRAIN.NET_E", str(file)), ("DAMSM.IMAGE_ENCODER", "small"), *overrides)
        with pytest.raises((ConfigError, CheckpointError), match=f"^TRAIN.NET_E: {match}"):
            pretrain(cfg, CPU.device, tmp_path / "out")

    refused(".* is for 16 px, TREE.BASE_SIZE says 32; --set TREE.BASE_SIZE 16", ("TREE.BASE_SIZE", "32"))
    refused("the text_dim of .* is 256, TEXT.EMBEDDING_DIM says 128; set it to 256", ("TEXT.EMBEDDING_DIM", "128"))
    refused("the rnn_type of .* is LSTM, RNN_TYPE says GRU; set it to LSTM", ("RNN_TYPE", "GRU"))

    # A vocabulary with a word more: every index after it would mean another word.
    torch.save(stored | {"vocabulary": [*stored["vocabulary"], "zyzzyva"]}, tmp_path / "words.pth")
    refused(".*words.pth knows .* words, its vocabulary .* take the one", file=tmp_path / "words.pth")

    # No image encoder.
    networks = {"text_encoder": stored["networks"]["text_encoder"]}
    torch.save(stored | {"networks": networks}, tmp_path / "text.pth")
    refused(".*text.pth comes without an image encoder; give encoders of pretrain_DAMSM", file=tmp_path / "text.pth")


def test_a_text_encoder_goes_on_beside_a_fresh_image_encoder(damsm, encoders, tmp_path):
    changes = (("TRAIN.NET_E", str(encoders)), ("DAMSM.KEEP_IMAGE_ENCODER", "False"), ("TRAIN.MAX_EPOCH", "1"))
    pretrain(damsm(*changes), CPU.device, tmp_path / "out")
    before, after = load_encoders(encoders), load_encoders(tmp_path / "out" / "best.pth")
    moved = (after.text_encoder.embedding.weight - before.text_encoder.embedding.weight).abs().max()
    assert 0 < moved < 0.1, "the text encoder went on from where it was"
    shared = before.image_encoder.state_dict()["trunk.0.weight"]
    assert (after.image_encoder.state_dict()["trunk.0.weight"] - shared).abs().mean() > 0.01, "the other did not"
    with pytest.raises(ConfigError, match="DAMSM.KEEP_IMAGE_ENCODER: False is for encoders that go on; name them in"):
        pretrain(damsm(changes[1]), CPU.device, tmp_path / "none")


def test_an_image_encoder_that_does_not_go_on_is_not_read(damsm, tmp_path):
    """Its frozen network's file may be gone, and the settings may name another network's."""
    first = tmp_path / "first.pth"
    first.write_bytes(efficientnet_lite_file("efficientnet-lite0").read_bytes())
    pretrain(damsm(("DAMSM.BACKBONE_WEIGHTS", str(first)), ("TRAIN.MAX_EPOCH", "1")), CPU.device, tmp_path / "out")
    first.unlink()
    start = (("TRAIN.NET_E", str(tmp_path / "out" / "best.pth")), ("DAMSM.KEEP_IMAGE_ENCODER", "False"))
    one = ("TRAIN.MAX_EPOCH", "1")
    pretrain(damsm(*start, one, ("DAMSM.IMAGE_ENCODER", "small")), CPU.device, tmp_path / "small")
    pretrain(damsm(*start, one, ("DAMSM.BACKBONE", "efficientnet-lite2")), CPU.device, tmp_path / "other")

    # One that goes on and stands on another network than the settings say: the answer names the key, not the file.
    file = str(efficientnet_lite_file("efficientnet-lite2"))
    kept = damsm(("TRAIN.NET_E", str(tmp_path / "other" / "best.pth")), ("DAMSM.BACKBONE_WEIGHTS", file))
    with pytest.raises(ConfigError, match="stands on efficientnet-lite2, .*; --set DAMSM.BACKBONE efficientnet-lite2"):
        pretrain(kept, CPU.device, tmp_path / "none")


def test_a_text_encoder_that_is_not_trained_here_is_refused(damsm, encoders, tmp_path):
    stored = load_checkpoint(encoders)
    clip = untrained_clip(14, 2, 32, 2, 256, len(stored["vocabulary"]))
    entry = to_state("clip", clip.text_encoder)
    torch.save(stored | {"networks": stored["networks"] | {"text_encoder": entry}}, tmp_path / "clip.pth")
    for keep in ("True", "False"):
        cfg = damsm(("TRAIN.NET_E", str(tmp_path / "clip.pth")), ("DAMSM.KEEP_IMAGE_ENCODER", keep))
        with pytest.raises(CheckpointError, match="the text encoder of .* is clip, which is not trained here"):
            pretrain(cfg, CPU.device, tmp_path / "out")


def test_the_words_of_a_caption_are_those_of_the_settings(damsm, encoders, tmp_path):
    cfg = damsm(("TRAIN.NET_E", str(encoders)), ("TEXT.WORDS_NUM", "25"), ("TRAIN.MAX_EPOCH", "1"))
    pretrain(cfg, CPU.device, tmp_path / "out")
    assert load_encoders(encoders).max_words == 18 and load_encoders(tmp_path / "out" / "best.pth").max_words == 25


def test_a_frozen_network_without_a_use_is_refused(damsm, encoders, tmp_path):
    for key, value in (("DAMSM.BACKBONE", "efficientnet-lite2"), ("DAMSM.BACKBONE_WEIGHTS", "a.pth")):
        for start in ("", str(encoders)):
            cfg = damsm(("TRAIN.NET_E", start), ("DAMSM.IMAGE_ENCODER", "small"), (key, value))
            with pytest.raises(ConfigError, match=f"^{key}: has no meaning for the image encoder small"):
                pretrain(cfg, CPU.device, tmp_path / "out")


def test_a_score_during_training_is_by_another_network(monkeypatch):
    """The measure's first network is the encoder's backbone: the second is loaded."""
    loaded = []

    def load(name, **_):
        loaded.append(name)
        raise ImportError("that is all this test wants to know")

    monkeypatch.setattr("eval.features.networks.load_network", load)
    encoder, other = (PretrainedImageEncoder(image_size=16, nf=2, backbone=f"efficientnet-lite{n}") for n in (0, 2))
    for networks in ((), (encoder,)):
        with pytest.raises(ConfigError, match="TRAIN.EVAL_MEASURE: .* cannot be computed here"):
            Evaluation(None, 16, CPU.device, EvaluationSettings(), networks=networks)
    assert loaded == ["efficientnet-lite0", "efficientnet-lite2"]
    with pytest.raises(ConfigError, match="TRAIN.EVAL_MEASURE: all networks of .* train here .* DAMSM.BACKBONE"):
        Evaluation(None, 16, CPU.device, EvaluationSettings(), networks=(encoder, other))


def test_a_weight_file_may_move(damsm, drawn_folder, tmp_path):
    """Between pretraining, its resume, a GAN's training and that one's resume."""
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    first.write_bytes(efficientnet_lite_file("efficientnet-lite0").read_bytes())
    pretrain(damsm(("DAMSM.BACKBONE_WEIGHTS", str(first)), ("TRAIN.MAX_EPOCH", "1")), CPU.device, tmp_path / "out")
    assert load_encoders(tmp_path / "out" / "best.pth").image_encoder.settings.weights == str(first)
    first.rename(second)
    with pytest.raises(CheckpointError, match="first.pth"):
        load_encoders(tmp_path / "out" / "best.pth")
    pretrain(damsm(("DAMSM.BACKBONE_WEIGHTS", str(second))), CPU.device, tmp_path / "out", resume=True)
    assert load_checkpoint(tmp_path / "out" / "last.pth")["networks"]["image_encoder"]["arguments"]["weights"] == str(
        second
    )

    # A GAN beside these encoders, with a projected D on the same file; then both go on from the first place.
    text = GAN_YAML.format(data=drawn_folder, output=tmp_path / "output", encoders=tmp_path / "out" / "best.pth")
    small = (("GAN.PROJECTED.INPUT", "32"), ("GAN.PROJECTED.WIDTH", "4"), ("GAN.DISCRIMINATOR", "projected"))

    def cfg(steps, file):
        files = (("DAMSM.BACKBONE_WEIGHTS", str(file)), ("GAN.PROJECTED.WEIGHTS", str(file)))
        return settings(tmp_path / "gan.yml", text, overrides=(*small, *files, ("TRAIN.MAX_STEPS", str(steps))))

    train(cfg(1, second), CPU)
    second.rename(first)
    with pytest.raises(CheckpointError, match="second.pth"):
        train(cfg(2, second), CPU, resume=True)
    train(cfg(2, first), CPU, resume=True)

    # Another file in its place is not taken.
    torch.save({"a": torch.zeros(1)}, second)
    with pytest.raises(CheckpointError, match="second.pth: are not the weights"):
        train(cfg(3, second), CPU, resume=True)


def test_a_backbone_beside_another_encoder_is_named(damsm, tmp_path):
    changes = (("DAMSM.IMAGE_ENCODER", "small"), ("DAMSM.BACKBONE", "efficientnet-lite2"))
    with pytest.raises(ConfigError, match="DAMSM.BACKBONE: has no meaning for the image encoder small; set"):
        pretrain(damsm(*changes), CPU.device, tmp_path / "out")


def test_missing_weights_are_asked_for(damsm, tmp_path):
    with pytest.raises(CheckpointError, match="DAMSM.BACKBONE_WEIGHTS: is empty, .* torchvision's resnet18"):
        pretrain(damsm(("DAMSM.BACKBONE", "resnet18")), torch.device("cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
