"""GALIP and CLIP against the numbers that the original networks gave; see test_golden.py and ../shared/golden/README.md."""

import pytest
import torch
from golden import SHARED, fill_input, fill_state, load, relative_error, subsample
from test_golden import GRADIENT, OUTPUT

from miscc.batch import Batch
from miscc.losses import matching_aware_gradient_penalty
from models import released
from models.clip_features import load_clip
from models.galip import GALIP
from models.released import load_discriminator, load_generator
from models.types import TextFeatures

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/golden")


def gradient_norms(module, form, names):
    """Norms in the order of the released names, summed in double; 0 for tensors that are frozen or that ours does not have."""
    parameters = dict(module.named_parameters())
    gradients = [getattr(parameters.get(released.rename(name, form)), "grad", None) for name in names]
    return torch.tensor([0.0 if g is None else g.double().norm().item() for g in gradients], dtype=torch.float64)


class Fixture:
    """The fixture's networks and inputs, built once: the networks hold 320 M numbers."""

    def __init__(self):
        self.about, self.expected = load(SHARED, "galip")
        config = self.about["config"]
        salt, batch, size = config["salt"], config["batch"], config["image_size"]
        tensors = fill_state(self.about["clip"]["visual"] | self.about["clip"]["text"], salt)
        self.clip = load_clip(tensors, layers=config["clip_layers"], scaled_twice=True)
        shared, prefix = config["shared_weights"], self.about["saved_prefix"]
        own = {name: shape for name, shape in self.about["netG"].items() if not name.startswith(tuple(shared))}
        net_g = fill_state(own, salt)
        for theirs, clips in shared.items():
            inside = [name for name in self.about["netG"] if name.startswith(theirs)]
            net_g |= {name: tensors[clips + name.removeprefix(theirs)] for name in inside}
        net_g = {prefix + name: value for name, value in net_g.items()}
        parts = {part: fill_state(self.about[part], salt) for part in ("netD", "netC")}
        content = {"model": {"netG": net_g, **parts}, "epoch": 3}
        self.generator, self.discriminator = load_generator(content), load_discriminator(content)
        self.noise = fill_input("noise", (batch, config["z_dim"]), salt, 1.0)
        sentence = fill_input("sentence", (batch, config["cond_dim"]), salt, 0.5)
        self.text = TextFeatures(sentence, sentence[:, :, None], torch.zeros(batch, 1, dtype=torch.bool))
        self.real = fill_input("real", (batch, 3, size, size), salt, 0.5).clamp(-1, 1)
        self.real256 = fill_input("real256", (batch, 3, 256, 256), salt, 0.5).clamp(-1, 1)
        self.forms = [released.recognise(self.about[part]) for part in ("netG", "netD")]


