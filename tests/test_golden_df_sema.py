"""DF-GAN and SEMA against the numbers that the original systems gave, through models.released. As tests/test_golden.py."""

import pytest
import torch
from golden import fill_input, fill_state, load, relative_error, subsample
from test_golden import GRADIENT, OUTPUT, folders, gradient_norms

from models import released
from models.df_gan import DFGAN
from models.registry import network_name
from models.released import load_discriminator, load_generator
from models.types import TextFeatures


class Golden:
    """The fixture's networks and inputs."""

    def __init__(self, folder, name):
        self.about, self.expected = load(folder, name)
        config = self.about["config"]
        salt, batch, size = config["salt"], config["batch"], config.get("imsize", 256)
        self.states = {
            part: fill_state(self.about[part], salt) for part in self.about if part in ("netG", "netD", "netC")
        }
        self.generator = load_generator(self.states["netG"])
        self.noise = fill_input("noise", (batch, config["z_dim"]), salt, 1.0)
        sentence = fill_input("sentence", (batch, config["cond_dim"]), salt, 0.5)
        self.text = TextFeatures(sentence, sentence[:, :, None], torch.zeros(batch, 1, dtype=torch.bool))
        self.real = fill_input("real", (batch, 3, size, size), salt, 0.5).clamp(-1, 1)

    def check_images(self, images):
        assert relative_error(subsample(images), self.expected["eval_images"]) < OUTPUT
        assert relative_error(images.std(dim=(1, 2, 3)), self.expected["eval_image_std"]) < OUTPUT


@folders
def test_df_gan_images_and_gradients_of_both_steps(folder):
    golden = Golden(folder, "df_gan")
    generator, expected = golden.generator, golden.expected
    discriminator = load_discriminator({"model": {part: golden.states[part] for part in ("netD", "netC", "netG")}})
    fake = generator(golden.noise, golden.text).images[-1]
    golden.check_images(fake.detach())

    system = DFGAN({"generator": generator, "discriminator": discriminator})
    seen, original = [], discriminator.logits
    discriminator.logits = lambda *inputs: seen.append(original(*inputs)) or seen[-1]
    losses, _ = system.discriminator_losses(golden.real, fake.detach(), golden.text.sentence)
    for name, logits in zip(("real", "mismatch", "fake"), seen, strict=True):
        assert relative_error(logits.detach(), expected[f"{name}_logits"]) < OUTPUT
    relu = torch.relu
    pieces = [relu(1 - seen[0]).mean(), relu(1 + seen[2]).mean(), relu(1 + seen[1]).mean(), losses["penalty"]]
    for ours, theirs in zip(pieces, expected["d_loss"][1:], strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=OUTPUT)
    total = losses["hinge"] + losses["penalty"]
    assert total.item() == pytest.approx(expected["d_loss"][0].item(), rel=OUTPUT)
    total.backward()
    names = [*golden.about["netD"], *golden.about["netC"]]
    form = released.recognise({name: None for name in names})
    assert relative_error(gradient_norms(discriminator, form, names), expected["d_grad_norms"]) < GRADIENT

    discriminator.requires_grad_(False)
    loss = -discriminator(fake, golden.text.sentence).mean()
    assert loss.item() == pytest.approx(expected["g_loss"].item(), rel=OUTPUT)
    loss.backward()
    form = released.recognise(golden.about["netG"])
    norms = gradient_norms(generator, form, golden.about["netG_params"])
    assert relative_error(norms, expected["g_grad_norms"]) < GRADIENT


@folders
def test_sema_images(folder):
    golden = Golden(folder, "sema")
    with torch.no_grad():
        images = golden.generator(golden.noise, golden.text).images[-1]
    golden.check_images(images)
    assert network_name(golden.generator) == "sema"
