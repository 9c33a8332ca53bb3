"""Training with a projected discriminator: which networks there are and who moves, its losses by hand, runs that resume."""

import pytest
import torch
import torch.nn.functional as F
from test_distributed import torchrun
from test_trainer import assert_same_state, final_state, stats_of, trained_whole_and_in_parts
from tiny_systems import changed_by_a_step, make_batch, make_networks

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import ConfigError
from models.backbones import efficientnet_lite_file
from models.df_gan import DFGAN, DFDiscriminator, DFGenerator
from models.layers import OneWayDiscriminator
from models.projected import ProjectedDiscriminator
from models.ssa_gan import SSAGAN, SSAGenerator
from training.dry_run import describe
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))
TINY = (("GAN.PROJECTED.INPUT", "32"), ("GAN.PROJECTED.WIDTH", "4"))


def system_of(kind: str, mode: str, **settings):
    """A tiny SSA-GAN or DF-GAN without DAMSM's loss."""
    sizes = {"nf": 2, "image_size": 16}
    if kind == "ssa":
        generator, discriminator = SSAGenerator(z_dim=8, **sizes), OneWayDiscriminator(**sizes)
    else:
        generator, discriminator = DFGenerator(z_dim=8, **sizes), DFDiscriminator(**sizes)
    networks = make_networks(generator, discriminator)
    networks["projected"] = ProjectedDiscriminator(input_size=32, width=4)
    if kind == "ssa":
        settings["damsm_weight"] = 0.0
    cls = SSAGAN if kind == "ssa" else DFGAN
    parts = [*cls.parts(cls.Settings(discriminator=mode, **settings)), "text_encoder"]
    system = cls({part: networks[part] for part in parts}, discriminator=mode, **settings)
    system.train()
    return system


@pytest.mark.parametrize("kind", ["ssa", "df"])
def test_each_update_moves_its_own_network_alone(kind):
    history = changed_by_a_step(system_of(kind, "both"), make_batch(), torch.randn(4, 8))

    assert [name for name, *_ in history if name != "discriminator"] == ["projected", "generator"]
    for name, _, moved, touched in history:
        assert moved == {name} and touched == {name}, "no gradient reaches another network"
    assert history[-1][1] == ["adversarial", "projected_adversarial"]


@pytest.mark.parametrize("kind", ["ssa", "df"])
def test_projected_alone_has_no_penalty_and_no_paper_discriminator(kind):
    system = system_of(kind, "projected")
    assert "discriminator" not in system.networks

    history = changed_by_a_step(system, make_batch(), torch.randn(4, 8))

    assert [(name, losses) for name, losses, *_ in history] == [
        ("projected", ["projected_hinge"]), ("generator", ["projected_adversarial"]),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["ssa", "df"])
@pytest.mark.parametrize(
    ("joining", "first", "late"),
    [("steps_alone", "projected", "discriminator"), ("projected_joins", "paper", "projected")],
)
def test_a_discriminator_joins_after_its_steps(kind, joining, first, late):
    """Until then all is as with the other alone, bit for bit, and it stays as it was."""
    system, alone = system_of(kind, "both", **{joining: 5}), system_of(kind, first)
    for part, network in alone.networks.items():
        network.load_state_dict(system.networks[part].state_dict())
    batch, noise = make_batch(), torch.randn(4, 8)
    before = [parameter.clone() for parameter in system.networks[late].parameters()]

    system.step = alone.step = 4
    assert changed_by_a_step(system, batch, noise) == changed_by_a_step(alone, batch, noise)
    for part in alone.networks:
        both = (one.networks[part].parameters() for one in (system, alone))
        assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
    after = system.networks[late].parameters()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))

    system.step = 5
    history = changed_by_a_step(system, batch, noise)
    assert {name for name, *_ in history} == {"discriminator", "projected", "generator"}
    assert history[-1][1] == ["adversarial", "projected_adversarial"]


@pytest.mark.parametrize("joining", ["steps_alone", "projected_joins"])
def test_joining_means_nothing_for_one_discriminator(joining):
    for mode in ("paper", "projected"):
        system = system_of("ssa", mode, **{joining: 5})
        names = {name for name, *_ in changed_by_a_step(system, make_batch(), torch.randn(4, 8))}
        assert names == {"generator", "projected" if mode == "projected" else "discriminator"}


