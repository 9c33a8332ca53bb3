"""What a resumed run must not change, and what it may: settings, data, held-out classes. Loading is trainer.py's."""

from collections.abc import Iterable, Mapping

from datasets.records import Records
from miscc.config import flatten, lookup
from miscc.errors import CheckpointError, ConfigError, DataError
from training.build import network_keys
from training.evaluation import check_same_held_out


def check_fixed_settings(stored: Mapping, cfg: Mapping, keys: Iterable[str], instead: str) -> None:
    """Raises ConfigError where a key that a run cannot change on the way differs from the run's stored settings."""
    for key in keys:
        before, now = lookup(stored, key), lookup(cfg, key)
        if before != now:
            raise ConfigError(
                f"{key}: the run was started with {before}, not {now}; set it back, or start anew ({instead})"
            )


def fingerprint(records: Records) -> dict[str, int]:
    """What a checkpoint keeps of its training set, see `Records.fingerprint`."""
    return records.fingerprint()


def check_same_data(checkpoint: Mapping, records: Records, data_dir: str) -> None:
    """Raises DataError when a run was started with other images: its steps would no longer mean the same."""
    before, now = checkpoint.get("data", {}), fingerprint(records)
    if before != now:
        same_number = before.get("num_images") == now["num_images"]
        raise DataError(
            f"the run was started with {before.get('num_images')} training images, {data_dir} now has {now['num_images']}"
            f"{' others, or other captions' if same_number else ''}; restore the data, or start a new run from these weights "
            f"(TRAIN.NET_G, TRAIN.NET_E)"
        )


def check_resumable(checkpoint: Mapping, cfg: Mapping) -> None:
    """Raises where the checkpoint is not of a whole run, or where settings that shape networks or order have changed."""
    for part in ("optimizers", "step", "config"):
        if part not in checkpoint:
            raise CheckpointError(f"the checkpoint holds no {part}: resuming needs a last.pth of main.py")
    check_same_held_out(checkpoint["config"], cfg)
    shaping = network_keys(cfg.GAN.NAME) | {"SEED", "TRAIN.BATCH_SIZE"}
    check_fixed_settings(checkpoint["config"], cfg, sorted(shaping), "without --resume or RESTORE: True")


def changed_settings(before: Mapping, now: Mapping) -> list[str]:
    """`KEY: old -> new` for every setting that differs, but for those that any run may have its own way."""
    free = {"RESTORE", "GPU_ID", "WORKERS", "DATA_CACHE", "TRAIN.MAX_EPOCH", "TRAIN.MAX_STEPS"}
    before, now = flatten(before), flatten(now)
    names = [name for name in now if name in before and name not in free and before[name] != now[name]]
    return [f"{name}: {before[name]} -> {now[name]}" for name in names]
