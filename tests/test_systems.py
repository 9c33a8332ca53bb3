"""A new system is one file and its registry lines: a dummy of ten lines trains, resumes and draws like the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from models.types import Discriminator, Generator, GeneratorOutput, OptimizerSpec, System, Update
from sampling.pipeline import TextToImage
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))


class Dot(Generator):
    """One learned colour a noise dimension: the least that a generator can be."""

    def __init__(self, image_size, z_dim):
        super().__init__()
        self.arguments = {"image_size": image_size, "z_dim": z_dim}
        self.image_size, self.z_dim, self.noise_dim = image_size, z_dim, z_dim
        self.colour = nn.Linear(z_dim, 3)

    def forward(self, noise, text):
        size = (self.image_size, self.image_size)
        return GeneratorOutput(images=[self.colour(noise)[:, :, None, None].expand(-1, -1, *size).tanh()])


class Judge(Discriminator):
    arguments = {}

    def __init__(self):
        super().__init__()
        self.weigh = nn.Linear(3, 1)

    def forward(self, images):
        return self.weigh(images.mean(dim=(2, 3)))


class DummyGAN(System):
    GENERATOR_SETTINGS = {"image_size": "TREE.BASE_SIZE", "z_dim": "GAN.Z_DIM"}
    SHOWN = ("loss/generator",)

    def __init__(self, networks):
        self.networks, self.image_sizes = networks, [networks["generator"].image_size]

    def optimizers(self):
        spec = {p: list(self.networks[p].parameters()) for p in ("generator", "discriminator")}
        return {part: OptimizerSpec(parameters, 1e-2, (0.0, 0.9)) for part, parameters in spec.items()}

    def train(self):
        self.networks["text_encoder"].requires_grad_(False)

    def updates(self, batch, noise):
        fake = self.networks["generator"](noise, None).images[0]
        judge = self.networks["discriminator"]
        yield Update("discriminator", {"judge": (judge(fake.detach()) - judge(batch.images)).mean()})
        yield Update("generator", {"generator": -judge(fake).mean()})


@pytest.fixture
def dummy(monkeypatch):
    monkeypatch.setitem(models.SYSTEMS, "dummy", DummyGAN)
    monkeypatch.setitem(models.GENERATORS, "dummy", Dot)
    monkeypatch.setitem(models.DISCRIMINATORS, "dummy", Judge)


def last(cfg):
    return sorted(Path(cfg.OUTPUT_DIR).glob("*-dummy/checkpoints/last.pth"))[-1]


def test_the_trainer_trains_resumes_and_draws_with_a_system_it_has_never_seen(dummy, tiny, tmp_path):
    options = [("GAN.NAME", "dummy"), ("GAN.Z_DIM", "4"), ("TRAIN.DAMSM_WEIGHT", "0")]
    straight = tiny(*options, ("TRAIN.MAX_STEPS", "6"), ("OUTPUT_DIR", str(tmp_path / "straight")))
    assert train(straight, CPU) == 0
    parts = [("OUTPUT_DIR", str(tmp_path / "parts"))]
    assert train(tiny(*options, *parts, ("TRAIN.MAX_STEPS", "2")), CPU) == 0
    resumed = tiny(*options, *parts, ("TRAIN.MAX_STEPS", "6"))
    assert train(resumed, CPU, resume=True) == 0

    one, other = (load_checkpoint(last(cfg))["networks"]["generator"]["state"] for cfg in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = TextToImage.load(last(straight), "cpu").generate(["a red bird", "a blue bird"])
    assert drawn.images.shape == (2, 16, 16, 3) and not drawn.masks
    assert (np.ptp(drawn.images.reshape(2, -1, 3), axis=1) == 0).all()  # dots of one colour, as the network has it
