"""AttnGAN and AttnDCGAN: losses by hand, sizes, the mask, who learns from what. Whole runs are in test_attn_runs.py."""

import math

import pytest
import torch
from test_ssa_gan import changed_by_a_step

from miscc.batch import Batch
from miscc.losses import binary_discriminator_loss, binary_generator_loss, kl_to_standard_normal
from models.attn_discriminator import AttnDCDiscriminator, AttnDiscriminator, StageDiscriminator
from models.attn_gan import AttnDCGAN, AttnDCGenerator, AttnGAN, AttnGenerator, WordAttention
from models.damsm import SmallImageEncoder, TextEncoder
from models.registry import from_state, to_state
from models.types import TextFeatures

SMALL = {"z_dim": 6, "condition_dim": 4, "sentence_dim": 8, "gf_dim": 2}


def text_features(lengths, dim=8, width=None):
    number, width = len(lengths), width or max(lengths)
    mask = torch.arange(width) >= torch.tensor(lengths)[:, None]
    words = torch.randn(number, dim, width).masked_fill(mask[:, None], 0.0)
    return TextFeatures(torch.randn(number, dim), words, mask)


# -- losses -----------------------------------------------------------------------------------------------------------


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def mean_of(values, real):
    return -sum(log_sigmoid(x if real else -x) for x in values) / len(values)


def test_discriminator_loss_by_the_formula():
    groups = [torch.randn(number, dtype=torch.float64) * 3 for number in (4, 4, 3, 4, 4)]
    real, fake, wrong, real_alone, fake_alone = (group.tolist() for group in groups)
    up = mean_of(real, True) + mean_of(real_alone, True)
    down = mean_of(fake, False) + mean_of(wrong, False) + mean_of(fake_alone, False)
    assert binary_discriminator_loss(*groups).item() == pytest.approx(up / 2 + down / 3, rel=1e-12)
    conditional = mean_of(real, True) + (mean_of(fake, False) + mean_of(wrong, False)) / 2
    assert binary_discriminator_loss(*groups[:3]).item() == pytest.approx(conditional, rel=1e-12)


def test_discriminator_loss_pulls_the_right_way():
    """At logits of 0 a sigmoid's slope is a half: the weights show in the gradients."""
    groups = [torch.zeros(2, requires_grad=True) for _ in range(5)]
    binary_discriminator_loss(*groups).backward()
    slopes = [group.grad.tolist() for group in groups]
    expected = [-1 / 8, 1 / 12, 1 / 12, -1 / 8, 1 / 12]
    for slope, value in zip(slopes, expected, strict=True):
        assert slope == pytest.approx([value, value], rel=1e-6)


def test_generator_loss_by_the_formula():
    first, second = torch.tensor([0.5, -2.0]), torch.tensor([3.0])
    expected = mean_of([0.5, -2.0], True) + mean_of([3.0], True)
    assert binary_generator_loss(first, second).item() == pytest.approx(expected, rel=1e-6)
    assert binary_generator_loss(first).item() == pytest.approx(mean_of([0.5, -2.0], True), rel=1e-6)


def test_extreme_logits_stay_finite():
    far = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = binary_generator_loss(far)
    loss.backward()
    assert loss.item() == pytest.approx(100.0) and far.grad.tolist() == [0.0, -0.5]


def test_kl_by_the_integral():
    """Against the numerical integral of p·log(p/q), one normal at a time; zero exactly at the standard normal."""
    mu, logvar = torch.tensor([[0.0, 0.7], [-1.2, 0.3]]).double(), torch.tensor([[0.0, -0.5], [0.8, 0.2]]).double()
    x = torch.linspace(-20, 20, 400001, dtype=torch.float64)
    total = 0.0
    for m, v in zip(mu.flatten(), logvar.exp().flatten(), strict=True):
        log_p = -((x - m) ** 2) / (2 * v) - v.log() / 2
        total += torch.trapezoid(log_p.exp() / math.sqrt(2 * math.pi) * (log_p + x**2 / 2), x).item()
    assert kl_to_standard_normal(mu, logvar).item() == pytest.approx(total / 4, rel=1e-8)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base_size", "num_stages"), [(64, 1), (8, 1), (32, 3), (16, 3), (8, 2), (128, 1), (8, 4)])
