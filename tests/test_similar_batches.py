"""Batches of similar captions: vectors by hand, groups, an epoch's order, resume and ranks through the loader, both loops."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import DAMSM_YAML, GAN_YAML, settings
from test_trainer import assert_same_state

from datasets import load_records
from datasets.loading import training_loader
from datasets.similar import similar_groups, with_similar_batches, word_vectors
from datasets.text_image import TextImageDataset
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import ConfigError
from training.damsm import pretrain
from training.resume import check_fixed_settings
from training.trainer import train

CPU = World(0, 1, torch.device("cpu"))


def test_vectors_by_hand():
    """Words 1 (in all captions), 2, 3; pairs (1, 2), (1, 3)."""
    vectors = word_vectors([[1, 2], [1, 2], [1, 3], [1]]).toarray()
    rare, common = math.log(4 / 1), math.log(4 / 2)
    expected = np.zeros((4, 5))
    expected[:2, 1:3] = common / math.hypot(common, common)  # word 2 and pair (1, 2), alike rare
    expected[2, 3:] = rare / math.hypot(rare, rare)
    assert np.allclose(vectors, expected), "what all captions have counts nothing, and a caption of that alone is 0"


def test_a_share_is_not_rounded_up_by_its_last_bit():
    """0.07 of 100 batches is 7.000000000000001 in floating point: 7 of them, not 8, hold similar captions."""
    captions = [[index % 10, 10 + index % 7] for index in range(200)]
    calls = []
    for share in (0.07, 0.55, 1e-12, 0.0):
        read = []
        caption_of = lambda index, read=read: (read.append(index), captions[index])[1]  # noqa: E731
        with_similar_batches(np.arange(200), caption_of, 2, share, np.random.default_rng(0))
        calls.append(len(read) // 2)
    assert calls == [7, 55, 1, 0]
    few = with_similar_batches(np.arange(2), lambda index: captions[index], 4, 0.5, np.random.default_rng(0))
    assert len(few) == 0, "not one batch"


def test_pairs_tell_whose_colour_it_is():
    red, wings, head = 1, 2, 3
    captions = [[red, wings, 9, head], [red, head, 9, wings], [red, wings, head, 9], [4, 5, 6, 7]]
    near = (vectors := word_vectors(captions)) @ vectors.T
    assert near[0, 2] > near[0, 1] > near[0, 3]


def test_groups_are_alike():
    """Ten kinds of captions, twelve of each: two of a group are of one kind more than three times as often as two of all."""
    kinds = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 12))
    vectors = word_vectors([[kind, 10 + kind, 100 + row] for row, kind in enumerate(kinds)])
    same = []
    for seed in range(10):
        groups = kinds[similar_groups(vectors, 6, np.random.default_rng(seed))]
        same += [one == other for group in groups for one, other in itertools.combinations(group, 2)]
    assert np.mean(same) > 3 * 11 / 119


@pytest.mark.parametrize(("number", "size"), [(6, 6), (18, 6), (0, 6), (7, 1), (42, 6)])
def test_each_row_is_in_one_group(number, size):
    vectors = word_vectors([[index % 3, index] for index in range(number)])
    groups = similar_groups(vectors, size, np.random.default_rng(0))
    assert groups.shape == (number // size, size) and sorted(groups.reshape(-1)) == list(range(number))


def test_equal_captions_are_no_special_case():
    order = np.random.default_rng(0).permutation(50)
    found = with_similar_batches(order, lambda index: [1, 2, 3], 8, 1.0, np.random.default_rng(0))
    assert len(found) == 48 and len(set(found)) == 48


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.01, 1), (0.25, 3), (0.5, 5), (1.0, 10)])
def test_the_share_of_batches_that_are_similar(share, expected):
    """Ten batches of four: the first images of the order are grouped, the others stay together as they were."""
    order = np.random.default_rng(1).permutation(42)
    found = with_similar_batches(order, lambda index: [index % 10], 4, share, np.random.default_rng(1))
    assert len(found) == 40 and len(set(found)) == 40
    batches = [set(batch) for batch in found.reshape(-1, 4).tolist()]
    assert sum(batch <= set(order[: 4 * expected]) for batch in batches) == expected
    untouched = [set(batch) for batch in order[4 * expected : 40].reshape(-1, 4).tolist()]
    assert sorted(map(sorted, untouched)) == sorted(sorted(batch) for batch in batches if batch in untouched)


@pytest.fixture
def dataset(drawn_folder):
    records, _ = load_records("folder", drawn_folder, "train")
    return TextImageDataset(records, [16])


def keys_of(batches, number):
    return [(batch.keys, batch.caption_numbers.tolist()) for batch in itertools.islice(batches, number)]


def test_the_loader_has_them_for_every_worker_rank_and_start(dataset):
    whole = keys_of(training_loader(dataset, 4, seed=3, similar=0.5), 12)
    assert whole == keys_of(training_loader(dataset, 4, seed=3, similar=0.5, workers=2), 12)
    assert whole[5:9] == keys_of(training_loader(dataset, 4, seed=3, start_step=5, similar=0.5), 4)
    assert whole != keys_of(training_loader(dataset, 4, seed=3), 12)
    ranks = [keys_of(training_loader(dataset, 4, 3, rank=r, world_size=2, similar=0.5), 12) for r in range(2)]
    assert [keys for keys, _ in whole] == [one[0] + other[0] for one, other in zip(*ranks, strict=True)]


def test_groups_are_of_the_captions_that_the_epoch_draws(dataset):
    """Captions of a similar batch share more words than those of a random one."""

    def shared(similar):
        loader = training_loader(dataset, 4, seed=3, similar=similar)
        pairs = []
        for batch in itertools.islice(loader, 3 * loader.batch_sampler.batches_per_epoch):
            words = [set(row[:length].tolist()) for row, length in zip(batch.captions, batch.lengths, strict=True)]
            pairs += [len(one & other) / len(one | other) for one, other in itertools.combinations(words, 2)]
        return np.mean(pairs)

    assert shared(1.0) > 1.2 * shared(0.0)


def test_both_loops_resume_with_them(drawn_folder, encoders, tmp_path):
    similar = ("TRAIN.SIMILAR_BATCHES", "0.5")

    def content(path):
        return {key: value for key, value in load_checkpoint(path).items() if key not in ("config", "seconds")}

    # The encoders.
    def damsm(epochs):
        text = DAMSM_YAML.format(data=drawn_folder, epochs=epochs)
        return settings(tmp_path / "damsm.yml", text, "damsm", (similar,))

    pretrain(damsm(2), CPU.device, tmp_path / "whole")
    pretrain(damsm(1), CPU.device, tmp_path / "parts")
    pretrain(damsm(2), CPU.device, tmp_path / "parts", resume=True)
    assert_same_state(content(tmp_path / "whole" / "last.pth"), content(tmp_path / "parts" / "last.pth"))

    # A GAN, stopped within an epoch.
    def gan(name, steps):
        text = GAN_YAML.format(data=drawn_folder, output=tmp_path / name, encoders=encoders)
        return settings(tmp_path / "gan.yml", text, overrides=(("TRAIN.MAX_STEPS", str(steps)), similar))

    train(gan("one", 6), CPU)
    train(gan("two", 3), CPU)
    train(gan("two", 6), CPU, resume=True)
    last = "00000-tiny-ssa_gan/checkpoints/last.pth"
    assert_same_state(content(tmp_path / "one" / last), content(tmp_path / "two" / last))

    # Another share is another order: images would come twice in the epoch, or never.
    text = GAN_YAML.format(data=drawn_folder, output=tmp_path / "two", encoders=encoders)
    other = (("TRAIN.MAX_STEPS", "8"), ("TRAIN.SIMILAR_BATCHES", "0.25"))
    with pytest.raises(ConfigError, match="TRAIN.SIMILAR_BATCHES: the run was started with 0.5, not 0.25"):
        train(settings(tmp_path / "gan.yml", text, overrides=other), CPU, resume=True)
    text = DAMSM_YAML.format(data=drawn_folder, epochs=3)
    with pytest.raises(ConfigError, match="TRAIN.SIMILAR_BATCHES: the run was started with 0.5, not 0.0"):
        pretrain(settings(tmp_path / "damsm.yml", text, "damsm"), CPU.device, tmp_path / "parts", resume=True)

    # Without them the losses are others.
    plain = GAN_YAML.format(data=drawn_folder, output=tmp_path / "plain", encoders=encoders)
    train(settings(tmp_path / "gan.yml", plain, overrides=(("TRAIN.MAX_STEPS", "6"),)), CPU)
    rows = [(tmp_path / name / last).parents[1] / "stats.jsonl" for name in ("one", "plain")]
    assert len({json.loads(path.read_text().splitlines()[-1])["loss/words"] for path in rows}) == 2


def test_a_run_from_before_the_setting_has_no_similar_batches():
    today = {"TRAIN": {"SIMILAR_BATCHES": 0.5}}
    with pytest.raises(ConfigError, match="TRAIN.SIMILAR_BATCHES: the run was started with 0.0, not 0.5"):
        check_fixed_settings({"TRAIN": {}}, today, ["TRAIN.SIMILAR_BATCHES"], "--overwrite")


def test_a_share_above_one_is_refused(tmp_path, drawn_folder):
    text = DAMSM_YAML.format(data=drawn_folder, epochs=1)
    with pytest.raises(ConfigError, match=r"TRAIN.SIMILAR_BATCHES"):
        settings(tmp_path / "damsm.yml", text, "damsm", (("TRAIN.SIMILAR_BATCHES", "1.5"),))
