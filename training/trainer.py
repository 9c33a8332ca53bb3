"""The GAN loop: build a run's parts, take its steps; log, draw, evaluate and save when due. One trainer for every system.

Which losses there are is the system's part (models/), how an optimizer step is taken step.py's.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from datasets.loading import EpochBatches
from datasets.settings import DataSettings
from miscc import distributed
from miscc.batch import Batch
from miscc.checkpoint import save_checkpoint
from miscc.config import Config, to_plain, to_yaml
from miscc.distributed import World
from miscc.errors import CollapseError
from miscc.pictures import save_image
from miscc.progress import say
from miscc.randomness import noise_for, seed_everything
from miscc.settings import from_config
from models.choice import chosen_system
from models.modes import eval_mode
from models.registry import network_name, to_state
from models.types import Generator
from sampling.folders import generated_picture
from sampling.pipeline import TextToImage
from sampling.trained_with import networks_in_training, starting_hash
from training.build import build_system, resumed_networks, starting_networks
from training.compute import checkpoint_activations, compile_networks, peak_memory_mib, use_channels_last
from training.data import batches_from, fixed_captions, make_dataset, next_batch
from training.ema import EMA
from training.evaluation import Evaluation, split_records
from training.guard import Guard, after_rollbacks, go_back
from training.progress import Progress, StopSignal, introduce
from training.resume import check_resumable, check_same_data, restore_state, resumed_settings
from training.run_dir import RunDir, run_name
from training.schedule import Budget, learning_rate_factor, set_learning_rates
from training.settings import EvaluationSettings, StartSettings, TrainerSettings, keys_read
from training.step import FiniteCheck, Stepper, check_batch_size, check_finite_weights, log_values, make_optimizers
from training.tracker import Tracker, find_tracker
from training.watch import WatchSettings

CHECK_STOP_EVERY = 10  # steps, where several processes train
DRAWING = ("generator", "generator_ema", "text_encoder")  # what a checkpoint for drawing holds
NUM_PICTURED = 12  # fixed test captions in the picture of a run's state


def train(cfg: Config, world: World, resume: bool = False, resume_if_exists: bool = False) -> int:
    """Train the system that cfg.GAN.NAME names until MAX_EPOCH, MAX_STEPS, MAX_MINUTES or a signal.

    resume: continue the newest run of this configuration where it stopped.
    resume_if_exists: the same if there is one, else start.
    Returns the exit code: 0, or 128 + the signal's number. Raises UserError where something is missing or a loss is no
    longer finite.
    """
    package, name = find_tracker(cfg.TRAIN.TRACKER), run_name(cfg)
    run = progress = None
    try:
        with distributed.naming_lost_processes(world):
            # The run to continue, which no other process may train, and everything that it consists of.
            if resume or resume_if_exists:
                run = RunDir.newest(cfg.OUTPUT_DIR, name, must_exist=resume)
            if run is not None and world.is_main:
                run.lock()
            trainer = Trainer(cfg, world, run.load() if run else None)

            # A directory, only after all checks have passed. The main process alone shows and writes anything.
            if run is None and world.is_main:
                run = RunDir.create(cfg.OUTPUT_DIR, name, to_yaml(cfg))
                say(f"settings: {run.config}")
            run = run if world.is_main else None
            progress = Progress(run, trainer.step, Tracker(package, run, cfg) if package and run is not None else None)

            while True:
                try:
                    return trainer.run_to_the_end(run, progress)
                except CollapseError as error:
                    start = go_back(trainer, error, run, progress)
                del trainer  # or two would be in memory at once
                trainer, start = Trainer(cfg, world, *start), None
                progress.rewind(trainer.step)
    finally:
        if progress is not None:
            progress.close()
        if run is not None:
            run.release()
        distributed.stop()


class Trainer:
    """All that a run consists of: settings, networks, data, optimizers, and where it stands.

    checkpoint: to continue from; None: a new run.
    carried: parts that replace the checkpoint's, see `go_back`.
    """

    def __init__(self, cfg: Config, world: World, checkpoint: dict | None = None, carried: dict | None = None):
        # Settings: of each part. The configuration as a whole is for checkpoints alone.
        self.config, self.seed = to_plain(cfg), cfg.SEED
        self.settings = from_config(TrainerSettings, cfg)
        self.data_settings = from_config(DataSettings, cfg)
        self.evaluation_settings = from_config(EvaluationSettings, cfg)
        self.chosen = chosen_system(cfg)
        kept = (checkpoint or {}) | (carried or {})
        self.order_seed, self.rate_factor = after_rollbacks(self.seed, kept.get("watch"))
        self.world, self.device = world, world.device

        # Checks, then everything that takes time.
        check_batch_size(self.settings.batch_size, world.size, self.settings.accumulate)
        if checkpoint is not None:
            check_resumable(checkpoint, cfg)
        self._build_networks(checkpoint, from_config(StartSettings, cfg))
        self._build_data()
        watched = (self.system, self.pictured_captions, self.vocabulary, self.seed, world, keys_read(self.chosen.name))
        self.guard = Guard(from_config(WatchSettings, cfg), *watched)

        # Where the run stands, and where it ends.
        self.step, self.changes = 0, []
        if checkpoint is not None:
            self._restore(checkpoint)
        self.guard.restore(kept.get("watch"))
        self.system.restore(kept.get("system", {}))
        if self.evaluation is not None:
            self.evaluation.restore(kept.get("evaluation"))
        all_epochs = self.settings.max_epoch * self.steps_per_epoch
        self.last_step = min(all_epochs, self.settings.max_steps or all_epochs)
        self.budget = Budget(self.last_step, self.settings.max_minutes, kept.get("seconds", 0.0))

    # -- build ---------------------------------------------------------------------------------------------------

    def _build_networks(self, checkpoint: dict | None, start: StartSettings) -> None:
        """Networks, average, system, optimizers. The order matters: layout before copies, compiling last."""
        settings = self.settings
        seed_everything(self.seed)  # the initial weights
        if checkpoint is None:
            networks, self.vocabulary = starting_networks(self.chosen, start, self.data_settings)
            self.encoders_hash = starting_hash(networks["text_encoder"])
        else:
            self.encoders_hash = checkpoint.get("encoders_hash", "")
            networks, self.vocabulary = resumed_networks(self.chosen, checkpoint, start.backbone_weights)
        self.networks = {
            part: distributed.synchronise(network.to(self.device), self.world) for part, network in networks.items()
        }
        if settings.channels_last:
            use_channels_last(self.networks)
        of_generator = (cast(Generator, self.networks["generator"]), settings.ema_decay, settings.ema_share)
        self.average = EMA(*of_generator) if settings.ema_decay > 0 else None

        # The objective around them.
        self.system = build_system(self.chosen, self.networks)
        self.system.train()
        self.system.seed = self.order_seed
        if settings.activation_checkpointing:
            checkpoint_activations(self.system.generator)
        if settings.compile:
            compile_networks(self.networks)

        # What takes its steps.
        specs = self.system.optimizers()
        self.optimizers = make_optimizers(specs)
        self.base_rates = {name: spec.lr * self.rate_factor for name, spec in specs.items()}
        options = (settings.precision, settings.accumulate, settings.global_damsm)
        self.stepper = Stepper(self.system.updates, self.optimizers, self.world, *options)
        self.finite = FiniteCheck(self.device)

    def _build_data(self) -> None:
        """Images to train on, captions to draw, and what is held out for evaluations."""
        data, world = self.data_settings, self.world
        share = self.evaluation_settings.held_out_share
        self.records, held_out = split_records(data, share, self.seed, self.vocabulary)
        max_words = self.system.text_encoder.max_words
        self.dataset = make_dataset(data, self.records, self.system.image_sizes, self.order_seed, True, max_words)
        self.pictured_captions = fixed_captions(data, self.vocabulary, self.records, NUM_PICTURED)

        # Built once here for its checks: of the batch against the data and the processes.
        sizes = (len(self.dataset), self.settings.batch_size, self.seed)
        self.steps_per_epoch = EpochBatches(*sizes, world_size=world.size).batches_per_epoch

        # Evaluation: the main process's alone.
        self.evaluation = None
        if held_out is not None and world.is_main:
            of_run = (self.device, self.evaluation_settings, self.seed, data.skip_broken, self.networks.values())
            self.evaluation = Evaluation(held_out, self.system.generator.image_size, *of_run)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run_to_the_end(self, run: RunDir | None, progress: Progress) -> int:
        """Train until the last step or a signal; returns the exit code. run: None in all but the main process."""
        settings = self.settings
        introduce(self, run, progress)
        order = (settings.batch_size, self.order_seed, self.step)
        batches, epoch = iter(batches_from(self.dataset, *order, self.data_settings, self.world)), -1
        seconds, timed_from = 0.0, self.step
        self.budget.start()
        pictured = self.budget.seconds
        with StopSignal() as stop:
            while not self.budget.is_over(self.step):
                # Epoch: a bar of its own.
                if self.step // self.steps_per_epoch != epoch:
                    epoch = self.step // self.steps_per_epoch
                    title = f"epoch {epoch + 1}/{settings.max_epoch}"
                    progress.start_epoch(title, self.step % self.steps_per_epoch, self.steps_per_epoch)

                # Step: every update of the system, then the averaged generator.
                wants_log = (self.step + 1) % settings.log_every == 0
                began = time.perf_counter()
                batch = next_batch(batches, self.step, partial(self.save, run) if run is not None else None)
                values = self.train_step(batch.to(self.device, non_blocking=True), epoch, wants_log)
                seconds += time.perf_counter() - began
                progress.advance()
                if self.exchanges_signals():
                    self.budget.agree(self.world)
                if wants_log or self.device.type == "cpu":
                    self.finite.check(self.world)
                self.guard.look(self.step, progress)

                # Log, draw, evaluate, save: each at its own intervals.
                if wants_log:
                    values["images_per_second"] = settings.batch_size * (self.step - timed_from) / seconds
                    seconds, timed_from = 0.0, self.step
                    shown = (*self.system.SHOWN, "images_per_second")
                    progress.log(self.step, self.step / self.steps_per_epoch, values | self.guard.latest, shown)
                waited = self.budget.seconds - pictured
                is_due = settings.sample_every and self.step % settings.sample_every == 0
                if run is not None and (is_due or 0 < 60 * settings.sample_minutes <= waited):
                    self.draw(run, progress)
                    pictured = self.budget.seconds
                self.evaluate_when_due(run, progress)
                stopped = self.check_stop(stop)
                self.save_when_due(run, stopped)

                # Stop: after the checkpoint is written.
                if stopped:
                    progress.end_epoch()
                    progress.say(f"stopped after step {self.step}, saved {run.last if run else ''}")
                    progress.say("go on with: the same command and --resume")
                    return 128 + (stop.received or 15)

        progress.end_epoch()
        if run is not None and not run.picture(self.step).is_file():
            self.draw(run, progress)
        progress.say(f"finished at step {self.step}: {run.last if run else ''}")
        return 0

    def train_step(self, batch: Batch, epoch: int, wants_log: bool = False) -> dict[str, float]:
        """One training step: every update of the system, then the average. Returns the values to log, if wanted."""
        # Noise depends on seed, epoch and image alone, dropout on seed, step and process: a resumed run draws the same.
        seed_everything(self.order_seed, self.step, self.world.rank)
        noise_dim = self.system.generator.noise_dim
        noise = noise_for(self.order_seed, epoch, batch.indices.tolist(), noise_dim).to(self.device, non_blocking=True)

        # Learning rates: by the share of the budget that is used up.
        factor = learning_rate_factor(self.budget.share(self.step), self.settings.lr_decay_from)
        set_learning_rates(self.optimizers, self.base_rates, factor)

        # Updates: discriminator(s) and generator, in the system's order.
        self.system.step = self.step
        values: dict[str, Tensor] = {}
        stats: dict[str, Tensor | float] = {}
        for update in self.stepper.steps(batch, noise):
            stats.update(update.stats)
            self.finite.record(update, self.step + 1)
            self.guard.record(update)
            if wants_log:
                values |= log_values(update, self.optimizers[update.optimizer])
        if self.average is not None:
            self.average.update(self.networks["generator"])
        observed = {name: torch.as_tensor(stats[name]) for name in self.system.observed}
        self.system.observe(distributed.average(observed, self.world), self.settings.batch_size)
        self.step += 1

        if not wants_log:
            return {}
        averaged = {name: value.item() for name, value in distributed.average(values, self.world).items()}
        return averaged | {"memory_mib": peak_memory_mib(self.device)}

    def check_stop(self, stop: StopSignal) -> bool:
        """Whether to stop now, because some process received a signal: all processes stop together."""
        return self.exchanges_signals() and distributed.any_process(bool(stop.received), self.world)

    def exchanges_signals(self) -> bool:
        """Whether the processes share received signals after this step: not after each one, since that waits for the GPU."""
        return self.world.size == 1 or self.step % CHECK_STOP_EVERY == 0

    # -- pictures and evaluations --------------------------------------------------------------------------------

    def draw(self, run: RunDir, progress: Progress) -> None:
        """Write the picture of the run's state: fixed test captions and noise, images and last masks."""
        if not self.pictured_captions:
            return
        with self._pipeline() as pipeline:
            drawn = pipeline.generate(self.pictured_captions, seed=self.seed)
        picture = generated_picture(self.pictured_captions, drawn)
        with progress.optional("pictures"):
            save_image(picture, run.picture(self.step))
            progress.say(f"picture of step {self.step}: {run.picture(self.step)}")
        progress.picture("samples", picture, self.step)

    @contextmanager
    def _pipeline(self) -> Iterator[TextToImage]:
        """The averaged generator, or G itself where there is none, ready to draw."""
        generator = self.average.module if self.average is not None else self.system.generator
        text_encoder = self.system.text_encoder
        with eval_mode(generator, text_encoder):
            yield TextToImage(generator, text_encoder, self.vocabulary)

    def evaluate_when_due(self, run: RunDir | None, progress: Progress) -> None:
        """Every EVAL_EVERY epochs: the main process evaluates while the others wait, and keeps the best checkpoint."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        every = self.evaluation_settings.every
        if not every or step or epoch % every:
            return

        self.check_finite(self.world)
        if self.evaluation is not None and run is not None:
            with self._pipeline() as pipeline:
                value = self.evaluation.measure(pipeline)
            progress.log(self.step, epoch, {self.evaluation.name: value})
            better = self.evaluation.update_best(value, self.step)
            if better:
                save_checkpoint(run.best, self.checkpoint("networks"))
            progress.say(self.evaluation.line(value, epoch, run.best if better else None))
        distributed.wait_for_all(self.world)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_when_due(self, run: RunDir | None, stopped: bool) -> None:
        """Write last.pth and the numbered checkpoints that the settings ask for at this step."""
        epoch_ended, every = self.step % self.steps_per_epoch == 0, self.settings.save_every
        within = every > 0 and self.step % every == 0
        is_due = (within or epoch_ended) and not self.guard.withholds
        if not (is_due or self.budget.is_over(self.step) or stopped):
            return

        # Only what can be trained further: what is there stays as it is otherwise.
        self.check_finite(self.world)
        distributed.wait_for_all(self.world)
        if run is None:
            return

        # A numbered one, too. Should the disk take only one of them, last.pth is the one that resuming needs.
        epoch = self.step // self.steps_per_epoch
        due = self.settings.due_checkpoint(epoch) if epoch_ended else None
        try:
            if due:
                save_checkpoint(run.numbered(epoch), self.checkpoint(due))
        finally:
            run.save(self.checkpoint(scheduled=within or epoch_ended))

    def save(self, run: RunDir) -> None:
        """Write last.pth now."""
        self.check_finite()
        run.save(self.checkpoint(scheduled=False))

    def check_finite(self, world: World | None = None) -> None:
        """Raises CollapseError where a loss (world: of any process) or a weight, the average's too, is not finite."""
        self.finite.check(world)
        check_finite_weights(self.networks_and_average(), self.step)

    def networks_and_average(self) -> dict[str, Any]:
        """All networks that a checkpoint holds, by part."""
        return self.networks | ({"generator_ema": self.average.module} if self.average is not None else {})

    def checkpoint(self, contents: str = "full", scheduled: bool = True) -> dict[str, Any]:
        """Everything ("full"), all but the optimizers ("networks"), or G, its average and the text encoder ("drawing")."""
        networks = {part: to_state(network_name(net), net) for part, net in self.networks_and_average().items()}
        content: dict[str, Any] = {
            "config": self.config,
            "vocabulary": self.vocabulary.words,
            "networks": networks,
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "data": self.records.fingerprint(),
        }
        content |= {"encoders_hash": self.encoders_hash} if self.encoders_hash else {}  # former runs have none
        content |= {"seconds": self.budget.seconds} if self.settings.max_minutes else {}
        content |= {"evaluation": self.evaluation.state()} if self.evaluation is not None else {}
        if contents == "drawing":
            content["trained_with"] = networks_in_training(content)
            content["networks"] = {part: networks[part] for part in DRAWING if part in networks}
        if contents == "full":
            content["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            content["watch"] = self.guard.state(scheduled)
            content["system"] = self.system.state()
            content["num_averaged"] = self.average.num_updates if self.average is not None else 0
        return content

    def _restore(self, checkpoint: dict) -> None:
        """Continue where the checkpoint was written. The networks have their weights already, see `_build_networks`."""
        check_same_data(checkpoint, self.records, self.data_settings.data_dir)
        restore_state(self.optimizers, self.average, checkpoint)
        self.step = checkpoint["step"]
        self.config, self.changes = resumed_settings(checkpoint["config"], self.config)
