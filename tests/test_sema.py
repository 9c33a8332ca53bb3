"""SEMA: R and F by hand, the objective against its formulas and signs, and that its settings files train, resume and draw."""

import json

import pytest
import torch
from golden import OWN, fill_state, load
from tiny_systems import (
    changed_by_a_step,
    make_batch,
    make_networks,
    run_main,
    text_features,
    tiny_overrides,
    trains_resumes_and_samples,
)
from torch import nn

from miscc.checkpoint import load_checkpoint
from miscc.errors import ConfigError
from miscc.losses import semantic_distance
from models.layers import OneWayDiscriminator
from models.sema import SEMA, SEMAGenerator
from models.sema_modules import FeatureExtractor, Redescriber
from training.settings import load_config


@pytest.mark.parametrize("size", [8, 64, 256])
def test_shapes_at_every_size(size):
    generator = SEMAGenerator(nf=1, z_dim=5, image_size=size, hidden=8)
    with torch.no_grad():
        images = generator(torch.randn(2, 5), text_features(2)).images[0]
        assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
        assert Redescriber(nf=1, image_size=size)(images).shape == (2, 256)
        extractor = FeatureExtractor(nf=1, image_size=size, feature_dim=7)
        assert extractor(images).shape == (2, 7) and extractor.logits(torch.randn(2, 7)).shape == (2, 2)
    assert generator.noise_dim == 5 and generator.fc.out_features == 16 * min(8, size // 4)


def test_semantic_distance_by_hand():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 0.0]])
    assert semantic_distance(a, b).tolist() == [0.0, 1.0, 2.0, 1.0]


def test_the_redescriber_attends_where_its_keys_say():
    """One step, keys that only the place decides: the context is the value there, or the mean of all values."""
    torch.manual_seed(0)
    redescriber, seen = Redescriber(nf=1, image_size=16, sentence_dim=4, steps=1), []
    redescriber.cell.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    values = []
    redescriber.values.register_forward_hook(lambda *arguments: values.append(arguments[2]))
    nn.init.zeros_(redescriber.keys.weight)
    nn.init.zeros_(redescriber.keys.bias)
    images = torch.randn(2, 3, 16, 16)
    redescriber(images)
    torch.testing.assert_close(seen[0], values[0].mean(dim=(2, 3)))
    nn.init.ones_(redescriber.keys.weight)
    nn.init.zeros_(redescriber.query.weight)
    nn.init.ones_(redescriber.query.bias)
    nn.init.zeros_(redescriber.place)
    redescriber.place.data[:, :, 3, 5] = 1e4
    redescriber(images)
    torch.testing.assert_close(seen[1], values[1][:, :, 3, 5])


def make_system(**settings):
    networks = make_networks(SEMAGenerator(nf=2, z_dim=8, image_size=16), OneWayDiscriminator(nf=2, image_size=16))
    networks["redescriber"] = Redescriber(nf=2, image_size=16)
    networks["feature_extractor"] = FeatureExtractor(nf=2, image_size=16)
    system = SEMA(networks, **settings)
    system.train()
    return system


def test_four_steps_and_who_moves():
    history = changed_by_a_step(make_system(), make_batch(), torch.randn(4, 8))
    steps = [
        ("discriminator", ["hinge", "penalty"]),
        ("redescriber", ["redescribe_real", "redescribe_fake"]),
        ("feature_extractor", ["real_or_fake"]),
        ("generator", ["adversarial", "redescription", "feature"]),
    ]
    assert history == [(name, losses, {name}, {name}) for name, losses in steps]


