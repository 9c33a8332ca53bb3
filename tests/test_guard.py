"""Trainings made to fail: what the guard says, that it stops or goes back on request, and that resuming changes nothing."""

import copy
import json

import pytest
import torch

from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, TrainingError
from models.ssa_gan import SSAGenerator
from models.types import Update
from training.guard import Guard, Rollback, choose_checkpoint, is_before, rate_factor, remedies, seed_after
from training.run_dir import RunDir
from training.trainer import Trainer, train
from training.watch import Finding, WatchSettings

CPU = World(0, 1, torch.device("cpu"))
WATCH = (("TRAIN.WATCH.EVERY", "2"), ("TRAIN.WATCH.PATIENCE", "2"), ("TRAIN.SAVE_EVERY", "4"), ("TRAIN.MAX_EPOCH", "9"))
# D moves a hundred times as fast as it should, without a penalty; logits at 16 px and nf 1 lie closer together than usual.
D_WINS = (("TRAIN.DISCRIMINATOR_LR", "0.02"), ("TRAIN.PENALTY_WEIGHT", "0"), ("TRAIN.WATCH.LOGIT_GAP", "1"),
          ("TRAIN.WATCH.ACCURACY", "0.5"), ("TRAIN.MAX_STEPS", "24"))  # fmt: skip
PENALTY_EXPLODES = (("TRAIN.DISCRIMINATOR_LR", "0.1"), ("TRAIN.MAX_STEPS", "12"))
COLLAPSES = (("TRAIN.MAX_STEPS", "24"),)


def run_of(tmp_path, name="output"):
    return RunDir(tmp_path / name / "00000-tiny-ssa_gan")


def stats_of(run):
    return [json.loads(line) for line in run.stats.read_text().splitlines()]


def warnings_of(run):
    return [line.partition("warning: ")[2] for line in run.log.read_text().splitlines() if "warning: " in line]


@pytest.fixture
def one_image(monkeypatch):
    """From step 14 on G draws one image of a caption, whatever the noise, until a rollback."""
    forward, step = SSAGenerator.forward, Trainer.train_step
    collapsed = []

    def ignoring_noise(self, noise, text):
        return forward(self, torch.zeros_like(noise) if collapsed else noise, text)

    def watching(self, *arguments):
        collapsed[:] = [True] * (self.step >= 14 and not self.guard.rollbacks)
        return step(self, *arguments)

    monkeypatch.setattr(SSAGenerator, "forward", ignoring_noise)
    monkeypatch.setattr(Trainer, "train_step", watching)


