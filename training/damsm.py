"""The encoders' loop: DAMSM pretraining, with validation loss and retrieval on held-out pairs after each epoch."""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from datasets.loading import ordered_loader
from datasets.records import Records
from datasets.settings import DataSettings
from datasets.text_image import TextImageDataset
from miscc.batch import Batch
from miscc.checkpoint import save_checkpoint
from miscc.config import Config, to_plain, to_yaml
from miscc.distributed import World
from miscc.errors import CheckpointError, TrainingError
from miscc.files import write_text
from miscc.images import to_uint8
from miscc.losses import word_attention
from miscc.pictures import attention_picture, save_image
from miscc.randomness import seed_everything
from miscc.settings import arguments_from, from_config
from models.damsm import TextEncoder, losses_of_features
from models.modes import eval_mode
from models.registry import network_name, to_state
from models.types import CaptionEncoder, ImageEncoder, TextFeatures, Update
from training.data import batches_from, make_dataset, next_batch, split_pairs
from training.encoders import backbone_arguments, fresh_encoders, stored_encoders
from training.phrases import PhraseLosses
from training.progress import Progress, StopSignal
from training.resume import check_encoders_resumable, check_same_data, restore_state
from training.retrieval import retrieval_at
from training.run_dir import EncoderDir
from training.schedule import Budget, learning_rate_factor, set_learning_rates
from training.settings import PretrainingSettings
from training.step import Clipping, Stepper, adam, check_batch_size, check_finite_weights
from training.tracker import Tracker, find_tracker

logger = logging.getLogger(__name__)

NUM_PICTURED = 6  # captions in the attention picture
LOG_EVERY = 20  # steps


def pretrain(
    cfg: Config, device: torch.device, folder: str | Path, resume: bool = False, overwrite: bool = False
) -> int:
    """Train text and image encoder until MAX_EPOCH, MAX_MINUTES, PATIENCE or a signal; best.pth and last.pth go to `folder`.

    Returns the exit code: 0, or 128 + the signal's number. Raises UserError where something is missing, where encoders
    are in the folder already, or when the loss is no longer finite.
    """
    package = find_tracker(cfg.TRAIN.TRACKER)

    # The folder: nothing is overwritten unasked.
    run = EncoderDir(folder)
    if resume and not run.has_state():
        raise CheckpointError(f"nothing to resume: {run.last} does not exist; start without --resume")
    if (run.has_state() or run.best.is_file()) and not resume and not overwrite:
        raise CheckpointError(
            f"{run.path}: holds encoders already; give --resume, --overwrite, or, for other data, another folder: "
            f"--out DIR here, and --set TEXT.DAMSM_NAME DIR/best.pth for main.py"
        )

    # Everything that may be refused comes before the first file.
    if resume:
        run.lock()
    trainer = EncoderTrainer(cfg, device, run.load() if resume else None)
    if not resume:
        run.lock()
    if overwrite and not resume:
        run.discard_state()
    write_text(run.config, to_yaml(cfg))

    progress = Progress(run, trainer.step, Tracker(package, run, cfg) if package else None)
    try:
        return trainer.run_to_the_end(run, progress)
    finally:
        progress.close()
        run.release()