@pytest.mark.parametrize("joining", ["steps_alone", "projected_joins"])
@pytest.mark.parametrize(("steps", "every", "expected"), [(0, 1, 0), (0, 4, 0), (5, 1, 5), (5, 4, 8), (8, 4, 8)])
def test_a_training_is_measured_by_a_step_with_both_discriminators_and_the_penalty(joining, steps, every, expected):
    system = system_of("ssa", "both", **{joining: steps}, penalty_every=every)
    assert system.fullest_step == expected
    system.step = expected
    assert [name for name, *_ in changed_by_a_step(system, make_batch(), torch.randn(4, 8))] == [
        "discriminator", "discriminator", "projected", "generator",
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["GAN.PROJECTED.STEPS_ALONE", "GAN.PROJECTED.JOINS"])
@pytest.mark.parametrize("changes", [("TRAIN.LECAM", "0.1"), ("TRAIN.ADA", "0.6")])
def test_statistics_of_both_from_the_first_step_on_do_not_go_with_a_discriminator_that_joins(tiny, changes, key):
    extra = (("GAN.DISCRIMINATOR", "both"), ("TRAIN.AUGMENT", "cutout"), (key, "5"), *TINY)
    with pytest.raises(ConfigError, match=f"{key}: TRAIN.LECAM and TRAIN.ADA follow the logits of both"):
        train(tiny(*extra, changes), CPU)


def test_two_discriminators_do_not_wait_for_each_other(tiny):
    joining = (("GAN.PROJECTED.STEPS_ALONE", "5"), ("GAN.PROJECTED.JOINS", "5"))
    with pytest.raises(ConfigError, match="GAN.PROJECTED.JOINS: with STEPS_ALONE either"):
        train(tiny(("GAN.DISCRIMINATOR", "both"), *joining, *TINY), CPU)


@pytest.mark.parametrize(
    ("mode", "joins", "last_step", "expected"),
    [
        ("both", 5, 6, []),
        ("both", 0, 6, []),
        (
            "both",
            6,
            6,
            ["GAN.PROJECTED.JOINS: the projected discriminator never joins, as the training ends at step 6"],
        ),
        ("paper", 5, 6, ["GAN.PROJECTED.JOINS: 5 has no effect, as GAN.DISCRIMINATOR is not both"]),
        ("projected", 0, 6, []),
    ],
)
def test_a_discriminator_that_never_joins_is_named(mode, joins, last_step, expected):
    assert system_of("ssa", mode, projected_joins=joins).remarks(last_step) == expected


def test_a_training_names_what_comes_to_nothing(tiny, capsys):
    extra = (("GAN.DISCRIMINATOR", "both"), ("GAN.PROJECTED.STEPS_ALONE", "2"), ("TRAIN.MAX_STEPS", "2"), *TINY)
    train(tiny(*extra), CPU)
    remark = "GAN.PROJECTED.STEPS_ALONE: the paper's discriminator never joins, as the training ends at step 2"
    assert f"warning: {remark}" in capsys.readouterr().err.splitlines()


def test_the_paper_discriminator_is_the_default():
    assert list(SSAGAN.parts(SSAGAN.Settings())) == ["generator", "discriminator"]


def test_hinge_over_the_logits_of_all_heads():
    system = system_of("ssa", "projected")
    batch, sentence = make_batch(), torch.randn(4, 256)
    fake = torch.rand(4, 3, 16, 16)
    network = system.networks["projected"].eval()  # no power iteration between the two computations
    with torch.no_grad():
        real_logits, fake_logits = network(batch.images, sentence), network(fake, sentence)
        mismatched = network(batch.images, sentence[[1, 2, 3, 0]])
        expected = F.relu(1 - real_logits).mean() + (F.relu(1 + fake_logits).mean() + F.relu(1 + mismatched).mean()) / 2

        seen = system.seen(batch, fake)
        (update,) = system.projected_updates(seen, sentence)
        generator = system.adversarial_losses(seen, sentence)

    assert update.losses["projected_hinge"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert generator["projected_adversarial"].item() == pytest.approx(-fake_logits.mean().item(), rel=1e-5)


def test_weight_of_the_projected_discriminator_in_g():
    batch, noise = make_batch(), torch.randn(4, 8)
    losses = []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        *_, update = system_of("df", "projected", projected_weight=weight).updates(batch, noise)
        losses.append(update.losses["projected_adversarial"].item())
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["ssa", "df"])
def test_a_lazy_penalty_comes_every_so_many_steps_and_weighs_as_much_more(kind):
    batch, noise = make_batch(), torch.randn(4, 8)

    def penalties(every, step):
        torch.manual_seed(0)
        system = system_of(kind, "paper", penalty_every=every)
        system.step = step
        return [u.losses["penalty"].item() for u in system.updates(batch, noise) if "penalty" in u.losses]

    (each_step,) = penalties(1, 7)
    assert penalties(4, 7) == []
    assert penalties(4, 8) == pytest.approx([4 * each_step], rel=1e-4)


