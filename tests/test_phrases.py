"""Phrases of captions and images by hand, their loss, and the encoders that are trained with them."""

import math

import numpy as np
import pytest
import torch
from conftest import DAMSM_YAML, settings
from test_trainer import assert_same_state

from datasets.loading import collate
from datasets.phrases import MOST_FREQUENT, RAREST, Phrases, phrases_in
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.errors import CheckpointError, ConfigError, DataError
from miscc.losses import phrase_loss
from models.phrases import PhraseHead
from training.damsm import EncoderTrainer, pretrain

CPU = torch.device("cpu")


def rows(*captions):
    return [[np.array(caption) for caption in of_image] for of_image in captions]


@pytest.fixture
def with_phrases(drawn_folder, tmp_path):
    """Settings of a pretraining with the losses of phrases: with_phrases(epochs, *further pairs)."""

    def load(epochs=1, *overrides):
        text = DAMSM_YAML.format(data=drawn_folder, epochs=epochs)
        return settings(tmp_path / "damsm.yml", text, "damsm", (("DAMSM.PHRASES", "0.5"), *overrides))

    return load


# -- which captions and images have which phrases ------------------------------------------------------------------


def test_phrases_are_words_and_neighbours():
    assert phrases_in([4, 2, 4]) == {(2,), (4,), (4, 2), (2, 4)}
    assert phrases_in([7]) == {(7,)}


def test_phrases_by_hand():
    """Four images, five captions. Word 1 is in four of the five: too frequent. An image has what any of its captions has."""
    phrases = Phrases(rows([[1, 2]], [[1, 3]], [[1, 2], [3]], [[1]]))
    assert len(phrases) == 4  # (1, 2), (1, 3), (2), (3); by their order
    expected = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]])  # (1, 2), (1, 3), (2,), (3,)
    assert (phrases.of_images([0, 1, 2, 3]) == expected).all()
    assert (phrases.of_images([2, 0]) == expected[[2, 0]]).all()
    assert np.allclose(phrases.caption_rates, [2 / 5, 1 / 5, 2 / 5, 2 / 5])
    assert np.allclose(phrases.image_rates, expected.mean(axis=0))

    # Captions, also with words that the training set does not have.
    captions = [[1, 2], [3, 9, 2], [9]]
    found = phrases.of_captions(captions, captions)
    assert found.dtype == np.float32 and (found == [[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).all()


def test_words_that_became_neighbours_by_shortening_are_no_phrase():
    phrases = Phrases(rows([[1, 2]], [[1, 3]], [[1, 2], [3]], [[1]]))  # (1, 2), (1, 3), (2), (3)
    assert (phrases.of_captions([[1, 3]], [[1, 2, 3]]) == [[0, 0, 0, 1]]).all()  # not (1, 3)
    assert (phrases.of_captions([[1, 3]], [[4, 1, 3]]) == [[0, 1, 0, 1]]).all()


def test_rare_and_frequent_phrases_are_left_out():
    """Of 3,000 captions word 2 is in half, word 3 in one more, word 4 in a thousandth, word 5 in one less."""
    captions = [[1] for _ in range(3000)]
    for word, count in ((2, 1500), (3, 1501), (4, 3), (5, 2)):
        for index in range(count):
            captions[index] = [*captions[index], word]
    kept = Phrases(rows(*[[caption] for caption in captions]))
    assert (RAREST, MOST_FREQUENT) == (0.001, 0.5)
    single = [[2], [3], [4], [5]]
    assert kept.of_captions(single, single).sum(axis=1).tolist() == [1, 0, 1, 0]


def test_captions_that_are_all_alike_have_no_phrases():
    with pytest.raises(DataError, match="DAMSM.PHRASES: all captions have the same words, .*; set it to 0"):
        Phrases(rows([[1, 2]], [[1, 2]]))


# -- the loss ------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """The sum over phrases, the mean over captions: (-log σ(1) - log σ(0) - log σ(-(-2)) - log σ(-0)) / 2."""
    loss = phrase_loss(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)) + 2 * math.log(2)) / 2
    assert loss.item() == pytest.approx(expected)


