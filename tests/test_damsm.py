"""The encoders: networks, pretraining, what it writes, and its resuming."""

import functools
import json

import pytest
import torch
from conftest import DAMSM_YAML, settings
from test_trainer import assert_same_state
from torchvision.models import inception_v3
from torchvision.models.feature_extraction import create_feature_extractor

from datasets.loading import collate
from datasets.settings import DataSettings
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.errors import CheckpointError, ConfigError, TrainingError
from miscc.settings import from_config
from models.damsm import InceptionEncoder, SmallImageEncoder, TextEncoder, losses_of_features
from sampling.encoders import load_encoders
from training.damsm import EncoderTrainer, pretrain
from training.data import split_pairs
from training.encoders import load_imagenet_weights
from training.retrieval import retrieval_at
from training.run_dir import EncoderDir
from training.schedule import Budget

CPU = torch.device("cpu")


def test_captions_of_the_same_class_are_mismatches_where_the_settings_say_so():
    """With DAMSM.MASK_CLASSES False the losses are those of images that are all of classes of their own."""
    torch.manual_seed(0)
    features = (torch.randn(4, 8, 3, 3), torch.randn(4, 8), torch.randn(4, 8, 5), torch.randn(4, 8))
    lengths, gammas = torch.tensor([5, 3, 4, 2]), {"gamma1": 4.0, "gamma2": 5.0, "gamma3": 10.0}

    def losses(classes, **options):
        found = losses_of_features(*features, lengths, torch.tensor(classes), **gammas, **options)
        return {name: value.item() for name, value in found.items()}

    alike = [0, 0, 1, 0]
    assert losses(alike, mask_classes=False) == losses([0, 1, 2, 3]) == losses([0, 1, 2, 3], mask_classes=False)
    assert losses(alike)["words"] < losses(alike, mask_classes=False)["words"]


def test_pretraining_masks_classes_as_its_settings_say(drawn_folder, tmp_path):
    def losses(*overrides):
        cfg = settings(tmp_path / "damsm.yml", DAMSM_YAML.format(data=drawn_folder, epochs=1), "damsm", overrides)
        trainer = EncoderTrainer(cfg, CPU)
        batch = collate([trainer.dataset[0, index] for index in range(8)]).to(CPU)
        alike = batch._replace(class_ids=torch.zeros(8, dtype=torch.int64))
        return trainer.losses(alike, *trainer.encode(alike))

    assert losses()["sentence"] == 0 and losses(("DAMSM.MASK_CLASSES", "False"))["sentence"] > 1


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_text_encoder_ignores_padding_and_batch_mates(rnn_type):
    torch.manual_seed(0)
    encoder = TextEncoder(10, rnn_type=rnn_type).eval()
    captions, lengths = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]]), torch.tensor([2, 4])
    text = encoder(captions, lengths)
    assert text.sentence.shape == (2, 256) and text.words.shape == (2, 256, 4)
    assert text.mask.tolist() == [[False, False, True, True], [False] * 4]
    assert text.words[0, :, 2:].abs().max() == 0
    alone = encoder(torch.tensor([[3, 4, 9]]), torch.tensor([2]))
    torch.testing.assert_close(alone.sentence[0], text.sentence[0])
    torch.testing.assert_close(alone.words[0, :, :2], text.words[0, :, :2])
    # The sentence is the last state of each direction: forward at the last word, backward at the first.
    torch.testing.assert_close(text.sentence[0], torch.cat([text.words[0, :128, 1], text.words[0, 128:, 0]]))


def test_text_encoder_drops_out_in_training_only():
    encoder, captions, lengths = TextEncoder(10), torch.tensor([[3, 4]]), torch.tensor([2])
    assert not torch.equal(encoder.train()(captions, lengths).sentence, encoder(captions, lengths).sentence)
    assert torch.equal(encoder.eval()(captions, lengths).sentence, encoder(captions, lengths).sentence)


