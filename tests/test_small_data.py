"""LeCam and ADA: averages, controller and losses by hand; runs that resume, also with micro-batches; what is refused."""

import pytest
import torch
from test_projected_systems import TINY, system_of
from test_trainer import assert_same_state, final_state, stats_of, trained_whole_and_in_parts
from tiny_systems import make_batch

from miscc.augment import augmentation
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError
from models.small_data import AugmentationControl, LogitAverages
from training.guard import go_back
from training.trainer import Trainer, train

CPU = World(0, 1, torch.device("cpu"))
BOTH = (
    ("TRAIN.LECAM", "0.3"), ("TRAIN.LECAM_WARMUP", "2"), ("TRAIN.AUGMENT", "translation,cutout"), ("TRAIN.ADA", "0.6"),
    ("TRAIN.ADA_IMAGES", "64"),
)  # fmt: skip
# Signs of the first steps lie below 0.6: with a target of almost none, p rises.
RISES = (*BOTH, ("TRAIN.ADA", "1e-6"))


def logits_of(real, fake):
    return {"logits/real": torch.tensor(real), "logits/fake": torch.tensor(fake)}


# -- LeCam ---------------------------------------------------------------------------------------------------------


def test_averages_by_hand():
    averages = LogitAverages({"discriminator": ("real", "fake")}, warmup=2)
    averages.update(logits_of(2.0, -1.0))
    assert averages.of("discriminator") is None, "one step of a warm-up of two"
    averages.update(logits_of(4.0, 9.0))

    # 0.99 · 2 + 0.01 · 4; 0.99 · -1 + 0.01 · 9
    real, fake = averages.of("discriminator")
    assert real.item() == pytest.approx(2.02) and fake.item() == pytest.approx(-0.9)


def test_without_a_warm_up_the_first_step_has_no_average_yet():
    assert LogitAverages({"discriminator": ("real", "fake")}, warmup=0).of("discriminator") is None


@pytest.mark.parametrize("kind", ["ssa", "df"])
def test_each_discriminator_is_held_to_its_own_averages(kind):
    system = system_of(kind, "both", lecam_weight=0.5, lecam_warmup=1)
    batch, noise = make_batch(), torch.randn(4, 8)
    assert set(system.observed) == {f"logits/{p}{name}" for p in ("", "projected_") for name in ("real", "fake")}
    assert not [name for update in system.updates(batch, noise) for name in update.losses if "lecam" in name]

    means = {"logits/real": 1.0, "logits/fake": -3.0, "logits/projected_real": 2.0, "logits/projected_fake": -5.0}
    system.observe({name: torch.tensor(value) for name, value in means.items()}, 4)
    losses = {}
    for update in system.updates(batch, noise):
        losses |= {name: (update.optimizer, value) for name, value in update.losses.items()}
    assert losses["lecam"][0] == "discriminator" and losses["projected_lecam"][0] == "projected"

    # Half of (D(x) + 3)² + (D(G(z)) - 1)²: real pairs to the average of fake ones, and the other way round.
    text = system.text_encoder(batch.captions, batch.lengths)
    with torch.no_grad():
        seen = system.seen(batch, system.generator(noise, text).images[-1])
        real, fake = (system.discriminator(images, text.sentence) for images in (seen.real, seen.fake))
    expected = 0.5 * ((real + 3).square().mean() + (fake - 1).square().mean())
    assert losses["lecam"][1].item() == pytest.approx(expected.item(), rel=1e-3)
    assert losses["lecam"][1].requires_grad


# -- ADA -----------------------------------------------------------------------------------------------------------


def test_p_rises_where_d_is_surer_than_the_target_and_falls_where_it_is_not():
    control = AugmentationControl(target=0.6, num_images=400)
    for sign in (1.0, 1.0, 0.5):
        control.update(torch.tensor(sign), batch_size=10)
        assert control.p == 0, "four steps decide together"
    control.update(torch.tensor(0.5), 10)  # r = 0.75
    assert control.p.item() == pytest.approx(4 * 10 / 400)

    for _ in range(4):
        control.update(torch.tensor(1.0), 10)
    assert control.p.item() == pytest.approx(0.2)
    for sign in (1.0, 1.0, 0.3, 0.0):  # r = 0.575
        control.update(torch.tensor(sign), 10)
    assert control.p.item() == pytest.approx(0.1)


def test_p_stays_between_0_and_1():
    control = AugmentationControl(target=0.5, num_images=30)
    for sign, expected in ((0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0)):
        for _ in range(4):
            control.update(torch.tensor(sign), batch_size=10)
        assert control.p == expected


def test_a_share_of_the_images_is_augmented_the_same_for_real_and_fake():
    images = torch.ones(200, 3, 16, 16)
    draw = (("cutout",), 1, 5, list(range(200)))
    plain = augmentation(*draw)(images)
    share = augmentation(*draw, torch.tensor(0.25))
    real, fake = share(images), share(2 * images)

    changed = (real != images).flatten(1).any(dim=1)
    assert 30 < changed.sum() < 70 and torch.equal(fake, 2 * real)
    assert torch.equal(real[changed], plain[changed]), "the draws are those of every image"
    assert torch.equal(augmentation(*draw, torch.tensor(0.0))(images), images)
    assert torch.equal(augmentation(*draw, torch.tensor(1.0))(images), plain)


