"""Evaluation while training: what is held out, the number and its name, the best checkpoint, and resuming."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_help import tiny_network
from test_distributed import torchrun
from test_trainer import assert_same_state, final_state, stats_of

from datasets import load_records
from datasets.records import Records
from datasets.settings import DataSettings
from eval.features import networks
from eval.features.networks import load_network
from eval.features.reference import RealImages
from eval.features.statistics import statistics_of_features
from eval.FID import distance
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, DataError
from miscc.settings import from_config
from miscc.vocabulary import Vocabulary
from sampling.pipeline import TextToImage
from sampling.requests import split_requests
from training.dry_run import describe
from training.evaluation import Evaluation, hold_out, split_records
from training.run_dir import RunDir
from training.settings import EvaluationSettings
from training.trainer import Trainer, train

CPU = World(0, 1, torch.device("cpu"))
EVERY_EPOCH = (("TRAIN.EVAL_EVERY", "1"), ("TRAIN.EVAL_CLASSES", "0.1"), ("TRAIN.EVAL_IMAGES", "6"))


@pytest.fixture(autouse=True)
def instant_network(monkeypatch):
    """In EfficientNet's place, and with its name."""

    def load(weights, resize, seed):
        network = tiny_network(resize, seed)
        network.name = network.label = "efficientnet-lite0"
        return network

    monkeypatch.setitem(networks.NETWORKS, "efficientnet-lite0", load)


@pytest.fixture
def scripted(monkeypatch):
    """Each evaluation gives the next of these numbers; the trainings that follow see what was asked for."""

    def script(*values):
        left = list(values)
        monkeypatch.setattr(Evaluation, "measure", lambda self, pipeline: left.pop(0))
        return left

    return script


def run_of(folder):
    return RunDir(folder / "00000-tiny-ssa_gan")


def records_of(cfg, vocabulary=None):
    share = from_config(EvaluationSettings, cfg).held_out_share
    return split_records(from_config(DataSettings, cfg), share, cfg.SEED, vocabulary)


# -- what is held out ---------------------------------------------------------------------------------------------------


def classes(*sizes):
    """Records without images: so many of class 3, 10, 17 ..."""
    ids = np.concatenate([np.full(size, 3 + 7 * number) for number, size in enumerate(sizes)])
    keys = [f"{number:03d}" for number in range(len(ids))]
    vocabulary = Vocabulary.build(["a bird"])
    return Records("birds", "train", keys, [Path(key) for key in keys], [[np.array([1])]] * len(ids), ids, vocabulary)


def test_whole_classes_are_held_out():
    kept, held_out = hold_out(classes(*[4] * 20), 0.1, seed=1)
    assert not set(kept.class_ids) & set(held_out.class_ids)
    assert len(set(held_out.class_ids)) == 2 and len(held_out.class_ids) == 8
    assert sorted(kept.keys + held_out.keys) == classes(*[4] * 20).keys
    assert hold_out(classes(*[4] * 20), 0.1, seed=1)[1].keys == held_out.keys
    assert any(hold_out(classes(*[4] * 20), 0.1, seed=s)[1].keys != held_out.keys for s in (2, 3, 4))


def test_there_are_two_images_however_small_the_share():
    assert len(hold_out(classes(4, 4, 4), 0.01, seed=1)[1].keys) == 4  # one class
    assert len(hold_out(classes(*[1] * 30), 0.01, seed=1)[1].keys) == 2  # two classes of one image


def test_images_are_held_out_of_a_single_class():
    kept, held_out = hold_out(classes(40), 0.1, seed=1)
    assert len(held_out.keys) == 4 and len(kept.keys) == 36 and not set(kept.keys) & set(held_out.keys)


def test_something_must_be_left_to_train_on():
    with pytest.raises(DataError, match="TRAIN.EVAL_CLASSES: 0.9 of 2 classes leaves 0 images to train on"):
        hold_out(classes(3, 3), 0.9, seed=1)


