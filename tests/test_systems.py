"""A new system is one file and one line: a dummy trains, resumes and draws like the others."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.config import to_yaml
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError
from miscc.settings import check_arguments, setting
from models.registry import from_state, to_state
from models.settings import DiscriminatorSettings, NoiseSettings, image_size_setting
from models.ssa_gan import SSAGenerator
from models.types import Discriminator, Generator, GeneratorOutput, OptimizerSpec, System, Update
from sampling.pipeline import TextToImage
from training.settings import keys_without_effect, load_config, schema
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))

SSA = {"nf": 2, "z_dim": 4, "sentence_dim": 4, "image_size": 8}  # arguments of a small generator


class Dot(Generator):
    """One learned colour a noise dimension: the least that a generator can be."""

    @dataclass(frozen=True)
    class Settings(NoiseSettings):
        image_size: int = image_size_setting()

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.image_size, self.z_dim, self.noise_dim = self.settings.image_size, self.settings.z_dim, self.settings.z_dim
        self.colour = nn.Linear(self.z_dim, 3)

    def forward(self, noise, text):
        size = (self.image_size, self.image_size)
        return GeneratorOutput(images=[self.colour(noise)[:, :, None, None].expand(-1, -1, *size).tanh()])


class Judge(Discriminator):
    def __init__(self):
        super().__init__()
        self.weigh = nn.Linear(3, 1)

    def forward(self, images):
        return self.weigh(images.mean(dim=(2, 3)))


class DummyGAN(System):
    @dataclass(frozen=True)
    class Settings(System.Settings):
        brightness_weight: float = setting("DUMMY.BRIGHTNESS_WEIGHT", 0.0, "weight of the images' mean in G's loss")

    NETWORKS = {"generator": Dot, "discriminator": Judge}
    SHOWN = ("loss/generator",)

    def optimizers(self):
        spec = {p: list(self.networks[p].parameters()) for p in ("generator", "discriminator")}
        return {part: OptimizerSpec(parameters, 1e-2, (0.0, 0.9)) for part, parameters in spec.items()}

    def train(self):
        self.networks["text_encoder"].requires_grad_(False)

    def updates(self, batch, noise):
        fake = self.networks["generator"](noise, None).images[0]
        discriminator = self.networks["discriminator"]
        yield Update(
            "discriminator", {"discriminator": (discriminator(fake.detach()) - discriminator(batch.images)).mean()}
        )
        brightness = self.settings.brightness_weight * -fake.mean()
        yield Update("generator", {"generator": -discriminator(fake).mean(), "brightness": brightness})


@pytest.fixture
def dummy(monkeypatch):
    monkeypatch.setitem(models.SYSTEMS, "dummy", DummyGAN)


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


# A new loss weight is one field of the objective's settings and its use in `updates`.
WEIGHT = "DUMMY.BRIGHTNESS_WEIGHT"


def test_a_loss_weight_is_in_the_schema_and_in_set_and_printed(dummy, tiny):
    assert schema()[WEIGHT].default == 0.0 and "mean in G's loss" in schema()[WEIGHT].meaning
    cfg = tiny(("GAN.NAME", "dummy"), (WEIGHT, "3"))
    assert cfg.DUMMY.BRIGHTNESS_WEIGHT == 3.0 and "BRIGHTNESS_WEIGHT: 3.0" in to_yaml(cfg)
    with pytest.raises(ConfigError, match=f"{WEIGHT}: must be a number"):
        tiny(("GAN.NAME", "dummy"), (WEIGHT, "much"))
    with pytest.raises(ConfigError, match=f"{WEIGHT}: must not be negative"):
        tiny(("GAN.NAME", "dummy"), (WEIGHT, "-1"))
    with pytest.raises(ConfigError, match=f"DUMMY.BRIGHTNES_WEIGHT: no such setting; did you mean {WEIGHT}"):
        tiny(("DUMMY.BRIGHTNES_WEIGHT", "1"))


def test_a_loss_weight_is_named_where_it_has_no_effect(dummy, tiny_yaml):
    given = (WEIGHT, "3")
    assert keys_without_effect(tiny_yaml, [given]) == [WEIGHT]
    assert keys_without_effect(tiny_yaml, [given], command="damsm")[-1:] == [WEIGHT]
    assert keys_without_effect(tiny_yaml, [given, ("GAN.NAME", "dummy")])[-1:] != [WEIGHT]


def test_a_loss_weight_changes_the_loss_and_is_named_when_a_run_is_resumed(dummy, tiny, tmp_path, capsys):
    options = [("GAN.NAME", "dummy"), ("GAN.Z_DIM", "4"), ("OUTPUT_DIR", str(tmp_path))]
    assert train(tiny(*options, (WEIGHT, "3"), ("TRAIN.MAX_STEPS", "1")), CPU) == 0
    assert train(tiny(*options, (WEIGHT, "5"), ("TRAIN.MAX_STEPS", "2")), CPU, resume=True) == 0
    assert f"{WEIGHT}: 3.0 -> 5.0" in capsys.readouterr().out
    run = last(tiny(*options)).parent.parent
    losses = [json.loads(line)["loss/brightness"] for line in (run / "stats.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(loss != 0 for loss in losses)


def test_a_checkpoint_of_former_code_lacks_new_keys_and_resumes(dummy, tiny, tmp_path):
    options = [("GAN.NAME", "dummy"), ("GAN.Z_DIM", "4"), ("OUTPUT_DIR", str(tmp_path))]
    cfg = tiny(*options, ("TRAIN.MAX_STEPS", "1"))
    assert train(cfg, CPU) == 0
    content = load_checkpoint(last(cfg))
    del content["config"]["DUMMY"], content["config"]["GAN"]["Z_DIM"]
    save_checkpoint(last(cfg), content)
    assert train(tiny(*options, ("TRAIN.MAX_STEPS", "2")), CPU, resume=True) == 0


def test_a_system_changes_defaults_of_the_loops(dummy, monkeypatch, tmp_path):
    (tmp_path / "x.yml").write_text("GAN: {NAME: dummy}")
    assert load_config(tmp_path / "x.yml").TRAIN.BATCH_SIZE == 24
    monkeypatch.setattr(DummyGAN, "DEFAULTS", {"TRAIN.BATCH_SIZE": 7})
    assert load_config(tmp_path / "x.yml").TRAIN.BATCH_SIZE == 7
    assert load_config(tmp_path / "x.yml", [("TRAIN.BATCH_SIZE", "3")]).TRAIN.BATCH_SIZE == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sscbn": float("nan")}, "sscbn is nan, not a text"),
        ({"sscbn": "other"}, "sscbn is 'other', not one of code, paper"),
        ({"nf": True}, "nf is True, not a whole number"),
        ({"nf": 2.0}, "nf is 2.0, not a whole number"),
        ({"image_size": ()}, r"image_size is \(\), not a whole number"),
        ({"mask": "x" * 10**6}, "mask is 'xxx"),
    ],
)
def test_stored_arguments_of_another_type_or_choice_are_refused(changed, message):
    """As the fuzzer found them: NaN in the place of a text was a traceback."""
    entry = to_state("ssa_gan", SSAGenerator(**SSA))
    entry["arguments"] |= changed
    with pytest.raises(CheckpointError, match=rf"'ssa_gan' does not fit .*\({message}") as caught:
        from_state(entry, {"ssa_gan": SSAGenerator})
    assert len(str(caught.value)) < 400


def test_stored_arguments_that_are_right_are_taken():
    entry = to_state("ssa_gan", SSAGenerator(**SSA, sscbn="paper"))
    assert from_state(entry, {"ssa_gan": SSAGenerator}).arguments == entry["arguments"]


def test_a_whole_number_is_taken_where_a_number_is_wanted_and_infinity_is_not():
    check_arguments(DiscriminatorSettings, {"projected_weight": 1, "unknown": object()})
    with pytest.raises(ValueError, match="projected_weight is inf, not a number"):
        check_arguments(DiscriminatorSettings, {"projected_weight": float("inf")})