@pytest.mark.parametrize("kind", ["ssa", "df"])
def test_diversity_is_a_loss_of_the_generator_alone_and_off_by_default(kind):
    batch, noise = make_batch(), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def losses(**settings):
        torch.manual_seed(0)
        system = system_of(kind, "paper", **settings)
        torch.manual_seed(1)  # of dropout and augmentation
        return [(update.kind, dict(update.losses)) for update in system.updates(batch, noise)]

    plain, diverse = losses(), losses(diversity_weight=0.5)
    assert [kind for kind, _ in diverse if "diversity" in _] == ["generator"] == [plain[-1][0]]
    value = diverse[-1][1].pop("diversity")
    assert value > 0 and value.requires_grad
    assert [(kind, sorted(both)) for kind, both in plain] == [(kind, sorted(both)) for kind, both in diverse]
    assert all(torch.equal(plain[-1][1][name], diverse[-1][1][name]) for name in plain[-1][1])
    assert losses(diversity_weight=1.0)[-1][1]["diversity"].item() == pytest.approx(2 * value.item(), rel=1e-5)


def test_all_discriminators_and_both_steps_see_the_same_augmentation():
    system = system_of("ssa", "both", augment="translation,cutout")
    batch = make_batch()
    seen = system.seen(batch._replace(images=torch.ones(4, 3, 16, 16)), torch.full((4, 3, 16, 16), 2.0))
    assert torch.equal(seen.fake, 2 * seen.real) and 0 < seen.real.mean() < 1
    system.step += 1
    other = system.seen(batch._replace(images=torch.ones(4, 3, 16, 16)), torch.ones(4, 3, 16, 16))
    assert not torch.equal(other.real, seen.real)


@pytest.mark.parametrize("mode", ["projected", "both"])
def test_stopping_and_resuming_changes_nothing(tiny, tmp_path, mode):
    extra = [("GAN.DISCRIMINATOR", mode), ("TRAIN.AUGMENT", "translation,cutout"), ("TRAIN.PENALTY_EVERY", "2"), *TINY]
    extra += [("TRAIN.LR_DECAY_FROM", "0.5"), ("TRAIN.EMA_SHARE", "0.2"), ("GAN.PROJECTED.BATCH_STATISTIC", "True")]
    train(tiny(*extra), CPU)
    other = ("OUTPUT_DIR", str(tmp_path / "other"))
    # The schedule follows MAX_STEPS; so the first part is ended by its signal's stand-in, a lower limit, before it decays.
    train(tiny(*extra, other, ("TRAIN.MAX_STEPS", "3"), ("TRAIN.LR_DECAY_FROM", "1")), CPU)
    train(tiny(*extra, other), CPU, resume=True)

    whole, parts = (tmp_path / name / "00000-tiny-ssa_gan" for name in ("output", "other"))
    assert_same_state(final_state(whole), final_state(parts))
    assert "loss/projected_hinge" in stats_of(whole)[0]
    held = load_checkpoint(whole / "checkpoints" / "last.pth")["networks"]
    assert ("discriminator" in held) == (mode == "both")
    assert not [name for name in held["projected"]["state"] if name.startswith("backbone")]


@pytest.mark.parametrize(
    ("key", "late"), [("GAN.PROJECTED.STEPS_ALONE", "hinge"), ("GAN.PROJECTED.JOINS", "projected_hinge")]
)
def test_a_run_that_stops_before_a_discriminator_joins_resumes_exactly(tiny, tmp_path, key, late):
    extra = (("GAN.DISCRIMINATOR", "both"), (key, "3"), ("TRAIN.MAX_STEPS", "6"), *TINY)
    whole, parts = trained_whole_and_in_parts(tiny, tmp_path, 2, *extra)
    assert_same_state(final_state(whole), final_state(parts))
    assert [f"loss/{late}" in line for line in stats_of(whole)] == [False] * 3 + [True] * 3


def test_a_run_keeps_its_kind_of_discriminator(tiny):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    with pytest.raises(ConfigError, match="GAN.DISCRIMINATOR: the run was started with paper, not both"):
        train(tiny(("GAN.DISCRIMINATOR", "both"), *TINY), CPU, resume=True)


