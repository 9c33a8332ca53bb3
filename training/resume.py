"""What a resumed run must not change: kind of checkpoint, settings that shape it, data, held-out classes; and what it may.

Loading a checkpoint is trainer.py's and damsm.py's.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from datasets.records import Records
from miscc.config import Config, flatten
from miscc.errors import CheckpointError, ConfigError, DataError
from models.choice import keys_of, network_parts
from training.ema import EMA
from training.step import restore_adam

# What may differ from run to run and is not reported.
FREE = {"RESTORE", "GPU_ID", "WORKERS", "DATA_CACHE", "DATA_CACHE_DIR", "TRAIN.MAX_EPOCH", "TRAIN.MAX_STEPS", "TRAIN.MAX_MINUTES",
        "TRAIN.TRACKER"}  # fmt: skip
# What a run reads at its start alone. Going on, it keeps the values that it was started with.
AT_START = {"TEXT.DAMSM_NAME", "TEXT.WORDS_NUM", "TRAIN.NET_G", "TRAIN.NET_D", "TRAIN.B_NET_D", "TRAIN.NET_E", "GAN.GATE",
            "CLIP.WEIGHTS"}  # fmt: skip
# Where a file lies, of which a network keeps the hash.
MOVABLE = {"GAN.PROJECTED.WEIGHTS"}
# What shapes the encoders, their data or the order of it, or makes validation losses of another kind.
ENCODER_KEYS = ("SEED", "RNN_TYPE", "DAMSM.IMAGE_ENCODER", "TREE.BASE_SIZE", "TEXT.EMBEDDING_DIM",
                "TEXT.WORDS_NUM", "TRAIN.HELD_OUT", "TRAIN.BATCH_SIZE", "TRAIN.SIMILAR_BATCHES",
                "DAMSM.MASK_CLASSES", "DAMSM.PHRASES")  # fmt: skip
# What a run of an earlier version, which lacks the key, was trained with.
BEFORE = {"TRAIN.SIMILAR_BATCHES": 0.0, "DAMSM.MASK_CLASSES": True, "DAMSM.PHRASES": 0.0}


def check_resumable(checkpoint: Mapping, cfg: Config) -> None:
    """Checks that a run can continue from this checkpoint with these settings.

    Raises CheckpointError where the checkpoint is not of a whole run, ConfigError where settings that shape networks, data or
    their order have changed.
    """
    # A whole run: neither encoders alone nor a checkpoint for drawing.
    _check_parts(checkpoint, ("optimizers", "step", "config", "num_averaged"), "main.py")

    # The same data, networks and order.
    check_same_held_out(checkpoint["config"], cfg)
    shaping = keys_of(network_parts(cfg.GAN.NAME)) - MOVABLE
    shaping |= {"SEED", "TRAIN.BATCH_SIZE", "TRAIN.SIMILAR_BATCHES", "TEXT.ENCODER", "GAN.DISCRIMINATOR"}
    instead = f"without --resume, or beside the runs of {cfg.CONFIG_NAME!r} by another CONFIG_NAME"
    check_fixed_settings(checkpoint["config"], cfg, sorted(shaping), instead)


def check_encoders_resumable(checkpoint: Mapping, cfg: Mapping) -> None:
    """`check_resumable` for a training of the encoders."""
    _check_parts(checkpoint, ("optimizers", "step", "config", "best"), "pretrain_DAMSM.py")
    keys = [*ENCODER_KEYS, *(["DAMSM.BACKBONE"] if cfg["DAMSM"]["IMAGE_ENCODER"] == "pretrained" else [])]
    check_fixed_settings(checkpoint["config"], cfg, keys, "--overwrite")


def _check_parts(checkpoint: Mapping, parts: Iterable[str], command: str) -> None:
    for part in parts:
        if checkpoint.get(part) is None:
            raise CheckpointError(f"the checkpoint holds no {part}: resuming needs a last.pth of {command}")


def check_fixed_settings(stored: Mapping, cfg: Mapping, keys: Iterable[str], instead: str) -> None:
    """Raises ConfigError where one of these keys differs from the run's stored settings.

    instead: how to start anew.
    """
    then, today = flatten(stored), flatten(cfg)
    for key in keys:
        # A run of an earlier version lacks newer keys.
        before, now = then.get(key, BEFORE.get(key, today[key])), today[key]
        if before != now:
            raise ConfigError(
                f"{key}: the run was started with {before}, not {now}; set it back, or start anew ({instead})"
            )


def check_same_held_out(stored: Mapping, cfg: Mapping) -> None:
    """Raises ConfigError where a resumed run would train on other classes than it has until now."""
    before, now = _held_out_share(stored.get("TRAIN")), _held_out_share(cfg["TRAIN"])
    if before == now:
        return
    key = "TRAIN.EVAL_CLASSES" if before and now else "TRAIN.EVAL_EVERY"
    raise ConfigError(
        f"{key}: the run was started with {before:g} of the classes held out for evaluation, not {now:g}, and has trained "
        f"on the others; set it back, or start anew (without --resume)"
    )


def _held_out_share(train: Any) -> float:
    """`EvaluationSettings.held_out_share` of stored settings; a run of an earlier version lacks the keys."""
    try:
        return float(train.get("EVAL_CLASSES", 0.0)) if train.get("EVAL_EVERY", 0) else 0.0
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise CheckpointError("the checkpoint's settings are damaged (TRAIN); use another checkpoint") from None


def check_same_data(checkpoint: Mapping, records: Records, data_dir: str) -> None:
    """Raises DataError when a run was started with other images: its steps would no longer mean the same."""
    before, now = checkpoint.get("data", {}), records.fingerprint()
    if before == now:
        return
    same_number = before.get("num_images") == now["num_images"]
    raise DataError(
        f"the run was started with {before.get('num_images')} training images, {data_dir} now has {now['num_images']}"
        f"{' others, or other captions' if same_number else ''}; restore the data, or start a new run from these weights "
        f"(TRAIN.NET_G, TRAIN.NET_E)"
    )


def restore_state(optimizers: Mapping[str, torch.optim.Optimizer], average: EMA | None, checkpoint: Mapping) -> None:
    """Load the state of every optimizer that the checkpoint has, and the average; what the settings have added starts anew.

    Raises CheckpointError for a state that is missing, empty or not this optimizer's.
    """
    part = ""
    try:
        for name, optimizer in optimizers.items():
            # One that the settings have added, e.g. of fine-tuned encoders, goes by no network's name.
            if name in checkpoint["optimizers"] or name in checkpoint["networks"]:
                part = f"optimizer {name!r}"
                restore_adam(optimizer, checkpoint["optimizers"][name])

        # The average; a run without one starts it anew.
        if average is not None and "generator_ema" in checkpoint["networks"]:
            part = "averaged generator"
            average.module.load_state_dict(checkpoint["networks"]["generator_ema"]["state"])
            average.num_updates = checkpoint["num_averaged"]
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"the checkpoint's {part} is missing, empty or another's ({reason}); use another checkpoint, or start anew from "
            f"its networks (TRAIN.NET_G)"
        ) from None


def resumed_settings(stored: Mapping, now: Mapping) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run that goes on, and a line for each that differs from the last checkpoint's, but for the FREE ones.

    stored: of the checkpoint.
    now: what the user gives, nested as YAML has it; all of it counts but AT_START.
    """
    settings, lines = copy.deepcopy(dict(now)), []
    before = flatten(stored)
    for key, value in flatten(now).items():
        if key in FREE or before.get(key, value) == value:
            continue
        if key in AT_START:
            section, name = key.split(".")
            settings[section][name] = before[key]
            lines.append(f"setting without effect on a run that goes on: {key} stays {before[key]}, not {value}")
        else:
            lines.append(f"setting changed since the last checkpoint: {key}: {before[key]} -> {value}")
    return settings, lines