@pytest.mark.parametrize(
    "mode, sign", [("paper", "sign/real"), ("both", "sign/real"), ("projected", "sign/projected_real")]
)
def test_the_sign_that_controls_is_the_papers_where_there_is_one(mode, sign):
    system = system_of("df", mode, augment="cutout", ada_target=0.6, ada_images=16)
    assert system.observed == [sign]
    images = torch.ones(4, 3, 16, 16)
    assert torch.equal(system.seen(make_batch(), images).fake, images), "p is 0 at first"
    for _ in range(4):
        system.observe({sign: torch.tensor(1.0)}, 4)
    *_, update = system.updates(make_batch(), torch.randn(4, 8))
    assert update.stats["augment/p"] == 1
    assert not torch.equal(system.seen(make_batch(), images).fake, images)


# -- in a training -------------------------------------------------------------------------------------------------


def test_off_by_default():
    system = system_of("ssa", "both")
    assert not system.observed and not system.state()


def test_stopping_in_the_middle_of_four_steps_and_resuming_changes_nothing(tiny, tmp_path):
    """With micro-batches; the averages are those of the whole batch, which the log has."""
    extra = (*RISES, ("GAN.DISCRIMINATOR", "both"), ("TRAIN.ACCUMULATE", "2"), *TINY)
    whole, parts = trained_whole_and_in_parts(tiny, tmp_path, 6, *extra)
    assert_same_state(final_state(whole), final_state(parts))
    lines, state = stats_of(whole), final_state(whole)["system"]
    assert [("loss/lecam" in line, "loss/projected_lecam" in line) for line in lines] == [(False,) * 2] * 2 + [
        (True,) * 2
    ] * 8
    for kind in ("real", "fake", "projected_real", "projected_fake"):
        average = lines[0][f"logits/{kind}"]
        for line in lines[1:]:
            average = 0.99 * average + 0.01 * line[f"logits/{kind}"]
        assert state[f"lecam/{kind}"] == pytest.approx(average, abs=1e-4)

    # p as the log has it: 0 in four steps, then by half up or down, as the signs say.
    p = 0.0
    for start in (0, 4, 8):
        window = lines[start : start + 4]
        assert [line["augment/p"] for line in window] == [p] * len(window)
        mean = sum(line["sign/real"] for line in window) / 4
        p = min(1.0, max(0.0, p + (0.5 if mean > 1e-6 else -0.5))) if len(window) == 4 else p
    assert any(line["augment/p"] > 0 for line in lines), "p moves in this training"
    assert state["ada/p"] == p and state["ada/steps"] == 2


def test_a_rollback_goes_back_to_the_state_of_its_checkpoint(tiny, tmp_path):
    from miscc.errors import CollapseError

    settings = (*BOTH, ("TRAIN.ON_COLLAPSE", "rollback"), ("TRAIN.MAX_STEPS", "3"))
    train(tiny(*settings), CPU)
    from training.run_dir import RunDir

    run = RunDir(tmp_path / "output" / "00000-tiny-ssa_gan")
    trainer = Trainer(tiny(*settings), CPU, run.load())
    kept = trainer.system.state()
    assert kept["lecam/steps"] == 3
    trainer.system.observe(logits_of(5.0, 5.0) | {"sign/real": torch.tensor(1.0)}, 8)
    assert trainer.system.state() != kept

    silent = type("Silent", (), {"warn": lambda *arguments: None})()
    start = go_back(trainer, CollapseError("a loss was not finite"), run, silent)
    assert Trainer(tiny(*settings), CPU, *start).system.state() == kept


def test_a_checkpoint_without_the_state_starts_it_anew(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    checkpoint = load_checkpoint(tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth")
    for content in (checkpoint, {name: value for name, value in checkpoint.items() if name != "system"}):
        assert Trainer(tiny(*BOTH), CPU, content).system.state() == {
            "lecam/steps": 0, "ada/p": 0.0, "ada/sum": 0.0, "ada/steps": 0,
        }  # fmt: skip


@pytest.mark.parametrize(
    "state",
    [
        {"lecam/steps": 2, "lecam/real": 1.0},
        {"lecam/steps": 2, "lecam/real": 1.0, "lecam/fake": float("nan")},
        {"lecam/steps": 2.5},
        {"ada/p": 1.5, "ada/sum": 0.0, "ada/steps": 0},
        {"ada/p": 0.5, "ada/sum": "0", "ada/steps": 0},
        {"ada/p": 0.5, "ada/sum": 0.0, "ada/steps": 4},
        {"ada/p": True, "ada/sum": 0.0, "ada/steps": 0},
        {"ada/p": torch.ones(2), "ada/sum": 0.0, "ada/steps": 0},
    ],
)
def test_a_damaged_state_is_refused_in_one_line(state):
    system = system_of("df", "paper", augment="cutout", ada_target=0.6, lecam_weight=1.0)
    with pytest.raises(CheckpointError, match=r"system is damaged \((lecam|ada)/\w+ is .*\); use another checkpoint"):
        system.restore(state)


@pytest.mark.parametrize(
    "changes, said",
    [
        ([("TRAIN.ADA", "0.6")], "TRAIN.ADA: .* without TRAIN.AUGMENT; set that"),
        ([("TRAIN.ADA", "1"), ("TRAIN.AUGMENT", "cutout")], "TRAIN.ADA: must be below 1"),
        ([("TRAIN.ADA_IMAGES", "0")], "TRAIN.ADA_IMAGES: must be greater than 0"),
        ([("TRAIN.LECAM", "-1")], "TRAIN.LECAM: must not be negative"),
        ([("TRAIN.LECAM_WARMUP", "1.5")], "TRAIN.LECAM_WARMUP: must be a whole number"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes, said, tiny):
    with pytest.raises(ConfigError, match=said):
        tiny(*changes)
