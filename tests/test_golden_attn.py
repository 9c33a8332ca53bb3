"""AttnGAN and AttnDCGAN against the numbers that the original systems gave; see test_golden.py for the two folders."""

import pytest
import torch
from golden import fill_input, fill_state, load, relative_error, subsample
from test_golden import GRADIENT, OUTPUT, folders, gradient_norms

from miscc.losses import kl_to_standard_normal
from models import released
from models.attn_gan import adversarial_loss, discriminator_loss
from models.released import load_discriminator, load_generator
from models.types import TextFeatures

systems = pytest.mark.parametrize("name", ["attn_gan", "attn_dcgan"])


class Attn:
    """The fixture's networks and inputs; discriminators and real images by image size.

    In float64: batch norm over the few images amplifies float32's rounding, which differs from CPU to CPU, up to the
    limits of these tests.
    """

    def __init__(self, folder, name):
        self.about, self.expected = load(folder, name)
        config = self.about["config"]
        salt, batch, words = config["salt"], config["batch"], config["words"]
        self.generator = load_generator(fill_state(self.about["netG"], salt))
        dim = self.generator.arguments["sentence_dim"]
        sentence = fill_input("sentence", (batch, dim), salt, 0.5)
        mask = torch.zeros(batch, words, dtype=torch.bool)
        mask[:, config["valid_words"] :] = True
        self.text = TextFeatures(sentence, fill_input("words", (batch, dim, words), salt, 0.5), mask)
        self.noise = fill_input("noise", (batch, config["z_dim"]), salt, 1.0)
        self.epsilon = fill_input("ca_eps", (batch, config["condition_dim"]), salt, 1.0)
        self.discriminators, self.shapes, self.real = {}, {}, {}
        for number in range(sum(part.startswith("netD") for part in self.about)):
            stage = load_discriminator(fill_state(self.about[f"netD{number}"], salt + number))
            size = stage.image_size
            self.discriminators[size], self.shapes[size] = stage.train(), self.about[f"netD{number}"]
            self.real[size] = fill_input(f"real{size}", (batch, 3, size, size), salt, 0.5).clamp(-1, 1).double()
        for network in (self.generator, *self.discriminators.values()):
            network.double()
        self.text = TextFeatures(sentence.double(), self.text.words.double(), mask)
        self.noise, self.epsilon = self.noise.double(), self.epsilon.double()

    def draw(self):
        output = self.generator(self.noise, self.text, self.epsilon)
        return output, {images.shape[-1]: images for images in output.images}


def coarse(attention):
    """As the fixtures keep attention maps."""
    step = max(1, attention.shape[-1] // 8)
    return attention[..., step // 2 :: step, step // 2 :: step]


@folders
@systems
def test_images_and_attention_in_eval_mode(folder, name):
    attn = Attn(folder, name)
    with torch.no_grad():
        output, images = attn.draw()
    assert set(images) == {int(key.rpartition("_")[2]) for key in attn.expected if key.startswith("eval_images")}
    for size, drawn in images.items():
        assert relative_error(subsample(drawn), attn.expected[f"eval_images_{size}"]) < OUTPUT
    assert [list(maps.shape) for maps in output.attention] == attn.about["attention_shapes"]
    for number, maps in enumerate(output.attention):
        assert relative_error(coarse(maps), attn.expected[f"eval_attention_{number}"]) < OUTPUT
        assert maps[:, attn.about["config"]["valid_words"] :].abs().max() == 0
    assert relative_error(output.mu, attn.expected["mu"]) < OUTPUT
    assert relative_error(output.logvar, attn.expected["logvar"]) < OUTPUT
    kl = kl_to_standard_normal(output.mu, output.logvar)
    assert kl.item() == pytest.approx(attn.expected["kl"].item(), rel=OUTPUT)


@folders
@systems
def test_training_step_losses_and_gradients(folder, name):
    attn = Attn(folder, name)
    attn.generator.train()
    output, fakes = attn.draw()
    sentence, total = attn.text.sentence, kl_to_standard_normal(output.mu, output.logvar)
    for size, stage in attn.discriminators.items():
        expected, fake = attn.expected, fakes[size]
        assert relative_error(subsample(fake.detach()), expected[f"train_images_{size}"]) < OUTPUT
        loss, _ = discriminator_loss(stage, attn.real[size], fake.detach(), sentence)
        assert loss.item() == pytest.approx(expected[f"d_loss_{size}"].item(), rel=OUTPUT)
        loss.backward()
        form = released.recognise(attn.shapes[size])
        learned = [tensor for tensor in attn.shapes[size] if "running" not in tensor and "tracked" not in tensor]
        norms = gradient_norms(stage, form, learned)
        assert relative_error(norms, expected[f"d_grad_norms_{size}"]) < GRADIENT
        adversarial = adversarial_loss(stage, fake, sentence)
        assert adversarial.item() == pytest.approx(expected[f"g_loss_{size}"].item(), rel=OUTPUT)
        total = total + adversarial
    total.backward()
    norms = gradient_norms(attn.generator, released.recognise(attn.about["netG"]), attn.about["netG_params"])
    assert relative_error(norms, attn.expected["g_grad_norms"]) < GRADIENT
