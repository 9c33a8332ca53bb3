"""SSA-GAN's networks: shapes, starting values, forms, and what an update takes and leaves alone."""

import math

import pytest
import torch
from tiny_systems import changed_by_a_step, make_batch, text_features
from torch import nn

from models.damsm import SmallImageEncoder, TextEncoder
from models.layers import OneWayDiscriminator
from models.registry import count_parameters
from models.ssa_gan import SSAGAN, SSCBN, SSAGenerator, mask_area


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_images_and_masks_at_every_size(size):
    generator = SSAGenerator(nf=1, image_size=size).eval()
    with torch.no_grad():
        output = generator(torch.randn(2, 100), text_features(2))
    assert output.images[0].shape == (2, 3, size, size) and output.images[0].abs().max() <= 1
    assert [mask.shape[-1] for mask in output.masks] == [4 * 2**i for i in range(len(output.masks))]
    assert output.masks[-1].shape == (2, 1, size, size)
    assert all(0 < mask.min() and mask.max() < 1 for mask in output.masks)
    with torch.no_grad():
        assert OneWayDiscriminator(nf=1, image_size=size)(output.images[0], torch.randn(2, 256)).shape == (2,)


def test_parameter_counts_of_the_published_models():
    with torch.device("meta"):
        counts = [
            count_parameters(network) / 1e6
            for nf in (64, 32)
            for network in (SSAGenerator(nf=nf), OneWayDiscriminator(nf=nf))
        ]
    assert counts == pytest.approx([29.5, 80.4, 10.3, 20.2], abs=0.06)


def test_the_sentence_has_no_say_at_the_start_and_masks_gate_it_later():
    generator = SSAGenerator(nf=2, image_size=16).eval()
    noise, one, other = torch.randn(1, 100), text_features(1), text_features(1)
    assert torch.equal(generator(noise, one).images[0], generator(noise, other).images[0])
    for block in generator.blocks:
        nn.init.constant_(block.gate, 1.0)
        for sscbn in (block.sscbn1, block.sscbn2):
            nn.init.normal_(sscbn.beta[2].weight)
    assert not torch.allclose(generator(noise, one).images[0], generator(noise, other).images[0], atol=1e-3)


@pytest.mark.parametrize(
    ("form", "expected"), [("code", [[3.0, 8.5], [3.0, 1.0]]), ("paper", [[0.0, 7.5], [0.0, 0.0]])]
)
def test_sscbn_by_hand(form, expected):
    """x̂ = [3, 1] below masks 0 and 1 (and 3, 1 again with mask 0), γ = 2.5, β = 5."""
    sscbn = SSCBN(1, 4, form).eval()
    sscbn.norm.running_var.fill_(1 - 1e-5)
    nn.init.constant_(sscbn.gamma[2].bias, 2.5)
    nn.init.constant_(sscbn.beta[2].bias, 5.0)
    x = torch.tensor([[[[3.0, 1.0]]], [[[3.0, 1.0]]]])
    mask = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]])
    torch.testing.assert_close(sscbn(x, torch.randn(2, 4), mask).flatten(1), torch.tensor(expected))


def test_batch_norm_before_doubling_leaves_autograd_alone():
    """A graph made in eval mode outlives a pass in training mode, as with torch's own batch norm."""
    torch.manual_seed(4)
    sscbn = SSCBN(3, 4, "code")
    x, sentence, mask = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 4), torch.rand(2, 1, 4, 4)
    drawn = sscbn.eval()(x, sentence, mask)
    sscbn.train()(x, sentence, mask)
    drawn.sum().backward()
    assert x.grad.isfinite().all()


def test_masks_of_ones_switch_the_spatial_part_off():
    output = SSAGenerator(nf=1, image_size=16, mask="ones")(torch.randn(2, 100), text_features(2))
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in output.masks)


def test_bilinear_upsampling_is_another_network_with_the_same_weights():
    code, paper = (
        SSAGenerator(nf=1, image_size=16).eval(),
        SSAGenerator(nf=1, image_size=16, upsample="bilinear").eval(),
    )
    paper.load_state_dict(code.state_dict())
    noise, text = torch.randn(1, 100), text_features(1)
    assert not torch.allclose(code(noise, text).images[0], paper(noise, text).images[0], atol=1e-4)


# -- updates ----------------------------------------------------------------------------------------------------------


def make_system(**settings):
    torch.manual_seed(0)
    networks = {
        "generator": SSAGenerator(nf=2, z_dim=8, image_size=16),
        "discriminator": OneWayDiscriminator(nf=2, image_size=16),
        "text_encoder": TextEncoder(20),
        "image_encoder": SmallImageEncoder(image_size=16, nf=4),
    }
    system = SSAGAN(networks, **settings)
    system.train()
    return system


