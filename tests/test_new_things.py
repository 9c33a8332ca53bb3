"""Where a new thing goes (CONTRIBUTING.md): each row of its table by a dummy in as many lines as promised.

Here: data set, experiment, loss, and all together from training to a score. Elsewhere: system and loss weight
(test_systems.py), metric (test_metric_registry.py), network of a projected discriminator (test_projected.py).
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from dataset_samples import write_image
from test_systems import DummyGAN

import datasets
import eval
import main
import models
from datasets import load_records
from datasets.layout import Entry
from datasets.prepare import main as prepare
from eval import evaluate
from eval.metric import Metric, Score
from eval.protocol.protocols import PROTOCOLS, Protocol
from models.ssa_gan import SSAGAN
from sampling.publish import read_evaluations


def stats_of(output):
    (path,) = output.glob("*/stats.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path, **values):
    """The settings file with some values changed, in a new file beside it: what a new experiment is."""
    content = yaml.safe_load(path.read_text())
    for key, value in values.items():
        *groups, name = key.split("__")
        target = content
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    new = path.with_name("new.yml")
    new.write_text(yaml.safe_dump(content))
    return new


def build_squares(root, options):
    """Eight training and two test images, each with a caption of its own."""
    entries = []
    for index in range(10):
        write_image(root / f"{index}.png", 40, 40, seed=index)
        entries.append(Entry(f"square{index}", f"{index}.png", [f"a red bird with number {index}"], class_id=index))
    return {"train": entries[:8], "test": entries[8:]}


@pytest.fixture
def squares(monkeypatch):
    """One file with `build` and `locate`, one line in DATASETS."""
    source = SimpleNamespace(build=build_squares, locate=lambda root, keys: ([root / f"{k}.png" for k in keys], None))
    monkeypatch.setitem(datasets.DATASETS, "squares", source)


def test_a_data_set_is_named_by_help_prepared_and_loaded(squares, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare(["--help"])
    assert "squares" in capsys.readouterr().out
    prepare(["squares", "--root", str(tmp_path)])
    assert "squares: 10 images" in capsys.readouterr().out
    records, vocabulary = load_records("squares", tmp_path, "train")
    assert (len(records), records.keys[3], records.text(3, 0)) == (8, "square3", "a red bird with number 3")
    assert "number" in vocabulary


def test_a_data_set_is_trained_on_by_its_name(squares, tiny_yaml, tmp_path):
    prepare(["squares", "--root", str(tmp_path / "squares")])
    new = change(tiny_yaml, DATASET_NAME="squares", DATA_DIR=str(tmp_path / "squares"), TRAIN__MAX_STEPS=2)
    assert main.main(["--cfg", str(new), "--gpu", "-1"]) == 0
    assert [row["step"] for row in stats_of(tmp_path / "output")] == [1, 2]


def test_an_experiment_is_one_file(tiny_yaml, tmp_path):
    new = change(tiny_yaml, CONFIG_NAME="mine", TRAIN__MAX_STEPS=2, TRAIN__GENERATOR_LR=0.003)
    assert main.main(["--cfg", str(new), "--gpu", "-1"]) == 0
    (run,) = (tmp_path / "output").iterdir()
    assert "-mine-" in run.name and len(stats_of(tmp_path / "output")) == 2
    (saved,) = run.glob("*.yml")
    assert yaml.safe_load(saved.read_text())["TRAIN"]["GENERATOR_LR"] == 0.003


def smoothness_loss(image):
    """Mean squared difference of neighbours: a new loss is a function, tensors in, a scalar out."""
    return (image[..., 1:] - image[..., :-1]).square().mean()


class SmoothSSAGAN(SSAGAN):
    def updates(self, batch, noise):
        for update in super().updates(batch, noise):
            if update.optimizer == "generator":
                kernel = self.networks["generator"].to_rgb[2].weight
                update = update._replace(losses={**update.losses, "smoothness": smoothness_loss(kernel)})
            yield update


def test_a_loss_is_minimised_and_logged_where_a_system_yields_it(monkeypatch, tiny_yaml, tmp_path):
    monkeypatch.setitem(models.SYSTEMS, "ssa_gan", SmoothSSAGAN)
    new = change(tiny_yaml, TRAIN__MAX_STEPS=4, TRAIN__GENERATOR_LR=0.01)
    assert main.main(["--cfg", str(new), "--gpu", "-1"]) == 0
    values = [row["loss/smoothness"] for row in stats_of(tmp_path / "output")]
    assert len(values) == 4 and values[-1] != values[0] and all(value > 0 for value in values)


class Redness(Metric):
    """The mean of the red channel, 0 to 255."""

    accumulated = ("means",)

    def __init__(self):
        self.means = []

    def update(self, batch):
        self.means += [float(image[..., 0].mean()) for image in batch.images]

    def compute(self):
        return [Score("redness", float(np.mean(self.means)), {"num_images": len(self.means)})]


def test_new_things_go_together_from_training_to_a_score(squares, monkeypatch, tiny_yaml, tmp_path, capsys):
    monkeypatch.setitem(models.SYSTEMS, "dummy", DummyGAN)
    monkeypatch.setitem(eval.METRICS, "redness", (f"{__name__}:Redness", "how red the images are"))
    monkeypatch.setitem(PROTOCOLS, "red", Protocol("red", "for tests", num_images=3, metrics=("redness",)))

    # A new settings file: the new system on the new data set.
    prepare(["squares", "--root", str(tmp_path / "squares")])
    values = {"DATASET_NAME": "squares", "DATA_DIR": str(tmp_path / "squares"), "CONFIG_NAME": "mine"}
    new = change(tiny_yaml, **values, GAN__NAME="dummy", GAN__Z_DIM=4, TRAIN__DAMSM_WEIGHT=0, TRAIN__MAX_STEPS=2)
    assert main.main(["--cfg", str(new), "--gpu", "-1"]) == 0

    # Scored by the new metric.
    (checkpoint,) = (tmp_path / "output").glob("*-mine-dummy/checkpoints/last.pth")
    evaluate.main(["--checkpoint", str(checkpoint), "--protocol", "red", "--device", "cpu", "--no-cache"])
    (record,) = read_evaluations(checkpoint.with_name("evaluation.json"))
    (score,) = record["scores"]
    assert score["name"] == "redness" and 0 < score["value"] < 255 and record["num_images"] == 3
    assert record["real"]["data_set"] == "squares" and "3 generated images" in capsys.readouterr().out
