"""LeCam and ADA against values worked out by hand; their memory in checkpoints; off, they change nothing."""

import pytest
import torch
from test_trainer import assert_same_state, final_state, stats_of

from miscc.augment import augmentation
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError
from miscc.losses import lecam_loss
from models.small_data import AugmentationController, LogitAverages
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))
BOTH = [
    ("GAN.DISCRIMINATOR", "both"), ("GAN.PROJECTED.INPUT", "32"), ("GAN.PROJECTED.WIDTH", "2"),
    ("TRAIN.AUGMENT", "translation,cutout"), ("TRAIN.ADA", "0.1"), ("TRAIN.ADA_IMAGES", "100"),
    ("TRAIN.LECAM", "0.5"), ("TRAIN.LECAM_FROM", "2"), ("TRAIN.MAX_STEPS", "9"),
]  # fmt: skip


# -- LeCam ---------------------------------------------------------------------------------------------------------


def test_lecam_by_hand():
    """Averages 2 and -1: real 1, 3 are 2 and 4 from -1, mean square 10; fake -1, 1 are 3 and 1 from 2, mean square 5."""
    loss = lecam_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 1.0]), torch.tensor(2.0), torch.tensor(-1.0))
    assert loss.item() == 15.0


def test_averages_are_of_whole_steps_and_of_former_ones():
    averages = LogitAverages()

    # Two micro-batches: real 1 and 5, fake 0 and -2. There is no former step to hold them against.
    for real, fake in ((1.0, 0.0), (5.0, -2.0)):
        averages.add(0, torch.full((2, 3), real), torch.full((2,), fake))
        assert averages.loss(torch.ones(2), torch.ones(2)).item() == 0
    averages.add(1, torch.full((2,), 13.0), torch.full((2,), 9.0))
    assert averages.averages.tolist() == [3.0, -1.0]  # of step 0

    # 0.99 · (3, -1) + 0.01 · (13, 9)
    averages.add(2, torch.zeros(2), torch.zeros(2))
    assert averages.averages.tolist() == pytest.approx([3.1, -0.9])
    # (1 + 0.9)² + (1 - 3.1)²
    assert averages.loss(torch.ones(2), torch.ones(2)).item() == pytest.approx(1.9**2 + 2.1**2)


# -- ADA -----------------------------------------------------------------------------------------------------------


def probabilities(signs, target=0.5, num_images=64, batch=4):
    """p at the start of each step, and after the last, for D's mean signs of its steps."""
    controller, found = AugmentationController(target, num_images), []
    for step, sign in enumerate(signs):
        found.append(controller.begin(step, CPU.device).item())
        positive = round(batch * (1 + sign) / 2)
        controller.add(step, torch.tensor([3.0] * positive + [-3.0] * (batch - positive)))
    return [*found, controller.begin(len(signs), CPU.device).item()]


def test_the_probability_rises_where_d_is_too_sure_and_falls_where_it_is_not():
    """Four steps of four images are 16 of 64: a quarter up, a quarter up, a quarter down."""
    assert probabilities([1, 1, 1, 1, 1, 1, 1, 0.5, 0, 0, 0, 0]) == [0] * 4 + [0.25] * 4 + [0.5] * 4 + [0.25]


def test_the_probability_stays_within_0_and_1():
    assert max(probabilities([1] * 40)) == 1.0
    assert set(probabilities([-1] * 12)) == {0.0}


def test_all_none_or_some_images_are_augmented_real_and_fake_alike():
    images = torch.rand(64, 3, 16, 16) + 1
    always = augmentation(("cutout",), 0, 5, range(64))(images)
    chosen = [augmentation(("cutout",), 0, 5, range(64), torch.tensor(p)) for p in (0.0, 0.5, 1.0)]

    assert torch.equal(chosen[0](images), images) and torch.equal(chosen[2](images), always)
    is_augmented = (chosen[1](images) != images).flatten(1).any(dim=1)
    assert 16 < is_augmented.sum() < 48
    assert torch.equal(chosen[1](images)[is_augmented], always[is_augmented])
    assert torch.equal((chosen[1](2 * images) != 2 * images).flatten(1).any(dim=1), is_augmented)


def test_ada_without_augmentation_is_refused(tiny):
    with pytest.raises(ConfigError, match="TRAIN.ADA: needs TRAIN.AUGMENT"):
        train(tiny(("TRAIN.ADA", "0.6")), CPU)


# -- in a training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["ssa_gan", "df_gan"])
def test_a_resumed_training_remembers_both(tiny, tmp_path, system):
    """Stopped between two changes of the probability; with micro-batches; bit for bit."""
    extra = [*BOTH, ("GAN.NAME", system), ("TRAIN.ACCUMULATE", "2"), ("TRAIN.DAMSM_WEIGHT", "0")]
    train(tiny(*extra), CPU)
    other = ("OUTPUT_DIR", str(tmp_path / "other"))
    train(tiny(*extra, other, ("TRAIN.MAX_STEPS", "6")), CPU)
    train(tiny(*extra, other), CPU, resume=True)

    whole, parts = (next((tmp_path / name).glob("00000-*")) for name in ("output", "other"))
    assert_same_state(final_state(whole), final_state(parts))
    rows = stats_of(whole)
    assert [row["ada/probability"] for row in rows] == [row["ada/probability"] for row in stats_of(parts)]
    assert len({row["ada/probability"] for row in rows}) > 1
    for name in ("loss/lecam", "loss/projected_lecam"):
        assert name not in rows[1] and rows[2][name] > 0

    memory = load_checkpoint(whole / "checkpoints" / "last.pth")["objective"]
    assert set(memory["lecam"]) == {"discriminator", "projected"} and memory["ada"]["num_steps"] == 0


def test_a_training_without_them_remembers_nothing(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    checkpoint = load_checkpoint(tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth")
    assert checkpoint["objective"] == {}


@pytest.mark.parametrize(
    "damaged",
    [
        {"ada": {}},
        {"ada": {"probability": float("nan")}},
        {"lecam": 3},
        {"lecam": {"discriminator": {"averages": [1]}}},
    ],
)
def test_a_damaged_memory_is_refused_in_one_line(tiny, tmp_path, damaged):
    train(tiny(*BOTH, ("TRAIN.MAX_STEPS", "1")), CPU)
    path = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    checkpoint = load_checkpoint(path)
    if "ada" in damaged:
        damaged = {"ada": {**checkpoint["objective"]["ada"], **damaged["ada"]} if damaged["ada"] else {}}
    save_checkpoint(path, checkpoint | {"objective": damaged})
    with pytest.raises(CheckpointError, match="memory of LeCam or ADA is damaged"):
        train(tiny(*BOTH), CPU, resume=True)
