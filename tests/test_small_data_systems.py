"""What small data needs, in AttnGAN and GALIP: LeCam, augmentation, its control and mode seeking, by hand and in runs."""

import re

import pytest
import torch
from test_attn_gan import make_batch as attn_batch
from test_attn_gan import make_system
from test_attn_runs import small_run
from test_galip_runs import UNTRAINED
from test_trainer import assert_same_state
from tiny_clip import clip_batch, tiny_clip, tiny_galip
from tiny_systems import ROOT, tiny_overrides, trains_resumes_and_samples

from main import main
from miscc.checkpoint import load_checkpoint
from models.attn_gan import AttnDCGAN, AttnGAN
from models.galip import GALIP
from training.dry_run import describe as dry_run
from training.settings import load_config

KINDS = ["attn_gan", "attn_dcgan", "galip"]
CLIP = {"CLIP.WEIGHTS": "untrained"}
SWITCHES = {
    "TRAIN.LECAM": "0.3", "TRAIN.LECAM_WARMUP": "1", "TRAIN.AUGMENT": "translation,cutout", "TRAIN.ADA": "1e-6",
    "TRAIN.ADA_IMAGES": "32", "TRAIN.DIVERSITY": "0.1",
}  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture
def build(clip):
    """(kind, settings) -> (system, batch, noise); the same networks each time."""

    def make(kind, **settings):
        if kind == "galip":
            system = GALIP(tiny_galip(clip), **settings)
            system.train()
            return system, clip_batch(), torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
        cls, sizes = (AttnGAN, (8, 16)) if kind == "attn_gan" else (AttnDCGAN, (16,))
        noise = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
        return make_system(cls, **settings), attn_batch(sizes), noise

    return make