class GivenText(torch.nn.Module):
    """A text encoder that gives the fixture's features, whatever it reads."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, captions, lengths):
        return self.text


@pytest.fixture(scope="module")
def galip():
    return Fixture()


def test_text_tower(galip):
    text = galip.clip.text_encoder(galip.expected["tokens"])
    assert relative_error(text.sentence.detach(), galip.expected["text_sentence"]) < OUTPUT
    assert relative_error(galip.clip.text(galip.expected["tokens"]).detach(), galip.expected["text_sentence"]) < OUTPUT
    states = text.words[:, ::8].transpose(1, 2).detach()  # up to the longest caption; padding is not computed
    assert relative_error(states, galip.expected["text_words"][:, : states.shape[1]]) < OUTPUT
    assert text.mask.logical_not().sum(dim=1).tolist() == [7, 14]


def test_image_tower(galip):
    expected, visual = galip.expected, galip.clip.visual
    with torch.no_grad():
        maps, embedding = visual(galip.real)
        assert relative_error(torch.stack(maps, dim=1)[:, :, ::8], expected["real_clip_features"]) < OUTPUT
        assert relative_error(embedding, expected["real_embedding"]) < OUTPUT
        assert all(torch.equal(a, b) for a, b in zip(visual.patches(galip.real), maps, strict=True))
        assert relative_error(visual(galip.real256)[1], expected["real256_embedding"]) < OUTPUT
        pixels = visual.pixels(galip.real256)
    assert relative_error(subsample(pixels), expected["real256_clip_input"]) < OUTPUT
    assert relative_error(pixels.std(dim=(1, 2, 3)), expected["real256_clip_input_std"]) < OUTPUT


def test_right_scaling_sees_the_same_in_images_of_half_the_contrast(galip):
    visual = galip.clip.visual
    with torch.no_grad():
        twice = visual.pixels(galip.real)
        visual.change_settings(scaled_twice=False)
        try:
            assert relative_error(visual.pixels(galip.real / 2 + 0.5), twice) < 1e-5
            assert relative_error(visual.pixels(galip.real), twice) > 0.1
        finally:
            visual.change_settings(scaled_twice=True)


def test_generator_stage_by_stage(galip):
    expected, generator = galip.expected, galip.generator
    condition = torch.cat([galip.noise, galip.text.sentence], dim=1)
    with torch.no_grad():
        bridge, prompts = generator.bridge_features(galip.noise, condition), generator.prompts(condition)
        mapped = generator.vit(bridge, prompts)
        adapted = generator.adapter(bridge + 0.1 * mapped)
        images = generator(galip.noise, galip.text).images[0]
    assert relative_error(bridge[:, ::8], expected["bridge"]) < OUTPUT
    assert relative_error(prompts[:, :, ::8], expected["prompts"]) < OUTPUT
    assert relative_error(mapped[:, ::8], expected["mapped"]) < OUTPUT
    assert relative_error(adapted[:, ::8], expected["adapter"]) < OUTPUT
    assert images.shape == (2, 3, 224, 224)
    assert relative_error(subsample(images), expected["eval_images"]) < OUTPUT
    assert relative_error(images.mean(dim=(1, 2, 3)), expected["eval_image_mean"]) < OUTPUT
    assert relative_error(images.std(dim=(1, 2, 3)), expected["eval_image_std"]) < OUTPUT


def test_training_step_losses_and_gradients(galip):
    expected, about = galip.expected, galip.about

    networks = {"generator": galip.generator, "discriminator": galip.discriminator}
    networks |= {"text_encoder": GivenText(galip.text), "image_encoder": galip.clip.visual}
    system = GALIP(networks)
    system.train()
    numbers = torch.arange(len(galip.real))
    batch = Batch(galip.real, numbers, numbers, numbers, ["", ""], numbers, numbers)

    updates = system.updates(batch, galip.noise)
    losses, stats = next(updates)[1:3]
    total, real, fake, mismatch, penalty = expected["d_loss"].tolist()
    assert losses["penalty"].item() == pytest.approx(penalty, rel=OUTPUT)
    assert losses["hinge"].item() == pytest.approx(real + (fake + mismatch) / 2, rel=OUTPUT)
    assert (losses["hinge"] + losses["penalty"]).item() == pytest.approx(total, rel=OUTPUT)
    for kind, name in (("real", "real"), ("fake", "fake"), ("mismatched", "mismatch")):
        assert stats[f"logits/{kind}"].item() == pytest.approx(expected[f"{name}_logits"].mean().item(), rel=OUTPUT)
    sum(losses.values()).backward()
    norms = gradient_norms(galip.discriminator, galip.forms[1], about["netD_params"])
    assert relative_error(norms, expected["d_grad_norms"]) < GRADIENT

    # D stays as it is, as in the fixture: nothing steps its optimizer here.
    losses, stats = next(updates)[1:3]
    total, adversarial, similarity = expected["g_loss"].tolist()
    assert losses["adversarial"].item() == pytest.approx(adversarial, rel=OUTPUT)
    assert stats["similarity"].item() == pytest.approx(similarity, rel=OUTPUT)
    assert sum(losses.values()).item() == pytest.approx(total, rel=OUTPUT)
    sum(losses.values()).backward()
    norms = gradient_norms(galip.generator, galip.forms[0], about["netG_params"])
    assert relative_error(norms, expected["g_grad_norms"]) < GRADIENT
    assert next(updates, None) is None


def test_gradient_penalty_of_maps_and_sentence(galip):
    expected, discriminator = galip.expected, galip.discriminator
    discriminator.zero_grad()
    maps = torch.stack(galip.clip.visual.patches(galip.real), dim=1).detach().requires_grad_()
    sentence = galip.text.sentence.clone().requires_grad_()
    logits = discriminator(maps.unbind(dim=1), sentence)
    gradients = torch.autograd.grad(logits.sum(), (maps, sentence), retain_graph=True)
    squares = [part.square().flatten(1).sum(dim=1) for part in (*gradients[0].unbind(dim=1), gradients[1])]
    assert relative_error(torch.stack(squares).sqrt(), expected["magp_grad_l2_parts"]) < GRADIENT
    assert relative_error(sum(squares).sqrt(), expected["magp_grad_l2"]) < GRADIENT
    matching_aware_gradient_penalty(logits, maps, sentence).backward()
    norms = gradient_norms(discriminator, galip.forms[1], galip.about["netD_params"])
    assert relative_error(norms, expected["magp_grad_norms"]) < GRADIENT