@pytest.mark.parametrize(
    "state", [{"best_step": 1}, {"name": "FD", "best": "low", "best_step": 1}, {"name": "FD", "best": 1.0}, [1]]
)
def test_a_damaged_best_score_is_one_line(tiny, state):
    trainer = Trainer(tiny(*EVERY_EPOCH), World(0, 1, torch.device("cpu")))
    with pytest.raises(CheckpointError, match="the checkpoint's best score is damaged"):
        trainer.evaluation.restore(state)


# -- the number ---------------------------------------------------------------------------------------------------------


def test_the_number_is_the_distance_to_the_held_out_images(tiny, tmp_path):
    """By hand, from the same captions and noise; against the wrong images it is another."""
    cfg = tiny(*EVERY_EPOCH, ("TRAIN.MAX_EPOCH", "1"))
    train(cfg, CPU)
    run = run_of(tmp_path / "output")
    pipeline = TextToImage.load(run.best, "cpu")  # the average, of the same step
    kept, held_out = records_of(cfg, pipeline.vocabulary)
    drawn = pipeline.generate([r.caption for r in split_requests(held_out, num_images=6, seed=cfg.SEED)], cfg.SEED)
    network = load_network("efficientnet-lite0", resize="clean")

    def by_hand(records):
        real = [RealImages(records, 16).read(index) for index in range(len(records))]
        return distance(*(statistics_of_features(network.extract_features(list(i))[0]) for i in (real, drawn.images)))

    name = "evaluation/FD_efficientnet-lite0_6_images_of_held_out_classes"
    (line,) = [line for line in stats_of(run.path) if name in line]
    assert line["step"] == 4 and line["epoch"] == 1.0  # 36 images are left, in batches of 8
    assert line[name] == pytest.approx(by_hand(held_out), rel=1e-4)
    assert line[name] != pytest.approx(by_hand(kept), rel=1e-2)
    log = run.log.read_text()
    assert "evaluations: FD[efficientnet-lite0] of 6 images against 4 of held-out training classes" in log
    assert "4 images for 6 features make it too large" in log
    assert "evaluation after epoch 1: FD[efficientnet-lite0]" in log and "best.pth" in log


def test_held_out_images_are_never_trained_on(tiny, monkeypatch, tmp_path):
    cfg = tiny(*EVERY_EPOCH, ("DATA_CACHE", "True"))
    seen = set()
    step = Trainer.train_step

    def watch(self, batch, *rest):
        seen.update(batch.keys)
        return step(self, batch, *rest)

    monkeypatch.setattr(Trainer, "train_step", watch)
    train(cfg, CPU)
    kept, held_out = records_of(cfg)
    assert len(held_out) == 4 and len(kept) == 36
    assert seen and seen <= set(kept.keys) and not seen & set(held_out.keys)
    assert not set(kept.class_ids) & set(held_out.class_ids)
    assert load_checkpoint(run_of(tmp_path / "output").last)["data"] == kept.fingerprint()
    assert not set(held_out.keys) & set(load_records("folder", cfg.DATA_DIR, "test")[0].keys)


def test_without_evaluations_everything_is_trained_on(tiny, tmp_path):
    assert records_of(tiny())[1] is None and len(records_of(tiny())[0]) == 40
    train(tiny(("TRAIN.MAX_EPOCH", "1")), CPU)
    run = run_of(tmp_path / "output")
    assert not run.best.exists() and "evaluation" not in load_checkpoint(run.last)
    assert not any("evaluation" in name for line in stats_of(run.path) for name in line)


def test_an_evaluation_changes_nothing_in_the_training(tiny, scripted, tmp_path):
    train(tiny(*EVERY_EPOCH), CPU)
    scripted(*[1.0] * 2)
    train(tiny(*EVERY_EPOCH, ("OUTPUT_DIR", str(tmp_path / "other"))), CPU)
    measured, not_measured = (final_state(run_of(tmp_path / name).path) for name in ("output", "other"))
    for part in ("networks", "optimizers"):
        assert_same_state(measured[part], not_measured[part])


def test_dry_run_counts_what_is_left(tiny):
    assert "steps per epoch: 4 (36 images)" in describe(tiny(*EVERY_EPOCH))
    assert "steps per epoch: 5 (40 images)" in describe(tiny())