def test_a_weight_of_zero_leaves_a_distance_and_its_network_out():
    def steps(**weights):
        history = changed_by_a_step(make_system(**weights), make_batch(), torch.randn(4, 8))
        return [(name, losses) for name, losses, _, _ in history if name != "discriminator"]

    assert steps(redescription_weight=0.0) == [
        ("feature_extractor", ["real_or_fake"]),
        ("generator", ["adversarial", "feature"]),
    ]
    assert steps(redescription_weight=0.0, feature_weight=0.0) == [("generator", ["adversarial"])]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def test_values_against_the_formulas_in_double_precision():
    system, batch = make_system(redescription_weight=0.7, feature_weight=0.3, margin=1.06), make_batch()
    networks = {part: network.double() for part, network in system.networks.items() if part != "text_encoder"}
    real, sentence = batch.images.double(), torch.randn(4, 256).double()
    fake = torch.randn(4, 3, 16, 16).double()
    redescriber, extractor = networks["redescriber"], networks["feature_extractor"]
    s, written_real, written_fake, own, made = (
        t.tolist() for t in (sentence, redescriber(real), redescriber(fake), extractor(real), extractor(fake))
    )
    losses, stats = system.redescriber_losses(real, fake, sentence)
    away = [1 - cosine(a, b) for a, b in zip(written_fake, s, strict=True)]
    assert min(away) < 1.06 < max(away)  # the margin cuts some samples off, not all
    near = [1 - cosine(a, b) for a, b in zip(written_real, s, strict=True)]
    assert losses["redescribe_real"].item() == pytest.approx(sum(near) / 4)
    assert losses["redescribe_fake"].item() == pytest.approx(sum(max(0.0, 1.06 - d) for d in away) / 4)

    losses, stats = system.feature_extractor_losses(real, fake)
    real_logits, fake_logits = (extractor.logits(extractor(images)) for images in (real, fake))
    picked = [*real_logits.softmax(dim=1)[:, 1].tolist(), *fake_logits.softmax(dim=1)[:, 0].tolist()]
    assert losses["real_or_fake"].item() == pytest.approx(-torch.tensor(picked).double().log().mean().item())
    assert stats["accuracy/real_or_fake"].item() == sum(p > 0.5 for p in picked) / 8

    losses = system.generator_losses(real, fake, sentence)
    assert losses["adversarial"].item() == pytest.approx(-networks["discriminator"](fake, sentence).mean().item())
    assert losses["redescription"].item() == pytest.approx(0.7 * sum(away) / 4)
    same = [1 - cosine(a, b) for a, b in zip(made, own, strict=True)]
    assert losses["feature"].item() == pytest.approx(0.3 * sum(same) / 4)


def test_r_pushes_fake_images_away_and_g_pulls_them_near():
    system, batch = make_system(margin=2.0), make_batch()
    sentence, real = torch.randn(4, 256), batch.images
    fake = torch.randn(4, 3, 16, 16, requires_grad=True)
    redescriber = system.networks["redescriber"]

    def distance(images):
        return semantic_distance(redescriber(images), sentence).mean().item()

    before_fake, before_real = distance(fake), distance(real)
    (gradient,) = torch.autograd.grad(system.generator_losses(real, fake, sentence)["redescription"], fake)
    assert distance(fake - 0.5 * gradient / gradient.norm()) < before_fake  # G's step
    optimizer = torch.optim.SGD(redescriber.parameters(), lr=1.0)
    losses, _ = system.redescriber_losses(real, fake.detach(), sentence)
    losses["redescribe_fake"].backward()
    optimizer.step()
    assert distance(fake) > before_fake
    moved = distance(real)
    optimizer.zero_grad()
    losses, _ = system.redescriber_losses(real, fake.detach(), sentence)
    losses["redescribe_real"].backward()
    optimizer.step()
    assert distance(real) < moved and before_real > 0