def test_every_number_of_stages(base_size, num_stages):
    sizes = [base_size * 2**number for number in range(num_stages)]
    for generator_class, discriminator_class, drawn in (
        (AttnGenerator, AttnDiscriminator, sizes),
        (AttnDCGenerator, AttnDCDiscriminator, sizes[-1:]),
    ):
        generator = generator_class(base_size=base_size, num_stages=num_stages, **SMALL)
        discriminator = discriminator_class(df_dim=1, base_size=base_size, num_stages=num_stages, sentence_dim=8)
        text = text_features([3, 2])
        output = generator(torch.randn(2, 10), text)
        assert [images.shape for images in output.images] == [(2, 3, size, size) for size in drawn]
        assert [maps.shape for maps in output.attention] == [(2, 3, size, size) for size in sizes[:-1]]
        assert output.mu.shape == output.logvar.shape == (2, 4)
        assert generator.image_size == sizes[-1] and generator.noise_dim == 10
        assert [stage.image_size for stage in discriminator.stages] == drawn
        assert [logits.shape for logits in discriminator(output.images, text.sentence)] == [(2,)] * len(drawn)
        assert all(stage.features(images).shape == (2, 8, 4, 4) for stage, images in
                   zip(discriminator.stages, output.images, strict=True))  # fmt: skip


def test_impossible_sizes_are_refused():
    for size in (4, 48, 100):
        with pytest.raises(ValueError, match=f"not {size}"):
            AttnGenerator(base_size=size, **SMALL)
        with pytest.raises(ValueError, match=f"not {size}"):
            AttnDiscriminator(base_size=size)


def test_published_sizes():
    with torch.device("meta"):
        generator, discriminator = AttnGenerator(), AttnDiscriminator()
    channels = [block[1].in_channels for block in generator.first.blocks]
    assert channels == [512, 256, 128, 64] and generator.image_size == 256
    widths = [[layer[0].out_channels for layer in stage.down] for stage in discriminator.stages]
    assert widths == [[], [1024], [1024, 2048]]


