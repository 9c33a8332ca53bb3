"""DF-GAN: sizes, starting values, the objective against its formulas, and that its settings files train, resume and draw."""

import json

import pytest
import torch
from golden import OWN, fill_state, load
from tiny_systems import (
    changed_by_a_step,
    make_batch,
    make_networks,
    text_features,
    tiny_overrides,
    trains_resumes_and_samples,
)

from miscc.errors import CheckpointError
from miscc.losses import hinge_discriminator_loss, matching_aware_gradient_penalty
from models.df_gan import DFGAN, DFDiscriminator, DFGenerator
from models.layers import ConditionalAffine
from models.registry import count_parameters
from models.released import load_discriminator
from training.settings import load_config


@pytest.mark.parametrize("size", [8, 32, 64, 256, 512])
def test_images_at_every_size(size):
    generator = DFGenerator(nf=1, z_dim=5, image_size=size)
    with torch.no_grad():
        images = generator(torch.randn(2, 5), text_features(2)).images
        assert DFDiscriminator(nf=1, image_size=size)(images[0], torch.randn(2, 256)).shape == (2,)
    assert len(images) == 1 and images[0].shape == (2, 3, size, size) and images[0].abs().max() <= 1
    assert generator.noise_dim == generator.z_dim == 5
    assert generator.fc.out_features == 16 * min(8, size // 4)  # channels come from the end of the list


def test_the_affine_by_hand_and_the_identity_at_the_start():
    affine = ConditionalAffine(1, 2, 3)
    x, condition = torch.tensor([[[[3.0, -1.0]]]]), torch.randn(1, 2)
    assert torch.equal(affine(x, condition), x)
    for head, bias in ((affine.gamma, 2.0), (affine.beta, 0.5)):
        torch.nn.init.constant_(head[2].bias, bias)
    assert affine(x, condition).flatten().tolist() == [6.5, -1.5]


def test_noise_and_sentence_both_reach_the_affines():
    generator = DFGenerator(nf=8, z_dim=4, image_size=16)
    noise, text = torch.randn(1, 4), text_features(1)
    before = generator(noise, text).images[0]
    assert torch.equal(before, generator(noise, text_features(1)).images[0])  # the last weights start at zero
    torch.nn.init.normal_(generator.blocks[1].fusion2.affine1.beta[2].weight)
    assert not torch.equal(generator(noise, text).images[0], generator(noise, text_features(1)).images[0])
    hidden = generator.blocks[1].fusion2.affine1.beta[0].weight
    torch.nn.init.zeros_(generator.fc.weight)  # now the noise has no other way in
    assert not torch.equal(generator(noise, text).images[0], generator(-noise, text).images[0])
    hidden.data[:, :4] = 0
    assert torch.equal(generator(noise, text).images[0], generator(-noise, text).images[0])


def make_system(**settings):
    networks = make_networks(DFGenerator(nf=2, z_dim=8, image_size=16), DFDiscriminator(nf=2, image_size=16))
    system = DFGAN(networks, **settings)
    system.train()
    return system


def test_one_step_of_each_and_who_moves():
    history = changed_by_a_step(make_system(), make_batch(), torch.randn(4, 8))
    assert history == [
        ("discriminator", ["hinge", "penalty"], {"discriminator"}, {"discriminator"}),
        ("generator", ["adversarial"], {"generator"}, {"generator"}),
    ]
    assert not make_system().networks["text_encoder"].training


def test_values_against_the_formulas_in_double_precision():
    system, batch, noise = make_system(penalty_weight=3.0, penalty_power=4.0), make_batch(), torch.randn(4, 8)
    updates = system.updates(batch, noise)
    d_losses = next(updates).losses
    g_losses = next(updates).losses
    generator, discriminator = system.networks["generator"].double(), system.networks["discriminator"].double()
    text = system.networks["text_encoder"](batch.captions, batch.lengths)
    text = text._replace(sentence=text.sentence.double())
    with torch.no_grad():
        fake = generator(noise.double(), text).images[0]
        wrong = batch.images[[1, 2, 3, 0]].double()  # the caption of each with the image of the next
        pairs = [(batch.images.double(), -1, 1.0), (fake, 1, 0.5), (wrong, 1, 0.5)]
        hinge = 0.0
        for images, sign, weight in pairs:
            logits = [discriminator(images[i : i + 1], text.sentence[i : i + 1]).item() for i in range(4)]
            hinge += weight * sum(max(0.0, 1 + sign * logit) for logit in logits) / 4
        adversarial = -discriminator(fake, text.sentence).mean().item()
    total = 0.0
    for i in range(4):
        image = batch.images[i : i + 1].double().requires_grad_()
        sentence = text.sentence[i : i + 1].detach().requires_grad_()
        a, b = torch.autograd.grad(discriminator(image, sentence).sum(), (image, sentence))
        total += (a.square().sum() + b.square().sum()).sqrt().item() ** 4
    assert d_losses["hinge"].item() == pytest.approx(hinge, rel=1e-4)
    assert d_losses["penalty"].item() == pytest.approx(3.0 * total / 4, rel=1e-3)
    assert g_losses["adversarial"].item() == pytest.approx(adversarial, rel=1e-4)


def test_one_forward_for_hinge_and_penalty_equals_two():
    system, batch = make_system(), make_batch()
    discriminator = system.networks["discriminator"].double()
    real, fake = batch.images.double(), torch.randn(4, 3, 16, 16).double()
    sentence = torch.randn(4, 256).double()
    losses, _ = system.discriminator_losses(real, fake, sentence)
    sum(losses.values()).backward()
    joint = [parameter.grad.clone() for parameter in discriminator.parameters()]
    assert real.grad is None and not real.requires_grad  # the caller's tensors are left alone

    discriminator.zero_grad()
    features = discriminator.features(real)
    real_logits = discriminator.logits(features, sentence)
    mismatched = discriminator.logits(torch.cat([features[1:], features[:1]]), sentence)
    hinge = hinge_discriminator_loss(real_logits, discriminator(fake, sentence), mismatched)
    images, own = real.clone().requires_grad_(), sentence.clone().requires_grad_()
    penalty = matching_aware_gradient_penalty(discriminator(images, own), images, own)
    torch.testing.assert_close(losses["hinge"], hinge)
    torch.testing.assert_close(losses["penalty"], penalty)
    (hinge + penalty).backward()
    for ours, parameter in zip(joint, discriminator.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_defaults_are_those_of_the_released_code(tmp_path):
    path = tmp_path / "df.yml"
    path.write_text("GAN: {NAME: DF-GAN}")
    cfg = load_config(path)
    assert (cfg.TRAIN.NF, cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.MAX_EPOCH) == (32, 32, 1300)
    assert (cfg.TRAIN.GENERATOR_LR, cfg.TRAIN.DISCRIMINATOR_LR, cfg.TRAIN.BETAS) == (1e-4, 4e-4, [0.0, 0.9])
    assert (cfg.GAN.TRUNCATION, cfg.TRAIN.DAMSM_WEIGHT) == (0.88, 0.0)


@pytest.mark.parametrize("yaml", ["cfg/bird_df.yml", "cfg/coco_df.yml"])
def test_the_settings_files_train_resume_and_draw(yaml, drawn_folder, encoders, tmp_path):
    overrides = tiny_overrides(drawn_folder, encoders, tmp_path)
    last = trains_resumes_and_samples(yaml, "df_gan", overrides)
    assert last["networks"]["discriminator"]["name"] == last["networks"]["generator"]["name"] == "df_gan"
    assert last["optimizers"].keys() == {"generator", "discriminator"}
    settings = [json.loads(path.read_text()) for path in (tmp_path / "drawn").glob("*.json")]
    assert any(found.get("truncation") == 0.88 for found in settings)


def test_a_run_starts_from_a_state_epoch_file(drawn_folder, encoders, tmp_path):
    from miscc.distributed import World
    from training.trainer import Trainer

    about, _ = load(OWN, "df_gan")
    state = {part: fill_state(about[part], 1) for part in ("netG", "netD", "netC")}
    path = tmp_path / "state_epoch_1.pth"
    torch.save(
        {"model": {k: {f"module.{n}": t for n, t in v.items()} for k, v in state.items()}, "optimizers": {}}, path
    )
    overrides = tiny_overrides(drawn_folder, encoders, tmp_path) | {"TRAIN.NET_G": str(path), "TRAIN.NF": "2"}

    def networks(**changes):
        cfg = load_config("cfg/bird_df.yml", [*(overrides | changes).items()])
        return Trainer(cfg, World(0, 1, torch.device("cpu"))).networks

    both = networks()
    assert torch.equal(both["generator"].fc.weight, state["netG"]["fc.weight"])
    assert torch.equal(both["discriminator"].from_rgb.weight, state["netD"]["conv_img.weight"])
    assert torch.equal(both["discriminator"].head[0].weight, state["netC"]["joint_conv.0.weight"])
    fresh = networks(**{"TRAIN.B_NET_D": "False"})["discriminator"]
    assert not torch.equal(fresh.from_rgb.weight, state["netD"]["conv_img.weight"])


def test_the_released_discriminator_needs_its_head():
    about, _ = load(OWN, "df_gan")
    body, head = fill_state(about["netD"], 1), fill_state(about["netC"], 1)
    flat = load_discriminator({**body, **head})
    assert torch.equal(flat.head[2].weight, head["joint_conv.2.weight"])
    assert flat.arguments["multipliers"] == [2, 4] and flat.arguments["image_size"] == 16
    for lone in (body, {"netD": body}):
        with pytest.raises(CheckpointError, match="condition head is not here.*netC beside netD"):
            load_discriminator(lone)


def test_parameter_counts_at_256_px():
    with torch.device("meta"):
        generator, discriminator = DFGenerator(), DFDiscriminator()
    assert len(list(generator.parameters())) == 226
    assert [count_parameters(network) / 1e6 for network in (generator, discriminator)] == pytest.approx(
        [9.74, 6.92], abs=0.01
    )