FAILURES = {
    "discriminator": (D_WINS, "D wins outright (discriminator)", "lower TRAIN.DISCRIMINATOR_LR"),
    "penalty": (PENALTY_EXPLODES, "the gradient penalty explodes", "lower TRAIN.DISCRIMINATOR_LR"),
    "variety": (COLLAPSES, "the generator collapses: images of one caption differ by 0, usual", "TRAIN.DAMSM_WEIGHT"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_run_is_warned_of_and_goes_on(kind, tiny, tmp_path, one_image, capsys):
    settings, text, remedy = FAILURES[kind]
    assert train(tiny(*WATCH, *settings), CPU) == 0
    found = [line for line in warnings_of(run_of(tmp_path)) if text in line]
    assert found and remedy in found[0] and "rollback" not in found[0]
    assert found[0] in capsys.readouterr().err  # also with --quiet
    assert stats_of(run_of(tmp_path))[-1]["step"] == int(settings[-1][1])


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_run_stops_on_request_and_keeps_the_last_good_checkpoint(kind, tiny, tmp_path, one_image):
    settings, text, remedy = FAILURES[kind]
    with pytest.raises(TrainingError) as error:
        train(tiny(*WATCH, *settings, ("TRAIN.ON_COLLAPSE", "stop")), CPU)
    run, message = run_of(tmp_path), str(error.value)
    assert text in message and remedy in message and "\n" not in message and "stopped (TRAIN.ON_COLLAPSE)" in message

    # Neither what stands there nor what it is called has seen the failure; a penalty that explodes at once leaves nothing.
    if kind == "penalty":
        assert not run.has_state() and "checkpoint" not in message
    else:
        assert message.endswith(f"the last good checkpoint is {run.last}")
        last = load_checkpoint(run.last)
        assert last["watch"]["streaks"] == {} and last["watch"]["good"] and last["step"] < stats_of(run)[-1]["step"]


def test_d_that_wins_is_rolled_back_until_it_is_slow_enough(tiny, tmp_path):
    """After each rollback D moves half as fast, over other images and noise, until the times that are allowed are used up."""
    with pytest.raises(TrainingError, match=r"D wins outright .*; it has gone back 1 times \(TRAIN.WATCH.ROLLBACKS\)"):
        train(tiny(*WATCH, *D_WINS, ("TRAIN.ON_COLLAPSE", "rollback"), ("TRAIN.WATCH.ROLLBACKS", "1")), CPU)
    run = run_of(tmp_path)
    (rollback,) = [line for line in warnings_of(run) if "rollback" in line]
    assert "rollback 1 of 1, to step" in rollback and "all learning rates x 0.5" in rollback
    steps = [line["step"] for line in stats_of(run)]
    assert steps == list(range(1, steps[-1] + 1))  # what was given up is gone


def test_a_penalty_that_explodes_before_any_checkpoint_starts_anew(tiny, tmp_path):
    # The first step's penalty is 1.1e9, that of the first step at half the rate lower.
    settings = dict((*WATCH, *PENALTY_EXPLODES, ("TRAIN.WATCH.PENALTY", "1e9"), ("TRAIN.ON_COLLAPSE", "rollback")))
    settings |= {"TRAIN.WATCH.PATIENCE": "1", "TRAIN.MAX_STEPS": "6"}
    assert train(tiny(*settings.items()), CPU) == 0
    run = run_of(tmp_path)
    assert [rollback for rollback in warnings_of(run) if "rollback 1 of 3, to step 0;" in rollback]
    last = load_checkpoint(run.last)
    assert last["watch"]["rollbacks"] == [[2, 0, "penalty"]] and last["step"] == 6
    assert last["optimizers"]["discriminator"]["param_groups"][0]["lr"] == 0.05


def test_a_collapsed_generator_is_rolled_back_and_the_run_goes_on_to_its_end(tiny, tmp_path, one_image):
    assert train(tiny(*WATCH, *COLLAPSES, ("TRAIN.ON_COLLAPSE", "rollback")), CPU) == 0
    run = run_of(tmp_path)
    last = load_checkpoint(run.last)
    # Looks at 16 and 18 find it, the checkpoint of step 16 is withheld, that of step 15, the end of an epoch, is from before.
    assert last["watch"]["rollbacks"] == [[18, 15, "variety"]] and last["step"] == 24
    rates = {name: state["param_groups"][0]["lr"] for name, state in last["optimizers"].items()}
    assert rates == {"generator": 0.5e-4, "discriminator": 2e-4}
    assert [line["step"] for line in stats_of(run)] == list(range(1, 25))
    assert all(line["watch/variety"] > 0 for line in stats_of(run)[2:])


def test_losses_that_are_not_finite_are_rolled_back(tiny, tmp_path, monkeypatch):
    step, broken = Trainer.train_step, []

    def breaking(self, *arguments):
        if self.step == 9 and not broken:
            broken.append(True)
            self.networks["generator"].fc.weight.data[0, 0] = float("nan")
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", breaking)
    assert train(tiny(*WATCH, ("TRAIN.MAX_STEPS", "12"), ("TRAIN.ON_COLLAPSE", "rollback")), CPU) == 0
    run = run_of(tmp_path)
    (line,) = warnings_of(run)
    assert "was not finite at step 10: rollback 1 of 3, to step 8 (last.pth); all learning rates x 0.5" in line
    assert load_checkpoint(run.last)["watch"]["rollbacks"] == [[10, 8, "finite"]]


# -- resuming ------------------------------------------------------------------------------------------------------


def final_state(run):
    return {key: value for key, value in load_checkpoint(run.last).items() if key != "config"}


@pytest.mark.parametrize("stops", [(17,), (6, 16, 22)])
def test_resuming_across_rollbacks_changes_nothing(stops, tiny, tmp_path, one_image):
    """Stopped before a failure, while it is not reported yet, and after the rollback: bit for bit the run that never was."""
    from test_trainer import assert_same_state

    settings = (*WATCH, *COLLAPSES, ("TRAIN.ON_COLLAPSE", "rollback"))
    assert train(tiny(*settings), CPU) == 0
    other = (*settings, ("OUTPUT_DIR", str(tmp_path / "other")))
    for number, stop in enumerate(stops):
        train(tiny(*other, ("TRAIN.MAX_STEPS", str(stop))), CPU, resume=number > 0)
    assert train(tiny(*other), CPU, resume=True) == 0
    whole, parts = run_of(tmp_path), run_of(tmp_path, "other")
    assert_same_state(final_state(whole), final_state(parts))
    timing = {"images_per_second", "memory_mib"}
    strip = [[{k: v for k, v in line.items() if k not in timing} for line in stats_of(run)] for run in (whole, parts)]
    assert strip[0] == strip[1]


def test_another_order_and_noise_follow_a_rollback():
    assert seed_after(100, 0) == 100 and len({seed_after(100, n) for n in range(20)}) == 20
    assert [rate_factor(n) for n in range(4)] == [1, 0.5, 0.25, 0.125]


# -- what it reads -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_former_code_is_resumed(tiny, tmp_path):
    settings = (*WATCH, ("TRAIN.MAX_STEPS", "4"))
    train(tiny(*settings), CPU)
    run = run_of(tmp_path)
    before = run.load()
    save_checkpoint(run.last, {key: value for key, value in before.items() if key not in ("watch", "format")})
    trainer = Trainer(tiny(*settings), CPU, run.load())
    assert trainer.step == 4 and trainer.guard.rollbacks == [] and trainer.guard.watch.varieties == []
    assert is_before(run.load(), [Rollback(9, 4, "penalty")])


@pytest.mark.parametrize(
    "part, value", [("rollbacks", 3), ("rollbacks", [[1, 2]]), ("recent", []), ("latest", {"a": "b"})]
)
def test_a_damaged_state_is_refused_in_one_line(part, value, tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "2")), CPU)
    checkpoint = run_of(tmp_path).load()
    checkpoint["watch"][part] = value
    with pytest.raises(CheckpointError, match="watch is damaged .*; use another checkpoint"):
        Trainer(tiny(), CPU, checkpoint)


