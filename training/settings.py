"""The settings of both commands together: the loops' dataclasses, the schema, and reading of a file for a command."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets.settings import DatasetSettings, DataSettings
from miscc.config import Config, OutputSettings, RunSettings, read_given, resolve, without_effect
from miscc.errors import ConfigError
from miscc.settings import Setting, schema_of, setting
from models import SYSTEMS
from models.choice import SystemChoice, find_system, keys_of, load_for_system, system_parts
from models.clip_files import MODEL
from models.damsm import TextEncoder
from models.pretrained_encoder import PretrainedImageEncoder, backbone_weights_setting
from models.settings import (
    BetasSettings,
    ClipSizeSettings,
    ImageSizeSettings,
    MatchingSettings,
    image_size_setting,
    sentence_dim_setting,
)
from sampling.encoders import ENCODERS
from sampling.settings import SamplingSettings
from training.watch import WatchSettings


@dataclass(frozen=True)
class LoopSettings:
    """Settings of both loops: the GANs' and the encoders'."""

    batch_size: int = setting("TRAIN.BATCH_SIZE", 24, "images per step, over all GPUs together", above=0, maximum=10**6)
    max_epoch: int = setting("TRAIN.MAX_EPOCH", 600, "epochs to train", above=0)
    max_minutes: float = setting(
        "TRAIN.MAX_MINUTES",
        0.0,
        "stop after so many minutes, those before a --resume included where it was set then, too; 0: no limit",
    )
    lr_decay_from: float = setting(
        "TRAIN.LR_DECAY_FROM",
        1.0,
        "share of the steps or minutes from which learning rates fall linearly to 0; 1: never",
        maximum=1,
    )
    snapshot_interval: int = setting(
        "TRAIN.SNAPSHOT_INTERVAL", 0, "epochs between numbered checkpoints with everything; 0: none"
    )
    tracker: str = setting(
        "TRAIN.TRACKER", "none", "send what is logged to an experiment tracker, too", ("none", "wandb", "trackio")
    )


@dataclass(frozen=True)
class TrainerSettings(LoopSettings):
    """Settings of the GANs' loop: how long, how computed, when saved, drawn and logged."""

    max_steps: int = setting("TRAIN.MAX_STEPS", 0, "stop after so many steps, whatever MAX_EPOCH says; 0: no limit")
    warmup_epochs: int = setting("TRAIN.WARMUP_EPOCHS", 0, "no numbered checkpoint before this epoch")
    gsave_interval: int = setting(
        "TRAIN.GSAVE_INTERVAL", 10, "epochs between numbered checkpoints for sampling; 0: none"
    )
    dsave_interval: int = setting(
        "TRAIN.DSAVE_INTERVAL", 0, "epochs between numbered checkpoints that hold D, too; 0: none"
    )
    save_every: int = setting(
        "TRAIN.SAVE_EVERY", 1000, "steps between writes of last.pth within an epoch; 0: at its end alone"
    )
    sample_every: int = setting("TRAIN.SAMPLE_EVERY", 500, "steps between pictures of fixed test captions; 0: none")
    sample_minutes: float = setting(
        "TRAIN.SAMPLE_MINUTES",
        0.0,
        "minutes between pictures of fixed test captions, in addition to SAMPLE_EVERY; 0: none",
    )
    log_every: int = setting("TRAIN.LOG_EVERY", 50, "steps between lines in stats.jsonl and TensorBoard", above=0)
    precision: str = setting(
        "TRAIN.PRECISION",
        "tf32",
        "fp32, tf32 (on GPUs that have it), or bf16 autocast with penalties and losses in float32; auto: bf16 where the "
        "processor multiplies in it, else tf32",
        ("fp32", "tf32", "bf16", "auto"),
    )
    compile: bool = setting("TRAIN.COMPILE", False, "torch.compile for all that is not differentiated twice")
    channels_last: bool = setting(
        "TRAIN.CHANNELS_LAST", False, "channels_last layout of the networks; faster on GPUs only"
    )
    accumulate: int = setting(
        "TRAIN.ACCUMULATE", 1, "micro-batches that BATCH_SIZE is cut into, one after the other", above=0
    )
    activation_checkpointing: bool = setting(
        "TRAIN.ACTIVATION_CHECKPOINTING",
        False,
        "compute G's activations again in the backward pass instead of keeping them",
    )
    global_damsm: bool = setting(
        "TRAIN.GLOBAL_DAMSM", False, "DAMSM's losses over the images and captions of all processes together"
    )
    ema_decay: float = setting(
        "TRAIN.EMA_DECAY",
        0.999,
        "decay of the averaged generator used for samples; 0: sample from G itself",
        below=1,
    )
    ema_share: float = setting(
        "TRAIN.EMA_SHARE",
        0.0,
        "share of the steps so far that the average goes back over at most, for runs bounded by time; 0: EMA_DECAY alone",
        maximum=1,
    )

    def due_checkpoint(self, epoch: int) -> str | None:
        """What the numbered checkpoint after `epoch` epochs holds, see `Trainer.checkpoint`; None: no checkpoint is due."""
        if epoch < max(1, self.warmup_epochs):
            return None

        # The most complete kind that is due.
        intervals = {"full": self.snapshot_interval, "networks": self.dsave_interval, "drawing": self.gsave_interval}
        return next((contents for contents, every in intervals.items() if every and epoch % every == 0), None)


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the evaluations while training."""

    every: int = setting("TRAIN.EVAL_EVERY", 0, "epochs between evaluations on held-out training classes; 0: none")
    classes: float = setting(
        "TRAIN.EVAL_CLASSES", 0.05, "share of the training classes held out for evaluations, never trained on", below=1
    )
    num_images: int = setting("TRAIN.EVAL_IMAGES", 2000, "images drawn for an evaluation")
    measure: str = setting(
        "TRAIN.EVAL_MEASURE",
        "FD",
        "the score: FD by EfficientNet-lite0 (-lite2 where that is a backbone in the training), or FID by TensorFlow's Inception",
        ("FD", "FID"),
    )

    def __post_init__(self) -> None:
        if self.every and not self.classes:
            raise ConfigError("TRAIN.EVAL_CLASSES: must be above 0 where TRAIN.EVAL_EVERY asks for evaluations")

    @property
    def held_out_share(self) -> float:
        """The share of the training classes that a run keeps for its evaluations; 0 where it makes none."""
        return self.classes if self.every else 0.0


@dataclass(frozen=True)
class FormerEncodersSettings:
    """AttnGAN's key, whose meaning differs between its two programs."""

    former_encoders: str = setting(
        "TRAIN.NET_E",
        "",
        "AttnGAN's name for TEXT.DAMSM_NAME; in pretraining: encoders to go on from, small ones also as pretrained",
    )


