"""Small real data for the tests: a drawn folder data set, prepared as a user would, and encoders for it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from datasets.toybirds.dataset import ToyBirds
from training.settings import load_config

# The networks are tiny, and threads of several processes at once would only get in each other's way.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--write-pins", action="store_true", help="write tests/fixtures/pinned_steps.json anew")


def draw_folder(root: Path) -> Path:
    """Make and prepare a `folder` data set: 40 training and 12 test drawings of 40 px with three captions each."""
    from PIL import Image

    # The drawings.
    (root / "images").mkdir(parents=True)
    lines = {}
    for split, number in (("train", 40), ("test", 12)):
        names = []
        for index in range(number):
            bird = ToyBirds(split, size=number, image_size=40)[index]
            name = f"{split}{index:03d}.png"
            Image.fromarray(bird.image).save(root / "images" / name)
            lines[name] = bird.captions[:3]
            names.append(name)
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")

    # Their captions, and what a user's `prepare` makes of both.
    rows = [json.dumps({"image": name, "caption": caption}) for name, captions in lines.items() for caption in captions]
    (root / "captions.jsonl").write_text("\n".join(rows) + "\n")
    from datasets.prepare import main as prepare

    prepare(["folder", "--root", str(root)])
    return root


@pytest.fixture(scope="session")
def drawn_folder(tmp_path_factory):
    """That data set, once for all tests."""
    return draw_folder(tmp_path_factory.mktemp("drawn"))


def settings(path, text, command="gan", overrides=()):
    """Settings from YAML text, written where a user would have them."""
    path.write_text(text)
    return load_config(path, overrides, command=command)


DAMSM_YAML = """
DATASET_NAME: folder
DATA_DIR: {data}
WORKERS: 0
TREE: {{BASE_SIZE: 16}}
TRAIN: {{BATCH_SIZE: 8, MAX_EPOCH: {epochs}, PATIENCE: 0, HELD_OUT: 0.2, SNAPSHOT_INTERVAL: 0}}
TEXT: {{CAPTIONS_PER_IMAGE: 3}}
DAMSM: {{IMAGE_ENCODER: small}}
"""

GAN_YAML = """
CONFIG_NAME: tiny
DATASET_NAME: folder
DATA_DIR: {data}
OUTPUT_DIR: {output}
WORKERS: 0
TREE: {{BASE_SIZE: 16}}
TRAIN:
    NF: 1
    BATCH_SIZE: 8
    MAX_EPOCH: 2
    SAMPLE_EVERY: 0
    SAVE_EVERY: 1
    LOG_EVERY: 1
    GSAVE_INTERVAL: 1
TEXT: {{CAPTIONS_PER_IMAGE: 3, DAMSM_NAME: {encoders}}}
"""


@pytest.fixture(scope="session")
def encoders(drawn_folder, tmp_path_factory):
    """best.pth of a short pretraining on `drawn_folder`."""
    from training.damsm import pretrain

    folder = tmp_path_factory.mktemp("encoders")
    cfg = settings(folder / "damsm.yml", DAMSM_YAML.format(data=drawn_folder, epochs=1), "damsm")
    assert pretrain(cfg, torch.device("cpu"), folder / "out") == 0
    return folder / "out" / "best.pth"


@pytest.fixture
def tiny_yaml(drawn_folder, encoders, tmp_path) -> Path:
    """The settings file of a training that takes a second: 16 px, 5 steps an epoch, 2 epochs."""
    path = tmp_path / "tiny.yml"
    path.write_text(GAN_YAML.format(data=drawn_folder, output=tmp_path / "output", encoders=encoders))
    return path


@pytest.fixture
def tiny(tiny_yaml):
    """Those settings, loaded; further pairs change them: tiny(("TRAIN.NF", "2"))."""

    def load(*overrides):
        return load_config(tiny_yaml, overrides)

    return load


@pytest.fixture(scope="session")
def trained(drawn_folder, encoders, tmp_path_factory) -> Path:
    """The output folder of a run of three steps, with last.pth and previous.pth; tests get a copy of it, see `run`."""
    from miscc.distributed import World
    from training.trainer import train

    folder = tmp_path_factory.mktemp("trained")
    yaml = folder / "tiny.yml"
    yaml.write_text(GAN_YAML.format(data=drawn_folder, output=folder / "output", encoders=encoders))
    changes = [("TRAIN.MAX_STEPS", "3"), ("TRAIN.LOG_EVERY", "1")]
    train(load_config(yaml, changes), World(0, 1, torch.device("cpu")))
    return folder / "output"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, where `tiny` looks for it."""
    from training.run_dir import RunDir

    shutil.copytree(trained, tmp_path / "output")
    return RunDir(tmp_path / "output" / "00000-tiny-ssa_gan")
