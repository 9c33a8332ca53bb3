"""Our networks and losses against the numbers that the original systems gave, through models.released.

The fixtures of ../shared are used where they are there; a small one of our own making, written by these networks when they
agreed with ../shared, holds the same ground everywhere.
"""

import pytest
import torch
from golden import OWN, SHARED, fill_input, fill_state, load, relative_error, subsample

from miscc.losses import (
    hinge_discriminator_loss,
    matching_aware_gradient_penalty,
    sentence_loss,
    word_attention,
    word_loss,
)
from models import released
from models.released import load_discriminator, load_generator, load_image_encoder, load_text_encoder
from models.types import TextFeatures

OUTPUT, GRADIENT = 1e-4, 1e-3  # relative errors that float32 allows, as the fixtures' README has them

folders = pytest.mark.parametrize(
    "folder",
    [
        pytest.param(OWN, id="own"),
        pytest.param(SHARED, id="shared", marks=pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/golden")),
    ],
)


def gradient_norms(module, form, names):
    """Norms in the order of the released names; 0 where there is no gradient."""
    parameters = dict(module.named_parameters())
    gradients = [parameters[released.rename(name, form)].grad for name in names]
    return torch.tensor([0.0 if g is None else g.norm().item() for g in gradients], dtype=torch.float64)


class SSA:
    """The fixture's networks and inputs."""

    def __init__(self, folder):
        self.about, self.expected = load(folder, "ssa_gan")
        config = self.about["config"]
        salt, batch, size = config["salt"], config["batch"], config.get("image_size", 256)
        self.generator = load_generator(fill_state(self.about["netG"], salt))
        self.discriminator = load_discriminator(fill_state(self.about["netD"], salt))
        self.noise = fill_input("noise", (batch, config["z_dim"]), salt, 1.0)
        sentence = fill_input("sentence", (batch, 256), salt, 0.5)
        self.text = TextFeatures(sentence, sentence[:, :, None], torch.zeros(batch, 1, dtype=torch.bool))
        self.real = fill_input("real", (batch, 3, size, size), salt, 0.5).clamp(-1, 1)
        self.forms = [released.recognise(self.about[part]) for part in ("netG", "netD")]


@folders
def test_generator_in_eval_mode(folder):
    ssa = SSA(folder)
    with torch.no_grad():
        output = ssa.generator(ssa.noise, ssa.text)
    assert relative_error(subsample(output.images[0]), ssa.expected["eval_images"]) < OUTPUT
    assert relative_error(output.images[0].mean(dim=(1, 2, 3)), ssa.expected["eval_image_mean"]) < OUTPUT
    for mask in output.masks:
        assert relative_error(subsample(mask), ssa.expected[f"eval_mask_{mask.shape[-1]}"]) < OUTPUT


@folders
def test_training_step_losses_and_gradients(folder):
    ssa = SSA(folder)
    generator, discriminator, sentence = ssa.generator.train(), ssa.discriminator.train(), ssa.text.sentence
    fake = generator(ssa.noise, ssa.text).images[0]
    assert relative_error(subsample(fake.detach()), ssa.expected["train_images"]) < OUTPUT
    features = discriminator.features(ssa.real)
    shown = features[:, :: max(1, features.shape[1] // ssa.expected["real_features"].shape[1])]
    assert relative_error(shown.detach(), ssa.expected["real_features"]) < OUTPUT
    logits = {
        "real": discriminator.logits(features, sentence),
        "mismatch": discriminator.logits(features[:-1], sentence[1:]),
        "fake": discriminator(fake.detach(), sentence),
    }
    for name, value in logits.items():
        assert relative_error(value.detach(), ssa.expected[f"{name}_logits"]) < OUTPUT
    loss = hinge_discriminator_loss(logits["real"], logits["fake"], logits["mismatch"])
    assert loss.item() == pytest.approx(ssa.expected["d_loss"][0].item(), rel=OUTPUT)
    loss.backward()
    norms = gradient_norms(discriminator, ssa.forms[1], ssa.about["netD_params"])
    assert relative_error(norms, ssa.expected["d_grad_norms"]) < GRADIENT

    discriminator.requires_grad_(False)
    loss = -discriminator(fake, sentence).mean()
    assert loss.item() == pytest.approx(ssa.expected["g_adv_loss"].item(), rel=OUTPUT)
    loss.backward()
    norms = gradient_norms(generator, ssa.forms[0], ssa.about["netG_params"])
    assert relative_error(norms, ssa.expected["g_adv_grad_norms"]) < GRADIENT


@folders
def test_gradient_penalty(folder):
    ssa = SSA(folder)
    images, sentence = ssa.real.requires_grad_(), ssa.text.sentence.requires_grad_()
    penalty = matching_aware_gradient_penalty(ssa.discriminator(images, sentence), images, sentence)
    assert penalty.item() == pytest.approx(ssa.expected["magp"].item(), rel=OUTPUT)
    penalty.backward()
    norms = gradient_norms(ssa.discriminator, ssa.forms[1], ssa.about["netD_params"])
    assert relative_error(norms, ssa.expected["magp_grad_norms"]) < GRADIENT


@folders
def test_text_encoder(folder):
    about, expected = load(folder, "damsm")
    encoder = load_text_encoder(fill_state(about["text_encoder"], about["config"]["salt"]))
    text = encoder(expected["captions"], expected["lengths"])
    assert relative_error(text.words[:, ::8].detach(), expected["words"]) < OUTPUT
    assert relative_error(text.sentence.detach(), expected["sentence"]) < OUTPUT
    assert text.mask.logical_not().sum(dim=1).tolist() == expected["lengths"].tolist()


def damsm_inputs(about, expected):
    salt, batch = about["config"]["salt"], about["config"]["batch"]
    regions = fill_input("regions", (batch, 256, 17, 17), salt, 0.3)
    code, sentence = (fill_input(name, (batch, 256), salt, 0.3) for name in ("code", "sentence_in"))
    words = fill_input("words_in", (batch, 256, expected["captions"].shape[1]), salt, 0.3)
    for row, length in enumerate(expected["lengths"]):
        words[row, :, length:] = 0
    return [tensor.requires_grad_() for tensor in (regions, words, code, sentence)]


@folders
@pytest.mark.parametrize("gamma1", [4, 5])
@pytest.mark.parametrize("masked", ["class", "noclass"])
def test_matching_losses(folder, gamma1, masked):
    about, expected = load(folder, "damsm")
    regions, words, code, sentence = damsm_inputs(about, expected)
    class_ids = expected["class_ids"] if masked == "class" else None
    losses = [
        *word_loss(regions, words, expected["lengths"], class_ids, gamma1, 5.0, 10.0),
        *sentence_loss(code, sentence, class_ids, 10.0),
    ]
    name = f"g1_{gamma1}_{masked}"
    assert relative_error(torch.stack(losses).detach(), expected[name]) < OUTPUT
    sum(losses).backward()
    norms = torch.stack([tensor.grad.norm() for tensor in (regions, words, code, sentence)])
    assert relative_error(norms, expected[f"{name}_grad_norms"]) < GRADIENT


@folders
def test_attention(folder):
    about, expected = load(folder, "damsm")
    regions, words, *_ = damsm_inputs(about, expected)
    attention = word_attention(regions, words, expected["lengths"], 5.0)[:1]
    assert relative_error(attention.detach(), expected["attention_0"]) < OUTPUT


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/golden")
def test_image_encoder():
    about, expected = load(SHARED, "damsm")
    salt, batch = about["config"]["salt"], about["config"]["batch"]
    encoder = load_image_encoder(fill_state(about["image_encoder"], salt))
    with torch.no_grad():
        regions, code = encoder(fill_input("image", (batch, 3, 256, 256), salt, 0.5).clamp(-1, 1))
    assert list(regions.shape) == expected["regions_shape"].tolist()
    assert relative_error(regions[:, ::8], expected["regions"]) < OUTPUT
    assert relative_error(code, expected["code"]) < OUTPUT