@dataclass(frozen=True)
class StartSettings(FormerEncodersSettings, ClipSizeSettings, ImageSizeSettings, DatasetSettings):
    """What a training, or a drawing, starts from: weight files and encoders. The sizes are those of an untrained CLIP."""

    generator_file: str = setting(
        "TRAIN.NET_G", "", "weights to sample from or to continue from: ours, a published model, or the authors'"
    )
    discriminator_file: str = setting("TRAIN.NET_D", "", "the authors' discriminator that goes with NET_G")
    with_discriminator: bool = setting("TRAIN.B_NET_D", True, "take D from NET_G's checkpoint too, where it holds one")
    gate: float = setting(
        "GAN.GATE",
        0.0,
        "what the learned gates of residual branches start from; 0 as published, more for short trainings",
    )
    encoders: str = setting(
        "TEXT.DAMSM_NAME",
        "",
        "the encoders: ours, a published model's (text alone) or text_encoder*.pth; empty: DAMSMencoders/<DATASET_NAME>/best.pth",
    )
    text_dim: int = sentence_dim_setting()
    kind: str = setting(
        "TEXT.ENCODER", "damsm", "what reads captions: DAMSM's encoder, or CLIP's text tower", tuple(ENCODERS)
    )
    clip: str = setting(
        "CLIP.WEIGHTS",
        MODEL,
        "CLIP's weights: a file, a folder, or a name in Hugging Face's cache; untrained: small, random, means nothing",
    )
    backbone_weights: str = backbone_weights_setting()
    clip_scaled_twice: bool = setting(
        "CLIP.SCALED_TWICE",
        True,
        "CLIP sees images in half contrast, [1/2, 1], as GALIP's released weights were trained",
    )

    def __post_init__(self) -> None:
        encoders = self.encoders or self.former_encoders or f"DAMSMencoders/{self.dataset}/best.pth"
        object.__setattr__(self, "encoders", encoders)

    @property
    def encoders_path(self) -> str:
        """What the encoders of TEXT.ENCODER are loaded from."""
        return {"damsm": self.encoders, "clip": self.clip}[self.kind]