def guard_of(trainer, **settings):
    parts = (trainer.system, trainer.pictured_captions, trainer.vocabulary, trainer.seed, CPU)
    return Guard(WatchSettings(**settings), *parts, {"TRAIN.PENALTY_WEIGHT"})


def test_what_a_look_reads_by_hand(tiny):
    trainer = Trainer(tiny(), CPU)
    guard = guard_of(trainer, every=5)
    for real, fake, sign in ((1.0, -1.0, 0.0), (100.0, -2.0, 1.0), (3.0, -3.0, 0.5)):
        stats = {"logits/real": torch.tensor(real), "logits/fake": fake, "sign/real": sign, "sign/fake": -1.0, "x": 1.0}
        guard.record(Update("discriminator", {"hinge": torch.tensor(9.0)}, stats))
    guard.record(Update("discriminator", {"penalty": torch.tensor(float("inf"))}, is_penalty=True))
    guard.record(Update("discriminator", {"penalty": torch.tensor(7.0)}, is_penalty=True))
    reading = guard.read()
    # Medians: logits 3 and -2; signs 0.5 and -1, which is (2 + 0.5 + 1) / 4 told apart.
    assert reading.margins == {"discriminator": (5.0, 0.875)} and reading.penalty == 7.0
    assert guard.latest == {"watch/gap_discriminator": 5.0, "watch/penalty": 7.0, "watch/variety": reading.variety}
    assert guard.read().margins == {}  # the next look starts anew


def test_variety_by_hand(tiny, monkeypatch):
    """Two kinds of images of one caption, grey levels 0.5 apart: 4 of 6 pairs differ, or 3 where one of four does."""
    trainer = Trainer(tiny(), CPU)
    guard = guard_of(trainer)

    def drawing(*levels):
        def forward(noise, text):
            images = torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4)
            return type("Output", (), {"images": [images]})

        monkeypatch.setattr(trainer.system.generator, "forward", forward)
        return guard.variety()

    assert drawing(0.0, 0.0, 0.5, 0.5) == pytest.approx(0.5 * 4 / 6)
    assert drawing(0.0, 0.0, 0.0, 0.5) == pytest.approx(0.5 * 3 / 6)
    assert drawing(1.0, 1.0, 5.0, 5.0) == 0  # what is drawn is clamped to [-1, 1]
    assert drawing(1.0, 1.0, float("nan"), 5.0) is None


def test_looking_changes_nothing(tiny):
    trainer = Trainer(tiny(("TRAIN.FINETUNE_ENCODERS", "True"), ("TRAIN.FINETUNE_MODE", "train")), CPU)
    before = copy.deepcopy({part: network.state_dict() for part, network in trainer.networks.items()})
    modes = [module.training for network in trainer.networks.values() for module in network.modules()]
    random = torch.get_rng_state()
    assert trainer.guard.variety() == trainer.guard.variety() > 0
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for network in trainer.networks.values() for module in network.modules()]
    for part, network in trainer.networks.items():
        assert all(torch.equal(before[part][name], tensor) for name, tensor in network.state_dict().items())