@pytest.mark.parametrize("kind", [AttnGenerator, AttnDCGenerator])
def test_an_image_does_not_depend_on_the_captions_beside_it(kind):
    """Captions of 5, 1 and 3 words in one batch, and each alone with no padding at all."""
    torch.manual_seed(0)
    generator = kind(base_size=8, num_stages=3, **SMALL).eval()
    lengths = [5, 1, 3]
    text, noise = text_features(lengths, width=7), torch.randn(3, 10)
    text.words[:, :, 5:] = 50.0  # whatever stands behind a caption
    with torch.no_grad():
        together = generator(noise, text)
        for row, length in enumerate(lengths):
            alone_text = TextFeatures(text.sentence[row : row + 1], text.words[row : row + 1, :, :length],
                                      torch.zeros(1, length, dtype=torch.bool))  # fmt: skip
            alone = generator(noise[row : row + 1], alone_text)
            for ours, theirs in zip(together.images, alone.images, strict=True):
                torch.testing.assert_close(ours[row], theirs[0], rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(together.attention, alone.attention, strict=True):
                torch.testing.assert_close(ours[row, :length], theirs[0], rtol=1e-4, atol=1e-5)
                assert ours[row, length:].abs().max() == 0
                torch.testing.assert_close(ours[row].sum(dim=0), torch.ones(ours.shape[2:]))


def test_word_attention_by_loops():
    torch.manual_seed(0)
    layer, text, x = WordAttention(3, 8, attends=True).double(), text_features([4, 2]), torch.randn(2, 3, 2, 5).double()
    words = text.words.double()
    context, attention = layer(x, words, text.mask)
    for n, length in enumerate([4, 2]):
        keys = [layer.project.weight[:, :, 0, 0] @ words[n, :, t] for t in range(length)]
        for i in range(2):
            for j in range(5):
                scores = torch.stack([keys[t] @ x[n, :, i, j] for t in range(length)])
                weights = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(attention[n, :length, i, j], weights)
                torch.testing.assert_close(context[n, :, i, j], sum(w * k for w, k in zip(weights, keys, strict=True)))


def test_without_attention_all_words_weigh_the_same():
    layer, text = WordAttention(3, 8, attends=False), text_features([4, 2])
    _, attention = layer(torch.randn(2, 3, 2, 2), text.words, text.mask)
    assert attention[0].flatten().tolist() == pytest.approx([0.25] * 16)
    assert attention[1, :2].flatten().tolist() == pytest.approx([0.5] * 8) and attention[1, 2:].abs().max() == 0


def test_the_noise_holds_that_of_the_augmentation():
    generator = AttnGenerator(base_size=8, num_stages=1, **SMALL).eval()
    text, noise = text_features([2, 2]), torch.randn(2, 10)
    with torch.no_grad():
        joint = generator(noise, text).images[0]
        apart = generator(noise[:, :6], text, noise[:, 6:]).images[0]
        torch.manual_seed(1)
        one = generator(noise[:, :6], text).images[0]
        other = generator(noise[:, :6], text).images[0]
        output = generator(noise, text)
    assert torch.equal(joint, apart) and not torch.allclose(one, other, atol=1e-4)
    gated = torch.nn.functional.glu(generator.augmentation.linear(text.sentence), dim=1)
    torch.testing.assert_close(torch.cat([output.mu, output.logvar], dim=1), gated)
    condition, mu, logvar = generator.augmentation(text.sentence, noise[:, 6:])
    torch.testing.assert_close(condition, mu + torch.exp(logvar) ** 0.5 * noise[:, 6:])


def test_weights_start_orthogonal():
    generator = AttnGenerator(base_size=8, num_stages=2, **SMALL)
    weight = generator.refinements[0].residual[0].layers[0].weight.flatten(1)  # (8, 36)
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    scales = torch.cat([m.weight for m in generator.modules() if isinstance(m, torch.nn.BatchNorm1d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.01) and 0.01 < scales.std().item() < 0.03
    assert generator.augmentation.linear.bias.abs().max() == 0


def test_spectral_normalisation_bounds_every_convolution():
    stage = StageDiscriminator(df_dim=2, image_size=16, sentence_dim=8, spectral_normalisation=True)
    for _ in range(30):
        stage(torch.randn(2, 3, 16, 16), torch.randn(2, 8))
    convolutions = [m for m in stage.modules() if type(m).__name__.endswith("Conv2d")]
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() for m in convolutions]
    assert norms == pytest.approx([1.0] * len(norms), rel=0.05) and len(norms) == 5


@pytest.mark.parametrize("spectral_normalisation", [False, True])
def test_a_stored_discriminator_is_rebuilt_without_drawing_weights(spectral_normalisation):
    discriminator = AttnDiscriminator(
        df_dim=1, base_size=16, num_stages=2, sentence_dim=8, spectral_normalisation=spectral_normalisation
    )
    images, sentence = [torch.randn(2, 3, size, size) for size in (16, 32)], torch.randn(2, 8)
    discriminator(images, sentence)  # running statistics that differ from those at the start
    entry = to_state("attn_gan", discriminator)
    again = from_state(entry, {"attn_gan": AttnDiscriminator})
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), entry["state"].values(), strict=True))
    for ours, theirs in zip(discriminator.eval()(images, sentence), again.eval()(images, sentence), strict=True):
        assert torch.equal(ours, theirs)
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in again.parameters())


def test_a_network_around_given_stages_is_built_again_whatever_the_settings_said():
    sizes = {"base_size": 8, "num_stages": 2, "sentence_dim": 8}
    given = AttnDiscriminator(df_dim=1, **sizes)
    network = AttnDiscriminator(df_dim=2, spectral_normalisation=True, **sizes).with_stages(given.stages)
    again = from_state(to_state("attn_gan", network), {"attn_gan": AttnDiscriminator})
    assert not again.arguments["spectral_normalisation"]
    assert again.state_dict().keys() == given.state_dict().keys()


# -- updates ----------------------------------------------------------------------------------------------------------


