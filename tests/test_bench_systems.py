"""bench.systems: what it counts is right, and one command writes figures and table."""

import json

import pytest
import torch

from bench import common, systems
from bench.train_step import step_of
from training.settings import load_config


def tiny(tmp_path, name):
    path = tmp_path / f"{name}.yml"
    path.write_text(
        json.dumps({"GAN": {"NAME": name, "GF_DIM": 2, "DF_DIM": 2}, "TREE": {"BASE_SIZE": 16}, "TRAIN": {"NF": 2}})
    )
    return path


def test_the_table_of_two_systems(tmp_path, capsys):
    paths = [str(tiny(tmp_path, name)) for name in ("ssa_gan", "df_gan")]
    systems.main(
        ["--gpu", "-1", "--rounds", "1", "--batch", "2", "--cfg", *paths, "--json", str(tmp_path / "out.json")]
    )
    found = json.loads((tmp_path / "out.json").read_text())["systems"]
    assert list(found) == ["ssa_gan", "df_gan"]
    assert "| ssa_gan | 16 |" in capsys.readouterr().out and "| df_gan | 16 |" in (tmp_path / "out.md").read_text()
    for figures in found.values():
        assert figures["flops_per_image"]["training"] > figures["flops_per_image"]["drawing"] > 0
        assert figures["images_per_second"]["drawing"] > 0


def test_the_values_of_one_key_side_by_side(tmp_path, capsys):
    arguments = ["--gpu", "-1", "--rounds", "1", "--batch", "2", "--cfg", str(tiny(tmp_path, "ssa_gan"))]
    arguments += ["--set", "GAN.PROJECTED.INPUT", "32", "--set", "GAN.PROJECTED.WIDTH", "2"]
    systems.main([*arguments, "--each", "GAN.DISCRIMINATOR", "paper", "both", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["systems"]
    assert list(found) == ["ssa_gan, paper", "ssa_gan, both"]
    assert "projected" not in found["ssa_gan, paper"]["parameters"]
    assert found["ssa_gan, both"]["parameters"]["projected"] > 0
    assert "Beside the files: `GAN.PROJECTED.INPUT 32`, `GAN.PROJECTED.WIDTH 2`." in capsys.readouterr().out


def test_each_needs_a_value(capsys):
    with pytest.raises(SystemExit):
        systems.main(["--each", "GAN.DISCRIMINATOR"])
    assert "--each: a key and its values" in capsys.readouterr().err


def test_operations_of_drawing_are_those_of_the_layers(tmp_path):
    """Beside the text encoder's: 2 a weight of each linear layer, and 2 a weight and pixel of each convolution."""
    cfg = load_config(tiny(tmp_path, "ssa_gan"))
    found = systems.measure({"ssa": cfg}, "small", 2, 1, torch.device("cpu"))["ssa"]
    step = step_of(cfg, "small", 2, torch.device("cpu"))
    generator, text_encoder = (step.system.networks[part] for part in ("generator", "text_encoder"))
    counts = []

    def count(module, inputs, output):
        pixels = output.shape[2] * output.shape[3] if output.dim() == 4 else 1
        counts.append(2 * module.weight.numel() * pixels)

    for module in generator.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        words = common.count_flops(lambda: text_encoder(step.batch.captions, step.batch.lengths))
        generator(step.noise, text_encoder(step.batch.captions, step.batch.lengths))
    assert found["flops_per_image"]["drawing"] == pytest.approx(words / 2 + sum(counts))