def test_f_learns_real_from_fake_and_g_nears_the_real_features():
    system, batch = make_system(), make_batch()
    real, fake = batch.images, torch.full((4, 3, 16, 16), 0.5, requires_grad=True)
    optimizer = torch.optim.SGD(system.networks["feature_extractor"].parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        losses, stats = system.feature_extractor_losses(real, fake.detach())
        losses["real_or_fake"].backward()
        optimizer.step()
    assert stats["accuracy/real_or_fake"] == 1.0
    loss = system.generator_losses(real, fake, torch.randn(4, 256))["feature"]
    (gradient,) = torch.autograd.grad(loss, fake)
    nearer = system.generator_losses(real, fake - 0.5 * gradient / gradient.norm(), torch.randn(4, 256))["feature"]
    assert nearer < loss


def test_the_settings_of_the_released_file_name_no_unread_key(tmp_path):
    path = tmp_path / "sema.yml"
    path.write_text("GAN: {NAME: SEMA}")
    cfg = load_config(path)
    assert (cfg.TRAIN.NF, cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.MAX_EPOCH, cfg.GAN.TRUNCATION) == (32, 48, 121, 0.8)


@pytest.mark.parametrize("yaml", ["cfg/coco_sema.yml", "cfg/bird_sema.yml"])
def test_the_settings_files_train_resume_and_draw(yaml, drawn_folder, encoders, tmp_path):
    overrides = tiny_overrides(drawn_folder, encoders, tmp_path) | {"TRAIN.GSAVE_INTERVAL": "1"}
    last = trains_resumes_and_samples(yaml, "sema", overrides)
    trained = {"generator", "discriminator", "redescriber", "feature_extractor"}
    assert last["optimizers"].keys() == trained and trained <= last["networks"].keys()
    (numbered,) = (tmp_path / "whole").glob("*/checkpoints/epoch_*.pth")
    assert load_checkpoint(numbered)["networks"].keys() == {"generator", "generator_ema", "text_encoder"}
    settings = [json.loads(path.read_text()) for path in (tmp_path / "drawn").glob("*.json")]
    assert any(found.get("truncation") == 0.8 for found in settings)


def test_what_shapes_the_adversaries_stays_and_given_weights_bring_them_along(drawn_folder, encoders, tmp_path):
    from miscc.distributed import World
    from training.trainer import Trainer

    overrides = tiny_overrides(drawn_folder, encoders, tmp_path)
    assert run_main("cfg/coco_sema.yml", overrides) == 0
    (last,) = tmp_path.glob("*/checkpoints/last.pth")
    stored = load_checkpoint(last)["networks"]
    for key, value in (("SEMA.STEPS", "3"), ("SEMA.FEATURE_DIM", "8"), ("TEXT.TRANSFORMER", "bert")):
        with pytest.raises(ConfigError, match=f"{key}: the run was started with .*, not {value}"):
            run_main("cfg/coco_sema.yml", overrides | {key: value}, "--resume")

    def networks(**changes):
        pairs = (overrides | {"TRAIN.NET_G": str(last)} | changes).items()
        return Trainer(load_config("cfg/coco_sema.yml", [*pairs]), World(0, 1, torch.device("cpu"))).networks

    weight = stored["redescriber"]["state"]["keys.weight"]
    assert torch.equal(networks()["redescriber"].keys.weight, weight)
    assert not torch.equal(networks(**{"TRAIN.B_NET_D": "False"})["redescriber"].keys.weight, weight)


def test_a_released_generator_draws_and_is_trained_on(drawn_folder, encoders, tmp_path):
    about, _ = load(OWN, "sema")
    path = tmp_path / "netG_120.pth"
    torch.save({f"module.{name}": tensor for name, tensor in fill_state(about["netG"], 1).items()}, path)
    overrides = tiny_overrides(drawn_folder, encoders, tmp_path) | {"TRAIN.NET_G": str(path), "TRAIN.NF": "2"}
    out = tmp_path / "drawn"
    assert run_main("cfg/coco_sema.yml", overrides, "--caption", "a small red bird", "--out", str(out)) == 0
    assert len(list(out.glob("*.png"))) >= 1
    assert run_main("cfg/coco_sema.yml", overrides | {"TRAIN.MAX_STEPS": "1", "TRAIN.EMA_DECAY": "0"}) == 0
    (last,) = tmp_path.glob("*/checkpoints/last.pth")
    trained = load_checkpoint(last)["networks"]["generator"]
    difference = (trained["state"]["fc.weight"] - fill_state(about["netG"], 1)["fc.weight"]).abs()
    assert trained["name"] == "sema" and 0 < difference.max() < 1e-3  # one step of Adam away from the released weights
