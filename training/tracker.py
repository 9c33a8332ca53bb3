"""A sink for experiment trackers, which are optional packages: TRAIN.TRACKER. What is logged, and when, is progress.py's."""

import importlib
from collections.abc import Callable, Mapping
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
        name = package.__name__
        own = {"id": run.path.name, "dir": str(run.path)} if name == "wandb" else {}
        try:
            package.init(project=PROJECT, name=run.path.name, config=dict(config), resume="allow", **own)
        except Exception as error:  # each package raises errors of its own
            raise ConfigError(
                f"TRAIN.TRACKER: {name} cannot start ({_reason(error)}); log in, or set it to none"
            ) from None
        self.failure = ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step. After an error nothing more is sent; `failure` says why."""
        if not self.failure:
            self._try(lambda: self.package.log(dict(values), step=step))

    def close(self) -> None:
        self._try(self.package.finish)

    def _try(self, send: Callable[[], object]) -> None:
        """A service that cannot be reached must not end a training."""
        try:
            send()
        except Exception as error:
            self.failure = self.failure or _reason(error)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