def logits_of(system, batch, noise):
    """[(logits of real pairs, of fake pairs)] of each discriminator, without augmentation."""
    text = system.text_encoder(batch.captions, batch.lengths)
    images = system.generator(noise, text).images
    discriminator, sentence = system.discriminator, text.sentence
    if isinstance(system, GALIP):
        maps = (system.image_encoder.patches(batch.images), system.image_encoder.patches(images[-1]))
        return [tuple(discriminator(one, sentence) for one in maps)]
    return [
        (stage(batch.images_at(stage.image_size), sentence), stage(fake, sentence))
        for stage, fake in zip(discriminator.stage_list(), images, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_lecam_holds_each_discriminator_to_its_own_averages(kind, build):
    system, batch, noise = build(kind, lecam_weight=0.5, lecam_warmup=1)
    assert not [name for update in system.updates(batch, noise) for name in update.losses if "lecam" in name]

    # Averages that all logits lie on the far side of: for real pairs below, for fake ones above.
    pairs, means = list(system.logit_pairs().values()), {}
    for index, (real, fake) in enumerate(pairs):
        means |= {f"logits/{real}": torch.tensor(500.0 + index), f"logits/{fake}": torch.tensor(-700.0 - index)}
    assert sorted(system.observed) == sorted(means)
    system.observe(means, 4)

    first, *others = system.updates(batch, noise)
    expected = 0.0
    with torch.no_grad():
        for index, (real, fake) in enumerate(logits_of(system, batch, noise)):
            expected += 0.5 * ((real + 700 + index).square().mean() + (fake - 500 - index).square().mean()).item()
    assert first.optimizer == "discriminator" and first.losses["lecam"].requires_grad
    assert first.losses["lecam"].item() == pytest.approx(expected, rel=1e-4)
    assert not [name for update in others for name in update.losses if "lecam" in name]


@pytest.mark.parametrize("kind", ["attn_gan", "attn_dcgan"])
def test_the_stages_see_augmented_images_and_damsm_the_image_itself(kind, build):
    system, batch, noise = build(kind, augment="cutout")
    batch = batch._replace(images=_filled(batch.images, 0.5))
    seen = {stage.image_size: [] for stage in system.discriminator.stage_list()}
    for stage in system.discriminator.stage_list():
        stage.encoder.register_forward_pre_hook(lambda _, given, size=stage.image_size: seen[size].append(given[0]))
    encoded = []
    system.image_encoder.register_forward_pre_hook(lambda _, given: encoded.append(given[0]))
    list(system.updates(batch, noise))

    for size, inputs in seen.items():
        real, fake, again = (images.detach() for images in inputs)  # D's step: real, fake; G's: fake
        hidden = real == 0
        assert 0.05 < hidden.float().mean() < 0.3, f"a quarter of each image at most, at {size} px"
        assert torch.equal(fake == 0, hidden) and torch.equal(fake, again)
    assert not (encoded[0] == 0).any()


def test_d_sees_augmented_images_through_clip_which_matches_the_images_themselves(build):
    system, batch, noise = build("galip", augment="cutout")
    batch = batch._replace(images=_filled(batch.images, 0.5))
    seen = []
    for name in ("forward", "patches"):
        original = getattr(system.image_encoder, name)
        # Through `forward` CLIP sees the images that are matched to captions, through `patches` those that D sees.
        setattr(
            system.image_encoder, name, lambda x, of=original, by=name: seen.append((by, x.detach().clone())) or of(x)
        )
    (_, update) = system.updates(batch, noise)
    for name in ("forward", "patches"):
        delattr(system.image_encoder, name)

    (plain,) = (images for name, images in seen if name == "forward")
    real, fake = (images for name, images in seen if name == "patches")
    real, fake = (real, fake) if real.shape == batch.images.shape else (fake, real)
    assert 0.05 < (real == 0).float().mean() < 0.3 and 0.05 < (fake == 0).float().mean() < 0.3
    assert not (plain == 0).any() and torch.equal(torch.where(fake == 0, fake, plain), fake)
    without, *_ = build("galip")
    (_, other) = without.updates(batch, noise)
    assert update.stats["similarity"].item() == pytest.approx(other.stats["similarity"].item(), rel=1e-4)
    assert update.losses["adversarial"].item() != pytest.approx(other.losses["adversarial"].item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_diversity_is_a_loss_of_the_generator_alone(kind, build):
    def losses(**settings):
        system, batch, noise = build(kind, **settings)
        return [dict(update.losses) for update in system.updates(batch, noise)]

    (plain_d, plain), (diverse_d, diverse) = losses(), losses(diversity_weight=0.5)
    value = diverse.pop("diversity")
    assert value > 0 and value.requires_grad and diverse.keys() == plain.keys()
    assert plain_d.keys() == diverse_d.keys()
    assert all(torch.equal(plain[name], diverse[name]) for name in plain)


@pytest.mark.parametrize(("number", "others"), [(2, 2), (3, 2), (4, 2), (6, 3)])
def test_diversity_draws_half_of_the_captions_again_and_two_at_least(number, others, build):
    """AttnGAN's batch norm takes no single image."""
    system, _, _ = build("attn_gan", diversity_weight=0.5)
    batch = attn_batch((8, 16), 4)
    batch = batch._replace(
        images=[scale.repeat(2, 1, 1, 1)[:number] for scale in batch.images],
        **{
            name: getattr(batch, name).repeat(2, *[1] * (getattr(batch, name).dim() - 1))[:number]
            for name in ("captions", "lengths", "class_ids", "indices", "caption_numbers")
        },
    )
    drawn = []
    system.generator.register_forward_pre_hook(lambda _, given: drawn.append(len(given[0])))
    list(system.updates(batch, torch.randn(number, 10)))
    assert drawn == [number, others]


@pytest.mark.parametrize("cfg", ["bird_attn2", "bird_attnDCGAN2", "bird_galip", "bird"])
def test_the_dry_run_counts_what_a_step_keeps_for_diversity(cfg):
    """On two images without values: both captions are drawn again. (DF-GAN's step keeps most in D's penalty.)"""

    def memory(changes):
        described = dry_run(load_config(ROOT / "cfg" / f"{cfg}.yml", list((changes | CLIP).items())))
        return float(re.search(r"\((\d+) MiB an image", str(described))[1])

    without = {key: value for key, value in SWITCHES.items() if key != "TRAIN.DIVERSITY"}
    assert memory(SWITCHES) > 1.05 * memory(without)


@pytest.mark.parametrize(
    ("kind", "sign"), [("attn_gan", "sign/real_16"), ("attn_dcgan", "sign/real_16"), ("galip", "sign/real")]
)
def test_the_sign_of_the_last_stage_controls_the_augmentation(kind, sign, build):
    system, batch, noise = build(kind, augment="cutout", ada_target=0.6, ada_images=16)
    assert system.observed == [sign]
    first, *_, last = system.updates(batch, noise)
    assert sign in first.stats and last.stats["augment/p"] == 0
    images = torch.ones(4, 3, 16, 16)
    assert torch.equal(system.augmentation_of(batch)(images), images), "p is 0 at first"
    for _ in range(4):
        system.observe({sign: torch.tensor(1.0)}, 4)
    assert not torch.equal(system.augmentation_of(batch)(images), images)


def test_attn_gan_stops_and_resumes_with_all_of_it(drawn_folder, encoders, tmp_path):
    more = [text for pair in SWITCHES.items() for text in pair]
    for name, stops in (("whole", [7]), ("parts", [2, 7])):
        for stop in stops:
            run = small_run("bird_attn2", drawn_folder, encoders, tmp_path / name, *more, "TRAIN.MAX_STEPS", stop)
            assert main([*run, "--continue"]) == 0
    whole, parts = (
        load_checkpoint(next((tmp_path / name).glob("*/checkpoints/last.pth"))) for name in ("whole", "parts")
    )
    for content in (whole, parts):
        content.pop("config")
    assert_same_state(whole, parts)
    assert whole["system"]["lecam/steps"] == 7 and whole["system"]["ada/steps"] == 3
    assert {"lecam/real_8", "lecam/fake_32"} <= whole["system"].keys()


def test_galip_stops_and_resumes_with_all_of_it(drawn_folder, tmp_path):
    overrides = tiny_overrides(drawn_folder, "", tmp_path) | UNTRAINED | SWITCHES
    last = trains_resumes_and_samples("cfg/bird_galip.yml", "galip", overrides)
    assert last["system"]["lecam/steps"] == 5 and last["system"]["ada/steps"] == 1


def _filled(images, value):
    return (
        [torch.full_like(scale, value) for scale in images]
        if isinstance(images, list)
        else torch.full_like(images, value)
    )