def test_head_starts_from_the_rates_and_reads_both_sides_by_the_same_weights():
    torch.manual_seed(0)
    head = PhraseHead(3, image_rates=torch.tensor([0.25, 1.0]), caption_rates=torch.tensor([0.1, 0.5]))
    nothing = torch.zeros(2, 3)
    found = head.losses(nothing, nothing, torch.tensor([[1.0, 1.0]] * 2), torch.tensor([[0.0, 1.0]] * 2))
    assert found["image_phrases"].item() == pytest.approx(-math.log(0.25) - math.log(1 - 1e-4), rel=1e-4)
    assert found["caption_phrases"].item() == pytest.approx(-math.log(0.9) - math.log(0.5), rel=1e-5)

    # A direction that says phrase 0: up lowers both losses of a pair that has it.
    direction, has = head.weight[:1].detach(), torch.tensor([[1.0, 1.0]])
    before, after = (head.losses(x, x, has, has) for x in (nothing[:1], 30 * direction))
    assert after["image_phrases"] < before["image_phrases"] and after["caption_phrases"] < before["caption_phrases"]


# -- the encoders' training ----------------------------------------------------------------------------------------


def test_weighted_losses_of_a_batch(with_phrases):
    """Against the head's own, with an image's phrases from all its captions."""
    trainer = EncoderTrainer(with_phrases(), CPU)
    batch = collate([trainer.dataset[0, index] for index in range(8)]).to(CPU)
    text, image = trainer.encode(batch)
    found = trainer.phrase_losses(batch, text, image[1])

    phrases = Phrases(trainer.records.captions)
    of_images = phrases.of_images(list(range(8)))
    captions = [caption[:length].tolist() for caption, length in zip(batch.captions, batch.lengths, strict=True)]
    of_captions = phrases.of_captions(captions, captions)
    assert (of_images >= of_captions).all() and (of_images > of_captions).any()
    both = torch.from_numpy(of_images), torch.from_numpy(of_captions)
    expected = trainer.phrase_losses.head.losses(image[1], text.sentence, *both)
    assert found.keys() == {"image_phrases", "caption_phrases"}
    assert all(found[name].item() == pytest.approx(0.5 * expected[name].item()) for name in found)


def test_they_are_learned(with_phrases):
    trainer = EncoderTrainer(with_phrases(), CPU)
    batch = collate([trainer.dataset[0, index] for index in range(8)]).to(CPU)
    steps = [trainer.train_step(batch, 0) for _ in range(25)]
    for name in ("image_phrases", "caption_phrases"):
        assert steps[-1][name] < 0.8 * steps[0][name]


def test_without_weight_there_is_no_head(drawn_folder, tmp_path):
    cfg = settings(tmp_path / "damsm.yml", DAMSM_YAML.format(data=drawn_folder, epochs=1), "damsm")
    trainer = EncoderTrainer(cfg, CPU)
    assert trainer.phrase_losses is None and "phrases" not in trainer.checkpoint()


def test_training_resumes_exactly_and_the_best_encoders_come_without_the_head(with_phrases, tmp_path):
    pretrain(with_phrases(2), CPU, tmp_path / "whole")
    pretrain(with_phrases(1), CPU, tmp_path / "parts")
    assert pretrain(with_phrases(2), CPU, tmp_path / "parts", resume=True) == 0
    whole, parts = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert whole["phrases"].keys() == {"weight", "image_bias", "caption_bias"}
    for part in ("phrases", "networks", "optimizers"):
        assert_same_state(whole[part], parts[part])
    assert not {"phrases", "optimizers"} & load_checkpoint(tmp_path / "parts" / "best.pth").keys()


def test_a_resumed_training_keeps_its_weight_and_its_head(with_phrases, tmp_path):
    pretrain(with_phrases(1), CPU, tmp_path / "out")
    with pytest.raises(ConfigError, match="DAMSM.PHRASES: the run was started with 0.5, not 0.0; set it back"):
        pretrain(with_phrases(2, ("DAMSM.PHRASES", "0.0")), CPU, tmp_path / "out", resume=True)

    # A checkpoint without the head, or with another one.
    whole = load_checkpoint(tmp_path / "out" / "last.pth")
    for phrases in (None, {"weight": torch.zeros(2, 2)}):
        save_checkpoint(tmp_path / "out" / "last.pth", {**whole, "phrases": phrases})
        with pytest.raises(
            CheckpointError, match="the checkpoint's head for phrases is missing or another's; use another"
        ):
            pretrain(with_phrases(2), CPU, tmp_path / "out", resume=True)