def test_weights_of_the_papers_discriminator_have_no_use_without_it(tiny, encoders):
    cfg = tiny(("GAN.DISCRIMINATOR", "projected"), ("TRAIN.NET_D", str(encoders)), *TINY)
    with pytest.raises(ConfigError, match="TRAIN.NET_D: no discriminator of the paper's kind .* paper or both"):
        train(cfg, CPU)


def test_a_training_goes_on_from_networks_whose_backbone_file_has_moved(tiny, tmp_path):
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    first.write_bytes(efficientnet_lite_file("efficientnet-lite0").read_bytes())
    projected = (("GAN.DISCRIMINATOR", "projected"), ("TRAIN.MAX_STEPS", "1"), *TINY)
    train(tiny(("GAN.PROJECTED.WEIGHTS", str(first)), *projected), CPU)
    (run,) = (tmp_path / "output").iterdir()

    first.rename(second)
    start = ("TRAIN.NET_G", str(run / "checkpoints" / "last.pth"))
    assert train(tiny(("GAN.PROJECTED.WEIGHTS", str(second)), start, *projected), CPU) == 0


def test_micro_batches_and_dry_run(tiny, tmp_path):
    cfg = tiny(("GAN.DISCRIMINATOR", "both"), ("TRAIN.ACCUMULATE", "2"), ("TRAIN.MAX_STEPS", "2"), *TINY)
    assert train(cfg, CPU) == 0
    report = describe(cfg)
    assert "projected: " in report and "memory: about" in report


def test_minutes_end_a_run_and_are_counted_over_a_resume(tiny, tmp_path, monkeypatch):
    from training import schedule

    now = [0.0]

    def clock():
        now[0] += 1.0  # each reading takes a second
        return now[0]

    monkeypatch.setattr(schedule.Budget.__init__, "__defaults__", (0.0, 0.0, clock))
    cfg = tiny(("TRAIN.MAX_EPOCH", "1000"), ("TRAIN.MAX_MINUTES", "0.5"), ("TRAIN.SAMPLE_EVERY", "0"))
    assert train(cfg, CPU) == 0
    run = tmp_path / "output" / "00000-tiny-ssa_gan"
    first = load_checkpoint(run / "checkpoints" / "last.pth")
    assert 30 <= first["seconds"] < 40 and 0 < first["step"] < 30

    more = tiny(("TRAIN.MAX_EPOCH", "1000"), ("TRAIN.MAX_MINUTES", "1"), ("TRAIN.SAMPLE_MINUTES", "0.2"))
    assert train(more, CPU, resume=True) == 0
    second = load_checkpoint(run / "checkpoints" / "last.pth")
    assert 60 <= second["seconds"] < 70 and second["step"] > first["step"]
    assert len(list((run / "pictures").iterdir())) >= 3, "one at each end, and one every 12 seconds"
    assert "minutes used" in (run / "log.txt").read_text()


def test_two_processes_train_one_model(tiny_yaml, tiny, tmp_path):
    options = [value for pair in (("GAN.DISCRIMINATOR", "both"), ("TRAIN.AUGMENT", "cutout"), *TINY) for value in pair]
    options += ["TRAIN.LECAM", "0.1"]
    torchrun("main.py", "--cfg", tiny_yaml, "--gpu", "-1", "--set", "TRAIN.MAX_STEPS", "2", *options)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    train(tiny(("TRAIN.MAX_STEPS", "1"), ("OUTPUT_DIR", str(tmp_path / "alone")), *pairs), CPU)

    # Heads see each image alone: its logits do not depend on how the batch is shared out, nor does its augmentation.
    first, alone = (stats_of(tmp_path / name / "00000-tiny-ssa_gan")[0] for name in ("output", "alone"))
    for name in ("logits/real", "logits/projected_real"):
        assert first[name] == pytest.approx(alone[name], abs=1e-5)

    # LeCam's averages are those of the whole batch, which the log has.
    run = tmp_path / "output" / "00000-tiny-ssa_gan"
    state, (_, second) = load_checkpoint(run / "checkpoints" / "last.pth")["system"], stats_of(run)
    for kind in ("real", "projected_fake"):
        average = 0.99 * first[f"logits/{kind}"] + 0.01 * second[f"logits/{kind}"]
        assert state[f"lecam/{kind}"] == pytest.approx(average, abs=1e-5)
