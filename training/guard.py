"""Reads a running training for the watch, says what it finds, and goes back to the last good checkpoint on request.

What counts as a failed training is watch.py's; building a trainer of a checkpoint is trainer.py's.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from datasets.captions import encode_batch
from miscc import distributed
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, CollapseError, TrainingError
from miscc.randomness import noise_for, stream
from miscc.vocabulary import Vocabulary
from models.modes import eval_mode, full_precision
from models.types import System, Update
from training.progress import Progress
from training.run_dir import RunDir
from training.watch import Finding, Margin, Reading, Watch, WatchSettings, checked

if TYPE_CHECKING:
    from training.trainer import Trainer

NUM_CAPTIONS, NUM_NOISES = 4, 4  # of the fixed images

# {kind of finding: (key, what to do with it), what usually helps first}
REMEDIES: dict[str, tuple[tuple[str, str], ...]] = {
    "discriminator": (
        ("TRAIN.DISCRIMINATOR_LR", "lower {}"),
        ("TRAIN.PENALTY_WEIGHT", "raise {}"),
        ("TRAIN.AUGMENT", "{} translation,cutout"),
        ("GAN.DISCRIMINATOR", "{} both"),
    ),
    "variety": (
        ("TRAIN.GENERATOR_LR", "lower {}"),
        ("TRAIN.DIVERSITY", "{} 0.1"),
        ("TRAIN.DAMSM_WEIGHT", "lower {}"),
        ("GAN.DISCRIMINATOR", "{} both"),
    ),
    "penalty": (
        ("TRAIN.DISCRIMINATOR_LR", "lower {}"),
        ("TRAIN.PENALTY_EVERY", "{} 1"),
        ("TRAIN.BATCH_SIZE", "raise {}"),
    ),
}


def remedies(kind: str, keys: Iterable[str]) -> str:
    """What usually helps against a kind of finding, with those of these keys: "lower TRAIN.X, raise TRAIN.Y"."""
    known = set(keys)
    return ", ".join(text.format(key) for key, text in REMEDIES[kind] if key in known)


class Guard:
    """Watches one training, without effect on what a step computes: fixed noise, eval mode, no global random state.

    settings: TRAIN.WATCH.
    system: what is trained.
    captions: some of them are drawn at every look.
    vocabulary: of the text encoder.
    seed: of the fixed noise.
    keys: what the system reads, for advice.
    rollbacks: so far, see `Rollback`.
    latest: what the last look saw, for the log.
    """

    def __init__(
        self,
        settings: WatchSettings,
        system: System,
        captions: Sequence[str],
        vocabulary: Vocabulary,
        seed: int,
        world: World,
        keys: Iterable[str],
    ):
        self.settings, self.system, self.world, self.keys = settings, system, world, set(keys)
        self.watch = Watch(settings)
        self.suspects = False  # the same in all processes
        self.latest: dict[str, float] = {}
        self.rollbacks: list[Rollback] = []

        # What is recorded at every step: on the device, as reading it would make a GPU wait.
        self.logit_pairs = system.logit_pairs()
        kinds = [kind for pair in self.logit_pairs.values() for kind in pair]
        names = [f"{what}/{kind}" for what in ("logits", "sign") for kind in kinds]
        self.recent: dict[str, deque] = {
            name: deque(maxlen=max(1, settings.every)) for name in (*names, f"loss/{system.PENALTY}")
        }

        # The fixed captions and noise.
        self.tokens = (
            encode_batch(captions[:NUM_CAPTIONS], vocabulary, system.text_encoder.max_words) if captions else None
        )
        self.noise = noise_for(seed, 0, range(NUM_NOISES), system.generator.noise_dim)

    # -- looking -------------------------------------------------------------------------------------------------

    def record(self, update: Update) -> None:
        """Keep what an update tells; nothing is computed."""
        if not self.settings.every or not self.world.is_main:
            return
        values = update.named_losses() | dict(update.stats)
        for name in self.recent.keys() & values.keys():
            self.recent[name].append(values[name])

    def look(self, step: int, progress: Progress) -> None:
        """After every step; every TRAIN.WATCH.EVERY steps the main process looks, and all learn what it found.

        Raises CollapseError where something is found and TRAIN.ON_COLLAPSE asks for more than a warning.
        """
        if not self.settings.every or step % self.settings.every:
            return
        findings = self.watch.update(self.read()) if self.world.is_main else []
        findings, self.suspects = distributed.share((findings, self.watch.suspects), self.world)

        # One line each.
        lines = [self.line(finding, step) for finding in findings]
        for line in lines:
            progress.warn(f"warning: step {step}: {line}")
        if lines and self.settings.on_collapse != "warn":
            raise CollapseError(f"{lines[0]} (step {step})", findings[0].kind)

    def line(self, finding: Finding, step: int) -> str:
        """A finding for people: what was seen, since when, and what usually helps."""
        # No advice to add what is there already.
        helps = remedies(finding.kind, self.keys - self.system.keys_in_use())
        since = step - (self.settings.patience - 1) * self.settings.every
        return f"{finding.text}, at every look since step {since}. What usually helps: {helps}"

    def read(self) -> Reading:
        """What the steps since the last look, and the fixed images, tell now."""
        # Losses and logits: one transfer from the device.
        values = {name: _to_floats(recent) for name, recent in self.recent.items() if recent}
        medians = {name: median(numbers) for name, numbers in values.items() if numbers}
        for recent in self.recent.values():
            recent.clear()

        # Discriminators, as far as the system logs what tells how they stand.
        margins = {}
        for name, (real, fake) in self.logit_pairs.items():
            if {f"logits/{real}", f"logits/{fake}"} <= medians.keys():
                gap = medians[f"logits/{real}"] - medians[f"logits/{fake}"]
                # Signs are means of -1 and 1.
                up, down = medians.get(f"sign/{real}"), medians.get(f"sign/{fake}")
                accuracy = None if up is None or down is None else (2 + up - down) / 4
                margins[name] = Margin(gap, accuracy)

        # The numbers for the log.
        reading = Reading(margins, medians.get(f"loss/{self.system.PENALTY}"), self.variety())
        self.latest = {f"watch/gap_{name}": margin.gap for name, margin in margins.items()}
        numbers = {"watch/penalty": reading.penalty, "watch/variety": reading.variety}
        self.latest |= {name: value for name, value in numbers.items() if value is not None}
        return reading

    @torch.no_grad()
    def variety(self) -> float | None:
        """How much G's images of one caption differ: root mean square of their pixels' differences in [0, 2].

        The mean over all pairs of 4 images each of 4 fixed captions. G itself, as its average follows hundreds of steps
        later. None without a caption, and where an image is not finite.
        """
        if self.tokens is None:
            return None
        generator, text_encoder = self.system.generator, self.system.text_encoder
        device, noise = self.world.device, self.noise.to(self.world.device)
        distances = []
        with eval_mode(generator, text_encoder), full_precision(device):
            text = text_encoder(self.tokens.tokens.to(device), self.tokens.lengths)
            for index in range(len(self.tokens.lengths)):
                # One caption at a time: no more memory than a batch of 4 takes.
                of_one = text.select([index] * NUM_NOISES)
                images = generator(noise, of_one).images[-1].float().clamp(-1, 1)  # (NUM_NOISES, 3, H, W)
                pairs = [(images[a] - images[b]).square().mean().sqrt() for a, b in combinations(range(NUM_NOISES), 2)]
                distances.append(torch.stack(pairs).mean())
        value = torch.stack(distances).mean().item()
        return value if value == value else None

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def withholds(self) -> bool:
        """Whether a checkpoint that is due must wait: the last good one may be needed."""
        return self.suspects and self.settings.on_collapse != "warn"

    def is_good(self, scheduled: bool) -> bool:
        """Whether a checkpoint of now may become previous.pth.

        scheduled: not written because of a signal or an error.

        So that a run that was stopped goes back to where one that never stopped does.
        """
        return self.settings.on_collapse == "warn" or (scheduled and not self.suspects)

    def state(self, scheduled: bool = True) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers."""
        return {
            **self.watch.state(),
            "recent": {name: _to_floats(recent) for name, recent in self.recent.items()},
            "latest": dict(self.latest),
            "good": self.is_good(scheduled),
            "rollbacks": [list(rollback) for rollback in self.rollbacks],
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint's `state`, None in a checkpoint of former code. Raises CheckpointError."""
        state = state or {}
        self.watch.restore(state)
        self.suspects = self.watch.suspects
        self.latest = dict(checked(state.get("latest", {}), dict))
        self.rollbacks = rollbacks_in(state)
        kept = state.get("recent", {})
        if not isinstance(kept, dict):
            raise CheckpointError("the checkpoint's watch is damaged (recent); use another checkpoint, or start anew")
        for name, recent in self.recent.items():
            recent.extend(checked(kept.get(name, []), list))


def _to_floats(recent: Iterable[Tensor | float]) -> list[float]:
    """Scalars as numbers, read from the device at once; what is not finite is left out: step.py's FiniteCheck reports it."""
    scalars = [torch.as_tensor(value).detach().double() for value in recent]
    device = next((scalar.device for scalar in scalars if scalar.device.type != "cpu"), torch.device("cpu"))
    numbers = torch.stack([scalar.to(device) for scalar in scalars]).tolist() if scalars else []
    return [number for number in numbers if abs(number) < float("inf")]


# -- going back ----------------------------------------------------------------------------------------------------


class Rollback(NamedTuple):
    """One return to an earlier step.

    found: the step at which a finding was reported.
    to: the step that the training went back to.
    kind: of the finding, "finite" where losses or weights were not.
    """

    found: int
    to: int
    kind: str


def rollbacks_in(state: Mapping[str, Any] | None) -> list[Rollback]:
    """The rollbacks in a checkpoint's "watch". Raises CheckpointError for a malformed one."""
    try:
        return [Rollback(int(found), int(to), str(kind)) for found, to, kind in (state or {}).get("rollbacks", [])]
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(
            "the checkpoint's watch is damaged (rollbacks); use another checkpoint, or start anew"
        ) from None


def seed_after(seed: int, num_rollbacks: int) -> int:
    """The seed of noise, order and augmentation: the run's, and another one after each rollback."""
    return int(stream(seed, "rollback", num_rollbacks).integers(2**31)) if num_rollbacks else seed


def rate_factor(num_rollbacks: int) -> float:
    """What all learning rates are multiplied by."""
    return 0.5**num_rollbacks


def after_rollbacks(seed: int, state: Mapping[str, Any] | None) -> tuple[int, float]:
    """`seed_after` and `rate_factor` of a checkpoint's "watch".

    seed: the run's.

    Raises CheckpointError as `rollbacks_in`.
    """
    num_rollbacks = len(rollbacks_in(state))
    return seed_after(seed, num_rollbacks), rate_factor(num_rollbacks)


def is_before(checkpoint: Mapping[str, Any], rollbacks: Sequence[Rollback]) -> bool:
    """Whether a checkpoint is a state that this run has come through: not one that a rollback has given up."""
    own = rollbacks_in(checkpoint.get("watch"))
    later = rollbacks[len(own) :]
    return own == list(rollbacks[: len(own)]) and all(checkpoint["step"] <= rollback.to for rollback in later)


def choose_checkpoint(run: RunDir, rollbacks: Sequence[Rollback]) -> Path | None:
    """The newest good checkpoint to go back to, None where the run has none at all yet.

    One that the training went back to before comes last: it led to the same. Raises TrainingError where none is good.
    """
    used, choices, has_any = {rollback.to for rollback in rollbacks}, [], False
    for path, checkpoint in run.whole_checkpoints():
        has_any = True
        watch, step = checkpoint.get("watch", {}), checkpoint["step"]
        if is_before(checkpoint, rollbacks) and not watch.get("streaks"):
            choices.append((step in used, not watch.get("good", True), -step, path))
    if has_any and not choices:
        raise TrainingError(f"{run.path} holds no checkpoint from before; start anew with other settings")
    return min(choices)[-1] if choices else None


class Return(NamedTuple):
    """What the next trainer is built of: the checkpoint (None: from the start), and what it takes over beside that."""

    checkpoint: dict[str, Any] | None
    carried: dict[str, Any]


def go_back(trainer: "Trainer", error: CollapseError, run: RunDir | None, progress: Progress) -> Return:
    """Choose what to go back to after a finding, in all processes alike.

    run: None in all but the main one.

    Raises TrainingError where TRAIN.ON_COLLAPSE, or the number of rollbacks, says that this is the end.
    """
    guard, most = trainer.guard, trainer.guard.settings.rollbacks
    done = len(guard.rollbacks)
    if guard.settings.on_collapse != "rollback" or done >= most:
        why = f"; it has gone back {done} times (TRAIN.WATCH.ROLLBACKS)" if done else ""
        raise TrainingError(f"{error}{why}" if error.kind == "finite" else f"{error}{why}; stopped{_kept(guard, run)}")

    # The main process looks through its files; the others read the one that it has chosen.
    path = choose_checkpoint(run, guard.rollbacks) if run is not None else None
    path = distributed.share(path, trainer.world)
    checkpoint = load_checkpoint(path) if path is not None else None
    if run is not None:
        run.last_is_good = path == run.last
    to = checkpoint["step"] if checkpoint else 0
    rollbacks = [*guard.rollbacks, Rollback(trainer.step, to, error.kind)]

    # The log has the finding already, unless it is a loss that is not finite.
    cause = f"{str(error).partition(';')[0]}: " if error.kind == "finite" else ""
    progress.warn(
        f"warning: step {trainer.step}: {cause}rollback {len(rollbacks)} of {most}, to step {to}"
        f"{f' ({path.name})' if path else ''}; all learning rates x {rate_factor(len(rollbacks)):g}, other noise and order"
    )

    # The minutes used and the best score stay; so does best.pth.
    watch = (checkpoint or {}).get("watch", {}) | {"rollbacks": [list(rollback) for rollback in rollbacks]}
    carried: dict[str, Any] = {"watch": watch, "seconds": distributed.share(trainer.budget.seconds, trainer.world)}
    if trainer.evaluation is not None:
        carried["evaluation"] = trainer.evaluation.state()
    return Return(checkpoint, carried)


def _kept(guard: Guard, run: RunDir | None) -> str:
    """Which checkpoint there is from before, for a training that ends."""
    try:
        path = choose_checkpoint(run, guard.rollbacks) if run is not None else None
    except TrainingError:
        path = None
    return f" (TRAIN.ON_COLLAPSE); the last good checkpoint is {path}" if path else " (TRAIN.ON_COLLAPSE)"