def test_inception_encoder_reads_the_layers_of_torchvisions_network():
    torch.manual_seed(0)
    whole = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    encoder = InceptionEncoder().eval()
    encoder.trunk.load_state_dict({name: whole.state_dict()[name] for name in encoder.trunk.state_dict()})
    nodes = create_feature_extractor(whole, {"Mixed_6e": "regions", "avgpool": "pooled"})
    images = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        expected, (regions, code) = nodes(images), encoder(images)
        torch.testing.assert_close(regions, encoder.region_head(expected["regions"]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(code, encoder.code_head(expected["pooled"].flatten(1)), rtol=1e-3, atol=1e-4)
    assert regions.shape == (1, 256, 17, 17) and code.shape == (1, 256)


def test_inception_trunk_is_frozen_and_keeps_its_statistics():
    encoder = InceptionEncoder().train()
    assert not encoder.trunk.training and encoder.region_head.training
    trained = {id(p) for p in encoder.parameters() if p.requires_grad}
    assert trained == {id(p) for p in encoder.head_parameters()}
    encoder.batch_statistics = True
    assert encoder.train().trunk.training and not encoder.eval().trunk.training


@pytest.mark.parametrize("size", [16, 32, 64, 256])
def test_small_encoder_gives_an_eight_by_eight_grid(size):
    encoder = SmallImageEncoder(image_size=size, nf=2).eval()
    for given in (size, 2 * size):  # other images are resized
        regions, code = encoder(torch.zeros(2, 3, given, given))
        assert regions.shape == (2, 256, 8, 8) and code.shape == (2, 256)


def test_imagenet_weights_come_from_a_file_or_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    encoder = InceptionEncoder()
    with pytest.raises(
        CheckpointError, match=r"download https://.*inception_v3.* to .*hub.*DAMSM.IMAGE_ENCODER pretrained or small"
    ):
        load_imagenet_weights(encoder.trunk, "")
    weights = inception_v3(weights=None, init_weights=False).state_dict()  # with fc and AuxLogits, as the file has them
    torch.save(weights, tmp_path / "inception.pth")
    load_imagenet_weights(encoder.trunk, str(tmp_path / "inception.pth"))
    assert torch.equal(encoder.trunk.Mixed_7c.branch1x1.conv.weight, weights["Mixed_7c.branch1x1.conv.weight"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is not torchvision's inception_v3"):
        load_imagenet_weights(encoder.trunk, str(tmp_path / "other.pth"))


def test_retrieval_by_hand():
    code = torch.eye(3)
    sentence = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.9]])
    scores = retrieval_at(code, sentence, (1, 2))
    # Image 0 finds its text; image 1's own is orthogonal to it, below text 2; image 2 prefers text 1 to its own.
    assert scores["image_to_text_r1"] == pytest.approx(1 / 3) and scores["chance_r1"] == pytest.approx(1 / 3)
    assert scores["image_to_text_r2"] == pytest.approx(2.5 / 3)  # image 1: text 2, then a tie of texts 0 and 1
    assert retrieval_at(code, code)["text_to_image_r1"] == 1.0
    equal = retrieval_at(torch.ones(11, 2), torch.ones(11, 2), (1, 6))
    assert equal["text_to_image_r1"] == pytest.approx(1 / 11) and equal["text_to_image_r6"] == pytest.approx(6 / 11)


@pytest.fixture
def damsm_settings(drawn_folder, tmp_path):
    def load(epochs=2, *overrides):
        return settings(tmp_path / "damsm.yml", DAMSM_YAML.format(data=drawn_folder, epochs=epochs), "damsm", overrides)

    return load


def state(folder, name="last.pth"):
    return {key: value for key, value in load_checkpoint(folder / name).items() if key != "config"}


def test_pretraining_writes_encoders_scores_and_attention(damsm_settings, tmp_path, capsys):
    folder = tmp_path / "encoders"
    assert pretrain(damsm_settings(2, ("TRAIN.SNAPSHOT_INTERVAL", "2")), CPU, folder) == 0
    assert {"best.pth", "last.pth", "epoch_0002.pth", "config.yml", "log.txt", "stats.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert sorted(path.name for path in (folder / "attention").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "validation/loss" in line]
    assert len(scores) == 2 and scores[0]["validation/chance_r1"] == pytest.approx(1 / 8)  # 20 % of 40 are held out
    assert "R@1" in capsys.readouterr().out
    loaded = load_encoders(folder / "best.pth")
    assert loaded.vocabulary.words[0] == "<end>" and loaded.max_words == 18 and loaded.image_size == 16
    assert not loaded.text_encoder.training and not any(p.requires_grad for p in loaded.image_encoder.parameters())


def test_held_out_pairs_are_not_trained_on(damsm_settings):
    """A fifth of the 40, drawn by the seed."""
    data = from_config(DataSettings, damsm_settings())
    trained, held_out = split_pairs(data, 0.2, 1, None)
    assert (len(trained), len(held_out)) == (32, 8) and not set(trained.keys) & set(held_out.keys)
    assert split_pairs(data, 0.2, 1, None)[1].keys == held_out.keys != split_pairs(data, 0.2, 2, None)[1].keys


def test_pretraining_resumes_exactly(damsm_settings, tmp_path):
    pretrain(damsm_settings(3), CPU, tmp_path / "whole")
    pretrain(damsm_settings(1), CPU, tmp_path / "parts")
    # Stopped in the middle of the second epoch, as by a signal.
    trainer = EncoderTrainer(damsm_settings(3), CPU, load_checkpoint(tmp_path / "parts" / "last.pth"))
    from datasets.loading import training_loader

    batches = iter(training_loader(trainer.dataset, 8, 100, trainer.step))
    trainer.train_step(next(batches).to("cpu"), 1)
    save_checkpoint(tmp_path / "parts" / "last.pth", trainer.checkpoint())
    assert pretrain(damsm_settings(3), CPU, tmp_path / "parts", resume=True) == 0
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert_same_state(state(tmp_path / "whole", "best.pth"), state(tmp_path / "parts", "best.pth"))


def test_encoders_that_are_there_are_not_lost(damsm_settings, tmp_path):
    pretrain(damsm_settings(1), CPU, tmp_path / "out")
    before = (tmp_path / "out" / "best.pth").read_bytes()
    with pytest.raises(CheckpointError, match="holds encoders already; give --resume, --overwrite"):
        pretrain(damsm_settings(1), CPU, tmp_path / "out")
    assert (tmp_path / "out" / "best.pth").read_bytes() == before
    with pytest.raises(CheckpointError, match="nothing to resume"):
        pretrain(damsm_settings(1), CPU, tmp_path / "nowhere", resume=True)


def test_overwriting_leaves_nothing_of_the_former_training_to_go_on_from(damsm_settings, tmp_path, monkeypatch):
    """Killed before its first checkpoint, the new training must not be resumed from the former one's state."""
    pretrain(damsm_settings(2, ("TRAIN.SNAPSHOT_INTERVAL", "1")), CPU, tmp_path / "out")
    assert (tmp_path / "out" / "previous.pth").is_file() and (tmp_path / "out" / "epoch_0001.pth").is_file()
    before = (tmp_path / "out" / "best.pth").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(EncoderTrainer, "run_to_the_end", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(damsm_settings(1), CPU, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "best.pth").read_bytes() == before
    assert not EncoderDir(tmp_path / "out").has_state() and not list((tmp_path / "out").glob("epoch_*.pth"))
    with pytest.raises(CheckpointError, match="nothing to resume"):
        pretrain(damsm_settings(1), CPU, tmp_path / "out", resume=True)


def test_patience_ends_the_training(damsm_settings, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    monkeypatch.setattr(
        EncoderTrainer,
        "validate",
        lambda self: {"loss": next(losses)} | retrieval_at(torch.eye(3), torch.eye(3), (1, 5)),
    )
    assert pretrain(damsm_settings(50, ("TRAIN.PATIENCE", "2")), CPU, tmp_path / "out") == 0
    last, best = (load_checkpoint(tmp_path / "out" / name) for name in ("last.pth", "best.pth"))
    assert last["epoch"] == 4 and best["epoch"] == 2  # two epochs without a better loss


def test_a_signal_in_the_last_step_of_an_epoch_still_ends_the_epoch(damsm_settings, tmp_path, monkeypatch):
    import signal

    train_step = EncoderTrainer.train_step

    def interrupted(self, batch, epoch):
        losses = train_step(self, batch, epoch)
        if self.step == self.steps_per_epoch:
            signal.raise_signal(signal.SIGTERM)
        return losses

    monkeypatch.setattr(EncoderTrainer, "train_step", interrupted)
    assert pretrain(damsm_settings(1), CPU, tmp_path / "out") == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "out" / "best.pth")["best"]["epoch"] == 1


def test_settings_that_shape_the_encoders_cannot_change_on_resuming(damsm_settings, tmp_path):
    pretrain(damsm_settings(1), CPU, tmp_path / "out")
    with pytest.raises(ConfigError, match="TRAIN.HELD_OUT: the run was started with 0.2, not 0.3"):
        pretrain(damsm_settings(2, ("TRAIN.HELD_OUT", "0.3")), CPU, tmp_path / "out", resume=True)


def test_encoders_that_were_copied_here_are_not_lost(damsm_settings, encoders, tmp_path):
    import shutil

    (tmp_path / "out").mkdir()
    shutil.copy(encoders, tmp_path / "out" / "best.pth")
    with pytest.raises(CheckpointError, match="holds encoders already"):
        pretrain(damsm_settings(1), CPU, tmp_path / "out")


def test_a_loss_that_is_not_finite_is_named(damsm_settings):
    trainer = EncoderTrainer(damsm_settings(), CPU)
    trainer.image_encoder.code_head.weight.data.fill_(float("nan"))
    from datasets.loading import training_loader

    batch = next(iter(training_loader(trainer.dataset, 8, 100))).to("cpu")
    with pytest.raises(TrainingError, match=r"the loss `sentence` is not finite at step 1 \(epoch 1\)"):
        trainer.train_step(batch, 0)


def test_the_learning_rate_falls_to_a_tenth(damsm_settings):
    trainer = EncoderTrainer(damsm_settings(), CPU)
    from datasets.loading import training_loader

    batch = next(iter(training_loader(trainer.dataset, 8, 100))).to("cpu")
    rates = []
    for epoch in (0, 1, 500):
        trainer.train_step(batch, epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-3, 2e-3 * 0.98, 2e-4])


def test_minutes_end_the_pretraining_and_rates_fall_over_them(damsm_settings, tmp_path, monkeypatch):
    now, rates = [0.0], []
    monkeypatch.setattr("training.damsm.Budget", functools.partial(Budget, clock=lambda: now[0]))
    step = EncoderTrainer.train_step

    def timed(trainer, *arguments):
        losses = step(trainer, *arguments)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        now[0] += 30
        return losses

    monkeypatch.setattr(EncoderTrainer, "train_step", timed)
    changes = (("TRAIN.MAX_MINUTES", "3"), ("TRAIN.LR_DECAY_FROM", "0.5"), ("TRAIN.ENCODER_LR_DECAY", "1.0"))
    assert pretrain(damsm_settings(100, *changes), CPU, tmp_path / "out") == 0

    # Six steps of half a minute: full rates for three, then a third less each; validated, saved, time kept.
    assert rates == pytest.approx([2e-3] * 4 + [2e-3 * 2 / 3, 2e-3 / 3])
    best = load_checkpoint(tmp_path / "out" / "best.pth")
    assert best["step"] == 6 and best["seconds"] == 180

    # Out of minutes: nothing more to do. More of them: it goes on.
    assert pretrain(damsm_settings(100, *changes), CPU, tmp_path / "out", resume=True) == 0
    assert len(rates) == 6
    assert pretrain(damsm_settings(100, ("TRAIN.MAX_MINUTES", "4")), CPU, tmp_path / "out", resume=True) == 0
    assert len(rates) == 8


def test_training_lowers_the_loss(damsm_settings):
    trainer = EncoderTrainer(damsm_settings(), CPU)
    from datasets.loading import training_loader

    batch = next(iter(training_loader(trainer.dataset, 8, 100))).to("cpu")
    losses = [sum(trainer.train_step(batch, 0).values()).item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