@dataclass(frozen=True)
class PretrainingSettings(FormerEncodersSettings, MatchingSettings, BetasSettings, LoopSettings):
    """Settings of the encoders' loop."""

    batch_size: int = 48
    snapshot_interval: int = 50
    betas: tuple[float, float] = (0.5, 0.999)
    gamma1: float = 4.0
    image_size: int = image_size_setting()
    learning_rate: float = setting(
        "TRAIN.ENCODER_LR", 2e-3, "Adam's first learning rate in pretraining the encoders", above=0
    )
    learning_rate_decay: float = setting(
        "TRAIN.ENCODER_LR_DECAY", 0.98, "factor on ENCODER_LR each epoch, down to a tenth of it"
    )
    grad_clip: float = setting("TRAIN.RNN_GRAD_CLIP", 0.25, "largest gradient norm of the text encoder's recurrent net")
    patience: int = setting(
        "TRAIN.PATIENCE", 20, "stop pretraining after so many epochs without a better validation loss; 0: never"
    )
    held_out: float = setting(
        "TRAIN.HELD_OUT",
        0.05,
        "share of training images held out to validate the encoders where there is no val split",
        below=1,
    )
    image_encoder: str = setting(
        "DAMSM.IMAGE_ENCODER",
        "inception",
        "network of the image encoder to pretrain; small: from scratch; pretrained: small, beside a frozen network",
        ("inception", "small", "pretrained"),
    )
    keep_image_encoder: bool = setting(
        "DAMSM.KEEP_IMAGE_ENCODER",
        True,
        "TRAIN.NET_E's image encoder goes on, too; False: its text encoder alone, beside a fresh image encoder",
    )
    phrase_weight: float = setting(
        "DAMSM.PHRASES",
        0.0,
        "weight of the losses by which each encoder alone learns which words and pairs of words the captions have; 0: without",
    )
    inception_weights: str = setting(
        "DAMSM.INCEPTION_WEIGHTS", "", "ImageNet weights of torchvision's inception_v3; empty: torchvision's cache"
    )


# -- commands ------------------------------------------------------------------------------------------------------

GAN_PARTS = [
    RunSettings, OutputSettings, DataSettings, StartSettings, TrainerSettings, EvaluationSettings, SamplingSettings,
    WatchSettings,
]  # fmt: skip
ENCODER_PARTS = [RunSettings, DataSettings, PretrainingSettings, TextEncoder.Settings, PretrainedImageEncoder.Settings]


def schema() -> dict[str, Setting]:
    """All settings of both commands and all systems: what a YAML file may hold."""
    of_systems = [part for name in SYSTEMS for part in system_parts(name)]
    return schema_of([*GAN_PARTS, SystemChoice, *of_systems, *ENCODER_PARTS])


def load_config(path: str | Path, overrides: Iterable[tuple[str, str]] = (), command: str = "gan") -> Config:
    """A YAML file, then `--set` pairs, over the defaults of the command and its system.

    command: "gan" (main.py) or "damsm" (pretrain_DAMSM.py).

    Returns a nested Config with every key of the schema. Raises ConfigError for a missing or broken file, an unknown key
    (with the nearest name), a wrong type or value.
    """
    if command == "gan":
        return load_for_system(path, overrides, GAN_PARTS, schema())

    # The encoders' loop has no system.
    given = read_given(path, overrides, schema())
    given["GAN.NAME"], given["CONFIG_NAME"] = "damsm", given.get("CONFIG_NAME") or Path(path).stem
    defaults = {key: one.default for key, one in schema_of(ENCODER_PARTS).items()}
    return resolve(given, schema(), defaults, [RunSettings, DataSettings, PretrainingSettings])


def keys_read(system: str) -> set[str]:
    """The keys that a training of a system, and drawing with it, read."""
    # What tells the systems apart is read, unless it belongs to another system.
    of_systems = keys_of(part for name in SYSTEMS for part in system_parts(name))
    return keys_of([*GAN_PARTS, *system_parts(system)]) | (keys_of([SystemChoice]) - of_systems)


def keys_without_effect(path: str | Path, overrides: Iterable[tuple[str, str]] = (), command: str = "gan") -> list[str]:
    """The keys in a file, or in `--set`, that nothing of the command and of the system that they mean reads."""
    given = read_given(path, overrides, schema())
    if command == "damsm":
        return without_effect(given, schema(), keys_of(ENCODER_PARTS))
    return without_effect(given, schema(), keys_read(find_system(given, SYSTEMS)))