class EncoderTrainer:
    """Data, encoders, optimizer, and the step that a training of the encoders has reached."""

    def __init__(self, cfg: Config, device: torch.device, checkpoint: dict | None = None):
        # Settings: of each part. The configuration as a whole is for checkpoints alone.
        self.config, self.seed, self.device = to_plain(cfg), cfg.SEED, device
        self.settings = from_config(PretrainingSettings, cfg)
        self.data_settings = from_config(DataSettings, cfg)
        text_arguments, backbone = arguments_from(TextEncoder.Settings, cfg), backbone_arguments(cfg)
        check_batch_size(self.settings.batch_size)
        if checkpoint is not None:
            check_encoders_resumable(checkpoint, cfg)

        # Pairs, and encoders with a vocabulary for them.
        seed_everything(self.seed)  # the initial weights
        networks, vocabulary = stored_encoders(self.settings, self.data_settings, text_arguments, backbone, checkpoint)
        settings = (self.data_settings, self.settings.held_out, self.seed)
        self.records, self.validation = split_pairs(*settings, vocabulary)
        self.vocabulary = vocabulary or self.records.vocabulary
        if networks is None:
            words = {"vocabulary_size": len(self.vocabulary), "max_words": self.data_settings.max_words}
            networks = fresh_encoders(self.settings, words | text_arguments, backbone)
        self.networks = {part: network.to(device) for part, network in networks.items()}
        self.text_encoder = cast(CaptionEncoder, self.networks["text_encoder"])
        self.image_encoder = cast(ImageEncoder, self.networks["image_encoder"])
        self.dataset = self._dataset(self.records, augment=True)
        self.steps_per_epoch = max(1, len(self.dataset) // self.settings.batch_size)

        # The losses of phrases, where the settings ask for them.
        weight, text_dim = self.settings.phrase_weight, text_arguments["text_dim"]
        self.phrase_losses = PhraseLosses(self.records, weight, text_dim, device) if weight else None

        # The optimizer, and what steps it.
        parameters = [*self.text_encoder.parameters(), *self.image_encoder.head_parameters()]
        if self.phrase_losses is not None:
            parameters += self.phrase_losses.parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = adam(parameters, self.settings.learning_rate, self.settings.betas)
        clipping = Clipping(list(self.text_encoder.parameters()), self.settings.grad_clip)
        self.world = World(0, 1, device)
        self.stepper = Stepper(self.updates, {"encoders": self.optimizer}, self.world, clipping=clipping)

        # Where the training stands.
        self.step, self.best_loss, self.best_epoch = 0, float("inf"), 0
        if checkpoint is not None:
            self._restore(checkpoint)
        last_step = self.steps_per_epoch * self.settings.max_epoch
        used = checkpoint.get("seconds", 0.0) if checkpoint is not None else 0.0
        self.budget = Budget(last_step, self.settings.max_minutes, used)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run_to_the_end(self, run: EncoderDir, progress: Progress) -> int:
        """Train until MAX_EPOCH, MAX_MINUTES, PATIENCE or a signal; returns the exit code."""
        max_epoch = self.settings.max_epoch
        progress.say(
            f"encoders on {self.device}: {len(self.records)} images to train on, {len(self.validation)} held out, "
            f"{len(self.vocabulary)} words, epoch {self.step // self.steps_per_epoch + 1} of {max_epoch}"
        )
        order = (self.settings.batch_size, self.seed, self.step)
        batches = iter(batches_from(self.dataset, *order, self.data_settings, self.world))
        self.budget.start()
        with StopSignal() as stop:
            for epoch in range(self.step // self.steps_per_epoch, max_epoch):
                self.budget.agree(self.world)
                if self.out_of_patience(epoch) or self.budget.is_over(self.step):
                    break

                # Epoch: a bar of its own; a resumed one goes on where it stopped.
                done = self.step - epoch * self.steps_per_epoch
                progress.start_epoch(f"epoch {epoch + 1}/{max_epoch}", done, self.steps_per_epoch)
                for _ in range(done, self.steps_per_epoch):
                    # Step, log, stop: a signal at an epoch's last step lets the epoch end first.
                    batch = next_batch(batches, self.step, lambda: self.save(run))
                    losses = self.train_step(batch.to(self.device, non_blocking=True), epoch)
                    progress.advance()
                    if self.step % LOG_EVERY == 0:
                        values = {f"loss/{name}": loss.item() for name, loss in losses.items()}
                        progress.log(self.step, self.step / self.steps_per_epoch, values, tuple(values))
                    if stop.received and self.step % self.steps_per_epoch:
                        return self._stopped(run, progress, stop.received)
                    self.budget.agree(self.world)
                    if self.budget.is_over(self.step):
                        break  # out of minutes: this epoch ends here

                # Its end: validation and checkpoints.
                progress.end_epoch()
                self.end_epoch(epoch + 1, run, progress)
                if stop.received:
                    return self._stopped(run, progress, stop.received)

        progress.say(f"best: epoch {self.best_epoch}, validation loss {self.best_loss:.4f}: {run.best}")
        return 0

    def train_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """One optimizer step; returns the losses. Raises TrainingError, naming the loss, when one is not finite."""
        # Modes and learning rate of this epoch.
        seed_everything(self.seed, self.step)  # dropout
        self.text_encoder.train()
        self.image_encoder.train()
        falling = learning_rate_factor(self.budget.share(self.step), self.settings.lr_decay_from)
        rate = self.settings.learning_rate * max(0.1, self.settings.learning_rate_decay**epoch)
        set_learning_rates({"encoders": self.optimizer}, {"encoders": rate}, falling)

        # The step.
        (update,) = self.stepper.steps(batch, torch.empty(len(batch.keys), 0))  # the encoders take no noise
        self.step += 1

        # Losses: checked before anything is saved.
        for name, loss in update.losses.items():
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss `{name}` is not finite at step {self.step} (epoch {epoch + 1}); the last good encoders are "
                    f"kept. Lower TRAIN.ENCODER_LR, then go on with --resume"
                )
        return dict(update.losses)

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """The only update of a step: both encoders by the losses of both levels, and by those of phrases."""
        text, image = self.encode(batch)
        losses = self.losses(batch, text, image)
        if self.phrase_losses is not None:
            losses |= self.phrase_losses(batch, text, image[1])
        yield Update("encoders", losses)

    def encode(self, batch: Batch) -> tuple[TextFeatures, tuple[Tensor, Tensor]]:
        """The captions' features, and the images' regions and codes."""
        return self.text_encoder(batch.captions, batch.lengths), self.image_encoder(batch.images)

    def losses(self, batch: Batch, text: TextFeatures, image: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Word and sentence losses, each the sum of both directions."""
        rows = (*image, text.words, text.sentence, batch.lengths, batch.class_ids)
        return losses_of_features(*rows, **self.settings.matching)

    def end_epoch(self, epoch: int, run: EncoderDir, progress: Progress) -> None:
        """Validate, draw attention, save last, best and the numbered checkpoint that is due."""
        # Validation: numbers and a picture.
        scores = self.validate()
        progress.log(self.step, epoch, {f"validation/{name}": value for name, value in scores.items()})
        progress.say(
            f"epoch {epoch}: validation loss {scores['loss']:.4f}, R@1 {scores['text_to_image_r1']:.1%} / "
            f"{scores['image_to_text_r1']:.1%} (text to image / image to text; chance {scores['chance_r1']:.1%}), "
            f"R@5 {scores['text_to_image_r5']:.1%} / {scores['image_to_text_r5']:.1%}"
        )
        self.draw_attention(run, epoch, progress)

        # Checkpoints: the best is recorded first, since each checkpoint stores which epoch was best.
        is_best = scores["loss"] < self.best_loss
        if is_best:
            self.best_loss, self.best_epoch = scores["loss"], epoch
        checkpoint = self.checkpoint(scores)
        if is_best:  # without what resuming needs: GANs start from it, no training of encoders resumes from it
            resuming = ("optimizers", "phrases")
            save_checkpoint(run.best, {part: value for part, value in checkpoint.items() if part not in resuming})
        every = self.settings.snapshot_interval
        if every and epoch % every == 0:
            save_checkpoint(run.numbered(epoch), checkpoint)
        run.save(checkpoint)

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out pairs in full batches, and retrieval among all of them. Nothing random in it."""
        dataset = self._dataset(self.validation, augment=False)
        batch_size = min(self.settings.batch_size, len(dataset))

        # Losses and codes, batch by batch; a shorter last batch would be easier, so its loss does not count.
        totals, codes, sentences = [], [], []
        with eval_mode(self.text_encoder, self.image_encoder), torch.inference_mode():
            for batch in ordered_loader(dataset, batch_size, workers=0):
                batch = batch.to(self.device)
                text, image = self.encode(batch)
                if len(batch.lengths) == batch_size:
                    losses = self.losses(batch, text, image)
                    totals.append((losses["words"] + losses["sentence"]).item())
                codes.append(image[1].float().cpu())
                sentences.append(text.sentence.float().cpu())

        # Their mean, and retrieval.
        loss = sum(totals) / len(totals)
        if math.isnan(loss):
            raise TrainingError(
                f"the validation loss is not a number after step {self.step}; the last good encoders are kept. Lower "
                f"TRAIN.ENCODER_LR, then go on with --resume"
            )
        return {"loss": loss} | retrieval_at(torch.cat(codes), torch.cat(sentences))

    @torch.no_grad()
    def draw_attention(self, run: EncoderDir, epoch: int, progress: Progress) -> None:
        """A picture of the word attention of some held-out captions over their own images."""
        # Evenly spaced pairs.
        indices = range(0, len(self.validation), max(1, len(self.validation) // NUM_PICTURED))[:NUM_PICTURED]
        chosen = self._dataset(self.validation.select(indices), augment=False)
        batch = next(iter(ordered_loader(chosen, len(indices)))).to(self.device)

        # Attention of each word over the regions of its image.
        with eval_mode(self.text_encoder, self.image_encoder):
            text = self.text_encoder(batch.captions, batch.lengths)
            regions, _ = self.image_encoder(batch.images)
        maps = word_attention(regions, text.words, batch.lengths, self.settings.gamma1).cpu().numpy()

        # Words, picture.
        words = [
            [self.vocabulary.words[int(index)] for index in caption[:length]]
            for caption, length in zip(batch.captions, batch.lengths, strict=True)
        ]
        picture = attention_picture(list(to_uint8(batch.images)), words, list(maps))
        with progress.optional("pictures"):
            save_image(picture, run.picture(epoch))
        progress.picture("attention", picture, self.step)

    def out_of_patience(self, epoch: int) -> bool:
        """Whether `epoch` finished epochs are PATIENCE more than the best one."""
        patience = self.settings.patience
        return bool(patience and epoch and epoch - self.best_epoch >= patience)

    def checkpoint(self, scores: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Everything that resuming needs.

        scores: of the validation after this epoch.
        """
        checkpoint: dict[str, Any] = {
            "config": self.config,
            "vocabulary": self.vocabulary.words,
            "networks": {part: to_state(network_name(network), network) for part, network in self.networks.items()},
            "optimizers": {"encoders": self.optimizer.state_dict()},
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "data": self.records.fingerprint(),
            "best": {"loss": self.best_loss, "epoch": self.best_epoch},
            "validation": dict(scores or {}),
        }
        if self.phrase_losses is not None:
            checkpoint["phrases"] = self.phrase_losses.state()
        if self.settings.max_minutes:
            checkpoint["seconds"] = self.budget.seconds
        return checkpoint

    def _restore(self, checkpoint: dict) -> None:
        """Continue where the checkpoint was written. The networks have their weights already, see `stored_encoders`."""
        check_same_data(checkpoint, self.records, self.data_settings.data_dir)
        restore_state({"encoders": self.optimizer}, None, checkpoint)
        if self.phrase_losses is not None:
            self.phrase_losses.restore(checkpoint.get("phrases"))
        self.step = checkpoint["step"]
        self.best_loss, self.best_epoch = checkpoint["best"]["loss"], checkpoint["best"]["epoch"]

    def save(self, run: EncoderDir) -> None:
        """Write last.pth now."""
        check_finite_weights(self.networks, self.step)
        run.save(self.checkpoint())

    def _stopped(self, run: EncoderDir, progress: Progress, number: int) -> int:
        """Save and log it after a signal; returns the exit code for the signal's number."""
        progress.end_epoch()
        self.save(run)
        progress.say(f"stopped after step {self.step}, saved {run.last}; go on with the same command and --resume")
        return 128 + number

    def _dataset(self, records: Records, augment: bool) -> TextImageDataset:
        """Records as a data set of one image size."""
        return make_dataset(self.data_settings, records, [self.settings.image_size], self.seed, augment)
