"""A sink for experiment trackers, which are optional packages: TRAIN.TRACKER. What is logged, and when, is progress.py's."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from miscc.errors import ConfigError
from training.run_dir import RunDir

PROJECT = "text-to-image-gans"


def find_tracker(name: str) -> ModuleType | None:
    """The package of a tracker, None for "none". Raises ConfigError where it is not installed."""
    if name == "none":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"TRAIN.TRACKER: {name} is not installed; pip install {name}, or set it to none") from None


class Tracker:
    """One run of a tracker. wandb and trackio, which has wandb's functions, are called alike.

    A resumed run goes on under the name of its directory.
    """

    def __init__(self, package: ModuleType, run: RunDir, config: Mapping[str, Any]):
        self.package = package
        own = {"id": run.path.name, "dir": str(run.path)} if package.__name__ == "wandb" else {}
        package.init(project=PROJECT, name=run.path.name, config=dict(config), resume="allow", **own)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        self.package.log(dict(values), step=step)

    def close(self) -> None:
        self.package.finish()
