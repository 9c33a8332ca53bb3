"""What tells that a GAN's training fails: D wins outright, G collapses, the penalty explodes. Numbers in, findings out.

Where the numbers come from, and what is done about a finding, is guard.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from miscc.errors import CheckpointError
from miscc.settings import setting

REACTIONS = ("warn", "stop", "rollback")
NUM_LOOKS = 50  # that the usual variety is the median of
FEWEST_LOOKS = 5  # before there is a usual variety
REPEAT = 10  # looks between two reports of a finding that goes on


@dataclass(frozen=True)
class WatchSettings:
    """What is watched while a GAN trains, and what happens when it fails."""

    on_collapse: str = setting(
        "TRAIN.ON_COLLAPSE",
        "warn",
        "what follows where the watch finds a failed training: a warning; the end; or the last good checkpoint again, at "
        "half the learning rates",
        REACTIONS,
    )
    every: int = setting("TRAIN.WATCH.EVERY", 50, "steps between looks at D, G and the penalty; 0: none", maximum=10**6)
    patience: int = setting(
        "TRAIN.WATCH.PATIENCE",
        3,
        "looks in a row that must find the same before it is reported",
        above=0,
        maximum=10**4,
    )
    logit_gap: float = setting(
        "TRAIN.WATCH.LOGIT_GAP", 10.0, "D has won where its logits of real and fake images lie further apart", above=0
    )
    accuracy: float = setting(
        "TRAIN.WATCH.ACCURACY",
        0.98,
        "and it tells at least this share of them apart, where the system logs it",
        maximum=1,
    )
    variety: float = setting(
        "TRAIN.WATCH.VARIETY", 0.25, "G has collapsed where images of one caption differ by less of the usual", below=1
    )
    variety_floor: float = setting(
        "TRAIN.WATCH.VARIETY_FLOOR",
        0.01,
        "or by less than this, once they differed by more: root mean square of pixels in [-1, 1]",
        maximum=2,
    )
    penalty: float = setting(
        "TRAIN.WATCH.PENALTY", 100.0, "the gradient penalty has exploded where loss/penalty is higher", above=0
    )
    rollbacks: int = setting(
        "TRAIN.WATCH.ROLLBACKS", 3, "times that ON_COLLAPSE rollback goes back before it stops", above=0, maximum=30
    )


class Margin(NamedTuple):
    """How one discriminator stands against G, medians since the last look.

    gap: mean logit of real images less that of fake ones.
    accuracy: share of real and fake images that it tells apart; None where the system does not log it.
    """

    gap: float
    accuracy: float | None = None


class Reading(NamedTuple):
    """What one look sees; what a system does not have is empty or None.

    margins: by the discriminator's name.
    penalty: median of the gradient penalties since the last look.
    variety: how much images of one caption differ, see guard.py.
    """

    margins: Mapping[str, Margin] = {}
    penalty: float | None = None
    variety: float | None = None


class Finding(NamedTuple):
    """Something that is wrong.

    kind: "discriminator", "variety" or "penalty": the key of its remedies.
    text: what was seen, with its numbers and thresholds.
    """

    kind: str
    text: str


class Watch:
    """Counts the looks in a row that are over a threshold, and keeps what variety is usual."""

    def __init__(self, settings: WatchSettings):
        self.settings = settings
        self.streaks: dict[str, int] = {}  # {name of what is over its threshold: looks in a row}
        self.varieties: list[float] = []  # of the last looks that found no collapse

    @property
    def suspects(self) -> bool:
        """Whether the last look found something over its threshold, reported or not."""
        return bool(self.streaks)

    def update(self, reading: Reading) -> list[Finding]:
        """Take in a look; returns what is to be reported now: after PATIENCE looks, and then from time to time."""
        over = {name: finding for name, finding in self._over(reading).items() if finding is not None}
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in over}

        # A collapsed G must not make its own variety the usual one.
        if reading.variety is not None and "variety" not in over:
            self.varieties = [*self.varieties, reading.variety][-NUM_LOOKS:]

        late = {name: self.streaks[name] - self.settings.patience for name in over}
        return [finding for name, finding in over.items() if late[name] >= 0 and late[name] % REPEAT == 0]

    def _over(self, reading: Reading) -> dict[str, Finding | None]:
        """{name: finding, None below the threshold}."""
        found = {f"discriminator {name}": self._of_margin(name, margin) for name, margin in reading.margins.items()}
        return found | {"variety": self._of_variety(reading.variety), "penalty": self._of_penalty(reading.penalty)}

    def _of_margin(self, name: str, margin: Margin) -> Finding | None:
        settings, accuracy = self.settings, margin.accuracy
        if not margin.gap > settings.logit_gap or (accuracy is not None and accuracy < settings.accuracy):
            return None
        share = "" if accuracy is None else f", and it tells {100 * accuracy:.1f} % of the images apart"
        return Finding(
            "discriminator",
            f"D wins outright ({name}): its logits of real and fake images lie {margin.gap:.3g} apart "
            f"(TRAIN.WATCH.LOGIT_GAP {settings.logit_gap:g}){share}",
        )

    def _of_variety(self, variety: float | None) -> Finding | None:
        if variety is None or len(self.varieties) < FEWEST_LOOKS:
            return None

        # Below a share of what was usual, or below what one sees; an untrained G may start there, and has not collapsed.
        usual, settings = median(self.varieties), self.settings
        seen = f"the generator collapses: images of one caption differ by {variety:.3g}, usual are {usual:.3g}"
        if variety < settings.variety * usual:
            return Finding("variety", f"{seen} (TRAIN.WATCH.VARIETY {settings.variety:g} of it)")
        if variety < settings.variety_floor <= usual:
            return Finding("variety", f"{seen} (TRAIN.WATCH.VARIETY_FLOOR {settings.variety_floor:g})")
        return None

    def _of_penalty(self, penalty: float | None) -> Finding | None:
        if penalty is None or not penalty > self.settings.penalty:
            return None
        return Finding(
            "penalty", f"the gradient penalty explodes: {penalty:.3g} (TRAIN.WATCH.PENALTY {self.settings.penalty:g})"
        )

    # -- in a checkpoint -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"streaks": dict(self.streaks), "varieties": list(self.varieties)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's `state`; {}: as at the start. Raises CheckpointError for a malformed one."""
        self.streaks = {str(name): int(count) for name, count in checked(state.get("streaks", {}), dict).items()}
        self.varieties = [float(value) for value in checked(state.get("varieties", []), list)]


def checked(value: Any, kind: type) -> Any:
    """A list or dict of numbers, texts and lists of them out of a checkpoint. Raises CheckpointError for anything else."""
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, kind) and all(isinstance(one, (int, float)) and one == one for one in values):
        return value
    raise CheckpointError(
        f"the checkpoint's watch is damaged (a {type(value).__name__}); use another checkpoint, or start anew"
    )
