"""The GAN loop: what a run leaves behind, and that stopping, killing and resuming change nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.settings import DataSettings
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, DataError, TrainingError
from training.data import fixed_captions, read_records
from training.ema import EMA
from training.resume import resumed_settings
from training.run_dir import RunDir
from training.trainer import Trainer, train

ROOT = Path(__file__).parents[1]
CPU = World(0, 1, torch.device("cpu"))


def stats_of(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def assert_same_state(a, b, where=""):
    """Two checkpoints hold the same numbers, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_same_state(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}/{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def final_state(run):
    return {key: value for key, value in load_checkpoint(run / "checkpoints" / "last.pth").items() if key != "config"}


def trained_whole_and_in_parts(tiny, tmp_path, steps, *settings):
    """The folders of a run, and of the same that ended after `steps` and was resumed."""
    train(tiny(*settings), CPU)
    other = ("OUTPUT_DIR", str(tmp_path / "other"))
    train(tiny(*settings, other, ("TRAIN.MAX_STEPS", str(steps))), CPU)
    assert train(tiny(*settings, other), CPU, resume=True) == 0
    return [tmp_path / name / "00000-tiny-ssa_gan" for name in ("output", "other")]


def test_stats_are_written_where_tensorboard_cannot(tiny, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.progress.SummaryWriter", refuse)
    assert train(tiny(), CPU) == 0
    run = tmp_path / "output" / "00000-tiny-ssa_gan"
    assert [line["step"] for line in stats_of(run)] == list(range(1, 11))
    assert (run / "log.txt").read_text().count("TensorBoard's files cannot be written") == 1


def test_a_run_leaves_everything_behind(tiny, tmp_path, capsys):
    assert train(tiny(("TRAIN.SAMPLE_EVERY", "4")), CPU) == 0
    run = tmp_path / "output" / "00000-tiny-ssa_gan"
    lines = stats_of(run)
    assert [line["step"] for line in lines] == list(range(1, 11))
    wanted = {"loss/hinge", "loss/penalty", "loss/adversarial", "loss/words", "loss/sentence", "images_per_second",
              "memory_mib", "gradient_norm/generator", "gradient_norm/discriminator", "gradient_norm/penalty",
              *(f"{kind}/{pair}" for kind in ("logits", "sign") for pair in ("real", "fake", "mismatched"))}  # fmt: skip
    assert wanted <= lines[0].keys()
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["epoch"] == 2.0
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [f"step_{n:07d}.png" for n in (4, 8, 10)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "epoch_0001.pth", "epoch_0002.pth", "last.pth", "previous.pth",
    ]  # fmt: skip
    last, numbered = (load_checkpoint(run / "checkpoints" / name) for name in ("last.pth", "epoch_0001.pth"))
    assert last["step"] == 10 and last["networks"].keys() == {
        "generator", "generator_ema", "discriminator", "text_encoder", "image_encoder",
    }  # fmt: skip
    assert numbered["networks"].keys() == {"generator", "generator_ema", "text_encoder"}
    assert (run / "config.yml").read_text().startswith("CONFIG_NAME: tiny")
    log = (run / "log.txt").read_text()
    assert "finished" in log and any((run / "tensorboard").iterdir())
    hinge = [f"hinge={lines[step - 1]['loss/hinge']:.3g}" for step in (5, 10)]  # a line an epoch
    assert re.findall(r"epoch (\d)/2, step (\d+): (hinge=[^,]+)", log) == [("1", "5", hinge[0]), ("2", "10", hinge[1])]
    assert "last.pth" in capsys.readouterr().out


def test_numbered_checkpoints_hold_what_their_interval_promises(tiny, tmp_path):
    intervals = {"GSAVE_INTERVAL": 1, "DSAVE_INTERVAL": 3, "SNAPSHOT_INTERVAL": 4, "WARMUP_EPOCHS": 2, "MAX_EPOCH": 4}
    train(tiny(*((f"TRAIN.{name}", str(value)) for name, value in intervals.items())), CPU)
    folder = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints"
    held = {path.stem: load_checkpoint(path) for path in sorted(folder.glob("epoch_*.pth"))}
    assert list(held) == ["epoch_0002", "epoch_0003", "epoch_0004"]  # none in the warm-up
    assert ["discriminator" in content["networks"] for content in held.values()] == [False, True, True]
    assert ["optimizers" in content for content in held.values()] == [False, False, True]
    assert [content["epoch"] for content in held.values()] == [2, 3, 4]


def test_stopping_and_resuming_changes_nothing(tiny, tmp_path):
    """In the middle of an epoch, with the average, fine-tuning and dropout; and whatever the number of workers."""
    extra = [("TRAIN.FINETUNE_ENCODERS", "True"), ("TRAIN.FINETUNE_MODE", "train")]
    train(tiny(*extra), CPU)
    train(tiny(*extra, ("OUTPUT_DIR", str(tmp_path / "other")), ("TRAIN.MAX_STEPS", "3")), CPU)
    resumed = tiny(*extra, ("OUTPUT_DIR", str(tmp_path / "other")), ("WORKERS", "2"))
    assert train(resumed, CPU, resume=True) == 0
    whole, parts = (tmp_path / name / "00000-tiny-ssa_gan" for name in ("output", "other"))
    assert_same_state(final_state(whole), final_state(parts))
    timing = {"images_per_second", "memory_mib"}
    strip = [{k: v for k, v in line.items() if k not in timing} for line in stats_of(whole)]
    assert strip == [{k: v for k, v in line.items() if k not in timing} for line in stats_of(parts)]


def start_training(yaml, *arguments):
    command = [sys.executable, "main.py", "--cfg", str(yaml), "--gpu", "-1", *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=one_thread, text=True, **pipes)


def wait_for(condition, process, seconds=90):
    for _ in range(seconds * 50):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError("waited in vain")


def test_a_signal_saves_and_says_how_to_go_on(tiny_yaml, tmp_path):
    process = start_training(tiny_yaml, "--set", "TRAIN.MAX_EPOCH", "2000", "TRAIN.SAVE_EVERY", "0")
    stats = tmp_path / "output" / "00000-tiny-ssa_gan" / "stats.jsonl"
    wait_for(lambda: stats.exists() and stats.read_text().count("\n") > 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "go on with: the same command and --resume" in output
    step = load_checkpoint(stats.parent / "checkpoints" / "last.pth")["step"]
    assert step == stats_of(stats.parent)[-1]["step"]


def test_kill_9_and_resume_equals_a_run_that_never_stopped(tiny_yaml, tiny, tmp_path):
    """Three kills here; ten at random moments by `-m slow`."""
    kill_and_compare(tiny_yaml, tiny, tmp_path, kills=3)


@pytest.mark.slow
def test_ten_kills(tiny_yaml, tiny, tmp_path):
    kill_and_compare(tiny_yaml, tiny, tmp_path, kills=10)


def steps_logged(output):
    """Lines of all runs: one that is killed before its first checkpoint is whole is followed by a new run."""
    return sum(path.read_text().count("\n") for path in output.glob("*/stats.jsonl"))


def kill_and_compare(tiny_yaml, tiny, tmp_path, kills):
    epochs = ("TRAIN.MAX_EPOCH", "12")
    train(tiny(epochs, ("OUTPUT_DIR", str(tmp_path / "whole"))), CPU)
    output = tmp_path / "output"
    rng = np.random.default_rng(7)
    for _ in range(kills):
        reached = steps_logged(output)
        process = start_training(tiny_yaml, "--continue", "--set", *epochs)
        wait_for(lambda r=reached: steps_logged(output) > r, process)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    process = start_training(tiny_yaml, "--continue", "--set", *epochs)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    runs = sorted(path for path in output.iterdir() if (path / "checkpoints" / "last.pth").exists())
    assert_same_state(final_state(tmp_path / "whole" / "00000-tiny-ssa_gan"), final_state(runs[-1]))
    assert [line["step"] for line in stats_of(runs[-1])] == list(range(1, 61))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "3")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    before = last.read_bytes()
    trainer = Trainer(tiny(), CPU, load_checkpoint(last))
    trainer.networks["generator"].fc.weight.data[0, 0] = float("nan")
    progress = type("Silent", (), {name: lambda *a, **k: None for name in
                    ("say", "log", "advance", "start_epoch", "end_epoch", "picture")})()  # fmt: skip
    with pytest.raises(TrainingError, match=r"the loss `(hinge|adversarial)` was not finite at step 4"):
        trainer.run_to_the_end(RunDir(last.parents[1]), progress)
    assert last.read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(tiny):
    trainer = Trainer(tiny(), CPU)
    trainer.networks["discriminator"].from_rgb.bias.data[0] = float("inf")
    trainer.step = trainer.last_step
    with pytest.raises(TrainingError, match="weights of the discriminator are not finite"):
        trainer.save_when_due(None, stopped=False)


def test_nothing_to_resume_is_said(tiny):
    with pytest.raises(CheckpointError, match="nothing to resume for 'tiny-ssa_gan'"):
        train(tiny(), CPU, resume=True)


def test_missing_encoders_say_how_to_train_them(tiny):
    with pytest.raises(CheckpointError, match="gone.pth: no such encoders; train them with"):
        train(tiny(("TEXT.DAMSM_NAME", "gone.pth")), CPU)


def test_a_batch_larger_than_the_data_is_refused(tiny):
    with pytest.raises(DataError, match="40 images, fewer than one batch of 64"):
        train(tiny(("TRAIN.BATCH_SIZE", "64")), CPU)


def test_an_impossible_image_size_is_refused(tiny):
    with pytest.raises(ConfigError, match="TREE.BASE_SIZE: .* not 100"):
        train(tiny(("TREE.BASE_SIZE", "100")), CPU)


def test_other_data_cannot_be_resumed(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "2")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    checkpoint = load_checkpoint(last)
    save_checkpoint(last, checkpoint | {"data": {"num_images": 39, "keys": 0}})
    with pytest.raises(DataError, match="started with 39 training images.* now has 40;"):
        train(tiny(), CPU, resume=True)
    save_checkpoint(last, checkpoint | {"data": {"num_images": 40, "keys": 0}})
    with pytest.raises(DataError, match="now has 40 others, or other captions"):
        train(tiny(), CPU, resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("TRAIN.NF", "2"), ("TREE.BASE_SIZE", "32"), ("GAN.Z_DIM", "50"), ("SEED", "1"), ("TRAIN.BATCH_SIZE", "4")],
)
def test_settings_that_shape_a_run_cannot_change_on_resuming(tiny, key, value):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    with pytest.raises(ConfigError, match=f"{key}: the run was started with .*, not {value}; set it back"):
        train(tiny((key, value)), CPU, resume=True)


def test_a_batch_without_mismatched_pairs_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ConfigError, match="TRAIN.BATCH_SIZE: 1 cannot be cut into equal parts of at least 2 images"):
        train(tiny(("TRAIN.BATCH_SIZE", "1")), CPU)
    assert not (tmp_path / "output").exists()


