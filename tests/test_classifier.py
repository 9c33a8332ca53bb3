"""The classifier behind IS[cub]: what it learns, what it is measured on, its file, and the score that it gives."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import inception_v3

from datasets.records import Records
from eval import train_classifier as training
from eval.features.classifier import InceptionClassifier, SmallClassifier, classifier_input, load_classifier
from eval.features.statistics import load_source
from eval.IS import inception_score
from eval.IS import main as is_main
from eval.metric import score_name
from eval.train_classifier import Settings, split_within_classes, train_classifier
from miscc.checkpoint import load_file, save_checkpoint
from miscc.errors import CheckpointError, ConfigError, DataError
from miscc.vocabulary import Vocabulary

QUICK = Settings("small", image_size=16, epochs=12, batch_size=8, learning_rate=0.01, held_out=0.25, seed=3)
COLOURS = ((220, 40, 40), (40, 60, 220), (60, 200, 60))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """36 noisy pictures of three colours, whose class numbers are 5, 9 and 70, and one picture of a class alone."""
    folder = tmp_path_factory.mktemp("coloured")
    random = np.random.default_rng(0)
    keys, class_ids = [], []
    for number in range(37):
        colour = COLOURS[number % 3]
        pixels = (np.array(colour) + random.normal(0, 40, (20, 20, 3))).clip(0, 255).astype(np.uint8)
        keys.append(f"{number:02d}")
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        class_ids.append((5, 9, 70)[number % 3] if number < 36 else 99)
    vocabulary = Vocabulary.build(["a colour"])
    captions = [[np.array([1, 2])] for _ in keys]
    paths = [folder / f"{key}.png" for key in keys]
    return Records("birds", "train", keys, paths, captions, np.array(class_ids), vocabulary)


@pytest.fixture(scope="module")
def trained(coloured, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "birds.pth"
    save_checkpoint(path, train_classifier(coloured, QUICK))
    return path


def test_each_class_keeps_images_to_learn_from_and_to_measure_with(coloured):
    learned, held_out = split_within_classes(coloured, 0.25, seed=3)
    assert not set(learned.keys) & set(held_out.keys) and len(learned) + len(held_out) == 36
    for class_id in (5, 9, 70):
        assert (held_out.class_ids == class_id).sum() == 3 and (learned.class_ids == class_id).sum() == 9
    assert "36" not in learned.keys + held_out.keys  # alone in its class
    assert split_within_classes(coloured, 0.25, seed=3)[1].keys == held_out.keys
    assert split_within_classes(coloured, 0.25, seed=4)[1].keys != held_out.keys
    most = split_within_classes(coloured, 0.99, seed=3)[0]
    assert [(most.class_ids == class_id).sum() for class_id in (5, 9, 70)] == [1, 1, 1]


def test_without_classes_there_is_nothing_to_tell_apart(coloured):
    lonely = coloured.select(range(10))
    lonely.class_ids = np.arange(10)
    with pytest.raises(DataError, match=r"birds: 0 class\(es\) with two images"):
        train_classifier(lonely, QUICK)
    lonely.class_ids = np.zeros(10, dtype=np.int64)
    with pytest.raises(DataError, match=r"1 class\(es\)"):
        train_classifier(lonely, QUICK)


def test_it_learns_what_can_be_seen_and_not_what_cannot(coloured, trained):
    measured = load_file(trained)["measured"]
    assert measured["accuracy"] == 1.0 and measured["num_held_out"] == 9 and measured["num_images"] == 27
    assert measured["chance"] == pytest.approx(1 / 3)
    shuffled = coloured.select(range(36))
    shuffled.class_ids = np.repeat([5, 9, 70], 12)  # each class has every colour alike
    assert train_classifier(shuffled, QUICK)["measured"]["accuracy"] <= 0.67


def test_the_same_seed_gives_the_same_classifier(coloured, trained):
    again = train_classifier(coloured, QUICK)["networks"]["classifier"]["state"]
    assert all(
        torch.equal(tensor, again[name])
        for name, tensor in load_file(trained)["networks"]["classifier"]["state"].items()
    )


def test_the_file_says_whose_it_is(coloured, trained):
    content = load_file(trained)
    assert content["classes"] == [5, 9, 70] and content["dataset"] == "birds"
    assert content["data"] == coloured.fingerprint() and content["settings"]["epochs"] == 12
    assert content["networks"]["classifier"]["name"] == "small"
    assert "100.0 % of 9 held-out images" in content["statement"] and "not StackGAN's" in content["statement"]
    network = load_classifier(trained)
    assert score_name(network) == "IS[cub]" and network.num_classes == 3
    assert network.protocol()["classifier"]["statement"] == content["statement"]


def test_the_score_is_that_of_its_logits(coloured, trained, monkeypatch, capsys, tmp_path):
    folder = coloured.image_paths[0].parent
    command = ["IS.py", str(folder), "--classifier", str(trained), "--splits", "2", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--json", str(tmp_path / "out.json")])
    is_main()
    assert capsys.readouterr().out.startswith("IS[cub] ")
    (score,) = json.loads((tmp_path / "out.json").read_text())["scores"]
    source, _ = load_source(folder)
    images = torch.from_numpy(np.stack([source.read(i) for i in range(len(source))])).permute(0, 3, 1, 2)
    network = SmallClassifier(3, 16)
    network.load_state_dict(load_file(trained)["networks"]["classifier"]["state"])
    with torch.inference_mode():
        logits = network.eval()(classifier_input(images.float() / 127.5 - 1, network))
    assert score["value"] == pytest.approx(inception_score(logits, 2)[0], rel=1e-5)
    assert 2.0 < score["value"] <= 3.0  # three classes, seen clearly, alike in number
    protocol = score["protocol"]
    assert protocol["weights_hash"] == load_classifier(trained).weights_hash and protocol["published_weights"] is False
    assert protocol["classifier"]["accuracy"] == 1.0 and protocol["num_classes"] == 3


def test_a_wrong_file_is_refused(trained, tmp_path, encoders, monkeypatch):
    with pytest.raises(CheckpointError, match="no such weight file"):
        load_classifier(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="holds no classifier, but a checkpoint with text_encoder"):
        load_classifier(encoders)
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="holds no classifier, but another kind of weights; train one with"):
        load_classifier(tmp_path / "plain.pth")
    content = load_file(trained)
    content["networks"]["classifier"]["arguments"]["num_classes"] = 4
    save_checkpoint(tmp_path / "other.pth", content)
    with pytest.raises(CheckpointError, match="does not fit this version.*train it again"):
        load_classifier(tmp_path / "other.pth")
    monkeypatch.setattr("sys.argv", ["IS.py", "images", "--classifier", str(trained), "--resize", "tf1"])
    with pytest.raises(ConfigError, match="leave --network, --weights, --resize out"):
        is_main()


def test_inception_keeps_imagenets_trunk(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="inception_v3_google.*or train a light one from scratch: --network small"
    ):
        training.build(Settings(), 3)
    torch.manual_seed(0)
    whole = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    network, origin = training.build(Settings(), 3, tmp_path / "weights.pth")
    assert "weights.pth" in origin and isinstance(network, InceptionClassifier)
    images = torch.randn(2, 3, 299, 299)
    whole.fc = torch.nn.Identity()
    with torch.inference_mode():
        assert torch.allclose(network.eval().trunk(images), whole(images), rtol=1e-4, atol=1e-5)
        assert network(images).shape == (2, 3)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is not torchvision's inception_v3"):
        training.build(Settings(), 3, tmp_path / "other.pth")


def test_the_command(tmp_path, capsys, drawn_folder):
    (tmp_path / "a.yml").write_text(
        f"DATASET_NAME: folder\nDATA_DIR: {drawn_folder}\nWORKERS: 0\nTREE: {{BASE_SIZE: 16}}\nOUTPUT_DIR: {tmp_path}\n"
    )
    words = ["--cfg", str(tmp_path / "a.yml"), "--network", "small", "--epochs", "1", "--device", "cpu"]
    with pytest.raises(DataError, match="0 class.*--class-column"):  # every drawing is a class of its own
        training.main(words)
    assert not (tmp_path / "classifier-folder.pth").exists()
    (tmp_path / "classifier-folder.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match="is there already; give --overwrite"):
        training.main(words)


def test_the_command_saves_what_is_score_can_load(tmp_path, capsys, coloured, monkeypatch):
    monkeypatch.setattr(training, "load_records", lambda *a: (coloured, coloured.vocabulary))
    (tmp_path / "b.yml").write_text("DATASET_NAME: birds\nWORKERS: 0\nTREE: {BASE_SIZE: 16}\n")
    out = tmp_path / "c.pth"
    words = ["--cfg", str(tmp_path / "b.yml"), "--network", "small", "--epochs", "1", "--device", "cpu"]
    training.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "of 3 training classes of birds" in printed and f"--classifier {out}" in printed
    assert load_classifier(out).num_classes == 3