# -- the best checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((5.0, 3.0, 4.0), 2),
        ((2.0, 3.0, 4.0), 1),
        ((5.0, 4.0, 3.0), 3),
        ((3.0, 3.0, 3.0), 1),
        ((float("nan"), 9.0, 8.0), 3),
    ],
)
def test_the_best_checkpoint_is_that_of_the_lowest_number(tiny, scripted, tmp_path, values, best):
    left = scripted(*values)
    train(tiny(*EVERY_EPOCH, ("TRAIN.MAX_EPOCH", "3")), CPU)
    run = run_of(tmp_path / "output")
    kept, last = load_checkpoint(run.best), load_checkpoint(run.last)
    assert not left and kept["epoch"] == best and kept["step"] == 4 * best
    assert kept["evaluation"]["best"] == last["evaluation"]["best"] == values[best - 1]
    assert last["evaluation"]["best_step"] == 4 * best
    assert kept["networks"].keys() == last["networks"].keys() and "optimizers" not in kept
    numbered = load_checkpoint(run.numbered(best))["networks"]["generator_ema"]["state"]
    assert_same_state(dict(kept["networks"]["generator_ema"]["state"]), dict(numbered))


@pytest.mark.parametrize(
    ("values", "better"),
    [((5, 4, 3), (True, True, True)), ((3, 3, 4), (True, False, False)), ((math.inf, 4, 5), (False, True, False))],
)
def test_lower_is_better(values, better):
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.best, evaluation.title = None, "FD[x]"
    assert tuple(evaluation.update_best(value, step) for step, value in enumerate(values)) == better
    assert evaluation.best == min(values) and evaluation.best_step == values.index(min(values))


def test_every_second_epoch(tiny, scripted, tmp_path):
    left = scripted(5.0, 4.0, 3.0)
    train(tiny(*EVERY_EPOCH, ("TRAIN.EVAL_EVERY", "2"), ("TRAIN.MAX_EPOCH", "5")), CPU)
    assert left == [3.0] and load_checkpoint(run_of(tmp_path / "output").best)["epoch"] == 4


def test_resuming_keeps_the_best(tiny, scripted, tmp_path):
    scripted(2.0)
    train(tiny(*EVERY_EPOCH, ("TRAIN.MAX_EPOCH", "1")), CPU)
    scripted(3.0, 1.0)
    run = run_of(tmp_path / "output")
    train(tiny(*EVERY_EPOCH), CPU, resume=True)  # a worse one
    assert load_checkpoint(run.best)["epoch"] == 1 and load_checkpoint(run.last)["evaluation"]["best"] == 2.0
    assert "best until now 2 at step 4" in run.log.read_text()
    train(tiny(*EVERY_EPOCH, ("TRAIN.MAX_EPOCH", "3")), CPU, resume=True)
    assert load_checkpoint(run.best)["epoch"] == 3 and load_checkpoint(run.last)["evaluation"]["best"] == 1.0
    # Numbers of other images do not compare: the best begins anew.
    scripted(7.0)
    train(tiny(*EVERY_EPOCH, ("TRAIN.EVAL_IMAGES", "5"), ("TRAIN.MAX_EPOCH", "4")), CPU, resume=True)
    assert load_checkpoint(run.best)["epoch"] == 4


def test_a_resumed_run_equals_one_that_never_stopped(tiny, tmp_path):
    train(tiny(*EVERY_EPOCH), CPU)
    for steps in ("3", "4"):  # within an epoch, just after an evaluation
        folder = tmp_path / steps
        train(tiny(*EVERY_EPOCH, ("OUTPUT_DIR", str(folder)), ("TRAIN.MAX_STEPS", steps)), CPU)
        assert train(tiny(*EVERY_EPOCH, ("OUTPUT_DIR", str(folder))), CPU, resume=True) == 0
        assert_same_state(final_state(run_of(tmp_path / "output").path), final_state(run_of(folder).path))
        best = [load_checkpoint(run_of(where).best) for where in (tmp_path / "output", folder)]
        assert_same_state(*({k: v for k, v in content.items() if k != "config"} for content in best))
        timing = {"images_per_second", "memory_mib"}
        lines = [
            [{k: v for k, v in line.items() if k not in timing} for line in stats_of(run_of(where).path)]
            for where in (tmp_path / "output", folder)
        ]
        assert lines[0] == lines[1]