def test_steps_are_the_same_with_and_without_the_watch(tiny, tmp_path):
    from test_trainer import assert_same_state

    for name, every in (("watched", "1"), ("alone", "0")):
        pairs = (("TRAIN.WATCH.EVERY", every), ("OUTPUT_DIR", str(tmp_path / name)), ("TRAIN.MAX_STEPS", "6"))
        train(tiny(*pairs), CPU)
    watched, alone = (final_state(run_of(tmp_path, name)) for name in ("watched", "alone"))
    assert watched.pop("watch") != alone.pop("watch")
    assert_same_state(watched, alone)


def test_advice_names_only_keys_that_the_system_reads(tiny):
    assert remedies("discriminator", {"TRAIN.PENALTY_WEIGHT", "GAN.DISCRIMINATOR"}) == (
        "raise TRAIN.PENALTY_WEIGHT, GAN.DISCRIMINATOR both"
    )


@pytest.mark.parametrize(
    ("kind", "key", "value", "advice"),
    [
        ("variety", "TRAIN.DIVERSITY", "0.1", "TRAIN.DIVERSITY 0.1"),
        ("variety", "GAN.DISCRIMINATOR", "both", "GAN.DISCRIMINATOR both"),
        ("discriminator", "TRAIN.AUGMENT", "cutout", "TRAIN.AUGMENT translation,cutout"),
    ],
)
def test_what_is_used_already_is_no_advice(kind, key, value, advice, tiny):
    small = (("GAN.PROJECTED.INPUT", "32"), ("GAN.PROJECTED.WIDTH", "4"))
    trainers = [Trainer(tiny(*small, *more), CPU) for more in ((), ((key, value),))]
    lines = [trainer.guard.line(Finding(kind, "it fails"), 10) for trainer in trainers]
    assert advice in lines[0] and advice not in lines[1] and all("lower TRAIN." in line for line in lines)


# -- which checkpoint ----------------------------------------------------------------------------------------------


def whole(step, rollbacks=(), streaks=(), good=True):
    return {"step": step, "watch": {"rollbacks": list(rollbacks), "streaks": dict(streaks), "good": good}}


def chosen(rollbacks, **checkpoints):
    run = type("Run", (), {"path": "run", "whole_checkpoints": lambda self: checkpoints.items()})()
    return choose_checkpoint(run, rollbacks)


def test_the_newest_good_checkpoint_is_chosen():
    assert chosen([]) is None
    assert chosen([], last=whole(9), previous=whole(5)) == "last"
    assert chosen([], last=whole(9, streaks={"penalty": 1}), previous=whole(5)) == "previous"  # the failure had begun
    assert chosen([], last=whole(9, good=False), previous=whole(5)) == "previous"  # written by a signal
    assert chosen([], last=whole(9, good=False)) == "last"
    with pytest.raises(TrainingError, match="run holds no checkpoint from before; start anew"):
        chosen([], last=whole(9, streaks={"penalty": 1}))


def test_what_a_rollback_has_given_up_is_not_chosen_and_what_led_to_a_failure_comes_last():
    back = Rollback(30, 20, "penalty")
    assert chosen([back], last=whole(20), previous=whole(10)) == "previous"
    assert chosen([back], last=whole(20)) == "last"
    assert chosen([back], last=whole(25), previous=whole(10)) == "previous"  # between 20 and 30, given up
    assert chosen([back], last=whole(25, [back]), previous=whole(20)) == "last"  # after the rollback


def test_two_processes_go_back_together(tiny_yaml, tmp_path):
    """The main process looks and chooses. Both start again from its checkpoint, meet the same, and both end in one line."""
    from test_distributed import torchrun

    settings = dict((*WATCH, ("TRAIN.DISCRIMINATOR_LR", "0.02"), ("TRAIN.WATCH.PENALTY", "1")))
    settings |= {"TRAIN.WATCH.EVERY": "3", "TRAIN.WATCH.PATIENCE": "1", "TRAIN.MAX_STEPS": "5", "TRAIN.SAVE_EVERY": "2"}
    settings |= {"TRAIN.ON_COLLAPSE": "rollback", "TRAIN.WATCH.ROLLBACKS": "1"}
    pairs = [text for pair in settings.items() for text in pair]
    with pytest.raises(AssertionError) as ended:  # torchrun's exit code is not 0
        torchrun("main.py", "--cfg", tiny_yaml, "--gpu", "-1", "--set", *pairs)
    assert str(ended.value).count("it has gone back 1 times (TRAIN.WATCH.ROLLBACKS); stopped") == 2
    (rollback,) = [line for line in warnings_of(run_of(tmp_path)) if "rollback" in line]
    assert rollback.startswith("step 3: rollback 1 of 1, to step 2 (last.pth); all learning rates x 0.5")