def test_the_objective_masks_classes_as_its_settings_say():
    batch, text = make_batch(), text_features(4)
    alike = batch._replace(class_ids=torch.zeros(4, dtype=torch.int64))
    masked, compared = make_system(), make_system(mask_classes=False)
    assert masked.damsm_losses(batch.images, text, alike)["words"] == 0, "nothing is left to compare with"
    apart = compared.damsm_losses(batch.images, text, batch)["words"]
    assert apart > 0 and compared.damsm_losses(batch.images, text, alike)["words"] == apart


def test_the_order_of_updates_and_who_moves():
    history = changed_by_a_step(make_system(), make_batch(), torch.randn(4, 8))
    assert [(name, losses) for name, losses, _, _ in history] == [
        ("discriminator", ["hinge"]),
        ("discriminator", ["penalty"]),
        ("generator", ["adversarial", "words", "sentence"]),
    ]
    assert [moved for _, _, moved, _ in history] == [{"discriminator"}, {"discriminator"}, {"generator"}]
    # A network that an update does not move takes no gradient in it either: that work is saved.
    assert [touched for _, _, _, touched in history] == [{"discriminator"}, {"discriminator"}, {"generator"}]


def test_a_joint_penalty_is_one_step():
    history = changed_by_a_step(make_system(penalty_step="joint"), make_batch(), torch.randn(4, 8))
    assert [losses for _, losses, _, _ in history][0] == ["hinge", "penalty"]
    assert len(history) == 2


def test_without_damsm_only_the_adversarial_loss_is_left():
    history = changed_by_a_step(make_system(damsm_weight=0.0), make_batch(), torch.randn(4, 8))
    assert history[-1][1] == ["adversarial"]


def test_the_area_of_masks_by_hand_and_from_both_sides():
    """Stages count alike, whatever their size; a smaller mask is cheaper at each pixel."""
    logits = [torch.zeros(2, 1, 4, 4, requires_grad=True), torch.full((2, 1, 8, 8), math.log(3.0), requires_grad=True)]
    area = mask_area([logit.sigmoid() for logit in logits])
    assert area.item() == pytest.approx((0.5 + 0.75) / 2)
    area.backward()
    assert all((logit.grad > 0).all() for logit in logits)
    assert mask_area([torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)]).item() == 0.5


def test_the_area_of_masks_is_a_loss_of_g_alone():
    history = changed_by_a_step(make_system(mask_area_weight=0.5), make_batch(), torch.randn(4, 8))
    assert history[-1][1] == ["adversarial", "words", "sentence", "mask_area"] and history[-1][2] == {"generator"}
    losses = [
        list(make_system(mask_area_weight=w).updates(make_batch(), torch.ones(4, 8)))[-1].losses for w in (0.5, 1.0)
    ]
    assert losses[1]["mask_area"].item() == pytest.approx(2 * losses[0]["mask_area"].item(), rel=1e-5)
    assert 0 < losses[1]["mask_area"].item() < 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fine_tuning_moves_the_encoders_on_real_pairs_only(mode):
    system = make_system(finetune_encoders=True, finetune_mode=mode)
    assert system.networks["text_encoder"].training is (mode == "train")
    history = changed_by_a_step(system, make_batch(), torch.randn(4, 8))
    assert history[0] == ("encoders", ["words", "sentence"], *[{"text_encoder", "image_encoder"}] * 2)
    assert history[-1][2] == {"generator"}


def test_frozen_encoders_stay_in_eval_mode():
    system = make_system()
    assert not system.networks["text_encoder"].training and not system.networks["image_encoder"].training
    assert system.networks["generator"].training and system.networks["discriminator"].training
    assert all(not p.requires_grad for p in system.networks["text_encoder"].parameters())


def test_mismatched_pairs_are_images_with_the_next_caption():
    system, batch, seen = make_system(), make_batch(), []
    discriminator = system.networks["discriminator"]
    original = discriminator.logits

    def record(features, sentence):
        seen.append((features.detach().clone(), sentence.detach().clone()))
        return original(features, sentence)

    discriminator.logits = record
    next(system.updates(batch, torch.randn(4, 8)))
    (features, sentence), (mismatched_features, mismatched_sentence) = seen[:2]
    assert torch.equal(mismatched_features, features[:-1]) and torch.equal(mismatched_sentence, sentence[1:])


def test_the_weights_of_damsm_multiply():
    def words(**settings):
        return list(make_system(**settings).updates(make_batch(), torch.ones(4, 8)))[-1].losses["words"].item()

    assert words(damsm_weight=0.05, damsm_factor=2.0) == pytest.approx(words(damsm_weight=0.1), rel=1e-5)
    assert words(damsm_weight=0.1) == pytest.approx(2 * words(damsm_weight=0.05), rel=1e-5)