def test_what_is_held_out_cannot_change_on_resuming(tiny, tmp_path):
    train(tiny(*EVERY_EPOCH, ("TRAIN.MAX_STEPS", "1")), CPU)
    with pytest.raises(ConfigError, match=r"TRAIN.EVAL_CLASSES: the run was started with 0.1 of the classes.*not 0.2"):
        train(tiny(*EVERY_EPOCH, ("TRAIN.EVAL_CLASSES", "0.2")), CPU, resume=True)
    with pytest.raises(ConfigError, match=r"TRAIN.EVAL_EVERY: the run was started with 0.1 .*not 0"):
        train(tiny(), CPU, resume=True)
    # A checkpoint from before there were evaluations goes on without them.
    train(tiny(("OUTPUT_DIR", str(tmp_path / "old")), ("TRAIN.MAX_STEPS", "1")), CPU)
    last = run_of(tmp_path / "old").last
    content = load_checkpoint(last)
    for name in [name for name in content["config"]["TRAIN"] if name.startswith("EVAL_")]:
        del content["config"]["TRAIN"][name]
    save_checkpoint(last, content)
    assert train(tiny(("OUTPUT_DIR", str(tmp_path / "old")), ("TRAIN.MAX_STEPS", "2")), CPU, resume=True) == 0


# -- what may be missing ------------------------------------------------------------------------------------------------


def test_missing_weights_show_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="TRAIN.EVAL_MEASURE: FID cannot be computed here: inception-tf: its weights"):
        train(tiny(*EVERY_EPOCH, ("TRAIN.EVAL_MEASURE", "FID")), CPU)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TRAIN.EVAL_CLASSES", "0", "TRAIN.EVAL_CLASSES: must be above 0"),
        ("TRAIN.EVAL_CLASSES", "1", "TRAIN.EVAL_CLASSES: must be below 1"),
        ("TRAIN.EVAL_MEASURE", "IS", "TRAIN.EVAL_MEASURE: must be one of FD, FID"),
        ("TRAIN.EVAL_IMAGES", "1", "TRAIN.EVAL_IMAGES: must be 2 or more"),
    ],
)
def test_settings_without_sense_are_refused(tiny, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(*EVERY_EPOCH, (key, value)), CPU)


def test_broken_held_out_images_cost_nothing_where_they_may_be_left_out(tiny, drawn_folder, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(drawn_folder, data)
    keys = (*EVERY_EPOCH, ("DATA_DIR", str(data)))
    broken = records_of(tiny(*keys))[1].image_paths[0]
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=broken.name):
        train(tiny(*keys), CPU)
    assert train(tiny(*keys, ("SKIP_BROKEN", "True")), CPU) == 0
    assert "against 3 of held-out" in run_of(tmp_path / "output").log.read_text()


SHARED = """
import sys
sys.path[:0] = ["tests", "."]
from eval.features import networks
from metrics_help import tiny_network
networks.NETWORKS["efficientnet-lite0"] = lambda weights, resize, seed: tiny_network(resize, seed)
import main
main.main(sys.argv[1:])
"""


def test_one_of_two_processes_evaluates(tiny_yaml, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    pairs = [word for pair in EVERY_EPOCH for word in pair]
    torchrun(tmp_path / "shared.py", "--cfg", tiny_yaml, "--gpu", "-1", "--set", *pairs)
    run = run_of(tmp_path / "output")
    lines = [json.loads(line) for line in run.stats.read_text().splitlines()]
    assert sum("evaluation" in name for line in lines for name in line) == 2
    assert load_checkpoint(run.best)["evaluation"]["best"] == load_checkpoint(run.last)["evaluation"]["best"]
