"""The encoders' loop: DAMSM pretraining, with validation loss and retrieval on held-out pairs after each epoch."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights

from datasets.layout import splits_present
from datasets.loading import ordered_loader, training_loader
from datasets.records import Records
from miscc.batch import Batch
from miscc.checkpoint import load_checkpoint, load_file, save_checkpoint
from miscc.config import to_plain, to_yaml
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, TrainingError
from miscc.files import remove_unfinished, write_text
from miscc.images import to_uint8
from miscc.losses import sentence_loss, word_attention, word_loss
from miscc.pictures import attention_picture, save_image
from miscc.randomness import seed_everything, stream
from miscc.vocabulary import Vocabulary
from models import IMAGE_ENCODERS, TEXT_ENCODERS, networks_of
from models.modes import eval_mode
from models.registry import from_state, network_name, to_state
from models.types import TextFeatures, Update
from sampling.encoders import load_encoders, released_vocabulary
from training.build import check_batch_size
from training.data import make_dataset, read_records, usable_workers
from training.progress import Progress, StopSignal
from training.resume import check_encoders_resumable, check_same_data, fingerprint
from training.retrieval import retrieval_at
from training.run_dir import EncoderDir
from training.step import Clipping, Stepper, adam, restore_adam
from training.tracker import Tracker, find_tracker

logger = logging.getLogger(__name__)

MOST_VALIDATED = 1000  # held-out pairs that are ranked against each other at most
NUM_PICTURED = 6  # captions in the attention picture
LOG_EVERY = 20  # steps


def pretrain(
    cfg: Mapping, device: torch.device, folder: str | Path, resume: bool = False, overwrite: bool = False
) -> int:
    """Train text and image encoder until MAX_EPOCH, PATIENCE or a signal; best.pth and last.pth go to `folder`.

    Returns the exit code: 0, or 128 + the signal's number. Raises UserError where something is missing, where encoders
    are in the folder already, or when the loss is no longer finite.
    """
    package = find_tracker(cfg.TRAIN.TRACKER)
    run = EncoderDir(folder)
    if resume and not run.last.is_file():
        raise CheckpointError(f"nothing to resume: {run.last} does not exist; start without --resume")
    if (run.last.is_file() or run.best.is_file()) and not resume and not overwrite:
        raise CheckpointError(
            f"{run.path}: holds encoders already; give --resume, --overwrite, or another folder with --out"
        )
    trainer = EncoderTrainer(cfg, device, load_checkpoint(run.last) if resume else None)
    write_text(run.config, to_yaml(cfg))
    remove_unfinished(run.path)
    progress = Progress(run, trainer.step, Tracker(package, run, cfg) if package else None)
    try:
        return trainer.run_to_the_end(run, progress)
    finally:
        progress.close()


class EncoderTrainer:
    """Data, encoders, optimizer, and the step that a training of the encoders has reached."""

    def __init__(self, cfg: Mapping, device: torch.device, checkpoint: dict | None = None):
        self.cfg, self.device = cfg, device
        check_batch_size(cfg.TRAIN.BATCH_SIZE)
        seed_everything(cfg.SEED)  # the initial weights
        given, vocabulary = self._given_encoders(checkpoint)
        self.records, self.validation = split_records(cfg, vocabulary)
        self.vocabulary = vocabulary or self.records.vocabulary
        networks = given or self._fresh_encoders()
        self.networks = {part: network.to(device) for part, network in networks.items()}
        self.text_encoder, self.image_encoder = self.networks["text_encoder"], self.networks["image_encoder"]
        parameters = [*self.text_encoder.parameters(), *self.image_encoder.head_parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = adam(parameters, cfg.TRAIN.ENCODER_LR, cfg.TRAIN.BETAS)
        clipping = Clipping(list(self.text_encoder.parameters()), cfg.TRAIN.RNN_GRAD_CLIP)
        self.stepper = Stepper(self.updates, {"encoders": self.optimizer}, World(0, 1, device), clipping=clipping)
        self.dataset = make_dataset(cfg, self.records, [cfg.TREE.BASE_SIZE], augment=True)
        self.steps_per_epoch = max(1, len(self.dataset) // cfg.TRAIN.BATCH_SIZE)
        self.step, self.best_loss, self.best_epoch = 0, float("inf"), 0
        if checkpoint is not None:
            self._restore(checkpoint)

    def run_to_the_end(self, run: EncoderDir, progress: Progress) -> int:
        cfg = self.cfg
        loader = training_loader(
            self.dataset,
            cfg.TRAIN.BATCH_SIZE,
            cfg.SEED,
            self.step,
            usable_workers(cfg.WORKERS, self.device),
            pin_memory=self.device.type == "cuda",
        )
        progress.say(
            f"encoders on {self.device}: {len(self.records)} images to train on, {len(self.validation)} held out, "
            f"{len(self.vocabulary)} words, epoch {self.step // self.steps_per_epoch + 1} of {cfg.TRAIN.MAX_EPOCH}"
        )
        batches = iter(loader)
        with StopSignal() as stop:
            for epoch in range(self.step // self.steps_per_epoch, cfg.TRAIN.MAX_EPOCH):
                if self.out_of_patience(epoch):
                    break
                done = self.step - epoch * self.steps_per_epoch
                progress.start_epoch(f"epoch {epoch + 1}/{cfg.TRAIN.MAX_EPOCH}", done, self.steps_per_epoch)
                for _ in range(done, self.steps_per_epoch):
                    losses = self.train_step(next(batches).to(self.device, non_blocking=True), epoch)
                    progress.advance()
                    if self.step % LOG_EVERY == 0:
                        values = {f"loss/{name}": loss.item() for name, loss in losses.items()}
                        progress.log(self.step, self.step / self.steps_per_epoch, values, tuple(values))
                    if stop.received and self.step % self.steps_per_epoch:  # else the epoch is ended first
                        return self._stopped(run, progress, stop.received)
                progress.end_epoch()
                self.end_epoch(epoch + 1, run, progress)
                if stop.received:
                    return self._stopped(run, progress, stop.received)
        progress.say(f"best: epoch {self.best_epoch}, validation loss {self.best_loss:.4f}: {run.best}")
        return 0

    def train_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """One optimizer step; returns the losses. Raises TrainingError, naming the loss, when one is not finite."""
        train = self.cfg.TRAIN
        seed_everything(self.cfg.SEED, self.step)  # dropout
        self.text_encoder.train()
        self.image_encoder.train()
        for group in self.optimizer.param_groups:
            group["lr"] = train.ENCODER_LR * max(0.1, train.ENCODER_LR_DECAY**epoch)

        (update,) = self.stepper.steps(batch, torch.empty(len(batch.keys), 0))  # the encoders take no noise
        self.step += 1

        for name, loss in update.losses.items():
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss `{name}` is not finite at step {self.step} (epoch {epoch + 1}); the last good encoders are "
                    f"kept. Lower TRAIN.ENCODER_LR, then go on with --resume"
                )
        return dict(update.losses)

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """The only update of a step: both encoders by the losses of both levels."""
        yield Update("encoders", self.losses(batch, *self.encode(batch)))

    def encode(self, batch: Batch) -> tuple[TextFeatures, tuple[Tensor, Tensor]]:
        """The captions' features, and the images' regions and codes."""
        return self.text_encoder(batch.captions, batch.lengths), self.image_encoder(batch.images)

    def losses(self, batch: Batch, text: TextFeatures, image: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Word and sentence losses, each the sum of both directions."""
        smooth = self.cfg.TRAIN.SMOOTH
        regions, code = image
        gammas = (smooth.GAMMA1, smooth.GAMMA2, smooth.GAMMA3)
        words = word_loss(regions, text.words, batch.lengths, batch.class_ids, *gammas)
        sentences = sentence_loss(code, text.sentence, batch.class_ids, smooth.GAMMA3)
        return {"words": sum(words), "sentence": sum(sentences)}

    def end_epoch(self, epoch: int, run: EncoderDir, progress: Progress) -> None:
        """Validate, draw attention, save last, best and the numbered checkpoint that is due."""
        scores = self.validate()
        progress.log(self.step, epoch, {f"validation/{name}": value for name, value in scores.items()})
        progress.say(
            f"epoch {epoch}: validation loss {scores['loss']:.4f}, R@1 {scores['text_to_image_r1']:.1%} / "
            f"{scores['image_to_text_r1']:.1%} (text to image / image to text; chance {scores['chance_r1']:.1%}), "
            f"R@5 {scores['text_to_image_r5']:.1%} / {scores['image_to_text_r5']:.1%}"
        )
        self.draw_attention(run, epoch, progress)
        better = scores["loss"] < self.best_loss
        if better:
            self.best_loss, self.best_epoch = scores["loss"], epoch
        checkpoint = self.checkpoint(scores)
        if better:
            save_checkpoint(run.best, checkpoint)
        every = self.cfg.TRAIN.SNAPSHOT_INTERVAL
        if every and epoch % every == 0:
            save_checkpoint(run.numbered(epoch), checkpoint)
        save_checkpoint(run.last, checkpoint)

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out pairs in full batches, and retrieval among all of them. Nothing random in it."""
        dataset = make_dataset(self.cfg, self.validation, [self.cfg.TREE.BASE_SIZE], augment=False)
        batch_size = min(self.cfg.TRAIN.BATCH_SIZE, len(dataset))
        totals, codes, sentences = [], [], []
        with eval_mode(self.text_encoder, self.image_encoder), torch.inference_mode():
            for batch in ordered_loader(dataset, batch_size, workers=0):
                batch = batch.to(self.device)
                text, image = self.encode(batch)
                if len(batch.lengths) == batch_size:  # a shorter batch would be easier
                    totals.append(sum(self.losses(batch, text, image).values()).item())
                codes.append(image[1].float().cpu())
                sentences.append(text.sentence.float().cpu())
        loss = sum(totals) / len(totals)
        if loss != loss:
            raise TrainingError(
                f"the validation loss is not a number after step {self.step}; the last good encoders are kept"
            )
        return {"loss": loss} | retrieval_at(torch.cat(codes), torch.cat(sentences))

    @torch.no_grad()
    def draw_attention(self, run: EncoderDir, epoch: int, progress: Progress) -> None:
        """A picture of where the words of some held-out captions look in their own images."""
        places = range(0, len(self.validation), max(1, len(self.validation) // NUM_PICTURED))[:NUM_PICTURED]
        chosen = make_dataset(self.cfg, self.validation.select(places), [self.cfg.TREE.BASE_SIZE], augment=False)
        batch = next(iter(ordered_loader(chosen, len(places)))).to(self.device)
        with eval_mode(self.text_encoder, self.image_encoder):
            text = self.text_encoder(batch.captions, batch.lengths)
            regions, _ = self.image_encoder(batch.images)
        maps = word_attention(regions, text.words, batch.lengths, self.cfg.TRAIN.SMOOTH.GAMMA1).cpu().numpy()
        words = [
            [self.vocabulary.words[int(index)] for index in caption[:length]]
            for caption, length in zip(batch.captions, batch.lengths, strict=True)
        ]
        picture = attention_picture(list(to_uint8(batch.images)), words, list(maps))
        save_image(picture, run.picture(epoch))
        progress.picture("attention", picture, self.step)

    def out_of_patience(self, epoch: int) -> bool:
        """Whether `epoch` finished epochs are PATIENCE more than the best one."""
        patience = self.cfg.TRAIN.PATIENCE
        return bool(patience and epoch and epoch - self.best_epoch >= patience)

    def checkpoint(self, scores: Mapping[str, float] | None = None) -> dict[str, Any]:
        return {
            "config": to_plain(self.cfg),
            "vocabulary": self.vocabulary.words,
            "networks": {part: to_state(network_name(network), network) for part, network in self.networks.items()},
            "optimizers": {"encoders": self.optimizer.state_dict()},
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "data": fingerprint(self.records),
            "best": {"loss": self.best_loss, "epoch": self.best_epoch},
            "validation": dict(scores or {}),
        }

    def _restore(self, checkpoint: dict) -> None:
        check_encoders_resumable(checkpoint, self.cfg)
        check_same_data(checkpoint, self.records, self.cfg.DATA_DIR)
        restore_adam(self.optimizer, checkpoint["optimizers"]["encoders"])
        self.step = checkpoint["step"]
        self.best_loss, self.best_epoch = checkpoint["best"]["loss"], checkpoint["best"]["epoch"]

    def _stopped(self, run: EncoderDir, progress: Progress, number: int) -> int:
        progress.end_epoch()
        save_checkpoint(run.last, self.checkpoint())
        progress.say(f"stopped after step {self.step}, saved {run.last}; go on with the same command and --resume")
        return 128 + number

    def _given_encoders(self, checkpoint: dict | None) -> tuple[dict[str, nn.Module] | None, Vocabulary | None]:
        """The encoders of the checkpoint, or of NET_E, with their vocabulary."""
        if checkpoint is not None:
            networks = {part: from_state(entry, networks_of(part)) for part, entry in checkpoint["networks"].items()}
            return networks, Vocabulary(checkpoint["vocabulary"])
        if not self.cfg.TRAIN.NET_E:
            return None, None
        encoders = load_encoders(self.cfg.TRAIN.NET_E, max_words=self.cfg.TEXT.WORDS_NUM)
        if encoders.image_encoder is None:
            raise CheckpointError(f"TRAIN.NET_E: there is no image encoder beside {self.cfg.TRAIN.NET_E}")
        vocabulary = encoders.vocabulary or released_vocabulary(self.cfg.DATA_DIR)
        return {"text_encoder": encoders.text_encoder, "image_encoder": encoders.image_encoder}, vocabulary

    def _fresh_encoders(self) -> dict[str, nn.Module]:
        cfg = self.cfg
        arguments = {"text_dim": cfg.TEXT.EMBEDDING_DIM}
        if cfg.DAMSM.IMAGE_ENCODER == "small":
            size = cfg.TREE.BASE_SIZE
            if size < 16 or size & (size - 1):
                raise ConfigError(f"TREE.BASE_SIZE: the small encoder takes powers of two from 16 on, not {size}")
            arguments["image_size"] = size
        image_encoder = IMAGE_ENCODERS[cfg.DAMSM.IMAGE_ENCODER](**arguments)
        if cfg.DAMSM.IMAGE_ENCODER == "inception":
            load_imagenet_weights(image_encoder.trunk, cfg.DAMSM.INCEPTION_WEIGHTS)
        text_encoder = TEXT_ENCODERS["rnn"](
            vocabulary_size=len(self.vocabulary),
            text_dim=cfg.TEXT.EMBEDDING_DIM,
            rnn_type=cfg.RNN_TYPE,
            max_words=cfg.TEXT.WORDS_NUM,
        )
        return {"text_encoder": text_encoder, "image_encoder": image_encoder}


def split_records(cfg: Mapping, vocabulary: Vocabulary | None) -> tuple[Records, Records]:
    """Training pairs and held-out pairs: the data's val split, or else a seeded share of the training images.

    HELD_OUT 0 without a val split: the test split, as AttnGAN does; what is chosen by it then knows the test set.
    """
    records = read_records(cfg, "train", vocabulary)
    if "val" in splits_present(Path(cfg.DATA_DIR)):
        validation = read_records(cfg, "val", vocabulary)
    elif cfg.TRAIN.HELD_OUT == 0:
        logger.warning("TRAIN.HELD_OUT is 0: the best encoders are chosen by the test split, as AttnGAN's were")
        validation = read_records(cfg, "test", vocabulary)
    else:
        number = min(MOST_VALIDATED, max(2, round(cfg.TRAIN.HELD_OUT * len(records))))
        order = stream(cfg.SEED, "held out").permutation(len(records))
        records, validation = records.select(sorted(order[number:])), records.select(sorted(order[:number]))
    if len(validation) > MOST_VALIDATED:
        places = stream(cfg.SEED, "validated").permutation(len(validation))[:MOST_VALIDATED]
        validation = validation.select(sorted(places))
    return records, validation


def load_imagenet_weights(trunk: nn.Module, path: str) -> None:
    """Put torchvision's ImageNet weights into Inception-v3. Raises CheckpointError, saying where to get them."""
    url = Inception_V3_Weights.IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    file = Path(path) if path else cached
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no ImageNet weights of Inception-v3 there; download {url} to {cached} or set "
            f"DAMSM.INCEPTION_WEIGHTS to the file (or train a light encoder: --set DAMSM.IMAGE_ENCODER small)"
        )
    state = load_file(file)
    wanted = trunk.state_dict()
    missing = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    if missing:
        raise CheckpointError(
            f"{file}: is not torchvision's inception_v3, {len(missing)} tensors missing ({missing[0]})"
        )
    trunk.load_state_dict({name: state[name] for name in wanted})