def make_system(kind=AttnGAN, num_stages=2, **settings):
    torch.manual_seed(0)
    generator, discriminator = {
        AttnGAN: (AttnGenerator, AttnDiscriminator),
        AttnDCGAN: (AttnDCGenerator, AttnDCDiscriminator),
    }[kind]
    networks = {
        "generator": generator(gf_dim=2, z_dim=6, condition_dim=4, base_size=8, num_stages=num_stages),
        "discriminator": discriminator(df_dim=2, base_size=8, num_stages=num_stages),
        "text_encoder": TextEncoder(20),
        "image_encoder": SmallImageEncoder(image_size=16, nf=4),
    }
    system = kind(networks, **settings)
    system.train()
    return system


def make_batch(sizes=(8, 16), number=4):
    torch.manual_seed(1)
    captions, lengths = torch.randint(1, 20, (number, 6)), torch.tensor([6, 4, 5, 3])[:number]
    images = [torch.randn(number, 3, size, size).clamp(-1, 1) for size in sizes]
    numbers = torch.arange(number)
    images = images if len(images) > 1 else images[0]
    return Batch(images, captions, lengths, numbers, [str(n) for n in numbers], numbers, numbers)


@pytest.mark.parametrize(("kind", "sizes"), [(AttnGAN, [8, 16]), (AttnDCGAN, [16])])
def test_the_order_of_updates_and_who_moves(kind, sizes):
    system = make_system(kind)
    assert system.image_sizes == sizes
    history = changed_by_a_step(system, make_batch(sizes), torch.randn(4, 10))
    assert [(name, losses) for name, losses, _, _ in history] == [
        ("discriminator", ["discriminator"]),
        ("generator", ["adversarial", "kl", "words", "sentence"]),
    ]
    assert [moved for _, _, moved, _ in history] == [{"discriminator"}, {"generator"}]
    assert [touched for _, _, _, touched in history] == [{"discriminator"}, {"generator"}]


def test_losses_are_the_sums_over_the_stages():
    system, batch, noise = make_system(), make_batch(), torch.randn(4, 10)
    for update, name in zip(system.updates(batch, noise), ("discriminator", "adversarial"), strict=True):
        parts = [update.stats[f"loss/{name}_{size}"].item() for size in (8, 16)]
        assert update.losses[name].item() == pytest.approx(sum(parts), rel=1e-6) and min(parts) > 0
    assert {f"logits/{pair}_16" for pair in ("real", "fake", "mismatched", "real_alone", "fake_alone")} <= set(
        next(make_system().updates(batch, noise)).stats
    )


def test_every_parameter_of_both_learns():
    system = make_system()
    for update in system.updates(make_batch(), torch.randn(4, 10)):
        network = system.networks[update.optimizer]
        network.zero_grad()
        sum(update.losses.values()).backward()
        assert [n for n, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_mismatched_pairs_are_images_with_the_next_caption():
    system, batch, seen = make_system(), make_batch(), []
    stage = system.networks["discriminator"].stages[1]
    original = stage.logits
    stage.logits = lambda features, sentence: seen.append((features.detach(), sentence)) or original(features, sentence)
    next(system.updates(batch, torch.randn(4, 10)))
    (real, sentence), (fake, same), (mismatched, shifted) = seen
    assert torch.equal(sentence, same) and not torch.equal(real, fake)
    assert torch.equal(mismatched, real[:-1]) and torch.equal(shifted, sentence[1:])


def test_the_weight_of_damsm_multiplies_and_may_be_zero():
    def generator_losses(**settings):
        return list(make_system(**settings).updates(make_batch(), torch.ones(4, 10)))[-1].losses

    words = generator_losses(damsm_factor=5.0)["words"].item()
    assert words == pytest.approx(5 * generator_losses(damsm_factor=1.0)["words"].item(), rel=1e-5)
    assert list(generator_losses(damsm_weight=0.0)) == ["adversarial", "kl"]


def test_the_image_encoder_sees_the_last_image_only():
    system, seen = make_system(), []
    system.networks["image_encoder"].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    list(system.updates(make_batch(), torch.randn(4, 10)))
    assert seen == [16]