def test_a_run_without_image_encoder_cannot_turn_damsm_on(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    checkpoint = load_checkpoint(last)
    del checkpoint["networks"]["image_encoder"]
    save_checkpoint(last, checkpoint)
    with pytest.raises(CheckpointError, match="started without an image encoder"):
        train(tiny(), CPU, resume=True)


def test_given_weights_must_fit(tiny, encoders, tmp_path):
    with pytest.raises(CheckpointError, match="TRAIN.NET_G: .* holds no generator but text_encoder, image_encoder"):
        Trainer(tiny(("TRAIN.NET_G", str(encoders))), CPU)
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    for key, value, said in (
        ("GAN.Z_DIM", "50", "the generator's z_dim is 100, GAN.Z_DIM says 50; set it to 100"),
        ("GAN.SSCBN", "paper", "the generator's sscbn is code, GAN.SSCBN says paper; set it to code"),
    ):
        with pytest.raises(CheckpointError, match=f"TRAIN.NET_G: {said}"):
            Trainer(tiny(("TRAIN.NET_G", str(last)), (key, value)), CPU)


def test_what_a_killed_process_left_unfinished_goes_away(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    folder = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints"
    (folder / ".last.pth.abc.tmp").write_bytes(b"half a file")
    train(tiny(), CPU, resume=True)
    assert not list(folder.glob(".*"))


def test_broken_images_are_skipped_with_the_cache_too(tiny, drawn_folder, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(drawn_folder, data)
    (data / "images" / "train007.png").write_bytes(b"no image")
    keys = (("DATA_DIR", str(data)), ("DATA_CACHE", "True"), ("TRAIN.MAX_EPOCH", "1"))
    with pytest.raises(DataError, match="train007.png"):
        train(tiny(*keys), CPU)
    assert train(tiny(*keys, ("SKIP_BROKEN", "True")), CPU) == 0


def test_gates_start_where_the_settings_say(tiny, tmp_path):
    def gates(*changes):
        networks = Trainer(tiny(*changes), CPU).networks
        return {float(gate.detach()) for part in ("generator", "discriminator") for gate in networks[part].gates()}

    assert gates() == {0.0}
    assert gates(("GAN.GATE", "0.5")) == {0.5}

    # Weights of a file keep theirs.
    train(tiny(("GAN.GATE", "0.25"), ("TRAIN.MAX_STEPS", "1")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    assert 0.5 not in gates(("TRAIN.NET_G", str(last)), ("GAN.GATE", "0.5"))


def test_training_goes_on_from_given_weights(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "2")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    given = load_checkpoint(last)["networks"]
    both, only_g = (
        Trainer(tiny(("TRAIN.NET_G", str(last))), CPU),
        tiny(("TRAIN.NET_G", str(last)), ("TRAIN.B_NET_D", "False")),
    )
    assert_same_state(dict(both.networks["generator"].state_dict()), dict(given["generator"]["state"]))
    assert_same_state(dict(both.networks["discriminator"].state_dict()), dict(given["discriminator"]["state"]))
    fresh = Trainer(only_g, CPU).networks["discriminator"].state_dict()
    assert not torch.equal(fresh["from_rgb.weight"], given["discriminator"]["state"]["from_rgb.weight"])
    assert both.step == 0


def test_learning_rates_and_changed_settings_on_resuming(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "2")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    trainer = Trainer(tiny(("TRAIN.GENERATOR_LR", "0.5")), CPU, load_checkpoint(last))
    assert trainer.optimizers["generator"].param_groups[0]["lr"] == 0.5
    assert trainer.changes == ["setting changed since the last checkpoint: TRAIN.GENERATOR_LR: 0.0001 -> 0.5"]
    train(tiny(("TRAIN.GENERATOR_LR", "0.001"), ("TRAIN.MAX_STEPS", "3")), CPU, resume=True)
    assert (
        "changed since the last checkpoint: TRAIN.GENERATOR_LR: 0.0001 -> 0.001"
        in (last.parents[1] / "log.txt").read_text()
    )


def test_a_process_that_is_lost_while_a_run_is_built_is_one_line(tiny, monkeypatch):
    """E.g. since the main process has refused to start: its own line says why."""

    def lost(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    monkeypatch.setattr(Trainer, "__init__", lost)
    with pytest.raises(TrainingError, match="process 1 of 2: another process has ended, or cannot be reached"):
        train(tiny(), World(1, 2, torch.device("cpu")))


def test_settings_that_only_a_start_reads_stay_as_they_were():
    stored = {"TEXT": {"DAMSM_NAME": "old.pth", "WORDS_NUM": 18}, "TRAIN": {"LOG_EVERY": 50}, "WORKERS": 1}
    now = {"TEXT": {"DAMSM_NAME": "new.pth", "WORDS_NUM": 18}, "TRAIN": {"LOG_EVERY": 25, "NEW": 1}, "WORKERS": 4}
    settings, lines = resumed_settings(stored, now)
    assert (
        settings == now | {"TEXT": {"DAMSM_NAME": "old.pth", "WORDS_NUM": 18}}
        and now["TEXT"]["DAMSM_NAME"] == "new.pth"
    )
    assert lines == [
        "setting without effect on a run that goes on: TEXT.DAMSM_NAME stays old.pth, not new.pth",
        "setting changed since the last checkpoint: TRAIN.LOG_EVERY: 50 -> 25",
    ]


def test_a_checkpoint_of_a_run_that_goes_on_names_the_encoders_it_has(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    before = load_checkpoint(last)["config"]["TEXT"]
    train(
        tiny(("TRAIN.MAX_STEPS", "2"), ("TEXT.DAMSM_NAME", "/nowhere.pth"), ("TEXT.WORDS_NUM", "5")), CPU, resume=True
    )
    assert load_checkpoint(last)["config"]["TEXT"] == before and "/nowhere.pth" not in before["DAMSM_NAME"]


def test_penalties_and_learning_rates_follow_the_step(tiny, tmp_path, monkeypatch):
    """Of 4 steps: a penalty in every second; rates fall after the first half: 3/4 are used up before the last."""
    rates, original = [], Trainer.train_step

    def step(self, *arguments):
        values = original(self, *arguments)
        rates.append(self.optimizers["generator"].param_groups[0]["lr"])
        return values

    monkeypatch.setattr(Trainer, "train_step", step)
    changes = {"MAX_STEPS": "4", "PENALTY_EVERY": "2", "LR_DECAY_FROM": "0.5", "GENERATOR_LR": "0.2"}
    train(tiny(*((f"TRAIN.{name}", value) for name, value in changes.items())), CPU)
    lines = stats_of(tmp_path / "output" / "00000-tiny-ssa_gan")
    assert ["loss/penalty" in line for line in lines] == [True, False, True, False]
    assert rates == pytest.approx([0.2, 0.2, 0.2, 0.1])


def test_pictures_and_evaluations_are_by_the_average(tiny):
    trainer = Trainer(tiny(), CPU)
    trainer.networks["generator"].train()
    with trainer._pipeline() as pipeline:
        assert pipeline.generator is trainer.average.module and not pipeline.generator.training
    without = Trainer(tiny(("TRAIN.EMA_DECAY", "0")), CPU)
    with without._pipeline() as pipeline:
        assert pipeline.generator is without.networks["generator"] and not pipeline.generator.training
    assert without.networks["generator"].training


def test_average_by_hand():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = EMA(module, decay=0.5)
    module.weight.data.fill_(1.0)
    average.update(module)  # decay 1/10
    assert average.module.weight.item() == pytest.approx(0.9)
    average.update(module)  # decay 2/11
    assert average.module.weight.item() == pytest.approx(0.9 * 2 / 11 + 9 / 11)
    for _ in range(20):
        average.update(module)
    module.weight.data.fill_(0.0)
    before = average.module.weight.item()
    average.update(module)  # 0.5 by now
    assert average.module.weight.item() == pytest.approx(before / 2)


def test_run_directories_are_numbered(tmp_path):
    first, second = (RunDir.create(tmp_path, "bird-ssa_gan", "A: 1\n") for _ in range(2))
    assert [run.path.name for run in (first, second)] == ["00000-bird-ssa_gan", "00001-bird-ssa_gan"]
    (tmp_path / "00007-other").mkdir()
    assert RunDir.create(tmp_path, "x", "").path.name == "00008-x"
    second.last.parent.mkdir()
    second.last.write_bytes(b"")
    assert RunDir.newest(tmp_path, "bird-ssa_gan").path == second.path
    with pytest.raises(CheckpointError, match="no such run"):
        RunDir.newest(tmp_path, "bird")
    assert RunDir.newest(tmp_path, "bird", must_exist=False) is None


def test_pictured_captions_do_not_come_twice(drawn_folder):
    settings = DataSettings(dataset="folder", data_dir=str(drawn_folder))
    records = read_records(settings, "test")
    every = [records.text(index, 0) for index in range(len(records))]
    for count in (1, 5, len(records), 40):
        captions = fixed_captions(settings, records.vocabulary, records, count)
        assert len(set(captions)) == len(captions) and set(captions) <= set(every)
    assert captions == list(dict.fromkeys(every))
